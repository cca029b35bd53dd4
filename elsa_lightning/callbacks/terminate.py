"""SaveOnTerminate: saves a checkpoint and exits when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class SaveOnTerminate(Callback):
    """Saves after the current step and exits on Ctrl-C or SIGTERM, which schedulers and preempted nodes send.

    The checkpoint is ``terminated-step=N.ckpt``, with exact zeros, and ``ckpt_path`` resumes it exactly. If the machine
    stops before the checkpoint is complete, there is none, or, if it is a distributed one, its folder is refused at
    loading. The exit status is that of a process ended by the signal: 143, or 130 after Ctrl-C. A second Ctrl-C ends
    the run as it would without this callback.

    Args:
        dirpath: Folder for the checkpoint; None takes ``checkpoints`` in the logger's folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._asked = 0  # number of the signal that was received
        self._step = 0
        self._former: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._asked, self._step = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._former = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._asked == signum:
                raise KeyboardInterrupt
            rank_zero_warn("saving a checkpoint after this step; press Ctrl-C again to end without")
        self._asked = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on all processes after an optimizer step, if any process got a signal."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not stepped or not trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            return
        trainer.should_stop = True  # so that ElsaCallback makes the zeros exact
        # the process ends here whatever the run's minimum is, before which Lightning heeds no request to stop
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints").expanduser()
        path = folder / f"terminated-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        rank_zero_warn(f"terminated after optimizer step {trainer.global_step}; resume with ckpt_path={path}")
        raise SystemExit(128 + (self._asked or signal.SIGTERM))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the former signal handlers."""
        self._listen_no_more()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the former signal handlers."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        self._former = {}
