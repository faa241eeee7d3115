"""Errors that a user can mend: one sentence that names the file or the id, and what to do."""

import re
import sys
import traceback


class BadInput(ValueError):
    """Something given by the user is wrong; the message is one sentence that names it and the mend."""

    def __init__(self, message: str) -> None:
        # On one line: DataLoader workers and MONAI's wrappers pass an error on as the text of its traceback.
        super().__init__(" ".join(str(message).split()))


def sentence(error: BaseException) -> str | None:
    """Return the sentence of the last `BadInput` among the causes of an error, None if there is none.

    MONAI re-raises what a transform or a component raises as a `RuntimeError`, and a DataLoader worker sends nothing
    but text; so the sentence is looked for in the text of the whole traceback.
    """
    # torch puts quotation marks round a message only when it is a KeyError, so the line's end is the message's end.
    found = re.findall(r"BadInput: (?!.*Caught BadInput)(.+)", "".join(traceback.format_exception(error)))
    return found[0] if found else None


def speak_plainly() -> None:
    """Let an uncaught error of the process print its `BadInput` sentence alone instead of a traceback."""

    def hook(kind, error, trace):
        message = sentence(error)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(f"\nerror: {message}", file=sys.stderr)

    sys.excepthook = hook
