"""Errors that a user can mend: one sentence that names the file or the id, and what to do."""

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path


class BadInput(ValueError):
    """Something given by the user is wrong; the message is one sentence that names it and the remedy."""

    def __init__(self, message: str) -> None:
        # On one line: a DataLoader's worker passes an error on as the text of its traceback.
        super().__init__(" ".join(str(message).split()))


def user_message(error: BaseException) -> str | None:
    """Return the sentence of the `BadInput` that caused an error; None for any other error, which is a fault of ours.

    MONAI raises what a transform or a component raises again, as a `RuntimeError` with a cause. A DataLoader's worker
    sends nothing but the text of the traceback.
    """
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == BadInput.__name__:  # a bundle may carry a `custom` of its own
            return str(cause)
        if "in DataLoader worker process" in str(cause):
            # An error that came up while a `BadInput` was handled is not the user's.
            last = str(cause).split("During handling of the above exception")[-1]
            found = re.search(r"^(?:\w+\.)*BadInput: (.+)", last, re.MULTILINE)
            return found and found[1]
        cause = cause.__cause__
    return None


def report_errors(folder: str | Path) -> None:
    """Let an uncaught error of this process be told, see `tell`; one that is no user's with its traceback."""

    def hook(kind, error, trace):
        if not (isinstance(error, Exception) and tell(error, folder)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def tell(error: BaseException, folder: str | Path) -> bool:
    """Keep an error's traceback in a folder, in `error.txt`, and print the user's sentence.

    Returns:
        Whether there is such a sentence; if not, the error is called a fault of the program.
    """
    rank = int(os.environ.get("RANK", "0"))
    file = Path(folder, f"error_rank={rank}.txt" if rank else "error.txt")
    kept = ""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
        kept = f" (The traceback is kept in {file}.)"
    message = user_message(error)
    if message is None:
        print(f"This is a fault of the program, not of yours.{kept}", file=sys.stderr)
    else:
        print(f"\nerror: {message}{kept}", file=sys.stderr)
    return message is not None
