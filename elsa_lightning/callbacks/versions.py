"""A folder for each run, also of runs that are started together."""

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
    """Let loggers that number their folders make the folder when they choose the number, so that no run shares it.

    Lightning's look for a free number, and make its folder much later.
    """
    for logger in trainer.loggers:
        search: Callable[[], int] | None = getattr(logger, "_get_next_version", None)
        if search is not None and trainer.is_global_zero:  # the other processes are told by the first
            setattr(logger, "_get_next_version", functools.partial(_claim, logger, search))  # noqa: B010


def _claim(logger: Any, search: Callable[[], int]) -> int:
    for _ in range(1000):
        version = search()
        logger._version = version
        folder = str(logger.log_dir)
        if "://" in folder:  # of a store whose folders cannot be claimed
            return version
        try:
            Path(folder).mkdir(parents=True)
            return version
        except FileExistsError:
            continue
    raise UnavailableError(f"no free folder was found beside {folder!r}: give the logger another save_dir or version")


def unused(file: Path) -> Path:
    """Return a file that nobody else has, made empty: the one asked for, or the first such name with a number."""
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
        """Take a name that nobody has, and save."""
        log_dir = trainer.log_dir  # every process asks: this is a broadcast
        if trainer.is_global_zero and not self.already_saved and log_dir is not None and "://" not in log_dir:
            self.config_filename = unused(Path(log_dir) / self.config_filename).name
        super().setup(trainer, pl_module, stage)
