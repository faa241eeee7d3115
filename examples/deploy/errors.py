"""Errors that a user can mend."""


class BadInput(ValueError):
    """Something given by the user is wrong; the message is one sentence that names it and the mend."""
