"""Errors that commands show to the user."""


class UserError(RuntimeError):
    """Something that the user can correct; a command prints the message without a traceback."""
