"""Reads the tensors of a saved model some rows at a time, without loading any whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elsa_lightning.anatomy import examine
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.layout.kernels import is_transposed
from elsa_lightning.layout.sharded import clean
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.packed_files import in_gguf, in_safetensors

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TURNED = (  # names of matrices that some models store (in, out), and these models
    (
        re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$"),
        {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"},
    ),
    (
        re.compile(r"(^|\.)experts\.(gate_up_proj|down_proj)$"),  # stacks (experts, in, out)
        {"gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"},
    ),
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")  # in a model's folder
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read in parts.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the whole tensor.
        dtype: Name of the dtype in the file's own terms.
        floating: Whether its entries are floating-point numbers, not codes or indices.
        transposed: Whether it is a matrix ``(in, out)``.
        rows: Returns the rows from one index of the first dimension to another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    floating: bool
    transposed: bool
    rows: Callable[[int, int], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Source:
    """A source of tensors.

    Attributes:
        name: Path of the files, or class of the module.
        config: The model's configuration, empty if there is none.
        tensors: Yields the tensors, one after the other.
    """

    name: str
    config: dict[str, Any]
    tensors: Callable[[], Iterator[Stored]] = field(repr=False)


def open_source(path_or_model: str | Path | nn.Module) -> Source:
    """Find the tensors of a folder, a file or a module.

    Raises:
        UserError: There are no tensors, or they are in an unsupported format.
    """
    if isinstance(path_or_model, nn.Module):
        return _of_module(path_or_model)
    path = Path(path_or_model).expanduser()
    if not path.exists():
        raise UnavailableError(f"{str(path)!r} does not exist; give the folder of a saved model or a .safetensors file")
    path = _in_run(path)
    files = _files(path)
    folder = path if path.is_dir() else path.parent
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}

    def tensors() -> Iterator[Stored]:
        for file in files:
            if file.suffix == ".gguf":
                for name, shape, kind, rows in in_gguf(file):
                    yield Stored(name, shape, kind, True, False, rows)
            elif file.suffix == ".safetensors":
                yield from _of_safetensors(file, config)
            else:
                yield from _of_torch(file, config)

    return Source(str(path), config, tensors)


def _in_run(path: Path) -> Path:
    """Return the model, or else the last checkpoint, in the folder of a run; any other path as it is."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    if (path / "hf/config.json").is_file():
        return path / "hf"
    found, runs = path, ("checkpoints/*.ckpt", "version_*", "lightning_logs/version_*")
    if any(next(path.glob(run), None) for run in runs) and not any(next(path.glob(kind), None) for kind in _WEIGHTS):
        from elsa_lightning.export.source import find

        try:
            found = find(path)
        except UserError as error:  # its message begins with an option of elsa export
            raise UserError(str(error).replace("--from ", "", 1)) from None
    if (found / ".metadata").is_file():
        raise UserError(
            f"{str(found)!r} is a checkpoint in several files, which is not read: elsa export --from {str(path)!r} "
            f"--to hf makes a model's folder of it"
        )
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        if path.suffix in (".safetensors", ".gguf", *_TORCH):
            return [path]
        raise UserError(
            f"{str(path)!r} is not read: give .safetensors, its .index.json, .gguf, {', '.join(_TORCH)}, or a folder"
        )
    for index in _INDICES:
        if (path / index).is_file():
            return _indexed(path / index)
    found = next((files for kind in _WEIGHTS if (files := sorted(path.glob(kind)))), [])
    if not found:
        others = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{str(path)!r} has no .safetensors and no pytorch_model.bin, but {others}; give a model's folder"
        )
    return found


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UnavailableError(
            f"{str(index)!r} names {missing[0]}, which is not there: the model was saved or copied in part"
        )
    return files


def _of_safetensors(file: Path, config: Mapping[str, Any]) -> Iterator[Stored]:
    try:
        opened: Any = safe_open(file, "pt")
    except Exception as error:  # safetensors has its own exception
        raise UserError(f"{str(file)!r} is no whole safetensors file: {error}") from None
    with opened as tensors:
        packed = in_safetensors(file, tensors, config)
        for name, matrix in packed.items():
            yield Stored(name, matrix.shape, matrix.dtype, True, False, matrix.rows)
        parts = {part for matrix in packed.values() for part in matrix.parts}
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        turned = _turned(config, shapes)
        for name in (name for name in tensors.keys() if name not in parts):  # noqa: SIM118
            part = tensors.get_slice(name)
            shape, kind = shapes[name], str(part.get_dtype())
            dtype = dtype_name(_DTYPES[kind]) if kind in _DTYPES else kind
            read = partial(_slice, part) if shape else partial(_scalar, tensors, name)
            yield Stored(name, shape, dtype, kind.startswith(("F", "BF")), name in turned, read)


def _turned(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the names of a file's matrices that are stored (in, out), by its configuration or by its biases."""
    found: set[str] = set()
    for pattern, models in _TURNED:
        names = [name for name in shapes if pattern.search(name)]
        if config.get("model_type") in models or _biases_tell(names, shapes):
            found.update(names)
    return found


def _biases_tell(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether biases show that matrices are stored (in, out), as where no configuration tells the model.

    Other models have layers of the same names that are stored (out, in): a bias has as many entries as there are
    outputs. Square matrices do not tell, so all of a file are judged by the first that does.
    """
    for name in names:
        *stack, first, second = shapes[name] if len(shapes[name]) > 1 else (0, 0)
        bias = shapes.get(f"{name.removesuffix('weight')}bias" if name.endswith(".weight") else f"{name}_bias")
        if first != second and bias in [(*stack, first), (*stack, second)]:
            return bias == (*stack, second)
    return False


def _slice(part: Any, start: int, stop: int) -> Tensor:
    rows: Tensor = part[start:stop]
    return rows


def _scalar(tensors: Any, name: str, start: int, stop: int) -> Tensor:
    number: Tensor = tensors.get_tensor(name)
    return number


def _of_torch(file: Path, config: Mapping[str, Any]) -> Iterator[Stored]:
    try:
        loaded: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises many types
        first = str(error).splitlines()[0]
        raise UserError(
            f"{str(file)!r} cannot be read without running its code: {first}; save it as safetensors"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{str(file)!r} holds no tensors by name")
    turned = _turned(config, {name: tuple(t.shape) for name, t in tensors.items()})
    seen = set()
    for name, t in tensors.items():
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape))
        if place not in seen:  # yield tied weights once
            seen.add(place)
            yield _of_tensor(name, t, name in turned)


def _of_module(model: nn.Module) -> Source:
    examine(model)  # marks weights stored (in, out)
    config: Any = getattr(model, "config", None)

    def tensors() -> Iterator[Stored]:
        for name, p in model.named_parameters():
            if isinstance(p, DTensor):
                raise UserError(
                    f"{name} is sharded over processes: save the model, and count the zeros of what is saved"
                )
            yield _of_tensor(clean(name), p.detach(), is_transposed(p))

    return Source(type(model).__name__, config.to_dict() if hasattr(config, "to_dict") else {}, tensors)


def _of_tensor(name: str, t: Tensor, transposed: bool) -> Stored:
    def rows(start: int, stop: int) -> Tensor:
        return t[start:stop] if t.dim() else t

    return Stored(name, tuple(t.shape), dtype_name(t.dtype), t.is_floating_point(), transposed, rows)
