"""Scores of a model, and their differences from another model's, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["paired", "independent"]


@dataclass(frozen=True)
class Score:
    """One figure of one model.

    Attributes:
        name: Name of the task or text.
        metric: ``acc``, ``acc_norm``, ``perplexity`` and the like.
        value: The figure.
        error: Its standard error over items; None if unknown.
        count: Number of items (questions, or segments of text).
        parts: Contribution of each item: the figure changes by the mean of their changes; empty if it is not a mean
            over items. Keys identify the same item in another model's score.
        protocol: Description of the measurement: items, length, examples, BOS.
    """

    name: str
    metric: str
    value: float
    error: float | None
    count: int
    parts: Mapping[Hashable, float] = field(default_factory=dict, repr=False)
    protocol: str = ""


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of another.

    Attributes:
        value: The difference.
        error: Its standard error; None where one of the figures has none.
        how: ``paired``: the error is that of the differences item by item, since both models had the same items.
            ``independent``: it is the root of the summed squares of both errors, which is too large if the models agree
            on most items.
    """

    value: float
    error: float | None
    how: How


def mean_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, or None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def difference(sparse: Score, dense: Score) -> Difference:
    """Return the difference of a model's figure from the same figure of another model."""
    value = sparse.value - dense.value
    if len(sparse.parts) > 1 and sparse.parts.keys() == dense.parts.keys():
        return Difference(value, mean_error([part - dense.parts[key] for key, part in sparse.parts.items()]), "paired")
    errors = (sparse.error, dense.error)
    return Difference(value, None if None in errors else math.hypot(*map(float, filter(None, errors))), "independent")


def average(scores: Sequence[Score], metric: str) -> Score | None:
    """Return the unweighted mean over several tasks, or None for fewer than two."""
    chosen = [score for score in scores if score.metric == metric]
    if len(chosen) < 2:
        return None
    errors = [score.error for score in chosen]
    error = None if None in errors else math.hypot(*map(float, filter(None, errors))) / len(chosen)
    value = math.fsum(score.value for score in chosen) / len(chosen)
    return Score(f"mean of {len(chosen)}", metric, value, error, sum(score.count for score in chosen))


def _rows(sparse: Sequence[Score], dense: Sequence[Score]) -> list[tuple[Score, Score | None, Difference | None]]:
    found = {(score.name, score.metric): score for score in dense}
    rows: list[tuple[Score, Score | None, Difference | None]] = []
    for score in sparse:
        other = found.get((score.name, score.metric))
        rows.append((score, other, None if other is None else difference(score, other)))
    for metric in ("acc", "acc_norm"):
        mean = average(sparse, metric)
        if mean is None:
            continue
        single = [row for row in rows if row[0].metric == metric]
        others = [other for _, other, _ in single if other is not None]
        mean_dense = average(others, metric) if len(others) == len(single) else None
        rows.append((mean, mean_dense, None if mean_dense is None else _mean_of([row[2] for row in single])))
    return rows


def _mean_of(differences: Sequence[Difference | None]) -> Difference:
    """Return the mean of differences over tasks, whose errors are independent."""
    known = [d for d in differences if d is not None]
    errors = [d.error for d in known]
    error = None if None in errors else math.hypot(*map(float, filter(None, errors))) / len(known)
    how: How = "paired" if all(d.how == "paired" for d in known) else "independent"
    return Difference(math.fsum(d.value for d in known) / len(known), error, how)


def to_dict(sparse: Sequence[Score], dense: Sequence[Score] = ()) -> list[dict[str, Any]]:
    """Return rows for machines: every figure with its error, count and protocol, and the differences."""
    rows = []
    for score, other, by in _rows(sparse, dense):
        row: dict[str, Any] = {"name": score.name, "metric": score.metric, "count": score.count}
        row |= {"protocol": score.protocol} if score.protocol else {}
        row["value"], row["error"] = score.value, score.error
        if other is not None and by is not None:
            row["dense"] = {"value": other.value, "error": other.error}
            row["difference"] = {"value": by.value, "error": by.error, "how": by.how}
        rows.append(row)
    return rows


def table(sparse: Sequence[Score], dense: Sequence[Score] = ()) -> str:
    """Return the figures side by side, and below how they were measured."""
    rows = _rows(sparse, dense)
    width = max((len(score.name) for score, *_ in rows), default=4)
    head = f"{'':{width}}  {'':10}  {'items':>6}"
    lines = [head + (f"  {'dense':>17}  {'sparse':>17}  {'difference':>18}" if dense else f"  {'':>17}")]
    for score, other, by in rows:
        line = f"{score.name:{width}}  {score.metric:10}  {score.count:>6}"
        if dense:
            line += f"  {_number(other):>17}"
        line += f"  {_number(score):>17}"
        if dense:
            mark = "*" if by is not None and by.how == "independent" else ""
            line += f"  {_number(by, signed=True) + mark:>18}"
        lines.append(line.rstrip())
    hows = {by.how for *_, by in rows if by is not None}
    if "paired" in hows:
        lines.append("± is one standard error; that of a difference is of the differences item by item (paired)")
    elif rows:
        lines.append("± is one standard error")
    if "independent" in hows:
        lines.append("* not paired: the root of the summed squares of both errors")
    told: dict[str, list[str]] = {}
    for score in sparse:
        names = told.setdefault(score.protocol, []) if score.protocol else []
        names += [] if score.name in names else [score.name]
    lines += [f"{', '.join(names)}: {protocol}" for protocol, names in told.items()]
    return "\n".join(lines)


def _number(found: Score | Difference | None, signed: bool = False) -> str:
    if found is None:
        return "–"
    places = 4 if abs(found.value) < 2 else 3 if abs(found.value) < 1000 else 1
    error = "" if found.error is None else f" ± {found.error:.{places}f}"
    return f"{found.value:{'+' if signed else ''}.{places}f}{error}"
