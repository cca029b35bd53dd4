"""What brings weights exactly into the set, and keeps them there: on a fixed mask, and at the end of a run.

On a fixed mask every step ends with :func:`hold`. At the end :func:`cut` projects the weights; if the run may go on,
the removed values are kept, and :func:`restore` undoes it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elsa_lightning.forms import Form
from elsa_lightning.forms.base import Forgets, Importance
from elsa_lightning.forms.on_set import on_values
from elsa_lightning.layout.fused import zero_off
from elsa_lightning.layout.lowbit import masked
from elsa_lightning.layout.sharded import Processes, exact_dtype, local
from elsa_lightning.sets.base import Constraint, project
from elsa_lightning.stacks import together
from elsa_lightning.tensors import KEYS, MASK, NUMBERS, REMOVED, SCALE, SPLIT, ConstrainedTensor


def hold(
    constraint: Constraint, tensors: Sequence[ConstrainedTensor], places: Mapping[nn.Parameter, int],
    copies: Collection[str], seed: Callable[[nn.Parameter], int] | None, forgets: Mapping[int, Forgets],
    importance: Importance | None = None, values: bool = True,
) -> None:  # fmt: skip
    """Bring the weights back to the set after a step on a fixed mask; zero the optimizer's copies of them off the mask.

    Where the set fixes values, kept weights are rounded to these, and the split remembers the rounding error.

    Args:
        constraint: The set.
        tensors: The tensors with a mask.
        places: Indices of the parameters among all constrained tensors.
        copies: Keys of the optimizer's state that hold copies of the weights.
        seed: Returns the seed for rounding a parameter's split; None if no step was made, so that there is no rounding
            error to remember.
        forgets: How much the memory of rounding errors loses, by index of the tensor; see :meth:`Form.forgets`.
        importance: Returns F̂ of some rows, if the numbers that groups of entries share are to be chosen anew.
        values: Whether kept weights are rounded, if the set fixes values.
    """
    for tensor in tensors if constraint.fixes_values and values else ():
        for piece in tensor.pieces():
            remembers = seed is not None and tensor.has(SPLIT)
            split = tensor.split(piece.rows) if remembers else tensor.x(piece.rows).new_zeros(())
            place = places[tensor.p]
            if remembers:
                split = on_values(constraint, place, tensor, piece, split, forgets.get(place), importance)
            else:
                on_values(constraint, place, tensor, piece, split)
            if seed is not None and remembers:
                tensor.set_split(piece.rows, split, seed(tensor.p))
    lines, by_pieces = [], []
    for tensor in tensors:
        of = _weights(tensor, copies)
        found = [line for t in of if (line := tensor.line(t)) is not None]
        if len(found) == len(of):
            lines += found
        else:
            by_pieces.append(tensor)
    zero_off(lines)
    for _, tensor in together(enumerate(by_pieces), stacks=not copies):
        of = _weights(tensor, copies)
        for rows, *_ in tensor.pieces():
            tensor.x(rows)  # raises if the memory format was changed
            for t in of:
                tensor.zero_off(t, rows)
        tensor.write()


def fix(constraint: Constraint, tensors: Sequence[ConstrainedTensor]) -> None:
    """Zero the weights off the mask, NaN included, and release the split.

    Where the set fixes values, the split stays on the mask: it remembers the rounding errors of the following steps.
    """
    for tensor in tensors:
        for rows, *_ in tensor.pieces():
            tensor.zero_off(tensor.p.detach(), rows)
            if constraint.fixes_values and tensor.has(SPLIT):
                tensor.set_split(rows, masked(tensor.split(rows), tensor.mask(rows)), seed=0)  # rounds nothing
        if not constraint.fixes_values:
            tensor.release(SPLIT, SCALE)


def stray(
    constraint: Constraint, tensors: Sequence[ConstrainedTensor], places: Mapping[nn.Parameter, int],
    values: bool = True,
) -> int:  # fmt: skip
    """Return how many entries on this process are not in the set: cut but not 0, or kept at none of the set's values.

    Args:
        constraint: The set.
        tensors: The tensors with a mask.
        places: Indices of the parameters among all constrained tensors.
        values: Whether kept entries count, if the set fixes values.
    """
    counts = []
    for tensor in tensors:
        for piece in tensor.pieces():
            x = tensor.x(rows := piece.rows)
            if constraint.fixes_values and values:
                z = project(constraint, x, tensor.mask(rows), tensor.point(places[tensor.p], piece, x))
                counts.append((x != z).sum())
            else:
                counts.append((~tensor.mask(rows) & (x != 0)).sum())
    return int(torch.stack(counts).sum()) if counts else 0


def weight_copies(tensors: Sequence[ConstrainedTensor], processes: Processes) -> list[str]:
    """Return the keys of the optimizer's state that hold copies of the weights.

    A copy is an average of the weights, or a point that the optimizer swaps in for evaluation. It differs from a moment
    by its direction: on the mask, over all tensors, within 60° of the weights'. Flat slices (FSDP1) are not examined,
    because a process may hold no entries, and so no keys to name.
    """
    if not tensors or any(tensor.part.start is not None for tensor in tensors):
        return []
    keys = sorted({key for tensor in tensors for key in tensor.state if _is_like_weights(tensor, key)})
    if not keys:
        return []
    device = tensors[0].p.device
    sums = torch.zeros(len(keys), 3, dtype=exact_dtype(device), device=device)  # inner products x·t, x·x, t·t
    for place, key in enumerate(keys):
        for tensor in tensors:
            if not tensor.part.counts or not _is_like_weights(tensor, key):
                continue
            held = local(tensor.state[key])
            for rows, *_ in tensor.pieces():
                x = tensor.x(rows).float() * tensor.mask(rows)
                other = tensor.layout.take(held, rows).float() * tensor.mask(rows)
                sums[place] += torch.stack(
                    [(a * b).sum().to(sums.dtype) for a, b in ((x, other), (x, x), (other, other))]
                )
    both, own, others = processes.add(sums).unbind(1)
    alike = (both > 0.5 * (own * others).sqrt()).tolist()
    return [key for key, yes in zip(keys, alike, strict=True) if yes]


def _weights(tensor: ConstrainedTensor, copies: Collection[str]) -> list[Tensor]:
    """Return the weights of a tensor and the optimizer's copies of them."""
    return [tensor.p.detach(), *(local(tensor.state[key]) for key in copies if _is_like_weights(tensor, key))]


