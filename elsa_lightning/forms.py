"""The forms of the x-update on constrained tensors; :class:`elsa_lightning.ADMM` describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, cast, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.tensors import ConstrainedTensor

Prox = Literal["hard", "decoupled", "coupled"]


def check_prox(prox: str) -> Prox:
    """Return ``prox``; raise ValueError if there is no such form."""
    if prox not in get_args(Prox):
        raise ValueError(f"prox must be one of {get_args(Prox)}, got {prox!r}")
    return cast(Prox, prox)


def add_proximal_gradient(tensors: Iterable[ConstrainedTensor], penalty: float, scale: Tensor | None) -> None:
    """g ← g + λ (x − s), for ``coupled``.

    Args:
        tensors: Those with a split.
        penalty: λ.
        scale: Of the gradients, where a fused optimizer under a GradScaler takes it off by itself.
    """
    for tensor in tensors:
        if tensor.p.grad is None:
            continue
        for rows, *_ in tensor.pieces():
            towards = tensor.x(rows) - tensor.split(rows)
            grad = tensor.grad(rows)
            grad.add_((towards if scale is None else towards * scale).to(grad.dtype), alpha=penalty)


def pull(tensors: Iterable[ConstrainedTensor], gammas: Mapping[nn.Parameter, float]) -> None:
    """x ← (x + γ s)/(1 + γ), for ``decoupled``."""
    for tensor in tensors:
        gamma = gammas[tensor.p]
        for rows, *_ in tensor.pieces():
            x = tensor.x(rows)
            x.add_(tensor.split(rows) - x, alpha=gamma / (1 + gamma))


def relative_rates(optimizer: Optimizer, peaks: Sequence[float]) -> tuple[dict[nn.Parameter, float], list[float]]:
    """Return each parameter's learning rate over its largest, and the largest of each group.

    Args:
        optimizer: Asked at every step, because loading an optimizer's state replaces its groups.
        peaks: The largest of each group so far.
    """
    groups = optimizer.param_groups
    rates = [float(group["lr"]) for group in groups]
    known = [float(group.get("max_lr", group.get("initial_lr", 0.0))) for group in groups]
    former = [*peaks, *[0.0] * (len(groups) - len(peaks))]
    now = [max(found) for found in zip(rates, known, former, strict=True)]
    relative = [rate / peak if peak else 0.0 for rate, peak in zip(rates, now, strict=True)]
    return {p: rate for group, rate in zip(groups, relative, strict=True) for p in group["params"]}, now


def remember(tensors: Iterable[ConstrainedTensor], penalty: float, seed: Callable[[nn.Parameter], int]) -> None:
    """u ← u + x/κ and x ← 0 off the mask, where s = −u, for ``hard``.

    Args:
        tensors: Those with a split.
        penalty: κ.
        seed: Of the rounding of a parameter's split.
    """
    for tensor in tensors:
        of_rounding = seed(tensor.p)
        for rows, *_ in tensor.pieces():
            x, mask = tensor.x(rows), tensor.mask(rows)
            split = tensor.split(rows).sub_(x.masked_fill(mask, 0), alpha=1 / penalty)
            tensor.set_split(rows, split, of_rounding)
            x.mul_(mask)
