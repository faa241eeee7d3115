"""Errors that a user can mend: one sentence that names the file or the id, and what to do."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
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
    """Let an uncaught error of this process be told, see `tell`."""

    def hook(kind, error, trace):
        if isinstance(error, Exception):
            tell(error, folder, lambda: sys.__excepthook__(kind, error, trace))
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def tell(error: Exception, folder: str | Path, show_traceback: Callable[[], None]) -> None:
    """Print the user's sentence, where an error has one, in place of its traceback.

    Any other error is shown with its traceback. Every traceback is also kept in the folder, in `error.txt`.
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
        show_traceback()
        print(f"This is a fault of the program, not of yours.{kept}", file=sys.stderr)
    else:
        print(f"\nerror: {message}{kept}", file=sys.stderr)
