"""Advice about matrices that stay dense although the user did not ask for it, with patterns to constrain or ignore."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elsa_lightning.selection import Selection

_SHOWN = 5


def advice(selection: Selection, tolerated: float) -> list[str]:
    """Return lines of advice; following its patterns leaves at most the tolerated share unaccounted for.

    Args:
        selection: The constrained parameters, and those left out.
        tolerated: Share of the matrices that may be left out silently.
    """
    kinds = {"left out": selection.left_out, "frozen": selection.frozen, "computed": selection.computed}
    missing = sum(sum(sizes.values()) for sizes in kinds.values())
    matrices = missing + selection.constrained
    guessed = _guessed(selection) if selection.guessed > selection.constrained else []
    if missing <= tolerated * matrices:
        return guessed
    groups = sorted(
        ((sum(sizes[name] for name in names), kind, names) for kind, sizes in kinds.items() for names in _alike(sizes)),
        key=lambda group: -group[0],
    )
    shown = "\n".join(f"    {_starred(names[0])}  ({size:,} parameters)" for size, _, names in groups[:_SHOWN])
    rest, patterns = missing, {kind: list[str]() for kind in kinds}
    for size, kind, names in groups:
        if rest > tolerated * (rest + selection.constrained):  # even if all groups so far are ignored
            allowed = {*selection.frozen, *(selection.left_out if kind == "left out" else selection.computed)}
            patterns[kind].append(pattern(names, set(selection.names) - allowed))
            rest -= size
    lines = [
        f"LOW COVERAGE: {missing:,} of the {matrices:,} parameters in matrices are NOT constrained and stay dense. The "
        f"largest:\n{shown}"
    ]
    if found := patterns["left out"]:
        lines.append(
            f"  Constrain them by name: targets=[{_quoted([*selection.targets, *found])}]; or say that dense is meant: "
            f"ignore=[{_quoted(found)}]."
        )
    if found := patterns["frozen"]:
        lines.append(
            f"  Frozen ones (requires_grad False) are never constrained: nothing would train what is left of them. "
            f"Unfreeze them, or say that dense is meant: ignore=[{_quoted(found)}]."
        )
    if found := patterns["computed"]:
        lines.append(
            f"  Weights that a parametrization computes (weight_norm, spectral_norm) are not constrained: zeros of "
            f"what they are computed from are none of the weights, or break them. Remove it "
            f"(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm), or say that "
            f"dense is meant: ignore=[{_quoted(found)}]."
        )
    return lines + guessed


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Group names that differ only in their numbers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_starred(name), []).append(name)
    return list(groups.values())


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _guessed(selection: Selection) -> list[str]:
    names = [name for name, told in selection.heads.items() if told == "shape"]
    targets = [*selection.targets, *(pattern([name], set(selection.names) - {name}) for name in names)]
    return [
        f"  {names[0]} ({selection.guessed:,} parameters) has an embedding's shape, is taken for the output layer and "
        f"stays dense. If it is a hidden layer, give targets=[{_quoted(targets)}]; else ignore=["
        f"{_quoted(targets[len(selection.targets) :])}] says that dense is meant."
    ]


def _quoted(patterns: Iterable[str]) -> str:
    return ", ".join(f"'{pattern}'" for pattern in patterns)


def pattern(names: list[str], others: Collection[str]) -> str:
    """Return a regular expression that matches names which differ only in their numbers, and none of the others."""
    pieces = re.split(r"\d+", names[0])
    numbers = list(zip(*(re.findall(r"\d+", name) for name in names), strict=True))
    listed = [("({})" if len(set(ns)) > 1 else "{}").format("|".join(dict.fromkeys(ns))) for ns in numbers]

    def joined(between: Iterable[str]) -> str:
        parts = itertools.zip_longest(map(re.escape, pieces), between, fillvalue="")
        return "".join(itertools.chain.from_iterable(parts)) + "$"

    candidates = [joined([r"\d+"] * len(numbers)), joined(listed)]
    for candidate in [*candidates, *(f"^{candidate}" for candidate in candidates)]:
        if not any(re.search(candidate, other) for other in others):
            return candidate
    return f"^({'|'.join(map(re.escape, names))})$"
