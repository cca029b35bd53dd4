"""Makes early stopping and best checkpoints wait until the mask is fixed; before that the densest model is best."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from elsa_lightning.errors import UserError
from elsa_lightning.schedule import Schedule

_NO_QUALITY = ("step", "epoch", "elsa")  # monitors of these keep the latest checkpoint, or watch the method itself


class Monitors:
    """Disables early stopping and the choice of best checkpoints until the mask is fixed.

    Attributes:
        count: Whether the mask is fixed, so that metrics are those of the intended sparsity.
    """

    def __init__(self) -> None:
        self.count = False
        self._validated = False
        self._away: list[Callback] = []
        self._order: list[Callback] = []

    def check(self, trainer: Trainer, schedule: Schedule) -> None:
        """Raise UserError if early stopping could never act, because the mask is fixed only at the run's end."""
        if schedule.frozen == 0 and (stoppers := _stoppers(trainer)):
            raise UserError(
                f"{type(stoppers[0]).__name__}(monitor={stoppers[0].monitor!r}) and ElsaCallback(frozen=0) do not go "
                f"together: until its end the run compares weights that are not sparse yet. Set frozen above 0 (0.4 is "
                f"the default), so that early stopping counts from there, or leave it out"
            )

    def begin(self, trainer: Trainer, count: bool) -> None:
        """Remove early stopping from the callbacks, unless the mask is fixed already.

        Args:
            trainer: The run's Trainer.
            count: Whether the mask is fixed.
        """
        self.count = count
        if count:
            return
        self._away, self._order = list(_stoppers(trainer)), list(_callbacks(trainer))
        trainer.callbacks = [c for c in self._order if c not in self._away]  # type: ignore[attr-defined]
        if watching := [*self._away, *_savers(trainer)]:
            names = ", ".join(f"{type(c).__name__}(monitor={c.monitor!r})" for c in watching)  # type: ignore[attr-defined]
            rank_zero_info(f"Elsa: {names} count from when the mask is fixed; before, the best would be the densest")
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            rank_zero_warn(
                "Elsa: ReduceLROnPlateau takes the rising sparsity for a plateau and lowers the learning rate before "
                "the model can recover; use a schedule of fixed length"
            )

    def look(self, trainer: Trainer, epoch_ended: bool) -> None:
        """Raise UserError if early stopping, which is disabled so far, would have missed the metric that it monitors.

        Args:
            trainer: The run's Trainer.
            epoch_ended: Whether a training epoch has ended, with all its hooks, some of which may log the metric; else
                a validation has. Each stopper checks at one of the two.
        """
        self._validated |= not epoch_ended
        metrics = trainer.callback_metrics
        for stopper in self._away if self._validated else ():
            assert isinstance(stopper, EarlyStopping)
            if stopper._check_on_train_epoch_end != epoch_ended:
                continue
            if stopper.strict and str(stopper.monitor).startswith("val") and stopper.monitor not in metrics:
                raise UserError(
                    f"{type(stopper).__name__} monitors {stopper.monitor!r}, and nothing logs that; there are "
                    f"{', '.join(sorted(metrics)) or 'no metrics'}"
                )

    def open(self, trainer: Trainer) -> None:
        """Enable the monitors, without memory of earlier metrics; earlier checkpoints are the first to be replaced."""
        self.count = True
        self._forget(trainer)
        self.put_back(trainer)

    def end(self, trainer: Trainer) -> None:
        """Make sure that a run that ended before its mask was fixed leaves no best checkpoint."""
        if not self.count and any(saver.best_model_path for saver in _savers(trainer)):
            self._forget(trainer)
            rank_zero_warn(
                "Elsa: the run ended before its mask was fixed, so no checkpoint is the best one (ckpt_path='best'); "
                "'last' or a path has the run's latest weights"
            )
        self.put_back(trainer)

    def put_back(self, trainer: Trainer) -> None:
        """Put early stopping back in its place among the callbacks."""
        if self._away:
            now = _callbacks(trainer)
            former = [c for c in self._order if c in now or c in self._away]
            trainer.callbacks = [*former, *(c for c in now if c not in former)]  # type: ignore[attr-defined]
            self._away = []

    @staticmethod
    def _forget(trainer: Trainer) -> None:
        for saver in _savers(trainer):
            worst = torch.tensor(float("-inf" if saver.mode == "max" else "inf"))
            saver.best_k_models = dict.fromkeys(saver.best_k_models, worst)
            saver.kth_value, saver.best_model_path, saver.best_model_score = worst, "", None


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _stoppers(trainer: Trainer) -> list[EarlyStopping]:
    return [c for c in _callbacks(trainer) if isinstance(c, EarlyStopping) and _of_quality(c.monitor)]


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in _callbacks(trainer) if isinstance(c, ModelCheckpoint) and _of_quality(c.monitor)]


def _of_quality(monitor: str | None) -> bool:
    return monitor is not None and monitor.split("/")[0].rstrip("0123456789_") not in _NO_QUALITY
