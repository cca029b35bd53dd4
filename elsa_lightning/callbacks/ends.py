"""When and how a run ends, as far as Lightning knows: its length, its last step, requests to stop."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from elsa_lightning.admm import ADMM
from elsa_lightning.errors import UserError
from elsa_lightning.watch import slack


def total_steps(trainer: Trainer) -> int:
    """Return how many steps each optimizer makes in the whole run."""
    steps = float(trainer.estimated_stepping_batches)
    if not 0 <= steps < math.inf:  # Lightning returns -1 or infinity if it cannot know
        raise UserError(
            "ElsaCallback needs to know how long the run is, and this data has no length: set the Trainer's max_steps"
        )
    accumulating = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if accumulating and trainer.max_epochs not in (None, -1) and trainer.num_training_batches < math.inf:
        each = [accumulating[-1].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
        steps = float(sum(math.ceil(trainer.num_training_batches / batches) for batches in each))
    if trainer.max_steps != -1:  # it counts the steps of all optimizers together
        steps = min(steps, trainer.max_steps / max(1, len(trainer.optimizers)))
    return max(1, int(steps))


def attached(trainer: Trainer) -> list[ADMM]:
    """Return the ADMMs that constrain the weights of a run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c.admm for c in callbacks if isinstance(getattr(c, "admm", None), ADMM)]


def trains_nothing(trainer: Trainer) -> bool:
    """Return whether a fit makes no step, so that Lightning skips all hooks between its start and its end."""
    return 0 in (trainer.max_steps, trainer.max_epochs)


def had_ended(trainer: Trainer) -> bool:
    """Return, at the end of a fit, whether it resumed a run with no step left, so that Lightning trained nothing."""
    return bool(trainer.fit_loop.restarting)  # set when a loop is restored, cleared when it ran


def is_stopping(trainer: Trainer) -> bool:
    """Return whether a request to stop was made and will be heeded."""
    if not trainer.should_stop or trainer.sanity_checking:
        return False
    epochs = trainer.current_epoch + trainer.is_last_batch
    return trainer.global_step >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)


def is_early(admm: ADMM) -> bool:
    """Return whether a run ends before its mask is fixed; a few skipped steps do not count."""
    return 0 < admm.step < admm.schedule.freeze_step(admm.total_steps) - slack(admm.total_steps)


def is_last_step(trainer: Trainer) -> bool:
    """Return whether the run, as planned, ends with this batch."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return last_epoch and trainer.is_last_batch


def unfinished(admm: ADMM, planned: bool) -> str:
    """Return the warning about a run that ended before its schedule did.

    Args:
        admm: The run's suspended ADMM.
        planned: Whether Lightning ended the run as planned.
    """
    fixed = admm.schedule.freeze_step(admm.total_steps)
    recovered = (
        f"the kept weights had {admm.step - fixed} steps on the fixed mask"
        if admm.schedule.frozen > 0 and admm.step >= fixed
        else "the model had no time to recover"
    )
    message = (
        f"Elsa is unfinished: {admm.step} of {admm.total_steps} optimizer steps. The zeros are exact at the full "
        f"sparsity, and {recovered}; ckpt_path resumes the run where it was."
    )
    if planned:
        message += (
            f" It ends here as planned, in fewer than Lightning counts (manual optimization, several optimizers, data "
            f"that ends): give ElsaCallback(total_steps={admm.step}), which is what it makes."
        )
    return message
