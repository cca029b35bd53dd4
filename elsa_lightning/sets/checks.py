"""Checks of the arguments that users give to sets (shares, whole numbers, budgets), and budgets in bytes as counts."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeGuard

from elsa_lightning.errors import UserError


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_fraction(name: str, value: object, what: str) -> None:
    """Raise UserError unless a value is at least 0 and below 1.

    Args:
        name: Name of the argument.
        value: The value.
        what: What the argument stands for, such as ``a fraction of zeros``.
    """
    if not (is_number(value) and 0 <= value < 1):
        hint = f"; for {value:g} % give {value / 100:g}" if is_number(value) and 1 < value < 100 else ""
        raise UserError(f"{name} must be {what} in [0, 1), got {value!r}{hint}")


def check_whole(name: str, value: object, what: str) -> None:
    """Raise UserError unless a value is a whole number, 1 or more.

    Args:
        name: Name of the argument.
        value: The value.
        what: What the argument stands for, such as ``a number of outputs``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be {what}, 1 or more, got {value!r}")


def check_budget(what: str, fractions: str = "", **given: float | None) -> None:
    """Raise UserError unless each budget that is given is a number of 1 or more.

    Args:
        what: What is counted, such as ``weights``; arguments in bytes always count bytes.
        fractions: A hint for a number below 1.
        given: The budgets by name of the argument; names of those in bytes end in ``_bytes``.
    """
    for name, value in given.items():
        if value is not None and not (is_number(value) and value >= 1):
            of = "bytes" if name.endswith("_bytes") else what
            hint = f"; {fractions}" if fractions and is_number(value) else ""
            raise UserError(f"{name} must be a number of {of}, 1 or more, such as 30e6, got {value!r}{hint}")


def entries_of(
    keep: float | None, keep_bytes: float | None, sizes: Mapping[str, int], bytes_each: Mapping[str, float] | None
) -> float:
    """Return a budget, given as a number of entries or in bytes, as a number of entries.

    Args:
        keep: Number of entries, or None.
        keep_bytes: Bytes of the entries, or None.
        sizes: Entries of the tensors that share the budget, by name.
        bytes_each: Bytes of one entry of each tensor; None for 4. Where tensors differ, their mean counts.
    """
    if keep is not None or keep_bytes is None:
        return keep or 0.0
    total = sum(sizes.values())
    whole = 4.0 * total if bytes_each is None else sum(size * bytes_each[name] for name, size in sizes.items())
    return keep_bytes * total / whole
