"""Exports: written beside their place, reloaded, compared, and only then given their name."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.export import cpu_sparse, reload
from elsa_lightning.export.card import write_card
from elsa_lightning.export.folders import check_replaceable, new_folder, save_tokenizer, zeros_of
from elsa_lightning.export.formats import Options, check_format
from elsa_lightning.export.gguf import check_gguf, write_gguf
from elsa_lightning.export.quantized import check_groups, write_quantized
from elsa_lightning.export.source import Source, find, open_source
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.report import some
from elsa_lightning.slicing import shrink

Say = Callable[[str], None]

_BEFORE_ROUNDING = "The perplexity was measured before the weights were rounded for this export."


@dataclass(frozen=True)
class Made:
    """What a folder must give back when it is loaded.

    Attributes:
        logits: Of :func:`_probe`'s token ids.
        sparsity: (zeros, entries) of each matrix.
        tolerance: Largest difference of logits, relative to the largest of them.
        does: What the export did, for the card.
        rounded: Whether values are others than the model's.
        checked: What to say of a folder that its writer has read back, and transformers does not load.
    """

    logits: Tensor
    sparsity: dict[str, tuple[int, int]]
    tolerance: float
    does: dict[str, Any] = field(default_factory=dict)
    checked: str | None = None
    rounded: bool = False


def export(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    fresh: bool = True,
    say: Say = print,
) -> Path:
    """Export a sparse model, and make sure that what was written is that model.

    Args:
        source: A model folder, the folder of a run, or a checkpoint of Lightning.
        to: ``hf``, ``shrunk``, ``quantized``, ``cpu-sparse`` or ``gguf``.
        output: Folder to write; a model that is there is replaced when the new one is complete.
        model: Name or folder of the model that a checkpoint is of, where it does not say so.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float16``; None takes the one that was given.
        options: Of single formats.
        fresh: Reload what was written in a process of its own; False does it in this one, which is quicker.
        say: Takes what there is to tell, line by line.

    Returns:
        The folder.

    Raises:
        UserError: Something given cannot be used, or what was written does not give the model back.
    """
    folder, options = Path(output).expanduser(), options or Options()
    check_format(to, options)
    check_replaceable(folder, "--output")
    found = find(Path(source).expanduser())
    if found.resolve() == folder.resolve():
        raise UserError(f"--output {str(folder)!r} is the folder to export; give another")
    loaded = open_source(found, model, dtype)
    options = options.of(loaded.record)
    if found != Path(source).expanduser():
        say(f"Exporting {found}.")
    for note in loaded.record.notes:
        say(note)
    if not any(zeros > 0.05 * size for zeros, size in zeros_of(loaded.model.state_dict()).values()):
        say("No matrix has more than 5 % zeros: this model is not sparse.")
    with new_folder(folder) as whole:
        made = WRITERS[to](loaded, whole, options, say)
        if to != "gguf" and (problem := save_tokenizer(loaded.tokenizer, whole)) is not None:
            say(problem)
        kept = dtype_name(loaded.model.dtype)
        record = replace(loaded.record, format=to, dtype=kept, export=made.does, sparsity=made.sparsity)
        if made.rounded and record.perplexity:
            record = replace(record, notes=[*record.notes, _BEFORE_ROUNDING])
        write_card(whole, record)
        ids = _probe(loaded.model)
        del loaded
        gc.collect()
        say(made.checked or _verify(whole, ids, made, fresh))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"{to}: {folder}, {size / 1e6:,.1f} MB")
    return folder


def _probe(model: Any) -> Tensor:
    """Return token ids that a model's logits are compared on, ``(2, 16)``."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _made(model: Any, does: dict[str, Any] | None = None) -> Made:
    logits = model(_probe(model)).logits
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
    return Made(logits.float(), zeros_of(model.state_dict()), tolerance, does or {})


def _hf(source: Source, folder: Path, options: Options, say: Say) -> Made:
    source.model.save_pretrained(folder)
    return _made(source.model)


