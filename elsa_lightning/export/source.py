"""Loads the model to export from a model folder, the folder of a run, or a checkpoint."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from elsa_lightning.checkpoints import WRITTEN_LAST, check_whole
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export.folders import ADAPTER
from elsa_lightning.export.project import project
from elsa_lightning.export.record import Record, read, settings_of, versions
from elsa_lightning.layout.precise import precise_buffers
from elsa_lightning.layout.sharded import clean
from elsa_lightning.lm import model_path
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.report import some
from elsa_lightning.tensors import MASK

_EXACT = ("frozen", "finished", "suspended")  # phases whose checkpoints have exact zeros


@dataclass(frozen=True)
class Source:
    """A loaded sparse model.

    Attributes:
        model: The model, on the CPU, in evaluation mode.
        record: Its record.
        tokenizer: Folder or hub name of its tokenizer.
        path: Where the model was found.
    """

    model: Any
    record: Record
    tokenizer: str
    path: Path


def open_source(path: str | Path, model: str | None = None, dtype: str | None = None) -> Source:
    """Load the model to export.

    Args:
        path: A model folder, the folder of a run (with ``hf`` or ``checkpoints`` in it), or a checkpoint of Lightning.
        model: Name or folder of a checkpoint's base model, if the checkpoint does not name it.
        dtype: The dtype of the weights; None takes that of the run's original model.

    Raises:
        UserError: The path does not exist, or has nothing that can be exported.
    """
    place = find(Path(path).expanduser())
    loaded = _of_folder(place) if (place / "config.json").is_file() else _of_checkpoint(place, model)
    name = dtype or loaded.record.dtype
    if name is not None:
        _cast(loaded.model, getattr(torch, name))
    loaded.model.eval().requires_grad_(False)
    record = replace(loaded.record, dtype=dtype_name(loaded.model.dtype))
    return replace(loaded, record=record)


def find(path: Path) -> Path:
    """Return the model folder or checkpoint at a path or in the folder of a run.

    Raises:
        UserError: There is none, or several.
    """
    if not path.exists():
        raise UnavailableError(f"--from {str(path)!r} does not exist; give a model folder, a run's folder or a .ckpt")
    if path.is_file():
        return path
    if (path / ".metadata").is_file() or (path / WRITTEN_LAST).is_file():
        check_whole(path)
        return path
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"--from {str(path)!r} is a PEFT adapter: give the folder of its base model, which has the zeros"
        )
    if (path / "config.json").is_file():
        return path
    if (path / "hf/config.json").is_file():
        return path / "hf"
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    if checkpoints:
        last = [file for file in checkpoints if file.name.startswith(("last", "terminated"))]  # SaveOnTerminate's
        return find((last or checkpoints)[-1])
    inside = [*path.glob("lightning_logs/version_*"), *path.glob("version_*")]
    runs = [str(run) for run in sorted(inside) if (run / "hf").is_dir() or (run / "checkpoints").is_dir()]
    if len(runs) == 1:
        return find(Path(runs[0]))
    several = f"holds several runs, give one: {', '.join(runs)}" if runs else (
        "has no config.json of a model, no hf and no checkpoints of a run: give a model folder, a run's folder (its "
        "version_0), or a .ckpt"
    )  # fmt: skip
    raise UserError(f"--from {str(path)!r} {several}")


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast a model to a dtype, in which zeros stay zeros; raise UserError if a number would become infinite."""
    if getattr(model, "dtype", dtype) == dtype:
        return
    for name, p in model.named_parameters():
        if p.is_floating_point() and bool((p.isfinite() & ~p.to(dtype).isfinite()).any()):
            raise UserError(f"{name} does not fit into {str(dtype).removeprefix('torch.')}: give --dtype float32")
    with precise_buffers(model):
        model.to(dtype)
    model.config.dtype = dtype


