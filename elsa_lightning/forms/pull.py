"""Forms whose weights approach the set, and that store s = z − u: coupled, published, decoupled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elsa_lightning.forms.base import Form, Step, gradient, relative_rates
from elsa_lightning.layout.lowbit import chosen
from elsa_lightning.tensors import ConstrainedTensor


class Pull(Form):
    """Base of these forms: the split is s = z − u, which is v on the mask and −u off it; projections leave x alone."""

    def former_z(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return s, which is z on the mask."""
        return tensor.split(rows)

    def settle(
        self, tensor: ConstrainedTensor, rows: slice, v: Tensor, mask: Tensor, z: Tensor, factor: Any, seed: Any
    ) -> None:
        """Store s = z − u, which is v on the mask and −u off it."""
        tensor.set_split(rows, chosen(mask, v, v * -factor), seed)


class Coupled(Pull):
    """λ(x − s) is added to the gradient after accumulation and clipping, and goes through the optimizer's moments.

    This is the published form, except that the first projection already uses the gradient of the first step.
    """

    name = "coupled"
    penalty = 0.01

    def importance(self, moment: Tensor | None, first: bool) -> Tensor | None:
        """Return F̂ itself."""
        return moment

    def before_step(self, tensors: Sequence[ConstrainedTensor], penalty: float, scale: Tensor | None) -> None:
        """Add the pull to the gradients: g ← g + λ (x − s)."""
        if penalty == 0 or not tensors:
            return
        groups = tensors[0].optimizer.param_groups
        rising = {p for group in groups if group.get("maximize") for p in group["params"]}  # steps follow the gradient
        for tensor in tensors:
            if tensor.p.grad is None:
                continue
            alpha = -penalty if tensor.p in rising else penalty
            for rows, *_ in tensor.pieces():
                towards = tensor.x(rows) - tensor.split(rows)
                grad = tensor.grad(rows)
                grad.add_((towards if scale is None else towards * scale).to(grad.dtype), alpha=alpha)

    def after_step(self, step: Step) -> None:
        """Leave the weights as the optimizer's step left them."""

    def inverse_penalty(self, tensor: ConstrainedTensor, penalty: float, off: Tensor, kept: Tensor) -> Any:
        """Return 1/λ, in the plain metric."""
        return 1 / penalty

    def direction(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return ∇f."""
        return gradient(tensor, rows)


class Published(Coupled):
    """``coupled`` with the first projection by magnitude: Lee et al., 2026 (arXiv:2510.01650), to the letter."""

    name = "published"

    def importance(self, moment: Tensor | None, first: bool) -> Tensor | None:
        """Return F̂ from the second projection on."""
        return None if first else moment


class Decoupled(Pull):
    """ADMM in the optimizer's own metric: after its step x ← (x + γ s)/(1 + γ), γ = κ · lr/lr_max.

    As in decoupled weight decay, the pull bypasses the gradient, so the second moment estimates ∇f alone. lr_max is the
    group's ``max_lr`` or ``initial_lr``, or the largest rate so far if that is more. λ in that metric is κ/lr_max.
    """

    name = "decoupled"
    penalty = 2.0

    def __init__(self) -> None:
        self._peaks: list[float] = []  # largest learning rate of each group

    def after_step(self, step: Step) -> None:
        """Pull the weights towards s: x ← (x + γ s)/(1 + γ)."""
        if step.penalty == 0:
            return
        rates, self._peaks = relative_rates(step.optimizer, self._peaks)
        for tensor in step.tensors.values():
            gamma = step.penalty * rates[tensor.p]
            for rows, *_ in tensor.pieces():
                x = tensor.x(rows)
                x.add_(tensor.split(rows) - x, alpha=gamma / (1 + gamma))

    def state_dict(self) -> dict[str, Any]:
        """Return the largest learning rates so far."""
        return {"peaks": list(self._peaks)}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._peaks = list(state_dict["peaks"])
