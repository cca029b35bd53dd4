"""Errors whose message is made for users: what was given, what is accepted, what to change.

The command line prints these, and Lightning's ``MisconfigurationException``, in one line; any other exception is a
fault and keeps its traceback.
"""


class UserError(ValueError):
    """Something given cannot be used; the message says what to change."""


class UnavailableError(UserError, FileNotFoundError):
    """A file, a model or a download that was named cannot be had."""
