"""Reads size, speed and perplexity of the models that runs and their exports left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elsa_lightning.export.folders import archive_of
from elsa_lightning.reports.metrics import number

_ROUNDED = ("quantized", "gguf")  # formats whose perplexity differs from the run's
_WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.bin")


@dataclass(frozen=True)
class Saved:
    """A model that a run, or an export of it, left on disk.

    Attributes:
        folder: Its folder.
        format: ``hf``, ``shrunk``, ``quantized``, ``cpu-sparse`` or ``gguf``.
        size: Bytes of its weights.
        tokens_per_second: Its decoding speed, if measured.
        archive: Bytes of the compressed file beside it, if there is one.
        perplexity: Perplexity measured on it, or the run's if values were not rounded.
        dtype: The dtype in which it decoded.
        dense_dtype: The dtype in which the dense model decoded.
        dense_speed: Tokens a second of the dense model, decoded in turn with it.
        speed_protocol: How both were measured.
        dense_size: Bytes of the dense model's weights, if its record says so.
    """

    folder: Path
    format: str
    size: int
    tokens_per_second: float | None = None
    archive: int | None = None
    perplexity: float | None = None
    dense_speed: float | None = None
    dtype: str | None = None
    dense_dtype: str | None = None
    speed_protocol: str | None = None
    dense_size: int | None = None


def saved_in(folder: Path, known: dict[str, Any]) -> list[Saved]:
    """Return the model in a folder, if there is one.

    Args:
        folder: Folder of the model.
        known: Its record.
    """
    size = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not size:
        return []
    measured, speed, kind = known.get("perplexity", {}), known.get("speed", {}), str(known.get("format", "hf"))
    archive = archive_of(folder)
    return [
        Saved(
            folder, kind, size, number(speed.get("exported")), archive.stat().st_size if archive.is_file() else None,
            number(measured.get("exported", None if kind in _ROUNDED else measured.get("sparse"))),
            number(speed.get("dense")), speed.get("dtype"),
            speed.get("dense dtype"), speed.get("protocol"), known.get("dense_bytes"),
        )
    ]  # fmt: skip
