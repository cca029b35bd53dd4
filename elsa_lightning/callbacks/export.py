"""Write the model as a Hugging Face folder when training ends."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from elsa_lightning.adapters import base_model, has_adapter, uncompiled, without_adapters
from elsa_lightning.callbacks.ends import trains_nothing
from elsa_lightning.callbacks.record import run_record
from elsa_lightning.callbacks.strategies import on_first
from elsa_lightning.errors import UserError
from elsa_lightning.export.card import write_card
from elsa_lightning.export.folders import ADAPTER, beside, check_replaceable, edit, replace, save_tokenizer, zeros_in
from elsa_lightning.families import find
from elsa_lightning.layout.fsdp1 import mark_slices, settle, whole_on_first
from elsa_lightning.layout.sharded import clean, part_of
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.sets.structured import is_structured
from elsa_lightning.slicing import shrink


class SaveHuggingFace(Callback):
    """Saves the module's Hugging Face model, and its tokenizer, for ``from_pretrained``.

    The model is looked for in the module's attribute ``model``, where :class:`~elsa_lightning.CausalLM` has it. The
    folder is written under a temporary name and renamed, so it is complete or does not exist. If the model has a PEFT
    adapter, the folder has the base model, and the adapter in a folder ``adapter`` inside it. A model card (README.md)
    and ``elsa.json`` describe how the model was made.

    Args:
        dirpath: Folder to write. A folder that exists when training begins is replaced if it holds nothing but a saved
            model. None takes ``hf`` in the logger's folder. A folder that another run wrote meanwhile is never
            replaced; the model is then saved beside it, under the same name with a number.
        dtype: The dtype of the saved weights; None takes that of the original model: one in bfloat16 is saved in
            bfloat16, even if it was trained in float32.
        shrink: Whether to save the smaller model that :func:`~elsa_lightning.shrink` makes by removing zeros. None does
            so if a callback of the run constrains neurons, heads, layers or experts.

    Raises:
        ValueError: ``dtype`` is not a dtype in which weights can be saved.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        shrink: bool | None = None,
    ) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(f"dtype must be one of 'float32', 'bfloat16', 'float16', or None, got {dtype!r}")
        self.dirpath, self.dtype, self.shrink = dirpath, dtype, shrink
        self._shrinks = bool(shrink)
        self.place: Path | None = None  # where the model was written; set on the first process alone
        self._found: object = None  # identity of the folder at dirpath when training began
        self._written: dict[str, Any] = {}
        self.shrunk: str | None = None  # how many parameters the smaller model has, of how many

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that holds something else, before training."""
        if stage != "fit" or self.dirpath is None:
            return
        folder = Path(self.dirpath).expanduser()
        check_replaceable(folder, "dirpath")
        self._found = identity(folder)
        source = getattr(pl_module, "path", None)
        if isinstance(source, str) and folder.resolve() == Path(source).resolve():
            raise UserError(f"dirpath {self.dirpath!r} is the folder of the model that is pruned; give another")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without a Hugging Face model, before training."""
        self.place = None
        model: Any = getattr(pl_module, "model", None)
        if not hasattr(model, "save_pretrained"):
            raise UserError(
                f"SaveHuggingFace needs a module whose attribute 'model' has save_pretrained; "
                f"{type(pl_module).__name__} has none: remove the callback"
            )
        if isinstance(model, nn.Module) and has_adapter(model) and _is_sharded(model, trainer.strategy.model):
            raise UserError(
                "SaveHuggingFace cannot save a sharded model with a PEFT adapter: train on one device or with DDP"
            )
        constraints = [getattr(callback, "constraint", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        self._shrinks = any(map(is_structured, constraints)) if self.shrink is None else self.shrink
        if self._shrinks:
            find(model)  # raises before training if the model is of no known family

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on the first process."""
        folder = self._folder(trainer)
        model = uncompiled(pl_module.model)
        whole_state = _gather(model, trainer.strategy.model or pl_module)
        on_first(trainer, lambda: self._save(trainer, pl_module, model, whole_state, folder))

    def _save(
        self, trainer: Trainer, pl_module: LightningModule, model: Any, whole_state: dict[str, Any], folder: Path
    ) -> None:
        folder = self._destination(folder)
        with beside(folder) as temporary:
            whole = temporary / "whole"
            dtype = self._write(pl_module, model, whole_state, whole)
            source = getattr(pl_module, "path", None)
            if source is not None and (problem := save_tokenizer(source, whole)) is not None:
                rank_zero_warn(f"SaveHuggingFace: {problem}")
            self._written = {"dtype": dtype, "sparsity": zeros_in(whole)}
            if self.shrunk is not None:
                self._written |= {"format": "shrunk", "export": {"parameters": self.shrunk}}
            write_card(whole, run_record(trainer, pl_module, **self._written))
            if self.dirpath is not None and self._found is not None and identity(folder) == self._found:
                replace(whole, folder)
                place = folder
            else:
                place = _move(whole, folder)
        self.place = place
        if (place / ADAPTER).is_dir():
            _name_base(place)
        self._tell(place, folder, dtype)

    def _folder(self, trainer: Trainer) -> Path:
        """Return the folder to write; every process must call this, since reading log_dir is a broadcast."""
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "hf").expanduser()

    def _destination(self, folder: Path) -> Path:
        """Return the folder in which the model is saved; called on the first process alone."""
        return folder

    def _tell(self, place: Path, folder: Path, dtype: str) -> None:
        rank_zero_info(f"Model saved for from_pretrained, weights in {dtype}: {place}")
        if place != folder:
            rank_zero_warn(f"SaveHuggingFace: {folder} is another run's and is left alone; this model is in {place}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the card, now that the final model is measured; write the folder first if there was no training."""
        if trains_nothing(trainer):  # Lightning did not call on_train_end
            self.on_train_end(trainer, pl_module)
        on_first(trainer, lambda: self._renew_card(trainer, pl_module))

    def _renew_card(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.place is not None and self.place.is_dir():
            write_card(self.place, run_record(trainer, pl_module, **self._written))

    def _write(self, pl_module: LightningModule, model: Any, whole_state: dict[str, Any], folder: Path) -> str:
        """Save the model, without its adapter if it has one, and return the name of the weights' dtype."""
        adapter = isinstance(model, nn.Module) and has_adapter(model)
        base = base_model(model)
        state: dict[str, Tensor] | None = whole_state.get("state_dict")
        if self._shrinks:
            dense = sum(p.numel() for p in base.parameters())
            base, state = shrink(base, state), None
            left = sum(p.numel() for p in base.parameters())
            self.shrunk = f"{left:,} of {dense:,}" if left < dense else None
            rank_zero_info(f"Model shrunk: {left:,} of {dense:,} parameters are left")
        kept = getattr(base, "dtype", torch.float32)
        target = self._target(pl_module, base, kept)
        if adapter or (target != kept and state is None):
            state = without_adapters(base, base.state_dict())
        if target != kept and state is not None:
            state, target = _cast(state, base, target)
        integrated = getattr(base, "_hf_peft_config_loaded", False)  # else save_pretrained saves the adapter alone
        if integrated:
            base._hf_peft_config_loaded = False
        former = getattr(getattr(base, "config", None), "dtype", None)
        base.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        if former is not None:
            base.config.dtype = former  # else the next save would take the training dtype for the original
        if integrated:
            base._hf_peft_config_loaded = True
        if target != kept:
            edit(folder / "config.json", dtype=dtype_name(target))
        if adapter:
            model.save_pretrained(folder / ADAPTER, **({} if integrated else {"save_embedding_layers": False}))
            rank_zero_warn(
                "SaveHuggingFace: the zeros are in the base model; with the adapter on it a layer computes the sum of "
                "both, and merging fills the zeros unless elsa_lightning.adapters.merge_and_keep_zeros does it"
            )
        return dtype_name(target)

    def _target(self, pl_module: LightningModule, base: Any, kept: torch.dtype) -> torch.dtype:
        """Return the dtype to save in, which is not wider than the trained weights unless the user gave it."""
        if self.dtype is not None:
            return getattr(torch, self.dtype)  # type: ignore[no-any-return]
        given: Any = getattr(pl_module, "given_dtype", None) or getattr(getattr(base, "config", None), "dtype", None)
        given = getattr(torch, given, None) if isinstance(given, str) else given
        if given not in (torch.float32, torch.bfloat16, torch.float16) or given.itemsize > kept.itemsize:
            return kept
        return given  # type: ignore[no-any-return]


def _cast(state: dict[str, Tensor], model: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], torch.dtype]:
    """Return a state in another dtype, except for tensors that the model always keeps in float32; zeros stay zeros.

    If that dtype's range is too small, the state stays as it is.
    """
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    names = {*names, *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())}
    cast, done = dict(state), dict[Any, Tensor]()
    for name, t in state.items():
        if not t.is_floating_point() or any(f".{part}." in f".{name}." for part in names):
            continue
        memory = (t.data_ptr(), t.shape, t.stride())  # cast tied tensors once
        if memory not in done:
            done[memory] = t.detach().to(dtype)
        cast[name] = done[memory]
        if bool((t.isfinite() & ~cast[name].isfinite()).any()):
            rank_zero_warn(f"SaveHuggingFace: {name} does not fit into {dtype_name(dtype)}, so training's dtype stays")
            return state, t.dtype
    return cast, dtype


def _name_base(folder: Path) -> None:
    """Write the path of the base model into its adapter's configuration."""
    edit(folder / ADAPTER / "adapter_config.json", base_model_name_or_path=str(folder.resolve()))


def identity(folder: Path) -> object:
    """Return what distinguishes a folder from a later one of the same name, or None if it does not exist."""
    if not folder.exists():
        return None
    found = folder.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _move(whole: Path, folder: Path) -> Path:
    """Rename ``whole`` to ``folder``, or to the first unused name with a number; return the name."""
    for number in itertools.count():
        place = folder if number == 0 else folder.with_name(f"{folder.name}_{number}")
        try:
            return whole.rename(place)  # fails if the folder exists and is not empty
        except OSError:
            if not place.exists():
                raise
    raise AssertionError


def _is_sharded(model: nn.Module, root: nn.Module | None) -> bool:
    mark_slices(root or model)
    return any(part_of(p).sharded for p in model.parameters())


def _gather(model: Any, root: nn.Module) -> dict[str, Any]:
    """Return extra arguments of ``save_pretrained`` for a sharded model: its whole state, on the first process's CPU.

    Args:
        model: The Hugging Face model, part of ``root``.
        root: The module as the strategy wrapped it.
    """
    settle(root)
    mark_slices(root)
    if not isinstance(model, nn.Module) or not any(part_of(p).sharded for p in model.parameters()):
        return {}
    tensors = {clean(name): t for name, t in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        lasting = module._buffers.keys() - module._non_persistent_buffers_set
        tensors |= {clean(f"{prefix}.{name}" if prefix else name): module.get_buffer(name) for name in sorted(lasting)}
    wholes = {t: whole_on_first(t) for t in dict.fromkeys(tensors.values())}  # gather tied tensors once
    return {"state_dict": {name: whole for name, t in tensors.items() if (whole := wholes[t]) is not None}}
