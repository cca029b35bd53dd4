"""Skips steps whose gradients are not finite, since a single one would spread to every weight, moment and dual."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout.rows import on_host
from elsa_lightning.layout.sharded import Processes, local
from elsa_lightning.optim.rounding import hazard

log = logging.getLogger(__name__)

_MOST = 20  # consecutive skipped steps after which the run fails


class Guard:
    """Skips an optimizer's steps whose gradients are not finite, on all processes together.

    The check is the only synchronization with the device in a step: a step, once made, cannot be taken back.

    Args:
        optimizer: Any torch optimizer. Under a GradScaler the check is left to the scaler.
        processes: The processes that must decide alike: they hold parts of the parameters, or copies of them (DDP).
        copies: Whether some of them hold copies, which have to step the same tensors.
    """

    def __init__(self, optimizer: Optimizer, processes: Processes, copies: bool = False) -> None:
        self.optimizer, self.processes, self.copies = optimizer, processes, copies
        self.skipped = 0  # consecutive skipped steps

    def skips(self, step: int, loss: Any, graded: int = 0) -> bool:
        """Return whether a step is skipped; if so, remove its gradients, so that the optimizer does nothing.

        Args:
            step: Optimizer steps done, for the message.
            loss: The loss of this step, or None.
            graded: Number of tensors that have a gradient; copies must have equally many.

        Raises:
            ValueError: Too many steps in a row were skipped, or copies have gradients of different tensors.
        """
        if not self._broken(step, graded):
            self.skipped = 0
            return False
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        self.skipped += 1
        message = (
            f"after optimizer step {step} the gradients are not finite, and the step is skipped"
            f"{self._where_not_finite(loss)}."
        )
        if self.skipped >= _MOST:
            raise UserError(
                f"{message} That makes {self.skipped} in a row: "
                + (
                    hazard(self.optimizer)
                    or "the data or the loss is broken, or the run has diverged. Lower the learning rate, clip "
                    "gradients (gradient_clip_val), or look at the batch"
                )
                + "; the checkpoints made so far are sound"
            )
        log.warning("Elsa: %s", message)
        return True

    @torch.no_grad()
    def _broken(self, step: int, graded: int) -> bool:
        if any(getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel() and not gradient.is_sparse]
        gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
        none = torch.zeros((), device=parameters[0].device)

        def any_broken(numbers: Sequence[Tensor]) -> bool:
            finite = torch.stack([none, *(number.to(none) for number in numbers)]).isfinite().all()
            broken = 1 - finite.float()
            if not self.copies:
                return bool(self.processes.add(broken))
            found, total = self.processes.add(torch.stack([broken, torch.full_like(broken, graded)])).tolist()
            if total != graded * self.processes.size:
                raise UserError(
                    f"after optimizer step {step} this process has gradients of {graded} constrained tensors, and the "
                    f"replicas of {total / self.processes.size:g} in the mean: they would step and prune different "
                    f"weights, and be copies no longer. Average the gradients of all replicas before "
                    f"optimizer.step(), with zeros where one has none, as DistributedDataParallel does"
                )
            return bool(found)

        if not on_host(none):
            return any_broken(torch._foreach_norm(gradients, torch.inf) if gradients else [])
        # A sum takes half as long as the extremes, and is finite only where all entries are.
        return any_broken([g.sum() for g in gradients]) and any_broken([t for g in gradients for t in g.aminmax()])

    def _where_not_finite(self, loss: Any) -> str:
        """Describe on which processes the loss is not finite; every process must call this."""
        if not self.processes.groups or not dist.is_initialized():
            return ""
        device = next(p.device for group in self.optimizer.param_groups for p in group["params"])
        broken = torch.zeros(dist.get_world_size(), device=device)
        if isinstance(loss, Tensor):
            broken[dist.get_rank()] = float(not bool(loss.detach().isfinite().all()))
        ranks = self.processes.add(broken).nonzero().flatten().tolist()
        return f": the loss is not finite on process {', '.join(map(str, ranks))}" if ranks else ""
