"""Errors whose message is made for users: what was given, what is accepted, what to change.

The command line prints these in one line, and Lightning's ``MisconfigurationException`` and what it refuses when a run
is set up; any other exception is a fault and keeps its traceback.
"""

import sys


class UserError(ValueError):
    """Something given cannot be used; the message says what to change."""


class UnavailableError(UserError, FileNotFoundError):
    """A file, a model or a download that was named cannot be had."""


def for_users(error: BaseException | None) -> BaseException | None:
    """Return the error, or what it came of, if its message is made for users, so that a traceback would hide it."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # not loaded, it raised nothing
    kinds = (UserError,) if lightning is None else (UserError, lightning.MisconfigurationException)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
