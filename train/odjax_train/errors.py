"""Errors that a person can correct."""


class UserError(Exception):
    """A mistake a person can correct; the message is one line that names the flag, file or path at fault.

    The command line prints the message alone, without a traceback.
    """
