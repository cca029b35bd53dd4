"""Different sets for different tensors in one run, chosen by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.sets.base import Constraint, Point, Points, check_set


@dataclass(frozen=True)
class ByPattern(Constraint):
    """Each tensor gets the set of the first pattern that its name matches; each set decides about its tensors alone.

    Args:
        sets: Sets by regular expression, which is searched for in names of parameters: ``{"attn": NM(2, 4), "mlp":
            Unstructured(0.9)}``. Tensors that no pattern matches stay dense.

    Raises:
        UserError: A pattern is no regular expression, or there is none.
    """

    sets: dict[str, Constraint]

    def __post_init__(self) -> None:
        if not isinstance(self.sets, Mapping) or not self.sets:
            given = "is empty" if self.sets in ({}, None) else f"is {self.sets!r}"
            raise UserError(f"sets {given}: give sets by pattern, such as {{'attn': ..., 'mlp': ...}}")
        for pattern, each in self.sets.items():
            check_set(each, f"sets[{pattern!r}]")
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise UserError(f"sets: {pattern!r} is no regular expression: {error}") from None
        object.__setattr__(self, "fixes_values", any(each.fixes_values for each in self.sets.values()))

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.sets if re.search(pattern, name)), None)

    def _of(self, name: str) -> Constraint:
        pattern = self._pattern(name)
        if pattern is None:
            raise UserError(
                f"no pattern of {list(self.sets)} matches {name!r}, which is constrained: add one, or ignore it"
            )
        return self.sets[pattern]

    def _shapes(self, pattern: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        return {name: shape for name, shape in shapes.items() if self._pattern(name) == pattern}

    def covers(self, name: str) -> bool:
        """Return whether a pattern matches and its set can put zeros there."""
        pattern = self._pattern(name)
        return pattern is not None and self.sets[pattern].covers(name)

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return the grain of the tensor's set."""
        return self._of(name).grain_of(name)

    def shared(self, name: str) -> tuple[int, int] | None:
        """Return the rows × columns for which the tensor's set chooses one number."""
        return self._of(name).shared(name)

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError if a pattern matches nothing, or a set is not possible for its tensors."""
        for name in shapes:
            self._of(name)
        for pattern, each in self.sets.items():
            mine = self._shapes(pattern, shapes)
            if not mine:
                raise UserError(
                    f"sets: {pattern!r} is the first match of no constrained tensor; these are {list(shapes)[:3]}..."
                )
            each.check(mine, transposed)

    def fitted(self, model: nn.Module) -> ByPattern:
        """Fit each set."""
        return replace(self, sets={pattern: each.fitted(model) for pattern, each in self.sets.items()})

    def sized(self, shapes: Mapping[str, torch.Size], bytes_each: Mapping[str, float] | None = None) -> ByPattern:
        """Size each set by its own tensors."""
        return replace(self, sets={p: each.sized(self._shapes(p, shapes), bytes_each) for p, each in self.sets.items()})

    def relaxed(self, tightness: float) -> ByPattern:
        """Relax each set."""
        return replace(self, sets={pattern: each.relaxed(tightness) for pattern, each in self.sets.items()})

    def members(self, names: Sequence[str]) -> list[tuple[Constraint, list[int]]]:
        """Return each set with its tensors, in the order of the patterns."""
        found = []
        for pattern, each in self.sets.items():
            indices = [index for index, name in enumerate(names) if self._pattern(name) == pattern]
            inner = each.members([names[index] for index in indices]) if indices else []
            found += [(member, [indices[i] for i in inside]) for member, inside in inner]
        return found

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of each set, in the order of the points."""
        masks: dict[int, list[Tensor]] = {}
        for member, indices in self.members(points.names):
            mine = points.only(indices)
            for point, mask in zip(mine, member.support(mine), strict=True):
                masks.setdefault(indices[point.tensor], []).append(mask)
        for point in points:
            yield masks[point.tensor].pop(0)

    def fit(self, v: Tensor, point: Point) -> Tensor:
        """Return the numbers of the tensor's set."""
        return self._of(point.name).fit(v, point)

    def resolution(self, point: Point) -> Tensor | None:
        """Return the distance of neighbouring values in the tensor's set."""
        return self._of(point.name).resolution(point)

    def values(self, v: Tensor, point: Point) -> Tensor:
        """Return the values that kept entries take in the tensor's set."""
        each = self._of(point.name)
        return each.values(v, point) if each.fixes_values else v
