"""The text that comes with every CPython: language reference topics, docstrings, standard-library sources.

About 12 MB of English and Python that need no network, so that the embedded model, the demo and the tests
run anywhere. The text differs slightly between Python versions.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

VERSION = 1  # increased when the choice of documents changes, so that cached tokens are made anew

# Tables and test suites are not prose or code that a language model should spend its capacity on;
# pydoc_data holds the topics, which are documents of their own.
_SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"}
)


def documents(split: Split) -> Iterator[str]:
    """Yield the documents of one split, in a fixed order.

    A document belongs to a split by a hash of its name: 5 % validation, 5 % test, the rest train.

    Args:
        split: The split.

    Yields:
        The text of one document: a topic, a built-in module's docstrings or a source file.
    """
    for name, text in _all_documents():
        if _split_of(name) == split and text.strip():
            yield text


def _split_of(name: str) -> Split:
    bucket = hashlib.sha256(name.encode()).digest()[0]
    return "validation" if bucket < 13 else "test" if bucket < 26 else "train"


def _all_documents() -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield f"topic:{topic}", topics[topic]
    for module in sorted(sys.builtin_module_names):
        yield f"builtin:{module}", _docstrings(module)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_DIRS.intersection(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield f"source:{relative.as_posix()}", path.read_text(encoding="utf-8", errors="ignore")


def _docstrings(module: str) -> str:
    """Return the docstrings of a module written in C, with one paragraph for each member."""
    namespace = importlib.import_module(module)
    parts = [inspect.getdoc(namespace) or ""]
    for name, member in sorted(vars(namespace).items()):
        if name.startswith("_") or not callable(member):
            continue
        parts.append(f"{name}\n{inspect.getdoc(member) or ''}")
        if inspect.isclass(member):
            parts += [
                f"{name}.{attribute}\n{doc}"
                for attribute, value in sorted(vars(member).items())
                if not attribute.startswith("_") and (doc := inspect.getdoc(value))
            ]
    return "\n\n".join(part for part in parts if part.strip())