def _of_folder(folder: Path) -> Source:
    from transformers import AutoModelForCausalLM

    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"--from {str(folder)!r} has a config.json that cannot be read: {error}") from error
    if config.get("quantization_config") is not None:
        raise UserError(f"--from {str(folder)!r} is quantized already: give the folder that it was made of")
    if not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")] or list(folder.glob("cpu_sparse*")):
        raise UserError(f"--from {str(folder)!r} has no weights that transformers loads: give the folder of the run")
    try:
        build: Any = AutoModelForCausalLM.from_pretrained
        model, found = build(folder, dtype="auto", output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # unknown architecture, cut off, wrong sizes
        raise UserError(f"--from {str(folder)!r} could not be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(
            f"--from {str(folder)!r} has no weights for {some(missing)}: it is incomplete, or of another task than "
            f"causal language modelling"
        )
    record = read(folder)
    notes = []
    if (folder / ADAPTER).is_dir():
        notes.append("The run trained a PEFT adapter, which is not part of this export: this is the base model.")
    if record is None:
        named = config.get("_name_or_path") or None
        record = Record(base_model=named, versions=versions())
    record = replace(record.of_model(), notes=[*record.notes, *notes])
    return Source(model, record, str(folder), folder)


def _of_checkpoint(file: Path, name: str | None) -> Source:
    checkpoint = _read(file)
    arguments = checkpoint.get("hyper_parameters", {}) if isinstance(checkpoint, dict) else {}
    name = name or arguments.get("name")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"--from {str(file)!r} is no checkpoint of Lightning: it has no state_dict")
    if name is None:
        raise UserError(f"--from {str(file)!r} does not say of which model it is: give --model NAME_OR_FOLDER")
    model, given = _build(model_path(name), arguments.get("revision"), checkpoint["state_dict"], file)
    states = [
        (value["admm"], checkpoint.get("optimizer_states", []))
        for key, value in checkpoint.get("callbacks", {}).items()
        if "ElsaCallback" in key and "admm" in value
    ]
    folder = file.resolve().parent.parent
    run = str(folder) if any(folder.glob("elsa_run*.json")) else None  # by which a report finds it
    record = replace(_record(checkpoint, name, arguments, [state for state, _ in states]), run=run)
    notes = [note for place, (state, of) in enumerate(states) if (note := _settle(model, state, of, place, file))]
    if not states:
        notes = ["The checkpoint has no state of ElsaCallback: its weights are exported as they are."]
    narrow = given in (torch.bfloat16, torch.float16)  # not wider than the trained weights
    dtype = dtype_name(given) if narrow else None
    return Source(model, replace(record, notes=notes, dtype=dtype), model_path(name), file)


def _read(file: Path) -> Any:
    """Return a checkpoint of one or several files, loaded without executing any code in it."""
    if file.is_dir():
        return _read_distributed(file)
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise UserError(f"--from {str(file)!r} is no checkpoint that loads with weights_only=True: {error}") from error


def _read_distributed(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        parts: dict[str, Any] = torch.load(whole, map_location="cpu", weights_only=True)
    parts |= torch.load(folder / WRITTEN_LAST, map_location="cpu", weights_only=True)
    if "model" in parts:  # FSDP1's key of the state dict
        parts["state_dict"] = parts.pop("model")
    parts["optimizer_states"] = [parts[key] for key in sorted(parts) if key.startswith("optimizer_")]
    return parts


def _settle(model: nn.Module, state: dict[str, Any], optimizers: list[Any], place: int, file: Path) -> str | None:
    """Make the zeros exact, by a projection if need be, and return a note about that, or None."""
    step, total = state["step"], state["total_steps"]
    if state["phase"] in _EXACT:
        unfinished = state["phase"] == "suspended" or step < total
        return f"From a checkpoint of step {step} of {total}: zeros are exact." if unfinished else None
    if state["phase"] != "admm":
        raise UserError(f"--from {str(file)!r} was saved before the first projection: nothing is pruned yet")
    if place >= len(optimizers):
        raise UserError(
            f"--from {str(file)!r} is of step {step} of {total}, before the zeros are exact, and has weights only: the "
            f"projection needs the optimizer's state, so give a whole checkpoint or the finished run"
        )
    masks = [entry[MASK] for entry in optimizers[place]["state"].values() if MASK in entry]
    if any(mask.is_floating_point() for mask in masks):
        raise UserError(
            f"--from {str(file)!r} is of FSDP1 and of step {step} of {total}, before the zeros are exact: resume the "
            f"run, and export what it leaves"
        )
    project(model, state, optimizers[place])
    return (
        f"From a checkpoint of step {step} of {total}, before the run had fixed its mask: the weights were projected "
        f"onto {state['settings']['constraint']} for this export. The finished run's model is better."
    )


def _build(path: str, revision: str | None, state: Mapping[str, Tensor], file: Path) -> tuple[Any, Any]:
    """Return the model of a checkpoint, and the dtype of its base model."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        given = config.dtype  # read before building, which changes it
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the model {path!r} that {str(file)!r} is of could not be had: {error}") from error
    names = {clean(name): t for name, t in state.items()}
    if any("lora_" in name for name in names):
        raise UserError(f"--from {str(file)!r} has a PEFT adapter in it: give the hf folder of the run")
    weights = {name.removeprefix("model."): t for name, t in names.items() if name.startswith("model.")}
    dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [*unexpected, *(set(missing) - set(getattr(model, "_tied_weights_keys", None) or ()))]
    if wrong:
        raise UserError(f"--from {str(file)!r} is not of the model {path!r}: {wrong[0]} does not fit; give --model")
    with contextlib.suppress(OSError):  # there may be none
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    return model, given


def _record(checkpoint: Mapping[str, Any], name: str, arguments: Mapping[str, Any], states: list[Any]) -> Record:
    data = checkpoint.get("CalibrationData", {})
    known = {key.removeprefix("data."): value for key, value in data.items() if key.startswith("data.") and value}
    training = {key: value for key, value in arguments.items() if isinstance(value, (bool, int, float, str))}
    training.pop("name", None)
    dense = checkpoint.get("dense_perplexity")
    return Record(
        base_model=name,
        method=[settings_of(state) for state in states],
        training={"optimizer steps": checkpoint.get("global_step"), **training},
        data=known,
        perplexity={} if dense is None else {"dense": dense},
        evaluation=checkpoint.get("evaluation") or {},
        versions=versions(),
    )
