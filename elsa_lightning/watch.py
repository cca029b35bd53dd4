"""What users see of a run: residuals, stationarity, the share that each tensor keeps, and whether the run converged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_lightning.layout.sharded import Processes, exact_dtype
from elsa_lightning.tensors import MASK, ConstrainedTensor

UPDATED = ("primal_residual", "dual_residual", "mask_flips", "sparsity")  # finite as long as the weights are
MEASUREMENTS = 10  # measurements of stationarity in a run: each takes an extra projection
STILL = 0.01  # a run has converged if its last update exchanged less than this share of the kept entries
_CLOSED = 0.05  # and ‖x − z‖/‖x‖ was less than this
DECADES, BINS = 8, 10  # reach of a histogram of scores on both sides of the threshold, and bins a decade
_LEAST, _MOST = -45, 15  # range of log10 of scores, before the threshold is known


@dataclass(frozen=True)
class Update:
    """Measurements of one z/u-update, as scalars on the weights' device.

    Attributes:
        step: Optimizer steps done.
        penalty: λ or κ from now on.
        sparsity: Fraction of zeros in z, over all constrained entries.
        primal_residual: ‖x − z‖ / ‖x‖.
        dual_residual: penalty · ‖z − z_before‖; z_before is z as changed by the steps since the last update.
        mask_flips: Fraction of the mask that changed.
    """

    step: int
    penalty: float
    sparsity: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    mask_flips: Tensor


@dataclass(frozen=True)
class Stationarity:
    """Distance of the weights from a λ-stationary point x ∈ Π_S(x − D⁻¹∇f(x)/λ), by one batch's gradient.

    The gradient's noise counts in full: with batches of a few hundred tokens the distance is mostly noise, and only its
    decrease over a run, and with larger batches, is informative. D and λ are those of the form.

    Attributes:
        step: Optimizer steps done.
        distance: ‖x − Π_S(x − D⁻¹∇f/λ)‖ / ‖x‖.
        outranking: Entries off the mask that this projection would keep, over the kept ones.
    """

    step: int
    distance: Tensor
    outranking: Tensor


def figures(update: Update, measured: Stationarity | None) -> dict[str, float]:
    """Return the figures of an update to log, by name, and those of a measurement if there is a new one."""
    values = torch.stack([getattr(update, name) for name in UPDATED]).tolist()  # one transfer to the host
    found = dict(zip(UPDATED, values, strict=True))
    found["penalty"] = update.penalty
    if measured is not None:
        found["stationarity"] = float(measured.distance)
        found["outranking"] = float(measured.outranking)
    return found


def settled(last: Update) -> tuple[bool, float, float]:
    """Return whether a run had converged by its last update, and that update's share of exchanged entries and residual.

    The share is relative to the kept entries, the residual ‖x − z‖/‖x‖.
    """
    kept = max(1e-12, 1 - float(last.sparsity))
    exchanged, residual = float(last.mask_flips) / 2 / kept, float(last.primal_residual)
    return exchanged < STILL and residual < _CLOSED, exchanged, residual


def verdict(last: Update | None, measured: Stationarity | None) -> str:
    """Describe whether a run had converged when its mask was fixed."""
    if last is None:
        return "no update was made in this run, so nothing is known of its convergence"
    if last.step == 1:
        return "the only update of this run made its mask, so nothing is known of its convergence"
    done, exchanged, residual = settled(last)
    figures = f"the last update exchanged {exchanged:.2%} of what is kept and moved the weights by {residual:.2%}"
    if measured is not None:
        figures += (
            f"; by the gradient of one batch, {float(measured.outranking):.1%} as many entries off the mask outrank "
            f"kept ones, and the weights are {float(measured.distance):.2g} of their norm from a stationary point"
        )
    return f"converged: {figures}" if done else f"not converged: {figures}. A longer run would still change the mask"


def slack(total: int) -> int:
    """Return how many steps a run may be off its schedule without a warning, since some may be skipped."""
    return max(1, total // 50)


def off_schedule(step: int, freeze: int, total: int) -> str | None:
    """Return a warning about a run that ends after ``step`` of ``total`` optimizer steps, or None if that is about all.

    Args:
        step: Optimizer steps done.
        freeze: The step after which the mask is fixed.
        total: Optimizer steps of the schedule.
    """
    if step > total + slack(total):
        return (
            f"{step} optimizer steps were made and the schedule was over after total_steps={total}: give the number "
            f"that the run makes"
        )
    if step >= total - slack(total):
        return None
    state = (
        f"the mask, to be fixed after step {freeze}, was still moving, and is cut at once"
        if step < freeze
        else f"the frozen phase, from step {freeze} on, was cut short"
    )
    return (
        f"{step} of total_steps={total} optimizer steps were made: {state}. total_steps counts optimizer steps, not "
        f"micro-batches that gradients are accumulated over"
    )


def occupancy(tensors: Sequence[ConstrainedTensor], processes: Processes) -> tuple[list[str], Tensor]:
    """Return names of tensors with a mask, and ``(tensors, 4)``: kept entries, entries, empty rows and rows of each.

    Rows are not counted where shards cut them.
    """
    masked = [tensor for tensor in tensors if tensor.has(MASK)]
    device = tensors[0].p.device
    counts = torch.zeros(len(masked), 4, dtype=exact_dtype(device), device=device)
    for index, tensor in enumerate(masked):
        whole_rows = tensor.part.start is None and tensor.layout.shape[-1] == tensor.part.shape[-1]
        for rows, *_ in tensor.pieces() if tensor.part.counts else ():
            mask = tensor.mask(rows)
            empty = (~mask.any(dim=1)).sum() if whole_rows else mask.new_zeros(())
            numbers = [mask.sum(), mask.numel(), empty, len(mask) * whole_rows]
            counts[index] += torch.stack([torch.as_tensor(n, device=device).to(counts.dtype) for n in numbers])
    return [tensor.name for tensor in masked], processes.add(counts)


def score_histogram(
    tensors: Sequence[ConstrainedTensor],
    value: Callable[[ConstrainedTensor, slice], Tensor],
    importance: Callable[[ConstrainedTensor, slice], Tensor | None],
    processes: Processes,
) -> Tensor:
    """Return a histogram of the scores F v², by which entries are ranked, around the threshold of their tensor.

    The threshold is the score that as many entries exceed as are kept. A set that only compares neighbours, such as
    N:M, keeps some entries below it and cuts others above.

    Args:
        tensors: The tensors with a mask and a split.
        value: Returns v = x + u of some rows.
        importance: Returns their F̂, or None for the magnitude alone.
        processes: The processes that hold the tensors.

    Returns:
        Counts ``(2, 2 · DECADES · BINS)`` on the CPU, of kept and of cut entries, by log10 of score over threshold;
        scores out of range are in the bins at the ends.
    """
    device, bins = tensors[0].p.device, (_MOST - _LEAST) * BINS
    counts = torch.zeros(len(tensors), 2, bins, dtype=exact_dtype(device), device=device)
    for index, tensor in enumerate(tensors):
        for rows, *_ in tensor.pieces() if tensor.part.counts else ():
            score, weight = value(tensor, rows).float().square(), importance(tensor, rows)
            if weight is not None:
                score = score.mul_(weight.view(score.shape))
            place = score.log10_().nan_to_num_(nan=_LEAST, neginf=_LEAST).clamp_(_LEAST, _MOST)
            mask = tensor.mask(rows)
            for row, of in enumerate((mask, ~mask)):
                counts[index, row] += torch.histc(place[of], bins, _LEAST, _MOST).to(counts.dtype)
    found, reach = processes.add(counts).cpu(), DECADES * BINS
    about = found.new_zeros(2, 2 * reach)
    for of in found:
        above = of.sum(dim=0).flip(0).cumsum(0).flip(0)  # entries in this bin and beyond
        threshold = int((above >= of[0].sum()).sum()) - 1
        places = (torch.arange(bins) - threshold + reach).clamp(0, 2 * reach - 1)
        about.index_add_(1, places, of)
    return about
