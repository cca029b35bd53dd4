"""One-line error messages for unreadable arguments of the command line, with a suggestion of what was meant."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from elsa_lightning.lm.data import CalibrationData

_UNKNOWN = re.compile(
    r"unrecognized arguments: (\S+)|(?:Option|Key) '([^']+)' is not (?:accepted|expected)|not accept option '([^']+)'"
)
_INVALID = re.compile(r'Parser key "([^"]+)":\s+(Expected .*? Got value: .*)')
_PROBLEM = re.compile(  # the innermost class with a problem
    r"Problem with given class_path '([^']+)': (?!Parser key \"[^\"]+\": Does not)"
    r"(.*?)(?= - (?:Expected|Not a)| Given |$)"
)
_NO_OBJECT = re.compile(
    r'.*Parser key "([^"]+)": .*?(?:Not a valid subclass of|Unexpected import path format).*?Given value: (\S+)'
)
_ALIKE, _ALIKE_AS_A_WHOLE = 0.75, 0.9  # least similarity of the last part of an option, and of all of it


class OneLineParser(LightningArgumentParser):
    """Lightning's parser, with one-line errors instead of the usage of all options."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse arguments; values in Python's notation, such as None for null, are accepted too.

        jsonargparse passes arguments of nested objects from parser to parser as text in that notation.
        """
        return super().parse_args(args and [_reread(argument) for argument in args], *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2; with ``JSONARGPARSE_DEBUG``, or called from code, raise instead."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"elsa: error: {explain(message, parser._option_string_actions)} (see {program} --help)\n")
        sys.exit(2)


def _reread(argument: Any) -> Any:
    """Return ``--name=None``, and lists and dictionaries in Python's notation, as YAML."""
    name, equals, value = str(argument).partition("=")
    if not (isinstance(argument, str) and equals and value.startswith(("None", "[", "{"))):
        return argument
    try:
        return f"{name}={json.dumps(ast.literal_eval(value))}"
    except (ValueError, SyntaxError, TypeError):  # not in Python's notation
        return argument


def explain(message: str, options: Iterable[str]) -> str:
    """Return a parser's message in one line, and for an unknown argument the most similar known one.

    Args:
        message: The message of jsonargparse.
        options: Every option, such as ``--trainer.max_steps``.
    """
    place = re.search(r'Parser key "([^"]+)"', message)
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        if (invalid := _INVALID.search(message)) and place:  # the innermost of several attempts
            name = invalid[1] if invalid.start() == place.start() else f"{place[1]}.{invalid[1]}"
            return f"{name}: {invalid[2]}"
        flat = " ".join(message.split())
        if problem := _PROBLEM.search(flat):
            return f"{problem[1]}: {problem[2]}"
        if wrong := _NO_OBJECT.search(flat.partition(" - Not a valid subclass of Callback")[0]):
            return f"{wrong[1]}: Expected a class_path and its init_args. Got value: {wrong[2]}"
        return flat
    word = next(filter(None, unknown.groups())).partition("=")[0]
    given = f"{place[1]}.{word}" if place and unknown[2] and not word.startswith(place[1]) else word
    data = (f"--data.{name}" for name in inspect.signature(CalibrationData).parameters)
    near = _nearest(given, {*options, *data})
    return f"unrecognized argument: {given}" + (f"; did you mean {near}?" if near else "")


def _nearest(word: str, options: set[str]) -> str | None:
    """Return the option most similar to a word, as a whole and in its last part, or None."""

    def likeness(option: str) -> tuple[float, float]:
        whole, last = (
            SequenceMatcher(None, a.lstrip("-"), b.lstrip("-")).ratio()
            for a, b in ((word, option), (word.rpartition(".")[2], option.rpartition(".")[2]))
        )
        return (last, whole) if last >= _ALIKE else (0.0, whole if whole >= _ALIKE_AS_A_WHOLE else 0.0)

    best = max(sorted(options), key=likeness)
    return best if any(likeness(best)) else None
