"""Stochastic rounding of bfloat16 weights under any optimizer, so that small steps are not lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout import fused
from elsa_lightning.layout.fsdp1 import FlatSlice
from elsa_lightning.layout.lowbit import round_to_bfloat16
from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import Part, local
from elsa_lightning.optim.moments import dtype_name

Seed = Callable[[nn.Parameter], int]


def moves_alike_everywhere(optimizer: Optimizer) -> bool:
    """Return whether a step depends on the gradients alone and not on the values of the weights.

    This holds for Adam and its kin without weight decay. It is found out by trial: an optimizer of the same class and
    settings steps two small parameters, one of them at 0, with the same gradients, and a third that is set to 0 before
    each step, as :class:`WeightRounding` does. If the third ends with another state, that state depends on the weights'
    values, such as an average of them.
    """
    groups = [group for group in optimizer.param_groups if group["params"]]
    return not any(group.get("weight_decay") for group in groups) and all(_is_alike(optimizer, g) for g in groups)


@torch.no_grad()
def _is_alike(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    kind, device = type(optimizer), group["params"][0].device
    known = inspect.signature(kind).parameters.keys() - {"params"}
    options = {key: value for key, value in {**optimizer.defaults, **group}.items() if key in known}
    numbers = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 8, generator=numbers).to(device) for _ in range(3)]
    found = []
    zeros, apart = torch.zeros(4, 8, device=device), torch.linspace(-1, 2, 32, device=device).view(4, 8)
    for start, from_zero in ((zeros, False), (apart, False), (apart, True)):
        p = nn.Parameter(start.clone())
        try:
            stepped = kind([p], **{**options, "lr": 0.01})
            for gradient in gradients:
                p.grad = gradient.clone()
                before = p.clone() if from_zero else zeros
                p.sub_(before)
                stepped.step()
                p.add_(before)
        except Exception:  # foreign code may raise anything; then the answer is no
            return False
        kept = {key: t for key, t in stepped.state.get(p, {}).items() if isinstance(t, Tensor) and t.shape == p.shape}
        found.append({"step": p.detach() - start, **kept})
    (at_zero, elsewhere, aside), names = found, found[1].keys()
    return (
        bool(at_zero["step"].isfinite().all())
        and _is_close(at_zero["step"], elsewhere["step"])
        and names == aside.keys()
        and all(_is_close(elsewhere[name], aside[name]) for name in names)
    )


def _is_close(one: Tensor, other: Tensor) -> bool:
    one, other = one.float(), other.float()
    return torch.allclose(one, other, rtol=1e-2, atol=float(one.abs().max()) / 100)


def hazard(optimizer: Optimizer) -> str | None:
    """Return a message if an optimizer's settings make weights NaN at any learning rate, else None."""
    if (stale := stale_curvature(optimizer)) is not None:
        return stale
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or float(torch.tensor(eps, dtype=torch.float16)) > 0:
            continue
        for p in group["params"]:
            moment = optimizer.state.get(p, {}).get("exp_avg_sq")
            if p.dtype == torch.float16 and (moment is None or moment.dtype == torch.float16):
                return (
                    f"eps={eps:g} is 0 in float16, the dtype of the weights, so that a weight without gradient becomes "
                    f"NaN: set eps=1e-4, or keep float32 weights (precision 16-mixed)"
                )
    return None


def stale_curvature(optimizer: Optimizer) -> str | None:
    """Return a message if an optimizer estimates curvature from many steps, between which pruning moves the weights."""
    if not isinstance(optimizer, torch.optim.LBFGS) or (most := optimizer.param_groups[0]["history_size"]) <= 5:
        return None
    return (
        f"LBFGS takes the curvature from its last {most} steps, and pruning moves the weights between them, so that it "
        f"diverges, with a line search too: set history_size=1"
    )


def steps_rows(optimizer: Optimizer) -> Callable[[nn.Parameter], bool] | None:
    """Return the optimizer's method that tells which parameters it steps by rows (see :class:`Around`), or None."""
    return getattr(optimizer, "steps_rows", None)


class Around:
    """Rounds bfloat16 weights around the step of some rows, in an optimizer that steps them piece by piece.

    Such an optimizer has an attribute ``around``, and a method ``steps_rows(p)`` that tells which parameters it steps
    so.

    Args:
        parts: The part of each parameter that this process holds.
        seed: Returns the seed for rounding a parameter.
    """

    def __init__(self, parts: Mapping[nn.Parameter, Part], seed: Seed) -> None:
        self.parts, self.seed = parts, seed

    def takes(self, p: nn.Parameter) -> bool:
        """Return whether a parameter is bfloat16, and its rows lie below each other in memory."""
        x = local(p)
        return p.dtype == torch.bfloat16 and self.parts[p].start is None and x.dim() > 1 and x.is_contiguous()

    def pieces(self, p: nn.Parameter) -> Iterator[slice]:
        """Yield the rows of each piece."""
        for piece in Rows(self.parts[p], local(p)).pieces():
            yield piece.rows

    @contextmanager
    def step(self, p: nn.Parameter, rows: slice) -> Iterator[None]:
        """Zero rows of the weights for the optimizer's step, then restore them with the step added."""
        layout = Rows(self.parts[p], local(p))
        now = layout.take(local(p), rows)
        former = now.clone()
        now.zero_()
        try:
            yield
        except BaseException:
            now.copy_(former)
            raise
        _add_rounded(layout, now, former, rows, self.seed(p))


