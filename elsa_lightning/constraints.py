"""The sets S that weights are constrained to: values that YAML can build."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from elsa_lightning.projections import unstructured


class Point(NamedTuple):
    """What is projected: one constrained tensor at its current place.

    Attributes:
        name: The parameter's name.
        v: x + u, ``(out, in)`` or ``(experts, out, in)``.
        importance: F̂ of the shape of ``v``, or None where the optimizer keeps no second moment.
    """

    name: str
    v: Tensor
    importance: Tensor | None


class Constraint(ABC):
    """A set S over all constrained tensors together.

    A new set is a frozen dataclass with these methods and a function in ``projections``.
    """

    @abstractmethod
    def relaxed(self, tightness: float) -> Constraint:
        """Return the looser set on the way to this one: everything at 0, this set at 1."""

    @abstractmethod
    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError if a tensor of this shape cannot be in the set."""

    @abstractmethod
    def project(self, points: Iterable[Point]) -> Iterator[Tensor]:
        """Yield the mask of Π_S of each point, in order.

        ``points`` may be iterated more than once and makes its tensors anew each time: a set that decides
        tensor by tensor looks at one at a time, and one with a common budget goes through them twice.
        """


@dataclass(frozen=True)
class Unstructured(Constraint):
    """At most (1 − sparsity) · n non-zeros in each tensor of n entries (in each expert of a fused tensor).

    Args:
        sparsity: Fraction of zeros, 0 ≤ sparsity < 1. At least one entry survives.

    Raises:
        ValueError: The sparsity is out of range.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            hint = f"; for {self.sparsity:g} % give {self.sparsity / 100:g}" if 1 < self.sparsity < 100 else ""
            raise ValueError(f"sparsity must be a fraction of zeros in [0, 1), got {self.sparsity}{hint}")

    def relaxed(self, tightness: float) -> Unstructured:
        """Return the set with ``tightness`` times the sparsity."""
        return replace(self, sparsity=self.sparsity * tightness)

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError unless the tensor is a matrix, or a stack of them."""
        if len(shape) < 2:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; a constrained tensor is a matrix or a stack of matrices"
            )

    def kept(self, shape: torch.Size) -> int:
        """Return how many entries of each matrix survive."""
        entries = shape[-2] * shape[-1]
        return max(1, entries - round(self.sparsity * entries))

    def project(self, points: Iterable[Point]) -> Iterator[Tensor]:
        """Yield the mask of each tensor's largest entries, F̂ v² each."""
        for point in points:
            yield unstructured(point.v, point.importance, self.kept(point.v.shape))