def _shrunk(source: Source, folder: Path, options: Options, say: Say) -> Made:
    whole, size = _made(source.model), source.model.num_parameters()
    model = shrink(source.model)
    if model.num_parameters() == size:
        raise UserError(
            "--to shrunk: no neuron, head, layer or expert of this model is zero as a whole, so nothing can be cut "
            "out; train under Neurons, Heads, Layers or Experts, or use --to hf"
        )
    made = _made(model, {"parameters": f"{model.num_parameters():,} of {size:,}"})
    if (off := _difference(made.logits, whole.logits)) > made.tolerance:
        raise UserError(
            f"--to shrunk: the smaller model's logits differ by {off:.1e} of the largest: nothing is written"
        )
    say(f"{made.does['parameters']} parameters are left.")
    model.save_pretrained(folder)
    return made


def _quantized(source: Source, folder: Path, options: Options, say: Say) -> Made:
    model = source.model
    assert options.bits is not None and options.group_size is not None  # of Options.of
    check_groups(model, options.bits, options.group_size)
    whole = _made(model)
    does = write_quantized(model, folder, options.bits, options.group_size)
    made = _made(model)
    if does["exact layers"] < does["layers"]:
        does["relative change of the logits"] = _relative(made.logits, whole.logits)
        say(
            f"Rounding to {does['scheme']} moved the weights by {does['relative error of the weights']:.2%} of their "
            f"norm and the logits by {does['relative change of the logits']:.2%}; elsa test measures the perplexity."
        )
    else:
        say(f"The weights lie on the grid of {does['scheme']}: nothing was rounded.")
    return replace(made, does=does, rounded=does["exact layers"] < does["layers"])


def _cpu_sparse(source: Source, folder: Path, options: Options, say: Say) -> Made:
    model = source.model
    shares = cpu_sparse.shares_of_zeros(model)
    model.float()
    made = _made(model)
    cpu_sparse.to_cpu_sparse(model, options.break_even)
    dense = [name for name, share in shares.items() if share < options.break_even]
    say(f"{len(shares) - len(dense)} of {len(shares)} linear layers are kept as compressed sparse rows, float32.")
    if dense:
        say(f"Below {options.break_even:.0%} zeros a layer is faster dense, and stays so: {some(dense)}.")
    cpu_sparse.save_cpu_sparse(model, folder)
    return replace(made, does={"sparse layers": len(shares) - len(dense), "break-even": options.break_even})


def _gguf(source: Source, folder: Path, options: Options, say: Say) -> Made:
    command = check_gguf(options.gguf_type, options.converter)
    checked = write_gguf(source.model, source.tokenizer, folder, options.gguf_type, command)
    return replace(
        _made(source.model, {"type": options.gguf_type}), checked=checked, rounded=options.gguf_type != "f32"
    )


WRITERS: dict[str, Callable[[Source, Path, Options, Say], Made]] = {
    "hf": _hf,
    "shrunk": _shrunk,
    "quantized": _quantized,
    "cpu-sparse": _cpu_sparse,
    "gguf": _gguf,
}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def _reloaded(folder: Path, ids: Tensor, fresh: bool) -> tuple[Tensor, dict[str, int], str]:
    if not fresh:
        return reload.look(folder, ids)
    with tempfile.TemporaryDirectory() as place:
        given, got = Path(place, "ids.safetensors"), Path(place, "logits.safetensors")
        save_file({"ids": ids}, given)
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", reload.__file__, str(folder), str(given), str(got)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"what was written does not load, and is not kept: {done.stderr.strip().splitlines()[-1:]}")
        with safe_open(got, framework="pt") as tensors:
            zeros, how = (json.loads(tensors.metadata()[key]) for key in ("zeros", "how"))
            return tensors.get_tensor("logits"), zeros, f"in a fresh process, {how}"


def _verify(folder: Path, ids: Tensor, made: Made, fresh: bool) -> str:
    """Load a folder and compare; return what to say of it.

    Raises:
        UserError: It does not load, or logits or zeros are not those of the model.
    """
    logits, zeros, how = _reloaded(folder, ids, fresh)
    logits = logits.float()
    off = _difference(logits, made.logits) if logits.shape == made.logits.shape else float("inf")
    if not off <= made.tolerance:
        raise UserError(f"what was written gives other logits ({off:.1e} of the largest apart), and is not kept")
    wrong = [name for name, (count, _) in made.sparsity.items() if zeros.get(name) != count]
    if wrong:
        raise UserError(f"what was written has {zeros.get(wrong[0])} zeros in {wrong[0]}, not as many as the model")
    exact = "the same" if off == 0 else f"within {off:.0e}"
    return f"Reloaded ({how}): logits {exact}, zeros the same."
