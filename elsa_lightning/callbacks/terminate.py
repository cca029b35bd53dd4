"""Save and exit when the machine is taken away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class SaveOnTerminate(Callback):
    """On SIGTERM, which a preempted node or a scheduler sends, saves a checkpoint after the current step and exits.

    The checkpoint is ``terminated-step=N.ckpt``, and ``ckpt_path`` resumes it exactly. If the machine goes before it
    is whole it is not there, or, as the folder of a distributed checkpoint, refused. The exit status is 143, as of a
    process that SIGTERM ended.

    Args:
        dirpath: Folder for the checkpoint; None takes ``checkpoints`` in the logger's folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._asked = False
        self._step = 0
        self._former: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signal."""
        self._asked, self._step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step once any process was asked to; all of them do."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not stepped or not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints").expanduser()
        path = folder / f"terminated-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        rank_zero_warn(f"terminated after optimizer step {trainer.global_step}; resume with ckpt_path={path}")
        raise SystemExit(128 + signal.SIGTERM)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
            self._former = None
