"""Write the model as a Hugging Face folder when training ends."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import mark_slices, settle, whole_on_first
from elsa_lightning.layout.sharded import clean, part_of


class SaveHuggingFace(Callback):
    """Saves the module's Hugging Face model, and its tokenizer, for ``from_pretrained``.

    Looks for the model in the module's attribute ``model``, as :class:`~elsa_lightning.CausalLM` has it.
    Written under a temporary name and renamed: the folder is whole or not there.

    Args:
        dirpath: Folder to write; None takes ``hf`` in the logger's folder. An existing one is replaced only
            if it holds nothing but a saved model.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that holds something else, before training."""
        if stage != "fit" or self.dirpath is None:
            return
        folder = Path(self.dirpath).expanduser()
        _check_replaceable(folder)
        source = getattr(pl_module, "path", None)
        if isinstance(source, str) and folder.resolve() == Path(source).resolve():
            raise UserError(f"dirpath {self.dirpath!r} is the folder of the model that is pruned; give another")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without a Hugging Face model, before training."""
        if not hasattr(getattr(pl_module, "model", None), "save_pretrained"):
            raise UserError(
                f"SaveHuggingFace needs a module whose attribute 'model' has save_pretrained; "
                f"{type(pl_module).__name__} has none: remove the callback"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on the first process."""
        # every process asks for log_dir, which is a broadcast
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "hf").expanduser()
        model: Any = pl_module.model
        whole_state = _gather(model, trainer.strategy.model or pl_module)
        if not trainer.is_global_zero:
            return
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            whole = Path(temporary) / "whole"
            model.save_pretrained(whole, **whole_state)
            _save_tokenizer(getattr(pl_module, "path", None), whole)
            if folder.exists():
                folder.replace(Path(temporary) / "former")
            whole.replace(folder)
        rank_zero_info(f"Model saved for from_pretrained: {folder}")


def _gather(model: Any, root: nn.Module) -> dict[str, Any]:
    """Return what ``save_pretrained`` needs beside a sharded model: its whole state, on the first process's CPU.

    Args:
        model: Part of ``root``.
        root: What the strategy made of the module.
    """
    settle(root)
    mark_slices(root)
    if not isinstance(model, nn.Module) or not any(part_of(p).sharded for p in model.parameters()):
        return {}
    tensors = {clean(name): t for name, t in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        lasting = module._buffers.keys() - module._non_persistent_buffers_set
        tensors |= {clean(f"{prefix}.{name}" if prefix else name): module.get_buffer(name) for name in sorted(lasting)}
    wholes = {t: whole_on_first(t) for t in dict.fromkeys(tensors.values())}  # tied ones once
    return {"state_dict": {name: whole for name, t in tensors.items() if (whole := wholes[t]) is not None}}


def _save_tokenizer(path: str | None, folder: Path) -> None:
    if path is None:
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    except (OSError, ValueError) as error:  # the trained model is worth more than its tokenizer
        rank_zero_warn(f"SaveHuggingFace: {path} has no tokenizer to save beside the model: {error}")


_WRITTEN = re.compile(  # what save_pretrained of models and tokenizers leaves
    r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|preprocessor_config)\.json|merges\.txt"
    r"|.*\.(safetensors|safetensors\.index\.json|model|jinja|spm)"
)


def _check_replaceable(folder: Path) -> None:
    """Raise ValueError if a folder holds anything but a model as this callback writes it."""
    if not folder.exists():
        return
    others = [folder] if not folder.is_dir() else [f for f in folder.iterdir() if not _WRITTEN.fullmatch(f.name)]
    if others:
        raise UserError(
            f"dirpath {str(folder)!r} exists and holds {others[0].name!r}, which is no part of a saved model and would "
            f"be lost; give an empty or a new folder"
        )
