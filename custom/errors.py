"""Errors that a user can mend: one sentence that names the file or the id, and what to do."""

import logging
import re
import sys
import traceback


class BadInput(ValueError):
    """Something given by the user is wrong; the message is one sentence that names it and the mend."""

    def __init__(self, message: str) -> None:
        # On one line: DataLoader workers and MONAI's wrappers pass an error on as the text of its traceback.
        super().__init__(" ".join(str(message).split()))


def sentence(error: BaseException) -> str | None:
    """Return the sentence of the `BadInput` among the causes of an error, None if there is none.

    An argument that a component does not have counts as one.

    MONAI re-raises what a transform or a component raises as a `RuntimeError`, and a DataLoader worker sends nothing
    but text; so the sentence is looked for in the text of the whole traceback.
    """
    text = "".join(traceback.format_exception(error))
    found = re.search(r"BadInput: (?!Caught )(.+)|TypeError: (.+ got an unexpected keyword argument .+)", text)
    return found and (found[1] or found[2])


def speak_plainly() -> None:
    """Let an uncaught error of the process print its `BadInput` sentence alone instead of a traceback."""

    def hook(kind, error, trace):
        message = sentence(error)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(f"\nerror: {message}", file=sys.stderr)

    sys.excepthook = hook
    for handler in logging.getLogger().handlers:
        # Ignite logs a worker's whole traceback before it passes the error on.
        handler.addFilter(lambda record: "BadInput: " not in record.getMessage())
