"""Progress for output that goes to a file: lines, not a bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn


class LineProgress(ProgressBar):
    """Prints a line now and then, where a bar that is drawn over itself would fill a log.

    Args:
        seconds: Least time between two lines.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._said = self._started = time.monotonic()
        self._first = 0

    def enable(self) -> None:
        """Print from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Print no more."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the time."""
        self._said = self._started = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say, if it is time, where the run is."""
        if self._due():
            made, total = trainer.global_step - self._first, trainer.estimated_stepping_batches
            each = (time.monotonic() - self._started) / max(1, made)
            left = each * (total - trainer.global_step)
            time_left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            self._say(trainer, pl_module, f"step {trainer.global_step} of {total}", f", about {time_left} left")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say, if it is time, where the validation is."""
        self._evaluated(trainer, pl_module, trainer.num_val_batches, args[2])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was measured in the middle of a run."""
        if self._enabled and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._say(trainer, pl_module, f"validated after step {trainer.global_step}")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say, if it is time, where the test is."""
        self._evaluated(trainer, pl_module, trainer.num_test_batches, args[2])

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say, if it is time, where the prediction is."""
        self._evaluated(trainer, pl_module, trainer.num_predict_batches, args[2])

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule, batches: Any, index: int) -> None:
        if self._due():
            total = sum(batches) if isinstance(batches, list) else batches
            self._say(trainer, pl_module, f"{trainer.state.stage}: batch {index + 1} of {total}")

    def _due(self) -> bool:
        return self._enabled and time.monotonic() - self._said >= self.seconds

    def _say(self, trainer: Trainer, pl_module: LightningModule, place: str, after: str = "") -> None:
        self._said = time.monotonic()
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        figures = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))]
        print(", ".join([place, *figures]) + after, flush=True)
