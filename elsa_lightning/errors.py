"""Errors whose messages are written for users: what was given, what is accepted, what to change.

The command line prints them in one line, like Lightning's ``MisconfigurationException`` and its refusals when a run is
set up. Any other exception is a bug and keeps its traceback.
"""

import sys


class UserError(ValueError):
    """An argument or input cannot be used; the message says what to change."""


class UnavailableError(UserError, FileNotFoundError):
    """A file, a model or a download is not available."""


def for_users(error: BaseException | None) -> BaseException | None:
    """Return the error, or the first in its chain of causes, whose message is written for users; None without one."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # if not loaded, it raised nothing
    kinds = (UserError,) if lightning is None else (UserError, lightning.MisconfigurationException)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
