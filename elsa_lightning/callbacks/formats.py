"""Export: a callback that does what ``elsa export`` does when training ends, without a second command."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from elsa_lightning.adapters import has_adapter, uncompiled
from elsa_lightning.callbacks.export import SaveHuggingFace, identity
from elsa_lightning.callbacks.keep_mask import KeepMask
from elsa_lightning.callbacks.strategies import on_first
from elsa_lightning.errors import UserError
from elsa_lightning.export.archive import check_archive
from elsa_lightning.export.folders import beside, check_replaceable
from elsa_lightning.export.formats import Options, check_format, check_run
from elsa_lightning.export.write import export
from elsa_lightning.sets import Constraint

Format = Literal["hf", "shrunk", "quantized", "cpu-sparse", "gguf"]


class Export(SaveHuggingFace):
    """Exports the module's Hugging Face model when training ends, each format to a folder of its name.

    As with ``elsa export``, an export is reloaded in a fresh process and compared with the model, and kept only if both
    agree. Missing requirements of a format, and sets that it cannot represent, are refused before training. If a format
    fails at the end, the others are written, and the model itself as ``hf``, so that no training is lost. Of several
    processes the first exports and the others wait, however long; a sharded model is gathered on the first one's CPU.
    An error there ends all processes.

    Args:
        to: Formats, of ``hf``, ``shrunk``, ``quantized``, ``cpu-sparse`` and ``gguf``; see docs/exports.md.
        dirpath: Folder in which the formats' folders are made; None takes ``exports`` in the logger's folder. Exports
            that exist when training begins are replaced; if another run writes there meanwhile, the folder gets a
            number instead.
        dtype: The dtype of the weights; None takes that of the original model.
        options: Options of single formats.
        measure: Measure the perplexity of each export, as the run did, and its speed beside the dense model's, on the
            CPU. For CausalLM on CalibrationData; ``gguf`` is not measured.
        archive: Write each folder as one compressed file too; needs the package zstandard.

    Raises:
        UserError: A format is unknown, is given twice, or needs something that is not installed.
    """

    def __init__(
        self,
        to: Sequence[Format] = ("hf",),
        dirpath: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        options: Options | None = None,
        measure: bool = False,
        archive: bool = False,
    ) -> None:
        super().__init__(dirpath, dtype, shrink=False)
        self.to: tuple[str, ...] = tuple(to)
        self.options = options or Options()
        self.measure, self.archive = measure, archive
        if not self.to or len(set(self.to)) < len(self.to):
            raise UserError(f"to must name at least one format, and each once, got {list(self.to)}")
        for name in self.to:
            check_format(name, self.options)
        if archive:
            check_archive(Path(dirpath or ".") / self.to[0])
        self.exported: dict[str, Path] = {}  # by format, on the first process
        self._identities: dict[str, object] = {}
        self._temporary: contextlib.ExitStack | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse folders that hold something else, before training."""
        if stage != "fit" or self.dirpath is None:
            return
        source = getattr(pl_module, "path", None)
        for name in {*self.to, "hf"}:
            folder = Path(self.dirpath).expanduser() / name
            check_replaceable(folder, "dirpath")
            self._identities[name] = identity(folder)
            if isinstance(source, str) and folder.resolve() == Path(source).resolve():
                raise UserError(f"dirpath {self.dirpath!r} has the folder of the model that is pruned: give another")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse formats to which this run's model and set cannot be exported, before training."""
        super().on_fit_start(trainer, pl_module)
        self.exported = {}
        model = uncompiled(pl_module.model)
        if isinstance(model, nn.Module) and has_adapter(model):
            raise UserError(
                "Export writes a model without its PEFT adapter, which would be lost: use SaveHuggingFace, and elsa "
                "export on what merge_and_keep_zeros makes of it"
            )
        data: Any = getattr(trainer, "datamodule", None)
        if self.measure and not (hasattr(pl_module, "evaluation") and hasattr(data, "evaluation")):
            raise UserError(
                f"measure is for CausalLM on CalibrationData, which say how perplexity is measured, and not for "
                f"{type(pl_module).__name__} on {'loaders' if data is None else type(data).__name__}: set it to false"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        known = not any(isinstance(c, KeepMask) for c in callbacks)  # its set follows from the weights
        sets = [c.constraint for c in callbacks if isinstance(getattr(c, "constraint", None), Constraint)]
        path, taken = getattr(pl_module, "path", None), sets if known else None

        def check() -> None:
            for name in self.to:
                check_run(name, self.options, model, taken, path)

        on_first(trainer, check)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, on the first process, now that the final model is measured."""
        super().on_fit_end(trainer, pl_module)
        on_first(trainer, self._export)

    def _export(self) -> None:
        if self._temporary is None or self.place is None:
            return
        base = self._base(self.place.parents[1] / "exports")
        failed: dict[str, Exception] = {}
        for to in self.to:
            try:
                self.exported[to] = export(
                    self.place,
                    to,
                    base / to,
                    options=self.options,
                    measure=self.measure and to != "gguf",
                    archive=self.archive,
                    say=rank_zero_info,
                )
            except Exception as error:  # one failed format must not lose the others
                failed[to] = error
        if failed and "hf" not in self.exported:
            self.exported["hf"] = Path(shutil.move(self.place, base / "hf"))
        self.place = next((self.exported[n] for n in ("hf", "shrunk", "quantized") if n in self.exported), None)
        self._temporary.close()
        self._temporary = None
        for to, why in failed.items():
            raise UserError(
                f"{' and '.join(failed)} could not be exported, {to} because of this: {why}; the trained model is in "
                f"{self.exported['hf']}"
            ) from why

    def _folder(self, trainer: Trainer) -> Path:
        logs = trainer.log_dir or trainer.default_root_dir  # a broadcast
        return Path(logs) if self.dirpath is None else Path(self.dirpath).expanduser()

    def _destination(self, folder: Path) -> Path:
        """Return a temporary folder beside the exports, in which the model is saved for them."""
        self._temporary = contextlib.ExitStack()
        return self._temporary.enter_context(beside(folder / "export")) / "hf"

    def _base(self, folder: Path) -> Path:
        """Return the folder that holds the formats' folders: a numbered one if another run wrote there meanwhile."""
        if self.dirpath is not None:
            folder = Path(self.dirpath).expanduser()
        for number in itertools.count():
            base = folder if number == 0 else folder.with_name(f"{folder.name}_{number}")
            found = self._identities if number == 0 else {}
            if all(identity(base / name) == found.get(name) for name in {*self.to, "hf"}):
                break
        if base != folder:
            rank_zero_warn(f"Export: {folder} has another run's models, which are left alone; these are in {base}")
        return base

    def _tell(self, place: Path, folder: Path, dtype: str) -> None:
        rank_zero_info(f"Exporting to {', '.join(self.to)}, weights in {dtype}.")
