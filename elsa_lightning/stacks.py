"""Small constrained tensors of one shape are processed together, as the matrices of one stack.

Each operation costs a launch, however small its tensor, and a mixture of experts or a vision transformer has thousands
of small matrices. Their weights and the needed state are copied into a stack, and changes are copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import local
from elsa_lightning.tensors import MASK, ConstrainedTensor, Factors

Placed = tuple[Sequence[int], ConstrainedTensor]


def together(tensors: Iterable[tuple[int, ConstrainedTensor]], stacks: bool = True) -> Iterator[Placed]:
    """Yield tensors with their indices: small ones of the same kind as a :class:`Stack`, the others one by one.

    Args:
        tensors: The tensors with their indices.
        stacks: Whether to make stacks at all.
    """
    kinds: dict[Any, list[tuple[int, ConstrainedTensor]]] = {}
    for place, tensor in tensors:
        if stacks and tensor.kind is not None and tensor.aside is None:
            kinds.setdefault((tensor.kind, *tensor.state), []).append((place, tensor))
        else:
            yield (place,), tensor
    for alike in kinds.values():
        first = alike[0][1]
        most = max(1, first.layout.stack // first.layout.shape.numel())
        for at in range(0, len(alike), most):
            places, members = zip(*alike[at : at + most], strict=True)
            yield places, Stack(members) if len(members) > 1 else members[0]


def by_rows(numbers: Tensor, rows: int) -> Tensor:
    """Expand one number a tensor, ``(tensors,)``, to the rows of their stack, ``(rows, 1)``; a single one stays."""
    n = len(numbers)
    return numbers if n == 1 else numbers[:, None].expand(n, rows // n).reshape(rows, 1)


def joined(packed: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """Return the packed masks at these indices stacked, or a single one as it is."""
    return packed[places[0]] if len(places) == 1 else torch.stack([packed[place] for place in places])


class _Gathered(dict[str, Any]):
    """State of a stack's members; each tensor is gathered when it is first read."""

    def __init__(self, members: Sequence[ConstrainedTensor]) -> None:
        super().__init__()
        self.members = members

    def __missing__(self, key: str) -> Tensor:
        self[key] = torch.stack([local(member.state[key]) for member in self.members])
        found: Tensor = self[key]
        return found


class Stack(ConstrainedTensor):
    """A stack of whole matrices: a copy, which :meth:`write` writes back to the members.

    Args:
        members: The matrices, all of one :attr:`~elsa_lightning.tensors.ConstrainedTensor.kind`.

    Attributes:
        of_member: All rows of one member.
    """

    def __init__(self, members: Sequence[ConstrainedTensor]) -> None:
        first = members[0]
        self.members = members
        self.name, self.optimizer, self.state_dtype = first.name, first.optimizer, first.state_dtype
        self.shared, self.aside, self._channels_last = None, None, False
        shape, offsets = torch.Size((len(members), *first.part.shape)), (0, *first.part.offsets)
        self.part = replace(first.part, shape=shape, offsets=offsets)
        x = local(first.p).detach().expand(len(members), *first.layout.shape)
        self.layout = Rows(self.part, x, transposed=first.layout.transposed)
        self.of_member = slice(0, first.layout.count)
        self._state = _Gathered(members)

    @cached_property
    def p(self) -> nn.Parameter:  # type: ignore[override]
        """The weights."""
        return nn.Parameter(torch.stack([local(member.p.detach()) for member in self.members]), requires_grad=False)

    @property
    def state(self) -> dict[str, Any]:
        """The members' state, copied into the stack."""
        return self._state

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has state of its own for the members."""
        return self.members[0].stepped

    def has(self, key: str) -> bool:
        """Return whether the members' state has this tensor of ours."""
        return self.members[0].has(key)

    def moment(self, rows: slice) -> Tensor | None:
        """Return the second moments, with 1 for members without one; None where no member has one."""
        found = [member.moment(self.of_member) for member in self.members]
        some = next((moment for moment in found if moment is not None), None)
        if some is None:
            return None
        return torch.cat([torch.ones_like(some) if moment is None else moment for moment in found])

    def importance(self, rows: slice) -> Tensor | None:
        """Return F̂, with 1 for members without a second moment; None where no member has one."""
        moment, found = self.moment(rows), [member.factors for member in self.members]
        known = [factors for factors in found if factors is not None]
        if moment is None or len(known) < len(found):
            return moment
        factors = Factors(
            torch.cat([each.rows for each in known]), torch.cat([each.columns for each in known]), known[0].share
        )
        return factors.hold(moment, self.members[0].layout, self.of_member)

    def seed(self, of: Callable[[nn.Parameter], int]) -> Any:
        """Return the seed of each member."""
        return [of(member.p) for member in self.members]

    def noise(self, rows: slice, seed: Any) -> Tensor:
        """Return the same random int32 that each member would draw by itself."""
        first = self.members[0].layout
        return first.part.noises(first.shape, seed, self.layout.device)

    def allocate(self, *keys: str) -> None:
        """Create tensors of ours in the members' state where they do not exist yet."""
        for member in self.members:
            member.allocate(*keys)

    def take_mask(self, packed: Tensor) -> None:
        """Store the masks of all members."""
        torch._foreach_copy_([local(member.state[MASK]) for member in self.members], list(packed.unbind()))

    def write(self, *keys: str) -> None:
        """Write the weights and the named tensors of the state back to the members."""
        torch._foreach_copy_([local(member.p.detach()) for member in self.members], list(self.p.unbind()))
        for key in keys:
            if key in self._state:
                torch._foreach_copy_(
                    [local(member.state[key]) for member in self.members], list(self._state[key].unbind())
                )
