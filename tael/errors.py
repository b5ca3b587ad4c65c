"""Errors that a user can act on."""


class TaelError(Exception):
    """A fault outside the program: a bad file, a missing model, a budget too small.

    The message is one line that says what happened and what to do. The command line prints
    it and exits with code 2; the Python API raises it. Programming errors raise ordinary
    exceptions instead.
    """


class LostBlocksError(TaelError):
    """KV blocks could not be written to disk or read back."""
