"""The record of how a sparse model was made, written for people (README.md) and for machines (elsa.json)."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import elsa_lightning
from elsa_lightning.export.folders import RECORD
from elsa_lightning.report import finite

_HUB_DATA = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext"}


@dataclass(frozen=True)
class Record:
    """Facts about a model; unknown ones are empty, and left out of the card.

    Attributes:
        format: Format of the export: ``hf``, ``shrunk``, ``quantized``, ``cpu-sparse`` or ``gguf``.
        base_model: Hub name or folder of the model that was pruned.
        method: Set, form of the x-update and schedule, one mapping for each optimizer that was constrained.
        training: Optimizer, steps, precision, and the module's own arguments.
        data: Training text: ``name``, ``seq_len``, ``batch_size``.
        perplexity: ``dense`` (or ``start``, if the run began with a sparse model), ``sparse``, ``protocol``; for a
            measured export also ``exported``, and ``exported in`` if the precision differs.
        speed: For a measured export: ``exported``, its tokens a second in decoding, ``dense``, those of the dense model
            beside it, and the ``protocol``.
        evaluation: How to repeat the measurement: arguments of CalibrationData, ``precision``, and ``first``, the
            number of segments, if not all were used.
        convergence: Whether the run converged, in words.
        notes: What else a user must know, such as that the run had not ended.
        command: The command that made the model.
        run: For an export of a checkpoint, which does not know its command: the folder of the run that left it.
        dtype: The dtype of the weights.
        dense_bytes: For an export: bytes of the weights of the exported model, stored dense.
        sparsity: (zeros, entries) of each matrix.
        export: What the export itself did.
        versions: Versions of the software that made the model.
    """

    format: str = "hf"
    base_model: str | None = None
    method: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    convergence: str | None = None
    notes: list[str] = field(default_factory=list)
    command: str | None = None
    run: str | None = None
    dtype: str | None = None
    dense_bytes: int | None = None
    sparsity: dict[str, tuple[int, int]] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def zeros(self) -> tuple[int, int]:
        """(zeros, entries) of the matrices that have many zeros."""
        sparse = [(zeros, size) for zeros, size in self.sparsity.values() if zeros > 0.05 * size]
        return sum(zeros for zeros, _ in sparse), sum(size for _, size in sparse)

    @property
    def title(self) -> str:
        """A short name of the base model; folders go by their last part."""
        if self.base_model is None:
            return "Sparse model"
        return self.base_model if self.base_hub_name else Path(self.base_model).name

    @property
    def base_hub_name(self) -> str | None:
        """The name of the base model if it may be on the hub, else None."""
        name = self.base_model
        on_hub = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] not in "./~"
        return name if on_hub and not Path(str(name)).exists() else None

    @property
    def data_hub_name(self) -> str | None:
        """The training text's name on the hub, if it is there."""
        return _HUB_DATA.get(str(self.data.get("name")))

    def of_model(self) -> Record:
        """Return the record without the facts about an export."""
        found = {name: value for name, value in self.perplexity.items() if not name.startswith("exported")}
        return dataclasses.replace(
            self, format="hf", export={}, sparsity={}, dtype=None, dense_bytes=None, perplexity=found, speed={}
        )

    def to_json(self) -> str:
        """Return all known facts as JSON."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value or value == 0}
        zeros, size = self.zeros
        if size:
            known["sparse_matrices"] = {"zeros": zeros, "entries": size}
        known["sparsity"] = {name: {"zeros": z, "entries": n} for name, (z, n) in self.sparsity.items()}
        return json.dumps(finite(known), indent=2, default=str) + "\n"


def read(folder: Path) -> Record | None:
    """Return the record in a folder, or None if there is none or it cannot be read."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known["sparsity"] = {name: (s["zeros"], s["entries"]) for name, s in known.get("sparsity", {}).items()}
        names = {f.name for f in dataclasses.fields(Record)}
        return Record(**{name: value for name, value in known.items() if name in names})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def settings_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a state dict of ADMM, without empty ones, and with the steps done."""
    settings = {name: value for name, value in state["settings"].items() if value is not None}
    tensors = settings.pop("constrained tensors", [])
    return {**settings, "constrained tensors": len(tensors), "steps": state["step"], "of": state["total_steps"]}


def versions() -> dict[str, str]:
    """Return the versions of Python and the main packages."""
    found = {"elsa-lightning": elsa_lightning.__version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """Return the command line of this process."""
    program = Path(sys.argv[0])
    ours = program.stem == "elsa" or program.parent.name == "elsa_lightning"
    return shlex.join(["elsa" if ours else program.name, *sys.argv[1:]])
