"""What a user gives to a set: shares, whole numbers, and a budget, in numbers or in bytes, that becomes a count."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeGuard

from elsa_lightning.errors import UserError


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_fraction(name: str, value: object, what: str) -> None:
    """Raise UserError unless a value is at least 0 and below 1.

    Args:
        name: Of the argument.
        value: What was given.
        what: Of what it must be, such as ``a fraction of zeros``.
    """
    if not (is_number(value) and 0 <= value < 1):
        hint = f"; for {value:g} % give {value / 100:g}" if is_number(value) and 1 < value < 100 else ""
        raise UserError(f"{name} must be {what} in [0, 1), got {value!r}{hint}")


def check_whole(name: str, value: object, what: str) -> None:
    """Raise UserError unless a value is a whole number, 1 or more.

    Args:
        name: Of the argument.
        value: What was given.
        what: It must be, such as ``a number of outputs``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be {what}, 1 or more, got {value!r}")


def check_budget(what: str, fractions: str = "", **given: float | None) -> None:
    """Raise UserError unless a number is 1 or more, where it is given.

    Args:
        what: It is a number of, such as ``weights``; of arguments in bytes it is bytes.
        fractions: What a number below 1 was meant to be.
        given: By the argument's name, those in bytes end in ``_bytes``.
    """
    for name, value in given.items():
        if value is not None and not (is_number(value) and value >= 1):
            of = "bytes" if name.endswith("_bytes") else what
            hint = f"; {fractions}" if fractions and is_number(value) else ""
            raise UserError(f"{name} must be a number of {of}, 1 or more, such as 30e6, got {value!r}{hint}")


def entries_of(
    keep: float | None, keep_bytes: float | None, sizes: Mapping[str, int], bytes_each: Mapping[str, float] | None
) -> float:
    """Return how many entries a budget is, which is given as their number or as their bytes.

    Args:
        keep: Their number, or None.
        keep_bytes: Bytes that they take, or None.
        sizes: Entries of the tensors that share the budget, by name.
        bytes_each: Of one entry of each tensor; None for 4. Where they differ, their mean counts.
    """
    if keep is not None or keep_bytes is None:
        return keep or 0.0
    total = sum(sizes.values())
    whole = 4.0 * total if bytes_each is None else sum(size * bytes_each[name] for name, size in sizes.items())
    return keep_bytes * total / whole
