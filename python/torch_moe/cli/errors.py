"""Errors that end the command with a message and an exit code, without a traceback."""


class UsageError(Exception):
    """Options that cannot work together or on this machine: exit code 2."""


class WrongResult(Exception):
    """A candidate's result differs from the reference: exit code 1, and no time is reported."""
