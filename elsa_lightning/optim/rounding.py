"""Steps that bfloat16 weights do not lose, whatever optimizer makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.fsdp1 import FlatSlice
from elsa_lightning.layout.lowbit import round_to_bfloat16
from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import Part, local
from elsa_lightning.optim.moments import dtype_name


def moves_alike_everywhere(optimizer: Optimizer) -> bool:
    """Say whether a step depends on the gradients alone and not on where the weights are.

    So it is for Adam and its kin without weight decay. Others are told by what they do: two small parameters, one at 0,
    get the same gradients from an optimizer of the same kind and settings.
    """
    groups = optimizer.param_groups
    return not any(group.get("weight_decay") for group in groups) and all(_is_alike(optimizer, g) for g in groups)


@torch.no_grad()
def _is_alike(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    kind, device = type(optimizer), group["params"][0].device
    known = inspect.signature(kind).parameters.keys() - {"params"}
    options = {key: value for key, value in {**optimizer.defaults, **group}.items() if key in known}
    numbers = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 8, generator=numbers).to(device) for _ in range(3)]
    steps = []
    for start in (torch.zeros(4, 8, device=device), torch.linspace(-1, 2, 32, device=device).view(4, 8)):
        p = nn.Parameter(start.clone())
        try:
            stepped = kind([p], **{**options, "lr": 0.01})
            for gradient in gradients:
                p.grad = gradient.clone()
                stepped.step()
        except Exception:  # anybody's code: what cannot be tried is not relied on
            return False
        steps.append(p.detach() - start)
    one, other = steps
    return bool(one.isfinite().all()) and torch.allclose(one, other, rtol=1e-2, atol=float(one.abs().max()) / 100)


def hazard(optimizer: Optimizer) -> str | None:
    """Return what of an optimizer's settings makes float16 weights NaN whatever the learning rate, or None."""
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


class WeightRounding:
    """Rounds bfloat16 weights stochastically, whatever optimizer trains them.

    To nearest, every step below half a unit of a weight's last place is lost. So the optimizer steps from 0, where
    bfloat16 holds its step to 3 digits, and the step is added to the weights in float32 and rounded up or down at
    random, exact in the mean. That takes a copy of the weights while the optimizer steps, and an optimizer whose
    step does not depend on where the weights are.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._alike: dict[tuple[Any, ...], bool] = {}

    @torch.no_grad()
    def set_aside(self, optimizer: Optimizer) -> str | None:
        """Zero the bfloat16 weights about to be stepped; return what to warn of where that cannot be done."""
        half = (torch.bfloat16, torch.float16)
        low = [p for group in optimizer.param_groups for p in group["params"] if p.dtype in half]
        if not low:
            return None
        if low[0].dtype != torch.bfloat16 or not self._moves_alike(optimizer):
            return (
                f"The weights are {dtype_name(low[0].dtype)}, and steps of {type(optimizer).__name__} that are small "
                f"beside them are lost to rounding. Use bfloat16 weights with an Adam or SGD without weight_decay, or "
                f"keep float32 weights (precision bf16-mixed)."
                + (f" {warning}." if (warning := hazard(optimizer)) else "")
            )
        for p in low:
            if p.grad is not None:
                x = local(p)
                self._before[p] = x.clone()
                x.zero_()
        return None

    def _moves_alike(self, optimizer: Optimizer) -> bool:
        key = tuple(group.get("weight_decay") for group in optimizer.param_groups)  # a schedule may change it
        if key not in self._alike:
            self._alike[key] = moves_alike_everywhere(optimizer)
        return self._alike[key]

    @torch.no_grad()
    def put_back(
        self, parts: Mapping[nn.Parameter, Part], noise: Callable[[Rows, slice, nn.Parameter], Tensor]
    ) -> None:
        """Add the steps to the weights, some rows at a time.

        Args:
            parts: Which part of each parameter this process holds.
            noise: Makes random int32 for some rows of a layout.
        """
        for p, before in self._before.items():
            x = local(p)
            flat = parts[p].start is not None
            if not flat and (x.dim() < 2 or not x.is_contiguous()):  # small, or rows that are not below each other
                rows = Rows(parts[p], x if x.dim() else x[None])
                bits = noise(rows, slice(0, rows.count), p).view(x.shape)
                x.copy_(round_to_bfloat16(before.float() + x, bits))
                continue
            layout = (FlatSlice if flat else Rows)(parts[p], x)
            for piece in layout.pieces():
                now, former = (layout.take(t, piece.rows) for t in (x, before))
                now.copy_(round_to_bfloat16(former.float() + now, noise(layout, piece.rows, p)))
        self._before = {}

    @torch.no_grad()
    def undo(self) -> None:
        """Return to the weights before a step that was interrupted."""
        for p, before in self._before.items():
            local(p).copy_(before)
        self._before = {}
