"""The z/u-update in two passes: the set decides all supports, then split, mask and weights of each tensor are stored.

Stationarity, and the damage that a projection would do, are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elsa_lightning.forms import Form, Sums
from elsa_lightning.forms.base import Importance
from elsa_lightning.layout.lowbit import masked, ones
from elsa_lightning.layout.rows import Piece
from elsa_lightning.layout.sharded import Processes, exact_dtype, local, sent
from elsa_lightning.sets.base import Constraint, Point, Points, project
from elsa_lightning.stacks import Placed, by_rows, joined, together
from elsa_lightning.tensors import MASK, NUMBERS, SCALE, SPLIT, ConstrainedTensor
from elsa_lightning.watch import Stationarity, Update

Value = Callable[[ConstrainedTensor, slice], Tensor]


class LivePoints(Points):
    """The points of constrained tensors, computed piece by piece whenever a set iterates over them.

    Args:
        tensors: The constrained tensors.
        value: Returns v of some rows of a tensor.
        importance: Returns F̂ of these rows; None if no tensor has one.
        processes: The processes that hold the tensors.
        guesses: Thresholds of the last projection; see :class:`~elsa_lightning.sets.base.Points`.
        stacks: Whether ``value`` accepts a :class:`~elsa_lightning.stacks.Stack` of small tensors.
    """

    def __init__(
        self, tensors: Sequence[ConstrainedTensor], value: Value, importance: Importance | None, processes: Processes,
        guesses: dict[Hashable, Tensor] | None = None, stacks: bool = False,
    ) -> None:  # fmt: skip
        self.guesses, self.stacks = guesses, stacks
        self.tensors, self.value, self.processes = list(tensors), value, processes
        self.importance: Importance = (lambda *_: None) if importance is None else importance
        self.unweighted = importance is None
        self.names = [tensor.name for tensor in tensors]
        self.shapes = [tensor.part.shape for tensor in tensors]
        self.transposed = [tensor.layout.transposed for tensor in tensors]
        self.parts, self.device = processes.size, tensors[0].p.device

    def together(self) -> Iterator[Placed]:
        """Yield the tensors with their indices, small ones of the same kind as a stack."""
        return together(enumerate(self.tensors), self.stacks)

    def __iter__(self) -> Iterator[Point]:
        """Yield the local rows, tensor by tensor."""
        for index, tensor in enumerate(self.tensors):
            for piece in tensor.pieces():
                rows = piece.rows
                yield tensor.point(index, piece, self.value(tensor, rows), self.importance(tensor, rows))

    def stacked(self) -> Iterator[Point]:
        """Yield the local rows, stack by stack."""
        for indices, tensor in self.together():
            for piece in tensor.pieces():
                rows = piece.rows
                point = tensor.point(indices[0], piece, self.value(tensor, rows), self.importance(tensor, rows))
                yield point if len(indices) == 1 else replace(point, stack=indices)

    def only(self, indices: Sequence[int]) -> LivePoints:
        """Return some of the tensors."""
        tensors = [self.tensors[i] for i in indices]
        importance = None if self.unweighted else self.importance
        return LivePoints(tensors, self.value, importance, self.processes, self.guesses, self.stacks)

    def add(self, t: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return self.processes.add(t)


def decide(constraint: Constraint, points: LivePoints, inert: bool = False) -> list[Tensor]:
    """Return the packed mask of each tensor, without changing the tensors.

    Args:
        constraint: The set.
        points: The tensors.
        inert: Whether the :attr:`~Constraint.inertia` of a set holds back entries that the former mask did not keep.
    """
    packed: dict[int, Tensor] = {}
    for member, indices in constraint.members(points.names):
        mine = points.only(indices)
        if inert and member.inertia:
            mine.value = _held_back(mine.value, member.inertia)
        mine.stacks = mine.stacks and member.stacks
        masks = member.support(mine)
        for inside, tensor in mine.together():
            room = tensor.room_for_mask()
            for rows, *_ in tensor.pieces():
                tensor.set_mask(rows, next(masks).view(-1, tensor.layout.width(rows)), room)
            for place, bits in zip(inside, [room] if len(inside) == 1 else room.unbind(), strict=True):
                packed[indices[place]] = bits
        next(masks, None)  # run the generator to its end on every process: it may communicate there
    return [packed[index] for index in range(len(points.tensors))]


def _held_back(value: Value, inertia: float) -> Value:
    """Return (v + τ z_before)/(1 + τ), where z_before is v on the former mask, for weights that lie on the set."""

    def held(tensor: ConstrainedTensor, rows: slice) -> Tensor:
        v = value(tensor, rows)
        fresh = not (tensor.has(MASK) and tensor.has(SPLIT))
        return v if fresh else torch.where(tensor.mask(rows), v, v / (1 + inertia))

    return held


def fit(constraint: Constraint, points: LivePoints, packed: Sequence[Tensor]) -> None:
    """Choose the numbers that groups of entries share, given the supports; v does not depend on these numbers."""
    for index, tensor in enumerate(points.tensors):
        if tensor.shared is None:
            continue
        tensor.allocate(NUMBERS)
        for piece in tensor.pieces():
            rows = piece.rows
            v, importance = points.value(tensor, rows), points.importance(tensor, rows)
            z = masked(v, tensor.unpacked(packed[index], rows))
            tensor.numbers(rows).copy_(constraint.fit(z, tensor.point(index, piece, v, importance)))


def dual_sum(form: Form, tensor: ConstrainedTensor, rows: slice) -> Tensor:
    """Return v = x + u, in at least float32."""
    if tensor.has(SPLIT):
        return form.dual_sum(tensor, rows)
    x = tensor.x(rows)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def update(
    form: Form, constraint: Constraint, points: LivePoints, places: Sequence[int], count: int, *, step: int,
    penalty: float, rescale: float, span: int, seed: Callable[[nn.Parameter], int],
) -> Update:  # fmt: skip
    """Set z ← Π_S(v) and u ← v − z times the form's factor; return the quantities that are logged.

    Args:
        form: The form of the x-update.
        constraint: The set, relaxed to the current point of the ramp.
        points: v = x + u of the tensors that take part.
        places: Their indices among all constrained tensors.
        count: Number of all constrained tensors.
        step: Optimizer steps done.
        penalty: The penalty from now on.
        rescale: λ_old/λ_new.
        span: Optimizer steps of the ADMM phase.
        seed: Returns the seed for rounding a parameter's split.
    """
    packed = decide(constraint, points, inert=form.on_set)
    fit(constraint, points, packed)
    sums = _count(form, constraint, points, packed, places, count)
    sums[:, 10:] = form.seen(count, points.device)
    points.add(sums)
    kept, former, z2, memory, cut, entries, steps, inner = sums[:, 4:].unbind(1)
    factors = form.factors(Sums(entries, kept, former, z2, memory, cut, steps, inner), rescale, penalty, span)
    for indices, tensor in points.together():
        bits, fresh, here = joined(packed, indices), not tensor.has(SPLIT), [places[index] for index in indices]
        mine = factors[here[0]][None] if len(here) == 1 else factors[sent(here, points.device)]
        for piece in tensor.pieces():  # v is computed with the former mask, so this must precede take_mask
            rows = piece.rows
            v = points.value(tensor, rows)
            if fresh:
                tensor.allocate(SPLIT, SCALE, MASK)
            z, mask = _projected(constraint, tensor, indices[0], piece, v, bits), tensor.unpacked(bits, rows)
            factor = by_rows(mine.to(v.dtype), len(v))
            factor = torch.where(mask, 1, factor) if constraint.fixes_values else factor
            form.settle(tensor, rows, v, mask, z, factor, tensor.seed(seed))
        tensor.allocate(SPLIT, SCALE, MASK)  # for a part without entries, which has no pieces
        tensor.take_mask(bits)
        tensor.write(SPLIT, SCALE)
    gap, norm, moved, flips, kept_, *_ = sums.sum(dim=0)
    total = entries.sum()
    return Update(
        step=step,
        penalty=penalty,
        sparsity=1 - kept_ / total,
        primal_residual=(gap / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt(),
        dual_residual=penalty * moved.sqrt(),
        mask_flips=flips / total,
    )


def _projected(
    constraint: Constraint, tensor: ConstrainedTensor, index: int, piece: Piece, v: Tensor, packed: Tensor
) -> Tensor:
    """Return z as :func:`project` does, given a packed mask."""
    if not constraint.fixes_values:
        return tensor.masked(v, piece.rows, packed)
    return project(constraint, v, tensor.unpacked(packed, piece.rows), tensor.point(index, piece, v))


def _count(
    form: Form, constraint: Constraint, points: LivePoints, packed: Sequence[Tensor], places: Sequence[int], count: int
) -> Tensor:
    """Return sums over each tensor's part on this process, ``(tensors, 12)``, for :class:`Sums` and the residuals.

    The last two columns are left 0.
    """
    # ‖x − z‖², ‖x‖², ‖z − z_before‖², flips, kept, formerly kept, Σ z², Σ u² before and after, entries
    sums = torch.zeros(count, 12, dtype=exact_dtype(points.device), device=points.device)
    for indices, tensor in points.together():
        if not tensor.part.counts:
            continue
        here, n, bits = [places[index] for index in indices], len(indices), joined(packed, indices)
        fresh, entries = not tensor.has(SPLIT), tensor.layout.shape.numel() // n
        kept = ones(bits, n)
        former = torch.full_like(kept, entries) if fresh else ones(local(tensor.packed), n)
        apart = bits if fresh else bits ^ local(tensor.packed)
        flips = entries - kept if fresh else ones(apart, n)
        by_masks = form.on_set and not (fresh or constraint.fixes_values)  # x, z: v on the former, on the new mask
        lengths = torch.zeros(n, 4 if by_masks else 6, dtype=sums.dtype, device=sums.device)
        for piece in tensor.pieces():
            rows, v = piece.rows, points.value(tensor, piece.rows)
            if by_masks:
                found = _squares_by_masks(tensor, rows, v, bits, apart)
            else:
                z = _projected(constraint, tensor, indices[0], piece, v, bits)
                cut = tensor.masked(v, rows, bits, kept=False) if constraint.fixes_values else v - z
                found = _squares(form, tensor, rows, v, z, cut, fresh)
            lengths += torch.stack([t.reshape(n, -1).sum(dim=1) for t in found], dim=1).to(sums.dtype)
        if by_masks:
            gap, memory, cut, whole = lengths.unbind(1)
            lengths = torch.stack([gap, whole - memory, gap, whole - cut, memory, cut], dim=1)
        counts = torch.stack([flips, kept, former], dim=1).to(sums.dtype)
        numbers = torch.cat([lengths[:, :3], counts, lengths[:, 3:], torch.full_like(lengths[:, :1], entries)], dim=1)
        sums[slice(here[0], here[0] + 1) if n == 1 else sent(here, points.device), :10] = numbers
    return sums


def _squares(
    form: Form, tensor: ConstrainedTensor, rows: slice, v: Tensor, z: Tensor, cut: Tensor, fresh: bool
) -> Iterator[Tensor]:
    """Yield (x − z)², x², (z − z_before)² (at the first update (z − x)²), z², u² before, and u² after the update."""
    x = tensor.x(rows).to(v.dtype)
    yield (x - z).square_()
    yield x.square()
    former = None if fresh else form.former_z(tensor, rows).to(v.dtype)
    yield (z - (x if former is None else tensor.masked(former, rows, local(tensor.packed)))).square_()
    yield z.square()
    yield torch.zeros_like(v) if fresh else tensor.masked(v, rows, tensor.packed, kept=False).square_()
    yield cut.square_()


def _squares_by_masks(
    tensor: ConstrainedTensor, rows: slice, v: Tensor, packed: Tensor, apart: Tensor
) -> Iterator[Tensor]:
    """Yield v² where the two masks differ, off the former mask, off the new mask, and everywhere."""
    square = v.square()
    yield tensor.masked(square, rows, apart)
    yield tensor.masked(square, rows, tensor.packed, kept=False)
    yield tensor.masked(square, rows, packed, kept=False)
    yield square


def stationarity(
    form: Form, constraint: Constraint, tensors: Sequence[ConstrainedTensor], importance: Importance,
    processes: Processes, *, step: int, penalty: float,
) -> Stationarity:  # fmt: skip
    """Return the distance of x from Π_S(x − D⁻¹∇f(x)/λ), by the gradient of the current batch.

    λ of a tensor follows from the gradients off its mask; where these are all 0, as with neurons that are zero on both
    sides, from the gradients on the mask.

    Args:
        form: Defines D and λ.
        constraint: The set, relaxed to the current point of the ramp.
        tensors: The tensors with a mask and a gradient.
        importance: Returns F̂ of some rows.
        processes: The processes that hold the tensors.
        step: Optimizer steps done.
        penalty: λ or κ.
    """
    device = tensors[0].p.device
    squares = torch.zeros(len(tensors), 5, dtype=exact_dtype(device), device=device)
    for index, tensor in enumerate(tensors):
        for rows, *_ in tensor.pieces() if tensor.part.counts else ():
            numbers = _lengths(form, tensor, rows)
            squares[index] += torch.stack([number.to(squares.dtype) for number in numbers])
    processes.add(squares)
    off, off_count, kept, kept_count, on = squares.unbind(1)
    off, off_count = torch.where(off > 0, off, on), torch.where(off > 0, off_count, kept_count)
    rms = [(a / b.clamp_min(1)).sqrt().float() for a, b in ((off, off_count), (kept, kept_count))]
    scales = {
        tensor.name: form.inverse_penalty(tensor, penalty, rms[0][index], rms[1][index])
        for index, tensor in enumerate(tensors)
    }

    def forward(tensor: ConstrainedTensor, rows: slice) -> Tensor:
        step: Tensor = form.direction(tensor, rows) * scales[tensor.name]
        return tensor.x(rows).float() - step

    points = LivePoints(tensors, forward, importance, processes)
    packed = decide(constraint, points)
    found = torch.zeros(3, dtype=squares.dtype, device=device)
    for index, tensor in enumerate(tensors):
        for piece in tensor.pieces() if tensor.part.counts else ():
            rows = piece.rows
            y, mask = forward(tensor, rows), tensor.unpacked(packed[index], rows)
            point = replace(tensor.point(index, piece, y, importance(tensor, rows)), numbers=None)  # are fitted to y
            z = project(constraint, y, mask, point)
            x = tensor.x(rows).float()
            numbers = [(x - z).square().sum(), x.square().sum(), (mask & ~tensor.mask(rows)).sum()]
            found += torch.stack([number.to(found.dtype) for number in numbers])
    gap, norm, outranking = processes.add(found)
    return Stationarity(
        step, (gap / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt(), outranking / kept_count.sum()
    )


def _lengths(form: Form, tensor: ConstrainedTensor, rows: slice) -> list[Tensor]:
    """Return ‖D⁻¹∇f‖² and the entries off the mask, ‖x‖² and the entries on it, and ‖D⁻¹∇f‖² on it, of some rows."""
    mask, square = tensor.mask(rows), form.direction(tensor, rows).square()
    off, on = masked(square, ~mask).sum(), masked(square, mask).sum()
    return [off, (~mask).sum(), tensor.x(rows).float().square().sum(), mask.sum(), on]


def damage(constraint: Constraint, points: LivePoints) -> Tensor:
    """Return Σ x², Σ (x − Π_S(x))² by magnitude, and the entries, over all tensors and processes, ``(3,)``."""
    packed = decide(constraint, points)
    found = torch.zeros(3, dtype=exact_dtype(points.device), device=points.device)
    for index, tensor in enumerate(points.tensors):
        for piece in tensor.pieces() if tensor.part.counts else ():
            x = points.value(tensor, piece.rows)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            point = replace(tensor.point(index, piece, x), numbers=None)  # are fitted to x
            z = project(constraint, x, tensor.unpacked(packed[index], piece.rows), point)
            numbers = [x.square().sum(), (x - z).square().sum(), torch.full((), x.numel(), device=x.device)]
            found += torch.stack([number.to(found.dtype) for number in numbers])
    return points.add(found)
