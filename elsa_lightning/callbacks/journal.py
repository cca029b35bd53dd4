"""What a run notes of itself for its report: a small file in its folder, renewed ten times."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.ends import attached, trains_nothing
from elsa_lightning.callbacks.record import run_record
from elsa_lightning.callbacks.samples import Samples
from elsa_lightning.callbacks.versions import unused
from elsa_lightning.export.folders import write
from elsa_lightning.report import finite
from elsa_lightning.watch import figures

JOURNAL = "elsa_run.json"
_NOTES = 10  # in a run
_MOST_METRICS = 50  # in a note: a module may log anything

Status = Literal["running", "finished", "unfinished", "interrupted", "failed"]


class Journal:
    """Keeps ``elsa_run.json`` in the run's folder: command, settings, outcome, and ten notes of where it was.

    A note has the step, seconds, peak memory, the latest metrics, dead rows, and the distribution of the scores by
    which weights are ranked. It is written by the first process, each time whole, and reads nothing from the device in
    between. A run that writes nothing else, because it has no logger and no checkpoints, leaves none.
    """

    def __init__(self) -> None:
        self.place: Path | None = None  # on the first process
        self._known: dict[str, Any] = {}
        self._notes: list[dict[str, Any]] = []
        self._tensors: dict[str, list[int]] = {}
        self._began = time.monotonic()
        self._done, self._active = 0, False

    def begin(self, trainer: Trainer) -> None:
        """Take a name that nobody has, on every process of the run at once."""
        silent = not trainer.loggers and not trainer.checkpoint_callbacks
        if silent or trainer.fast_dev_run or self._active:  # type: ignore[attr-defined]
            return
        folder = trainer.log_dir if trainer.loggers else _beside_checkpoints(trainer)  # which is asked of every process
        if folder is None or "://" in str(folder):
            return
        self._active, self._began = True, time.monotonic()
        resumed = trainer.ckpt_path
        self._known = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_from": None if resumed is None else str(resumed),
            "first_step": trainer.global_step,
            "device": _device(trainer),
            "processes": trainer.world_size,
        }
        if trainer.is_global_zero:
            self.place = unused(Path(folder) / JOURNAL)
            self._write(trainer, trainer.lightning_module, "running")

    def note(self, trainer: Trainer, module: LightningModule, outputs: Any, *, last: bool = False) -> None:
        """Note where the run is if a tenth of it has passed, on every process.

        Args:
            trainer: Of the run.
            module: Of the run.
            outputs: What the training step returned.
            last: Whether this is the end.
        """
        methods = attached(trainer)
        if not self._active or not methods:
            return
        admm = methods[0]
        due = _NOTES * admm.step // admm.total_steps
        if due <= self._done and not (last and (not self._notes or self._notes[-1]["step"] != trainer.global_step)):
            return
        self._done = due
        self._notes.append(
            {
                "step": trainer.global_step,
                "seconds": round(time.monotonic() - self._began, 3),
                "peak_memory": _peak_memory(trainer),
                "metrics": _metrics(trainer, methods, outputs),
                **self._occupancy(methods),
                "scores": _scores(methods),
            }
        )
        self._write(trainer, module, "running")

    def end(self, trainer: Trainer, module: LightningModule, error: BaseException | None = None) -> None:
        """Write how the run ended."""
        if trains_nothing(trainer):  # Lightning calls nothing between the beginning and the end
            self.begin(trainer)
        if not self._active:
            return
        if error is None:
            self.note(trainer, module, None, last=True)
        status: Status = "unfinished" if any(admm.suspended for admm in attached(trainer)) else "finished"
        if error is not None:
            status = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
            if status == "failed":
                self._known["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        self._write(trainer, module, status)
        self._active = False

    def _occupancy(self, methods: list[ADMM]) -> dict[str, int]:
        dead = rows = 0
        for admm in methods:
            names, counts = admm.occupancy()
            found: list[list[int]] = counts.long().tolist()
            self._tensors |= dict(zip(names, found, strict=True))
            dead, rows = dead + sum(c[2] for c in found), rows + sum(c[3] for c in found)
        return {"dead_rows": dead, "rows": rows}

    def _write(self, trainer: Trainer, module: LightningModule, status: Status) -> None:
        if self.place is None:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        record = run_record(trainer, module)
        if status in ("running", "failed"):
            record = replace(record, notes=[])  # of how it ended
        told = {
            "status": status,
            **self._known,
            "step": trainer.global_step,
            "seconds": round(time.monotonic() - self._began, 3),
            "peak_memory": _peak_memory(trainer),
            "record": {name: value for name, value in asdict(record).items() if value},
            "samples": [s for c in callbacks if isinstance(c, Samples) for s in c.samples],
            "tensors": self._tensors,
            "notes": self._notes,
        }
        write(self.place, json.dumps(finite(told), default=str) + "\n")


def _beside_checkpoints(trainer: Trainer) -> str:
    """Return the folder of a run without a logger: where its checkpoints go, or their ``checkpoints`` folder is."""
    place = getattr(trainer.checkpoint_callback, "dirpath", None)
    if place is None:
        return trainer.default_root_dir
    return str(Path(place).parent if Path(place).name == "checkpoints" else place)


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory(trainer: Trainer) -> int | None:
    """Return bytes: on CUDA what torch allocated at most, elsewhere what the process held; None where nobody knows."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def _metrics(trainer: Trainer, methods: list[ADMM], outputs: Any) -> dict[str, float]:
    logged = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    found = {name: float(value) for name, value in list(logged.items())[:_MOST_METRICS]}
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and loss.numel() == 1 and not any("loss" in name.lower() for name in found):
        found["loss"] = float(loss)
    if len(methods) == 1 and methods[0].last_update is not None:
        latest = figures(methods[0].last_update, methods[0].last_stationarity)
        found |= {f"elsa/{name}": value for name, value in latest.items()}
    return found


def _scores(methods: list[ADMM]) -> dict[str, Any] | None:
    """Return the distributions of all methods together, or None when no mask moves any more."""
    each = [found for admm in methods if (found := admm.score_histogram()) is not None]
    if not each:
        return None
    kept, cut = (torch.stack([one[index] for one in each]).sum(dim=0).long().tolist() for index in (0, 1))
    return {"kept": kept, "cut": cut}
