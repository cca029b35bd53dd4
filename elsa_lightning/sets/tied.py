"""Base of structured sets: entries of several tensors, such as those of a neuron, are kept or cut together."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import exact_dtype
from elsa_lightning.sets.base import Constraint, Point, Points


class Member(NamedTuple):
    """How the entries of one tensor belong to units: an index along ``axis`` is of unit ``first + index // entries``.

    Attributes:
        name: Name of the tensor.
        axis: The axis of the index: 0 for rows, 1 for columns, 2 for the matrices of a stack.
        entries: How many indices belong to one unit.
        first: Unit of index 0; if ``entries`` is the size of the axis, the whole tensor belongs to this unit.
    """

    name: str
    axis: int
    entries: int = 1
    first: int = 0


class Tie(NamedTuple):
    """Units that compete with each other, such as the neurons of one layer.

    Attributes:
        units: Number of units.
        kept: Number of units that survive.
        members: The tensors that hold the units' entries.
    """

    units: int
    kept: int
    members: tuple[Member, ...]


class Tied(Constraint):
    """A set that keeps or cuts whole units.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over z with only ``kept`` non-zero units in each tie: it keeps the units
    with the largest Σ Fᵢ vᵢ² over their entries in all members; ties in score go to the lower unit. An entry that
    belongs to units of several ties stays if all of these do; an entry of no unit stays. Processes exchange one number
    a unit.

    Scores of units are sums over many entries and lie close together, so their order near the border changes often, and
    each exchange removes a whole unit to which the others had adapted. Hence the inertia: during a run a cut unit
    returns only if its dual is twice the size of a unit that is kept.
    """

    inertia = 1.0
    decides_at_once = True

    @abstractmethod
    def ties(self, shapes: Mapping[str, torch.Size]) -> list[Tie]:
        """Return the ties among tensors of these names and shapes.

        Raises:
            ValueError: These tensors have no ties.
        """

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError if a tie names unconstrained tensors, or does not fit its tensors or its number of units."""
        super().check(shapes, transposed)
        for tie in self.ties(shapes):
            if not 0 < tie.kept <= tie.units:
                raise UserError(f"{tie.members[0].name}: {tie.kept} of {tie.units} units cannot be kept")
            if missing := [member.name for member in tie.members if member.name not in shapes]:
                others = [member.name for member in tie.members if member.name in shapes]
                tied = f"is tied to {others[0]} and" if others else f"has units that {type(self).__name__} removes and"
                raise UserError(
                    f"{missing[0]} {tied} is not constrained: train it (requires_grad), and do not leave it out by "
                    f"targets, ignore or a pattern"
                )
            for name, axis, entries, first in tie.members:
                size = math.prod(shapes[name][:-2]) if axis == 2 else shapes[name][axis - 2]
                if first + (size - 1) // entries >= tie.units or (entries <= size and size % entries):
                    raise UserError(
                        f"{name} of shape {tuple(shapes[name])} has {size} along axis {axis}, which are no "
                        f"{tie.units - first} units of {entries}"
                    )

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of the units that survive."""
        ties = self.ties(dict(zip(points.names, points.shapes, strict=True)))
        members: dict[str, list[tuple[int, Member]]] = {name: [] for name in points.names}
        for index, tie in enumerate(ties):
            for member in tie.members:
                members[member.name].append((index, member))
        exact = exact_dtype(points.device)
        costs = [torch.zeros(tie.units, dtype=exact, device=points.device) for tie in ties]
        for point in points:
            if point.part.counts:
                cost = point.v.to(exact).square()
                cost = cost if point.importance is None else cost * point.importance
                for index, member in members[points.names[point.tensor]]:
                    units = _units(point, member)
                    sums = cost.sum_to_size(units.shape)  # whole rows or columns belong to one unit
                    costs[index].index_put_((units.flatten(),), sums.flatten(), accumulate=True)  # deterministic
        joined = torch.split(points.add(torch.cat(costs)), [tie.units for tie in ties])
        stays = []
        for tie, cost in zip(ties, joined, strict=True):
            order = cost.argsort(descending=True, stable=True)
            stays.append(torch.zeros_like(cost, dtype=torch.bool).index_fill(0, order[: tie.kept], True))
        for point in points:
            mask = torch.ones_like(point.v, dtype=torch.bool)
            for index, member in members[points.names[point.tensor]]:
                mask &= stays[index][_units(point, member)]
            yield mask


def _units(point: Point, member: Member) -> Tensor:
    """Return the unit of each entry, int64, broadcastable to the shape of ``point.v``."""
    return point.place(member.axis) // member.entries + member.first
