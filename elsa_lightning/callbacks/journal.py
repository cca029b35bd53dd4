"""The journal of a run, from which ``elsa report`` is made: a small file in the run's folder, rewritten ten times."""

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
_NOTES = 10  # notes in a run
_MOST_METRICS = 50  # metrics in a note: a module may log any number

Status = Literal["running", "finished", "unfinished", "interrupted", "failed"]


class Journal:
    """Writes ``elsa_run.json`` in the run's folder: command, settings, outcome, and ten notes of its progress.

    A note has the step, seconds, peak memory, the latest metrics, dead rows, and the distribution of the scores by
    which weights are ranked. The first process rewrites the whole file at each note; in between nothing is read from
    the device. A run without logger and checkpoints, which writes nothing else, has no journal.
    """

    def __init__(self) -> None:
        self.place: Path | None = None  # set on the first process alone
        self._known: dict[str, Any] = {}
        self._notes: list[dict[str, Any]] = []
        self._tensors: dict[str, list[int]] = {}
        self._began = time.monotonic()
        self._done, self._active = 0, False

    def begin(self, trainer: Trainer) -> None:
        """Create the file under an unused name; every process of the run must call this."""
        silent = not trainer.loggers and not trainer.checkpoint_callbacks
        if silent or trainer.fast_dev_run or self._active:  # type: ignore[attr-defined]
            return
        folder = trainer.log_dir if trainer.loggers else _beside_checkpoints(trainer)  # every process must read it
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
        """Add a note if another tenth of the run has passed; every process must call this.

        Args:
            trainer: The run's Trainer.
            module: The run's module.
            outputs: The output of the training step.
            last: Whether the run ends here.
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
        """Write how the run ended; an error after the end, as of an export, makes a finished run a failed one."""
        if trains_nothing(trainer) and not self._known:  # Lightning calls nothing between the beginning and the end
            self.begin(trainer)
        if not self._active and (error is None or self.place is None):
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
        if error is not None:
            self.close()

    def close(self) -> None:
        """Leave the file alone from now on: errors of what the Trainer does after this run are not the run's."""
        self._active, self.place = False, None

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
            record = replace(record, notes=[])  # notes are about how a run ended
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
    """Return the folder of a run without a logger: that of its checkpoints, or the parent of ``checkpoints``."""
    place = getattr(trainer.checkpoint_callback, "dirpath", None)
    if place is None:
        return trainer.default_root_dir
    return str(Path(place).parent if Path(place).name == "checkpoints" else place)


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory(trainer: Trainer) -> int | None:
    """Return peak memory in bytes: torch's allocations on CUDA, else that of the process; None if unknown."""
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
    """Return the sum of all methods' score histograms, or None if no mask moves."""
    each = [found for admm in methods if (found := admm.score_histogram()) is not None]
    if not each:
        return None
    kept, cut = (torch.stack([one[index] for one in each]).sum(dim=0).long().tolist() for index in (0, 1))
    return {"kept": kept, "cut": cut}