def _is_like_weights(tensor: ConstrainedTensor, key: str) -> bool:
    value = tensor.state.get(key)
    if not isinstance(value, Tensor) or key in KEYS or not value.is_floating_point():
        return False
    return local(value).shape == local(tensor.p).shape


def cut(
    constraint: Constraint, tensor: ConstrainedTensor, place: int, packed: Tensor | None, importance: Importance, *,
    keeps: bool, resumable: bool, refits: bool = False,
) -> None:  # fmt: skip
    """Set x ← Π_S(x) in one tensor.

    Args:
        constraint: The set.
        tensor: The tensor.
        place: Its index among all constrained tensors.
        packed: The mask; None takes the tensor's own.
        importance: Returns F̂ of some rows, for numbers that the set has yet to choose.
        keeps: Whether to keep the mask, or the removed values, in the state.
        resumable: Keep the removed values, for :func:`restore`, instead of the mask.
        refits: Whether to choose the numbers anew, because the existing ones are of a looser set.
    """
    chosen = tensor.has(NUMBERS) and not refits
    tensor.allocate(*([REMOVED] if resumable else [MASK, NUMBERS]) * keeps)
    for piece in tensor.pieces():
        rows = piece.rows
        x = tensor.x(rows)
        mask = tensor.mask(rows) if packed is None else tensor.unpacked(packed, rows)
        point = tensor.point(place, piece, x, None if chosen else importance(tensor, rows))
        if tensor.shared is not None and not chosen:
            fresh = replace(point, numbers=None)  # existing numbers would be of a looser set
            point = replace(point, numbers=constraint.fit(masked(x, mask), fresh))
            if keeps and not resumable and point.numbers is not None:
                tensor.numbers(rows).copy_(point.numbers)
        z = project(constraint, x, mask, point)
        if resumable:
            tensor.set_removed(rows, torch.where(x == z, 0, x))
        elif keeps:
            tensor.set_mask(rows, mask)
        x.copy_(z)
    if not resumable:
        tensor.release(SPLIT, SCALE)


def restore(tensors: Sequence[ConstrainedTensor]) -> None:
    """Undo :func:`cut` with ``resumable``, bit for bit."""
    for tensor in tensors:
        for rows, *_ in tensor.pieces():
            x, removed = tensor.x(rows), tensor.removed(rows)
            x.copy_(torch.where(removed != 0, removed, x))
        tensor.release(REMOVED)


def stray_while_suspended(tensors: Sequence[ConstrainedTensor], by_mask: bool) -> int:
    """Return how many entries on this process that :func:`cut` with ``resumable`` left at 0 are not 0.

    Args:
        tensors: The tensors with removed values.
        by_mask: Whether the weights off the mask were 0 before, so that their removed values are, too.
    """
    counts = [
        (_left_at_zero(tensor, rows, by_mask) & (tensor.x(rows) != 0)).sum()
        for tensor in tensors
        for rows, *_ in tensor.pieces()
    ]
    return int(torch.stack(counts).sum()) if counts else 0


def cut_again(tensors: Sequence[ConstrainedTensor], by_mask: bool) -> None:
    """Zero the entries that :func:`cut` with ``resumable`` left at 0, in case they were changed since.

    Args:
        tensors: The tensors with removed values.
        by_mask: See :func:`stray_while_suspended`.
    """
    for tensor in tensors:
        for rows, *_ in tensor.pieces():
            tensor.x(rows).masked_fill_(_left_at_zero(tensor, rows, by_mask), 0)


def _left_at_zero(tensor: ConstrainedTensor, rows: slice, by_mask: bool) -> Tensor:
    removed = tensor.removed(rows) != 0
    return removed | ~tensor.mask(rows) if by_mask and tensor.has(MASK) else removed


def reopen(form: Form, tensors: Sequence[ConstrainedTensor], seed: Callable[[ConstrainedTensor], int]) -> None:
    """Let fixed masks move again, with a dual of 0."""
    for tensor in tensors:
        if tensor.has(SPLIT):  # the split that remembers rounding errors stays
            continue
        tensor.allocate(SPLIT, SCALE)
        for rows, *_ in tensor.pieces():
            tensor.set_split(rows, form.reopen(tensor, rows), seed(tensor))
