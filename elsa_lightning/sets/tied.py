"""Entries that stay or go together, across tensors: a neuron, a head, a layer, an expert."""

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
    """How the entries of one tensor belong to units: unit ``first + index // entries``.

    Attributes:
        name: Of the tensor.
        axis: What the index counts: 0 rows, 1 columns, 2 the matrices of a stack.
        entries: How many of them one unit has.
        first: Unit of the first one; with ``entries`` as many as there are, the whole tensor is of this unit.
    """

    name: str
    axis: int
    entries: int = 1
    first: int = 0


class Tie(NamedTuple):
    """Units that compete with each other, such as the neurons of one layer.

    Attributes:
        units: How many there are.
        kept: How many survive.
        members: The tensors that hold their entries.
    """

    units: int
    kept: int
    members: tuple[Member, ...]


class Tied(Constraint):
    """A set that keeps or cuts whole units.

    Its projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over z whose units are zero but for ``kept`` of each tie: it keeps those
    with the largest Σ Fᵢ vᵢ² over their entries in all members; equal ones go to the lower unit. An entry of units of
    several ties stays if all of them do, an entry of none stays. Processes exchange one number a unit.

    Scores of units are sums over many entries and lie close together, so that those next to the border are soon in
    another order, and each exchange takes out a whole unit that the others had adapted to. Hence the inertia: in a run
    a unit that was cut returns when it remembers twice the size of one that is kept.
    """

    inertia = 1.0
    decides_at_once = True

    @abstractmethod
    def ties(self, shapes: Mapping[str, torch.Size]) -> list[Tie]:
        """Return the ties among tensors of these names and shapes.

        Raises:
            ValueError: They have none.
        """

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError if a tie names tensors that are not constrained, or keeps more than it has."""
        super().check(shapes, transposed)
        for tie in self.ties(shapes):
            if not 0 < tie.kept <= tie.units:
                raise UserError(f"{tie.members[0].name}: {tie.kept} of {tie.units} units cannot be kept")
            if missing := [member.name for member in tie.members if member.name not in shapes]:
                raise UserError(f"{missing[0]} is tied to {tie.members[0].name} and is not constrained: add a target")
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
                    sums = cost.sum_to_size(units.shape)  # of whole rows or columns, where these are of one unit
                    costs[index].index_put_((units.flatten(),), sums.flatten(), accumulate=True)  # in one order
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
