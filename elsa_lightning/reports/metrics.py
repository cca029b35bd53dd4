"""Reads the metrics of a run from TensorBoard's events, CSVLogger's table, and the notes of the journal."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]  # by name of the metric: (step, value)

EVENTS = "events.out.tfevents.*"
TABLE = "metrics.csv"
_NO_METRICS = ("epoch", "step", "hp_metric")


def logged(folder: Path) -> Series:
    """Return the metrics that loggers wrote, in the order of steps."""
    series: Series = {}
    if next(folder.glob(EVENTS), None) is not None:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        for name in events.Tags()[SCALARS]:
            series[name] = [(event.step, event.value) for event in events.Scalars(name)]
    elif (folder / TABLE).is_file():
        with (folder / TABLE).open(newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                if (step := number(row.get("step"))) is None:
                    continue
                for name, cell in row.items():
                    if (value := number(cell)) is not None:
                        series.setdefault(name, []).append((int(step), value))
    return {
        name: sorted({step: value for step, value in values if math.isfinite(value)}.items())
        for name, values in series.items()
        if name not in _NO_METRICS
    }


def noted(notes: Sequence[dict[str, Any]]) -> Series:
    """Return the metrics in a journal's notes."""
    series: Series = {}
    for note in notes:
        for name, value in note.get("metrics", {}).items():
            if value is not None and name not in _NO_METRICS:
                series.setdefault(name, []).append((int(note["step"]), float(value)))
    return series


def number(value: Any) -> float | None:
    """Return a value as a float, or None if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
