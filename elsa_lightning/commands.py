"""What the commands without a Trainer have in common; loads nothing heavy, so that their help comes at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations.

    Args:
        prog: Name of the command, such as ``elsa export``.
        kwargs: Passed to :class:`argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print one line, with what an unknown option was probably meant to be, and exit with status 2."""
        start, _, unknown = message.partition("unrecognized arguments: ")
        if not start and (near := nearest(unknown.split()[0].partition("=")[0], self._option_string_actions)):
            message = f"unrecognized argument: {unknown}; did you mean {near}?"
        sys.stderr.write(f"elsa: error: {message} (see {self.prog} --help)\n")
        sys.exit(2)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like one, or None if none is."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)
