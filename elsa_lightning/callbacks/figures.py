"""Logs the figures of each update (residuals, sparsity, stationarity) to loggers, progress bar and monitors."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.health import Health, diverged
from elsa_lightning.errors import UserError
from elsa_lightning.report import mask_mosaic, shares_map
from elsa_lightning.watch import UPDATED, Stationarity, Update, figures

_PICTURES = 10  # how often a run logs pictures of the masks and the share that each tensor keeps


def log_settings(trainer: Trainer, module: LightningModule, admm: ADMM, learning_rate: str | None = None) -> None:
    """Add the settings of the method to the hyperparameters of every logger, so that runs can be compared by them.

    Args:
        trainer: The run's Trainer, before Lightning has logged the module's own hyperparameters.
        module: The run's module.
        admm: The run's ADMM.
        learning_rate: Logged instead of the optimizer's rate, if the run has yet to choose that.
    """
    ours: dict[str, Any] = {
        "elsa/sparsity": getattr(admm.constraint, "sparsity", None),
        "elsa/constraint": str(admm.constraint),
        "elsa/form": admm.prox,
        "elsa/penalty": admm.schedule.penalty,
        "elsa/frozen": admm.schedule.frozen,
        "optimizer/name": type(admm.optimizer).__name__,
        "optimizer/lr": learning_rate or admm.optimizer.param_groups[0].get("lr"),
        "trainer/steps": trainer.max_steps if trainer.max_steps != -1 else None,
        "trainer/epochs": trainer.max_epochs,
    }
    ours = {name: value for name, value in ours.items() if value is not None}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # its plugin reads only the first of several records
            holders: list[Any] = [module, trainer.datamodule]  # type: ignore[attr-defined]
            theirs = {
                k: v for h in holders if getattr(h, "_log_hyperparams", False) for k, v in h.hparams_initial.items()
            }
            logger.log_hyperparams({k: v for k, v in theirs.items() if k != "_class_path"} | ours)
        else:
            logger.log_hyperparams(ours)


class Figures:
    """Logs each update once.

    Args:
        prefix: Prefix of the names; each of several callbacks of one Trainer has its own.
    """

    def __init__(self, prefix: str = "elsa") -> None:
        self.prefix = prefix
        self._logged: Update | None = None
        self._measured: Stationarity | None = None
        self._pictures = 0
        self._health = Health()

    def log(self, trainer: Trainer, pl_module: LightningModule, admm: ADMM, outputs: Any) -> None:
        """Log a new update, and warn of signs of trouble.

        Args:
            trainer: The run's Trainer.
            pl_module: The run's module.
            admm: The run's ADMM.
            outputs: The output of the training step.

        Raises:
            ValueError: The weights are no longer finite.
        """
        self._health.add_loss(outputs)
        update = admm.last_update
        if update is None or update is self._logged:
            return
        self._logged = update
        measured, self._measured = self._measured, admm.last_stationarity
        found = figures(update, None if self._measured is measured else self._measured)
        if not all(math.isfinite(value) for value in (found[name] for name in UPDATED)):
            raise UserError(diverged(admm, "clip gradients (gradient_clip_val)"))
        for warning in self._health.warnings(admm, found["primal_residual"], found["mask_flips"], found["sparsity"]):
            rank_zero_warn(warning)
        metrics = {f"{self.prefix}/{name}": value for name, value in found.items()}
        shares = self._due(admm)
        for logger in trainer.loggers:
            logger.log_metrics(metrics | self._spread(shares), step=trainer.global_step)
        # self.log serves only progress bar and monitors: log_every_n_steps would drop most of these from the logger
        shown = {f"{self.prefix}/primal_residual", f"{self.prefix}/sparsity"}
        for name, value in metrics.items():
            pl_module.log(name, value, prog_bar=name in shown, logger=False)
        self._draw(trainer, admm, shares)

    def _due(self, admm: ADMM) -> dict[str, float]:
        """Return the share of entries that each tensor keeps, over all processes, if a picture is due."""
        due = math.ceil(_PICTURES * admm.step / admm.total_steps)
        if due <= self._pictures:
            return {}
        self._pictures = due
        return admm.shares()

    def _spread(self, shares: dict[str, float]) -> dict[str, float]:
        """Return least, median and largest share: one number a tensor would be too many."""
        if not shares:
            return {}
        of = {"least": min(shares.values()), "median": statistics.median(shares.values()), "most": max(shares.values())}
        return {f"{self.prefix}/kept_{name}": value for name, value in of.items()}

    def _draw(self, trainer: Trainer, admm: ADMM, shares: dict[str, float]) -> None:
        """Log pictures of the shares, and of the masks if they are not sharded."""
        for logger in trainer.loggers if shares else ():
            if isinstance(logger, TensorBoardLogger):
                pictures = {"kept": shares_map(shares)}
                if not admm.sharded:
                    pictures["masks"] = mask_mosaic(mask for _, mask in admm.each_mask())
                for name, picture in pictures.items():
                    logger.experiment.add_image(f"{self.prefix}/{name}", picture, trainer.global_step, dataformats="HW")
