"""Gives each run a folder and file names of its own, even if several runs start at the same time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from elsa_lightning.errors import UnavailableError


def claim_versions(trainer: Trainer) -> None:
    """Make loggers that number their folders create the folder as soon as they choose the number.

    Lightning's loggers create it much later, so that two runs could choose the same number.
    """
    for logger in trainer.loggers:
        search: Callable[[], int] | None = getattr(logger, "_get_next_version", None)
        if search is not None and trainer.is_global_zero:  # the first process tells the others
            setattr(logger, "_get_next_version", functools.partial(_claim, logger, search))  # noqa: B010


def _claim(logger: Any, search: Callable[[], int]) -> int:
    for _ in range(1000):
        version = search()
        logger._version = version
        folder = str(logger.log_dir)
        if "://" in folder:  # a remote store, whose folders cannot be claimed
            return version
        try:
            Path(folder).mkdir(parents=True)
            return version
        except FileExistsError:
            continue
    raise UnavailableError(f"no free folder was found beside {folder!r}: give the logger another save_dir or version")


def unused(file: Path) -> Path:
    """Create an empty file under the given name, or the first unused one with a number, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        place = file if number == 0 else file.with_stem(f"{file.stem}_{number}")
        try:
            place.touch(exist_ok=False)
            return place
        except FileExistsError:
            continue
    raise AssertionError


class SaveConfigOnce(SaveConfigCallback):
    """Saves a run's configuration beside those of other runs in the same folder: ``config.yaml``, ``config_1.yaml``."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration under an unused name."""
        log_dir = trainer.log_dir  # on every process: reading it is a broadcast
        if trainer.is_global_zero and not self.already_saved and log_dir is not None and "://" not in log_dir:
            self.config_filename = unused(Path(log_dir) / self.config_filename).name
        super().setup(trainer, pl_module, stage)
