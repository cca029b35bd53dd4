"""Against gradients that are not finite: one would end in every weight, moment and dual."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from elsa_lightning.layout.sharded import local

log = logging.getLogger(__name__)

_MOST = 20  # skipped steps in a row


class Guard:
    """Skips an optimizer's steps whose gradients are not finite, on all processes together.

    That takes the one look at the device that a step makes: whether to step cannot be taken back afterwards.

    Args:
        optimizer: Any torch optimizer. Under a GradScaler this is the scaler's business.
        add: Sums a number over the processes that hold different gradients.
    """

    def __init__(self, optimizer: Optimizer, add: Callable[[Tensor], Tensor]) -> None:
        self.optimizer, self.add = optimizer, add
        self.skipped = 0  # in a row

    def skips(self, step: int, loss: Any) -> bool:
        """Say whether a step is skipped, and if so take its gradients away, so that the optimizer does nothing.

        Args:
            step: Optimizer steps done, for the message.
            loss: Of this step, or None.

        Raises:
            ValueError: That goes on.
        """
        if not self._broken():
            self.skipped = 0
            return False
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        self.skipped += 1
        message = (
            f"after optimizer step {step} the gradients are not finite, and the step is skipped"
            f"{_where_not_finite(loss)}."
        )
        if self.skipped >= _MOST:
            raise ValueError(
                f"{message} That makes {self.skipped} in a row: the data or the loss is broken, or the run has "
                f"diverged. Lower the learning rate, clip gradients (gradient_clip_val), or look at the batch; the "
                f"checkpoints made so far are sound"
            )
        log.warning("Elsa: %s", message)
        return True

    @torch.no_grad()
    def _broken(self) -> bool:
        if any(getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel() and not gradient.is_sparse]
        broken = torch.zeros((), device=parameters[0].device)
        if gradients:
            largest = torch.stack([norm.to(broken.device) for norm in torch._foreach_norm(gradients, torch.inf)])
            broken = (~largest.isfinite()).any().float()
        return bool(self.add(broken))


def _where_not_finite(loss: Any) -> str:
    """Say on which processes a loss is not finite; all of them ask."""
    if not (isinstance(loss, Tensor) and dist.is_initialized()):
        return ""
    broken = torch.zeros(dist.get_world_size(), device=loss.device)
    broken[dist.get_rank()] = float(not bool(loss.detach().isfinite().all()))
    dist.all_reduce(broken)
    ranks = broken.nonzero().flatten().tolist()
    return f": the loss is not finite on process {', '.join(map(str, ranks))}" if ranks else ""
