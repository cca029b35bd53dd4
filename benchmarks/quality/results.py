"""Results of a benchmark in a file, a line a run, and Trainers without noise: shared by the benchmarks of quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


class Results:
    """Lines of a file, those of earlier runs included; every new one is appended at once.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def of(self, case: Any, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the line of a case, a dataclass of its settings, running it if it has none."""
        settings = asdict(case)
        for row in self.rows:
            if settings == {field.name: row.get(field.name, field.default) for field in fields(case)}:
                return row
        row = {**settings, **run()}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row


def quiet_trainer(**options: Any) -> Trainer:
    """Return a Trainer on one device that writes nothing."""
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
        "enable_progress_bar": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(devices=1, **{**quiet, **options})
