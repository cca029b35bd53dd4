"""Loads the model to evaluate from a folder, an export, a run, a checkpoint or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export import reload
from elsa_lightning.export.cpu_sparse import FILE
from elsa_lightning.export.record import read
from elsa_lightning.export.source import find, open_source
from elsa_lightning.layout.precise import precise_buffers
from elsa_lightning.lm import model_path
from elsa_lightning.lm.text import load_tokenizer
from elsa_lightning.optim.moments import dtype_name


@dataclass(frozen=True)
class Loaded:
    """A model on its device, in evaluation mode.

    Attributes:
        name: Path or name under which it was found.
        model: The model of transformers.
        tokenizer: Its tokenizer.
        base: Name of the model from which it was made, if known.
    """

    name: str
    model: Any
    tokenizer: Any
    base: str | None

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return dtype_name(self.model.dtype)

    @property
    def base_at_hand(self) -> str | None:
        """The base model's name, if it can be loaded without a download, else None."""
        if self.base is None:
            return None
        path = model_path(self.base) if not _is_path(self.base) or Path(self.base).expanduser().exists() else ""
        return self.base if path and (Path(path) / "config.json").is_file() else None


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def load(name: str, base: str | None = None, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load a model.

    Args:
        name: The folder of a model, an export or a run, a checkpoint, or a name on the hub.
        base: Base model of a checkpoint, if the checkpoint does not name it.
        dtype: The dtype of the weights; None takes the one in which they are saved.
        device: The device of the model; None takes an accelerator if there is one.

    Raises:
        UserError: The model or the device does not exist.
    """
    path = model_path(name)
    if Path(path).expanduser().exists():
        loaded = _of_disk(Path(path).expanduser(), name, base, dtype)
    else:
        loaded = _of_hub(path, dtype)
    place = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        loaded.model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {place!r} cannot be used: {error}; cpu always can") from error
    loaded.model.eval().requires_grad_(False)
    return loaded


def _of_disk(path: Path, name: str, base: str | None, dtype: str | None) -> Loaded:
    try:
        place = find(path)
        if not (place / "config.json").is_file():
            source = open_source(place, base, dtype)
            return Loaded(str(place), source.model, load_tokenizer(source.tokenizer), source.record.base_model)
    except UserError as error:  # its message names options of elsa export
        raise UserError(str(error).replace("--from ", "", 1).replace("--model", "--base")) from error
    if (place / FILE).is_file() and dtype not in (None, "float32"):  # torch has no such products of sparse rows
        raise UserError(
            f"model {name!r} is a cpu-sparse export, which computes in float32: leave --dtype out, or evaluate the hf "
            f"folder in {dtype}"
        )
    try:
        model, _ = reload.load(place)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"model {name!r} could not be loaded: {error}") from error
    if dtype is not None:
        with precise_buffers(model):
            model.to(getattr(torch, dtype))
    record = read(place)
    return Loaded(name, model, load_tokenizer(str(place)), None if record is None else record.base_model)


def _of_hub(name: str, dtype: str | None) -> Loaded:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"model {name!r} is no folder, and could not be had from the hub: {' '.join(str(error).split())}"
        ) from error
    return Loaded(name, model, load_tokenizer(name), None)
