"""Makes early stopping and best checkpoints wait until the mask is fixed; before that the densest model is best."""

from __future__ import annotations

from collections.abc import Collection, Iterable

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
        stale: Monitored metrics whose last validation was before that; they count from the next one.
    """

    def __init__(self) -> None:
        self.count = False
        self.stale: list[str] = []
        self._validated = False
        self._known: set[str] = set()  # metrics that there were when a validation began
        self._of_validation: set[str] = set()  # metrics that validations added
        self._away: list[EarlyStopping] = []
        self._order: list[Callback] = []

    def check(self, trainer: Trainer, schedule: Schedule) -> None:
        """Raise UserError if early stopping could never act, because the mask is fixed only at the run's end."""
        if schedule.frozen == 0 and (stoppers := _stoppers(trainer)):
            raise UserError(
                f"{type(stoppers[0]).__name__}(monitor={stoppers[0].monitor!r}) and ElsaCallback(frozen=0) do not go "
                f"together: until its end the run compares weights that are not sparse yet. Set frozen above 0 (0.4 is "
                f"the default), so that early stopping counts from there, or leave it out"
            )

    def begin(self, trainer: Trainer, count: bool, stale: Iterable[str] = ()) -> None:
        """Remove early stopping from the callbacks, unless the mask is fixed already.

        Args:
            trainer: The run's Trainer.
            count: Whether the mask is fixed.
            stale: Metrics that no validation has measured since, if it is; known of a resumed run.
        """
        self.count, self.stale = count, list(stale) if count else []
        self._order = list(_callbacks(trainer))
        self._away = [c for c in _stoppers(trainer) if not count or c.monitor in self.stale]
        trainer.callbacks = [c for c in self._order if c not in self._away]  # type: ignore[attr-defined]
        if count:
            return
        if watching := [*self._away, *_savers(trainer)]:
            names = ", ".join(f"{type(c).__name__}(monitor={c.monitor!r})" for c in watching)  # type: ignore[attr-defined]
            rank_zero_info(f"Elsa: {names} count from when the mask is fixed; before, the best would be the densest")
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            rank_zero_warn(
                "Elsa: ReduceLROnPlateau takes the rising sparsity for a plateau and lowers the learning rate before "
                "the model can recover; use a schedule of fixed length"
            )

    def before_validation(self, trainer: Trainer) -> None:
        """Let the metrics of validations count if the mask is fixed, and note which ones there are before this one."""
        if self.stale:
            self._forget(c for c in _savers(trainer) if c.monitor in self.stale)
            self.stale = []
            self.put_back(trainer)
        self._known = set(trainer.callback_metrics)

    def look(self, trainer: Trainer, epoch_ended: bool) -> None:
        """Raise UserError if early stopping, which is disabled so far, would have missed the metric that it monitors.

        Args:
            trainer: The run's Trainer.
            epoch_ended: Whether a training epoch has ended, with all its hooks, some of which may log the metric; else
                a validation has. Each stopper checks at one of the two.
        """
        metrics = trainer.callback_metrics
        if not epoch_ended:
            self._validated = True
            self._of_validation |= metrics.keys() - self._known
        for stopper in self._away if self._validated else ():
            if stopper._check_on_train_epoch_end != epoch_ended:
                continue
            if stopper.strict and str(stopper.monitor).startswith("val") and stopper.monitor not in metrics:
                raise UserError(
                    f"{type(stopper).__name__} monitors {stopper.monitor!r}, and nothing logs that; there are "
                    f"{', '.join(sorted(metrics)) or 'no metrics'}"
                )

    def open(self, trainer: Trainer) -> None:
        """Enable the monitors, without memory of earlier metrics; earlier checkpoints are the first to be replaced.

        A metric of validation is still that of a denser model. Early stopping waits for the next validation, and at its
        start checkpoints are forgotten once more; if none follows, one of them may be the best, as they are sparse.
        """
        self.count = True
        watching = [*self._away, *_savers(trainer)]
        self.stale = sorted({str(c.monitor) for c in watching} & self._of_validation)  # type: ignore[attr-defined]
        self._forget(_savers(trainer))
        self.put_back(trainer, but=self.stale)

    def end(self, trainer: Trainer) -> None:
        """Make sure that a run that ended before its mask was fixed leaves no best checkpoint."""
        if not self.count and any(saver.best_model_path for saver in _savers(trainer)):
            self._forget(_savers(trainer))
            rank_zero_warn(
                "Elsa: the run ended before its mask was fixed, so no checkpoint is the best one (ckpt_path='best'); "
                "'last' or a path has the run's latest weights"
            )
        self.put_back(trainer)

    def put_back(self, trainer: Trainer, but: Collection[str] = ()) -> None:
        """Put early stopping back in its place among the callbacks.

        Args:
            trainer: The run's Trainer.
            but: Metrics whose early stopping stays away.
        """
        away = [c for c in self._away if c.monitor in but]
        if len(away) < len(self._away):
            now = _callbacks(trainer)
            former = [c for c in self._order if c in now or (c in self._away and c not in away)]
            trainer.callbacks = [*former, *(c for c in now if c not in former)]  # type: ignore[attr-defined]
            self._away = away

    @staticmethod
    def _forget(savers: Iterable[ModelCheckpoint]) -> None:
        for saver in savers:
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
