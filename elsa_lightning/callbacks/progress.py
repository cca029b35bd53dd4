"""Progress of a run: a bar with words on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from elsa_lightning.callbacks.ends import attached, is_last_step

_SHORT = {"train/loss": "loss", "val/perplexity": "perplexity", "test/perplexity": "perplexity"}


class State:
    """Describes a run's progress in words: sparsity and phase, and the time left."""

    def __init__(self) -> None:
        self._started, self._first = time.monotonic(), 0
        self._sparsity: float | None = None

    def begin(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._started, self._first = time.monotonic(), trainer.global_step

    def left(self, trainer: Trainer) -> str:
        """Return the time left at the mean pace so far, validation and saving included."""
        made, total = trainer.global_step - self._first, trainer.estimated_stepping_batches
        if made < 1 or not 0 < total < float("inf"):
            return ""
        seconds = (time.monotonic() - self._started) / made * max(0, total - trainer.global_step)
        return f"{duration(seconds)} left"

    def phase(self, trainer: Trainer, metrics: dict[str, Any]) -> str:
        """Return sparsity and phase of the mask in words; empty for a run without an ElsaCallback.

        Args:
            trainer: The run's Trainer.
            metrics: The metrics of the progress bar.
        """
        admm = next(iter(attached(trainer)), None)
        if admm is None:
            return ""
        found = [value for name, value in metrics.items() if name.endswith("/sparsity") and name.startswith("elsa")]
        self._sparsity = found[0] if found else self._sparsity
        if self._sparsity is None and not admm.frozen:
            return "nothing pruned yet"
        zeros = "" if self._sparsity is None else f"{100 * self._sparsity:.1f} % zeros, "
        if admm.frozen:
            return f"{zeros}mask fixed"
        rising = admm.schedule.tightness_at(admm.step, admm.total_steps) < 1
        return f"{zeros}rising" if rising else f"{zeros}mask moves"


def duration(seconds: float) -> str:
    """Return a time in words, at most 12 letters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def shown(metrics: dict[str, Any]) -> list[str]:
    """Return metrics in words, without those that :class:`State` shows or Lightning adds."""
    others = {name: value for name, value in metrics.items() if name != "v_num" and not name.startswith("elsa")}
    return [f"{_SHORT.get(name, name)} {v:.4g}" for name, v in others.items() if isinstance(v, (int, float))]


class WordProgress(TQDMProgressBar):
    """A bar over the optimizer steps of the whole run: sparsity, phase, time left, and as many metrics as fit.

    Args:
        seconds: Least time between two refreshes; each reads metrics from the device.
    """

    BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
    train_description, validation_description = "training", "validating"
    test_description, predict_description = "testing", "predicting"

    def __init__(self, seconds: float = 0.2) -> None:
        super().__init__()
        self.seconds = seconds
        self._state, self._drawn = State(), 0.0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the bar at the run's first step; a resumed run starts in the middle."""
        self._state.begin(trainer)
        self.train_progress_bar = self.init_train_tqdm()
        total = trainer.estimated_stepping_batches
        self.train_progress_bar.total = total if 0 < total < float("inf") else None
        self._draw(trainer)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Do nothing: the bar is for the whole run, not for an epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Refresh the bar, if it is time."""
        if time.monotonic() - self._drawn >= self.seconds or trainer.global_step == self.train_progress_bar.total:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Close the bar if the run is over, before anything is printed about that."""
        if is_last_step(trainer) or trainer.should_stop:
            self._draw(trainer)
            self.train_progress_bar.close()

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar of the next loader, with a number if there are several."""
        super().on_validation_batch_start(trainer, *args)
        self._name(self.val_progress_bar, self.validation_description, trainer.num_val_batches, *args[3:])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line with the metrics of a validation during a run."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self.is_enabled:
            metrics = self.get_metrics(trainer, pl_module)
            said = [f"step {trainer.global_step}", self._state.phase(trainer, metrics), *shown(metrics)]
            self.train_progress_bar.write(", ".join(filter(None, said)))
            self._draw(trainer)

    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar of the next loader."""
        super().on_test_batch_start(trainer, *args)
        self._name(self.test_progress_bar, self.test_description, trainer.num_test_batches, *args[3:])

    def on_predict_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar of the next loader."""
        super().on_predict_batch_start(trainer, *args)
        self._name(self.predict_progress_bar, self.predict_description, trainer.num_predict_batches, *args[3:])

    @staticmethod
    def _name(bar: tqdm[Any], doing: str, loaders: Any, index: int = 0) -> None:
        if isinstance(loaders, list) and len(loaders) > 1:
            doing = f"{doing} {index + 1} of {len(loaders)}"
        bar.set_description_str(doing, refresh=False)

    def _draw(self, trainer: Trainer) -> None:
        bar = self.train_progress_bar
        if bar.disable or not self.is_enabled:
            return
        self._drawn = time.monotonic()
        metrics = self.get_metrics(trainer, trainer.lightning_module)
        bar.set_description_str(self._state.phase(trainer, metrics) or "training", refresh=False)
        # fewer words on a narrow terminal, since tqdm cuts in the middle of a word
        room = (bar.ncols or 80) - len(bar.desc) - 2 * len(str(bar.total or trainer.global_step)) - 12
        words = ""
        for word in filter(None, [self._state.left(trainer), *shown(metrics)]):
            if len(words) + len(word) + 2 > room:
                break
            words += f"{', ' if words else ''}{word}"
        bar.set_postfix_str(words, refresh=False)
        bar.n = trainer.global_step
        bar.refresh()


class LineProgress(ProgressBar):
    """Prints a line now and then, for log files, which a redrawn bar would fill.

    Args:
        seconds: Least time between two lines.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._said = time.monotonic()
        self._state = State()

    def enable(self) -> None:
        """Print from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Print no more."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._said = time.monotonic()
        self._state.begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the step of the run, if a line is due."""
        if self._due():
            place = f"step {trainer.global_step} of {trainer.estimated_stepping_batches}"
            self._say(trainer, pl_module, place, self._state.left(trainer))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the progress of the validation, if a line is due."""
        self._evaluated(trainer, pl_module, trainer.num_val_batches, args[2])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation during a run."""
        if self._enabled and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._say(trainer, pl_module, f"validated after step {trainer.global_step}")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the progress of the test, if a line is due."""
        self._evaluated(trainer, pl_module, trainer.num_test_batches, args[2])

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the progress of the prediction, if a line is due."""
        self._evaluated(trainer, pl_module, trainer.num_predict_batches, args[2])

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule, batches: Any, index: int) -> None:
        if self._due():
            total = sum(batches) if isinstance(batches, list) else batches
            self._say(trainer, pl_module, f"{trainer.state.stage}: batch {index + 1} of {total}")

    def _due(self) -> bool:
        return self._enabled and time.monotonic() - self._said >= self.seconds

    def _say(self, trainer: Trainer, pl_module: LightningModule, place: str, left: str = "") -> None:
        self._said = time.monotonic()
        metrics = self.get_metrics(trainer, pl_module)
        phase = self._state.phase(trainer, metrics) if trainer.state.fn == TrainerFn.FITTING else ""
        print(", ".join(filter(None, [place, phase, *shown(metrics), left])), flush=True)
