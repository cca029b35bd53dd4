"""The argument parser of commands without a Trainer; imports nothing heavy, so that their help appears at once."""

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
        others: Whether unknown options are passed on to another parser, which checks them.
        kwargs: Passed to :class:`argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, *, others: bool = False, **kwargs: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **kwargs)
        self._others = others

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report mistyped options first: argparse may report a missing argument instead."""
        for argument in () if self._others else args or ():
            word = argument.partition("=")[0]
            if word.startswith("--") and len(word) > 2 and word not in self._option_string_actions:
                near = nearest(word, self._option_string_actions)
                self.error(f"unrecognized argument: {word}" + (f"; did you mean {near}?" if near else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stderr.write(f"elsa: error: {message} (see {self.prog} --help)\n")
        sys.exit(2)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to a word, or None if none is similar."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)