class WeightRounding:
    """Rounds bfloat16 weights stochastically, whatever optimizer trains them.

    Rounding to nearest loses every step below half a unit of a weight's last place. So the optimizer steps from 0,
    where bfloat16 holds the step to 3 digits; the step is then added to the weights in float32, and the sum is rounded
    up or down at random, exact in the mean. This needs an optimizer whose step does not depend on the weights' values,
    and a copy of the weights during the step: of one piece at a time if the optimizer steps by pieces, as
    :class:`~elsa_lightning.optim.adam8bit.Adam8bit` does, else of all weights.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._alike: dict[tuple[Any, ...], bool] = {}
        self._stepping: Any = None  # an optimizer that steps by pieces, during its step

    @property
    def active(self) -> bool:
        """Whether weights are set aside for a step that goes on."""
        return bool(self._before) or self._stepping is not None

    @torch.no_grad()
    def set_aside(self, optimizer: Optimizer, parts: Mapping[nn.Parameter, Part], seed: Seed) -> str | None:
        """Zero the bfloat16 weights about to be stepped; return a warning if that is not possible for all weights.

        Args:
            optimizer: The optimizer about to step.
            parts: The part of each parameter that this process holds.
            seed: Returns the seed for rounding a parameter, for weights that are stepped by pieces.
        """
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        low = [p for p in trained if p.dtype == torch.bfloat16]
        if low and not self._moves_alike(optimizer):
            return _lost(optimizer, low[0].dtype)
        warning = _lost(optimizer, torch.float16) if any(p.dtype == torch.float16 for p in trained) else None
        if not low:
            return warning
        by_rows, around = steps_rows(optimizer), Around(parts, seed)
        if by_rows is not None:
            self._stepping = optimizer
            self._stepping.around = around
        for p in low:
            if p.grad is not None and not (by_rows is not None and by_rows(p) and around.takes(p)):
                x = local(p)
                self._before[p] = x.clone()
                x.zero_()
        return warning

    def _moves_alike(self, optimizer: Optimizer) -> bool:
        key = tuple(group.get("weight_decay") for group in optimizer.param_groups)  # a schedule may change it
        if key not in self._alike:
            self._alike[key] = moves_alike_everywhere(optimizer)
        return self._alike[key]

    @torch.no_grad()
    def put_back(self, parts: Mapping[nn.Parameter, Part], seed: Seed) -> None:
        """Restore the weights with their steps added, some rows at a time.

        Args:
            parts: The part of each parameter that this process holds.
            seed: Returns the seed for rounding a parameter.
        """
        for p, before in self._before.items():
            x = local(p)
            flat = parts[p].start is not None
            if not flat and (x.dim() < 2 or not x.is_contiguous()):  # small, or rows that are not below each other
                rows = Rows(parts[p], x if x.dim() else x[None])
                bits = rows.noise(slice(0, rows.count), seed(p)).view(x.shape)
                x.copy_(round_to_bfloat16(before.float() + x, bits))
                continue
            layout = (FlatSlice if flat else Rows)(parts[p], x)
            for piece in layout.pieces():
                now, former = (layout.take(t, piece.rows) for t in (x, before))
                _add_rounded(layout, now, former, piece.rows, seed(p))
        self._end()

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights from before an interrupted step."""
        for p, before in self._before.items():
            local(p).copy_(before)
        self._end()

    def _end(self) -> None:
        if self._stepping is not None:
            self._stepping.around = None
        self._before, self._stepping = {}, None


def _lost(optimizer: Optimizer, dtype: torch.dtype) -> str:
    """Return the warning that weights of a dtype are rounded to nearest."""
    return (
        f"The weights are {dtype_name(dtype)}, and steps of {type(optimizer).__name__} that are small beside them are "
        f"lost to rounding. Use bfloat16 weights with an Adam or SGD without weight_decay, or keep float32 weights "
        f"(precision bf16-mixed)." + (f" {warning}." if (warning := hazard(optimizer)) else "")
    )


def _add_rounded(layout: Rows, now: Tensor, former: Tensor, rows: slice, seed: int) -> None:
    """Write ``former + now``, bfloat16 rows of a layout, to ``now``, rounded stochastically."""
    places = layout.places(rows, seed)
    if places is not None and fused.takes(now, former):
        fused.add_rounded(now, former, places)
    else:
        now.copy_(round_to_bfloat16(former.float() + now, layout.noise(rows, seed)))
