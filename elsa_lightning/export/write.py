"""Writes exports: into a temporary folder, which is reloaded, compared, and only then renamed to its final name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from elsa_lightning.anatomy import stacks
from elsa_lightning.errors import UserError
from elsa_lightning.export import cpu_sparse
from elsa_lightning.export.archive import check_archive, write_archive
from elsa_lightning.export.card import write_card
from elsa_lightning.export.folders import archive_of, check_replaceable, new_folder, save_tokenizer, zeros_of
from elsa_lightning.export.formats import Options, check_format, has_experts, sets_of
from elsa_lightning.export.gguf import check_gguf, write_gguf
from elsa_lightning.export.measure import Measured, check_measurable, judge, prepare, timed
from elsa_lightning.export.quantized import check_groups, write_quantized
from elsa_lightning.export.record import Record
from elsa_lightning.export.source import Source, find, open_source
from elsa_lightning.export.verify import Made, difference, made_of, probe, verify
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.report import some
from elsa_lightning.sets.experts import pass_over, zero_experts
from elsa_lightning.sets.structured import is_structured
from elsa_lightning.slicing import shrink

Say = Callable[[str], None]

_BEFORE_ROUNDING = "The perplexity was measured before the weights were rounded for this export."


def export(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    measure: bool = False,
    archive: bool = False,
    fresh: bool = True,
    say: Say = print,
) -> Path:
    """Export a sparse model, and verify that the written files reproduce it.

    Args:
        source: A model folder, the folder of a run, or a checkpoint of Lightning.
        to: ``hf``, ``shrunk``, ``quantized``, ``cpu-sparse`` or ``gguf``.
        output: Folder to write; an existing model there is replaced when the new one is complete.
        model: Name or folder of a checkpoint's base model, if the checkpoint does not name it.
        dtype: The dtype of the weights: ``float32``, ``bfloat16`` or ``float16``; None takes that of the original
            model.
        options: Options of single formats.
        measure: Measure the perplexity of the export as the run did; a value that differs from the run's is an error,
            unless values were rounded. Also measure decoding speed on this machine's CPU, beside the dense model's.
        archive: Write the folder as one compressed file beside it too, ``OUTPUT.tar.zst``.
        fresh: Reload the export in a separate process; False does so in this one, which is quicker.
        say: Called with each line of output.

    Returns:
        The folder.

    Raises:
        UserError: An argument cannot be used, or the written files do not reproduce the model.
    """
    folder, options = Path(output).expanduser(), options or Options()
    check_format(to, options)
    check_replaceable(folder, "--output")
    if folder.is_symlink():  # what it leads to is replaced, and not the link itself
        folder = folder.resolve()
        check_replaceable(folder, "--output")
    found = find(Path(source).expanduser())
    if found.resolve() == folder.resolve():
        raise UserError(f"--output {str(folder)!r} is the folder to export; give another")
    if archive:
        check_archive(folder)
    loaded = open_source(found, model, dtype)
    if measure:
        check_measurable(loaded.record, to)
    options = options.of(loaded.record)
    if found != Path(source).expanduser():
        say(f"Exporting {found}.")
    for note in loaded.record.notes:
        say(note)
    experts = pass_over(loaded.model) if has_experts(sets_of(loaded.record)) else []  # skip zero experts
    if to != "shrunk" and any(bool(zero_experts(each).any()) for each in experts):
        raise UserError(
            f"the run removed experts, which its routers pass over while they are zero; plain software would choose "
            f"them, so --to {to} would be another model: export --to shrunk first, and that folder --to {to}"
        )
    if not any(zeros > 0.05 * size for zeros, size in zeros_of(loaded.model.state_dict()).values()):
        say("No matrix has more than 5 % zeros: this model is not sparse.")
    with new_folder(folder) as whole:
        given = prepare(loaded, to, whole.with_name("dense")) if measure else None
        dense = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        ids, made = probe(loaded.model), WRITERS[to](loaded, whole, options, say)
        if to != "gguf" and (problem := save_tokenizer(loaded.tokenizer, whole)) is not None:
            say(problem)
        kept = dtype_name(loaded.model.dtype)
        record = replace(
            loaded.record, format=to, dtype=kept, export=made.does, sparsity=made.sparsity, dense_bytes=dense
        )
        del loaded
        gc.collect()
        for line in _checked(whole, record, made, ids, given, fresh):
            say(line)
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        if archive:
            write_archive(whole, folder.name, archive_of(whole))
            packed = archive_of(whole).stat().st_size
    say(f"{to}: {folder}, {size / 1e6:,.1f} MB")
    if archive:
        say(f"archive: {archive_of(folder)}, {size / 1e6:,.1f} → {packed / 1e6:,.1f} MB")
    elif archive_of(folder).exists():
        say(f"{archive_of(folder)} is of an earlier export: give --archive to write it anew.")
    if found != Path(source).expanduser():
        say(f"Beside its run: elsa report {source} {folder}")
    return folder


def _checked(
    whole: Path, record: Record, made: Made, ids: Tensor, given: Measured | None, fresh: bool
) -> Iterator[str]:
    """Reload an export, measure it, and write its card; yield lines of output."""
    if made.rounded and record.perplexity and given is None:
        record = replace(record, notes=[*record.notes, _BEFORE_ROUNDING])
    if made.checked is not None:
        yield made.checked
    else:
        text, precision, dense = (given.text, given.precision, given.dense) if given else (None, "", None)
        said, look = verify(whole, ids, made, fresh, text, precision, dense)
        yield said
        if given is not None and look.perplexity is not None:
            record, said = judge(record, given, look.perplexity, made.rounded)
            yield said
            if look.speed:
                record, said = timed(record, look)
                yield said
    write_card(whole, record)


def _hf(source: Source, folder: Path, options: Options, say: Say) -> Made:
    source.model.save_pretrained(folder)
    return made_of(source.model)


def _shrunk(source: Source, folder: Path, options: Options, say: Say) -> Made:
    whole, size = made_of(source.model), source.model.num_parameters()
    model = shrink(source.model)
    if model.num_parameters() == size and any(map(is_structured, sets_of(source.record))):
        raise UserError("--to shrunk: this folder is the smaller model already; use --to hf")
    if model.num_parameters() == size:
        raise UserError(
            "--to shrunk: no neuron, head, layer or expert of this model is zero as a whole, so nothing can be cut "
            "out; train under Neurons, Heads, Layers or Experts, or use --to hf"
        )
    made = made_of(model, {"parameters": f"{model.num_parameters():,} of {size:,}"})
    if (off := difference(made.logits, whole.logits)) > made.tolerance:
        raise UserError(
            f"--to shrunk: the smaller model's logits differ by {off:.1e} of the largest: nothing is written"
        )
    say(f"{made.does['parameters']} parameters are left.")
    model.save_pretrained(folder)
    return made


def _quantized(source: Source, folder: Path, options: Options, say: Say) -> Made:
    model = source.model
    assert options.bits is not None and options.group_size is not None  # set by Options.of
    check_groups(model, options.bits, options.group_size)
    whole = made_of(model)
    does = write_quantized(model, folder, options.bits, options.group_size)
    made = made_of(model)
    if does["exact layers"] < does["layers"]:
        does["relative change of the logits"] = _relative(made.logits, whole.logits)
        say(
            f"Rounding to {does['scheme']} moved the weights by {does['relative error of the weights']:.2%} of their "
            f"norm and the logits by {does['relative change of the logits']:.2%}; --measure says what it cost."
        )
    else:
        say(f"The weights lie on the grid of {does['scheme']}: nothing was rounded.")
    return replace(made, does=does, rounded=does["exact layers"] < does["layers"])


def _cpu_sparse(source: Source, folder: Path, options: Options, say: Say) -> Made:
    model = source.model
    shares = cpu_sparse.shares_of_zeros(model)
    model.float()
    made = made_of(model)
    cpu_sparse.to_cpu_sparse(model, options.break_even)
    dense = [name for name, share in shares.items() if not cpu_sparse.is_enough(share, options.break_even)]
    say(f"{len(shares) - len(dense)} of {len(shares)} linear layers are kept as compressed sparse rows, float32.")
    if dense:
        say(f"Below {options.break_even:.0%} zeros a layer is faster dense, and stays so: {some(dense)}.")
    does: dict[str, object] = {"sparse layers": len(shares) - len(dense), "break-even": options.break_even}
    if found := stacks(model):
        say(f"{len(found)} stacks of experts stay dense, whatever their zeros: {some(found)}.")
        does["stacks of experts, left dense"] = len(found)
    cpu_sparse.save_cpu_sparse(model, folder)
    return replace(made, does=does)


def _gguf(source: Source, folder: Path, options: Options, say: Say) -> Made:
    command = check_gguf(options.gguf_type, options.converter)
    checked, rounded = write_gguf(source.model, source.tokenizer, folder, options.gguf_type, command)
    return replace(made_of(source.model, {"type": options.gguf_type}), checked=checked, rounded=rounded)


WRITERS: dict[str, Callable[[Source, Path, Options, Say], Made]] = {
    "hf": _hf,
    "shrunk": _shrunk,
    "quantized": _quantized,
    "cpu-sparse": _cpu_sparse,
    "gguf": _gguf,
}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
