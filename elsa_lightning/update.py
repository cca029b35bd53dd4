"""The z/u-update in two passes: the set decides all supports, then split, mask and weights of each tensor are stored.

Besides the update this module has what else :class:`elsa_lightning.ADMM` does with all constrained tensors: measuring
stationarity, restoring zeros on a fixed mask, and cutting, restoring and reopening at the end of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elsa_lightning.forms import Form, Sums
from elsa_lightning.forms.base import Forgets, Importance
from elsa_lightning.forms.on_set import on_values
from elsa_lightning.layout.fused import zero_off
from elsa_lightning.layout.lowbit import masked, ones
from elsa_lightning.layout.rows import Piece
from elsa_lightning.layout.sharded import Processes, exact_dtype, local, sent
from elsa_lightning.sets.base import Constraint, Point, Points, project
from elsa_lightning.stacks import Placed, by_rows, joined, together
from elsa_lightning.tensors import KEYS, MASK, NUMBERS, REMOVED, SCALE, SPLIT, ConstrainedTensor
from elsa_lightning.watch import Stationarity, Update

Value = Callable[[ConstrainedTensor, slice], Tensor]


class LivePoints(Points):
    """The points of constrained tensors, computed piece by piece whenever a set iterates over them.

    Args:
        tensors: The constrained tensors.
        value: Returns v of some rows of a tensor.
        importance: Returns F̂ of these rows.
        processes: The processes that hold the tensors.
        guesses: Thresholds of the last projection; see :class:`~elsa_lightning.sets.base.Points`.
        stacks: Whether ``value`` accepts a :class:`~elsa_lightning.stacks.Stack` of small tensors.
    """

    def __init__(
        self, tensors: Sequence[ConstrainedTensor], value: Value, importance: Importance, processes: Processes,
        guesses: dict[Hashable, Tensor] | None = None, stacks: bool = False,
    ) -> None:  # fmt: skip
        self.guesses, self.stacks = guesses, stacks
        self.tensors, self.value, self.importance, self.processes = list(tensors), value, importance, processes
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
        return LivePoints(tensors, self.value, self.importance, self.processes, self.guesses, self.stacks)

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


def _left_at_zero(tensor: ConstrainedTensor, rows: slice, by_mask: bool) -> Tensor:
    removed = tensor.removed(rows) != 0
    return removed | ~tensor.mask(rows) if by_mask and tensor.has(MASK) else removed


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


def reopen(form: Form, tensors: Sequence[ConstrainedTensor], seed: Callable[[ConstrainedTensor], int]) -> None:
    """Let fixed masks move again, with a dual of 0."""
    for tensor in tensors:
        if tensor.has(SPLIT):  # the split that remembers rounding errors stays
            continue
        tensor.allocate(SPLIT, SCALE)
        for rows, *_ in tensor.pieces():
            tensor.set_split(rows, form.reopen(tensor, rows), seed(tensor))


def cut_again(tensors: Sequence[ConstrainedTensor], by_mask: bool) -> None:
    """Zero the entries that :func:`cut` with ``resumable`` left at 0, in case they were changed since.

    Args:
        tensors: The tensors with removed values.
        by_mask: See :func:`stray_while_suspended`.
    """
    for tensor in tensors:
        for rows, *_ in tensor.pieces():
            tensor.x(rows).masked_fill_(_left_at_zero(tensor, rows, by_mask), 0)
