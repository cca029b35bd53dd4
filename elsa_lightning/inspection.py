"""``sparsity()``: where the zeros of a model are, by tensor, kind and pattern, for any folder, file or module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elsa_lightning.patterns import USUAL, Groups, groups_of, satisfied
from elsa_lightning.tensor_files import Stored, open_source
from elsa_lightning.units import Empty, Rows, empty_units

_AT_ONCE = 1 << 24  # entries read at once
_SPARSE = 0.05  # share of zeros from which the table tells how near a pattern is
_KINDS = {
    "embeddings": r"embed|(^|\.)(wte|wpe)\.|tok_embeddings|token_embd|position",
    "output": r"(^|\.)(lm_head|embed_out|classifier|score|qa_outputs)\.|^output\.weight$",
    "adapters": r"lora_",
    "attention": r"attn|attention|(^|[._])(q|k|v|o|qkv|out)_proj\b",
    "mlp": r"mlp|ffn|feed_forward|expert|moe|(^|\.)(fc\d|w[123]|(gate|up|down)_proj|(intermediate|output)\.dense)\.",
}
_VECTORS = "norms and biases"
_BIAS = re.compile(r"[._]bias$")  # those of stacks of experts have two dimensions, and are no matrices
_SCALES = re.compile(r"(scales?|scale_inv|absmax|quant_map|SCB|input_scale|weight_scale_2)$")


@dataclass(frozen=True)
class TensorZeros:
    """The zeros of one tensor.

    Attributes:
        name: Name of the tensor.
        kind: ``attention``, ``mlp``, ``embeddings``, ``output``, ``adapters``, ``norms and biases`` or ``other``.
        shape: Shape of the tensor.
        dtype: The dtype in which it is saved.
        zeros: Entries that are exactly 0.
        size: Number of entries.
        rows: Number of outputs; this and the following are 0 for tensors that are no matrix.
        dead_rows: Rows with only zeros.
        columns: Number of inputs.
        dead_columns: Columns with only zeros.
        groups: By pattern, such as ``2:4``, the number of groups and of those with too many weights; patterns whose
            groups do not divide the rows are missing.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    size: int
    rows: int = 0
    dead_rows: int = 0
    columns: int = 0
    dead_columns: int = 0
    groups: Mapping[str, Groups] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / max(1, self.size)

    @property
    def pattern(self) -> str | None:
        """The tightest of the usual N:M patterns that the tensor satisfies, or None."""
        return satisfied({pattern: found.violating for pattern, found in self.groups.items()})


@dataclass(frozen=True)
class Sparsity:
    """Where the zeros of a model are; its ``str`` is a table.

    Attributes:
        source: Path, or class of the module.
        tensors: The tensors that were read.
        units: Attention heads and neurons that add nothing to a layer's output, by layer; only for layers with the
            names of the usual models.
        unread: Tensors that were not read, with the reason.
    """

    source: str
    tensors: tuple[TensorZeros, ...]
    units: tuple[Empty, ...]
    unread: Mapping[str, str]

    @property
    def zeros(self) -> int:
        """Entries that are exactly 0, in all tensors that were read."""
        return sum(t.zeros for t in self.tensors)

    @property
    def size(self) -> int:
        """Entries of all tensors that were read."""
        return sum(t.size for t in self.tensors)

    def kinds(self) -> dict[str, tuple[TensorZeros, ...]]:
        """Return the tensors by kind."""
        names = dict.fromkeys(t.kind for t in self.tensors)
        return {kind: tuple(t for t in self.tensors if t.kind == kind) for kind in names}

    def to_dict(self) -> dict[str, Any]:
        """Return all results, and sums, in types that JSON has."""
        matrices = [{**asdict(t), "sparsity": t.sparsity, "pattern": t.pattern} for t in self.tensors]
        kinds = {
            kind: {"tensors": len(of), "zeros": sum(t.zeros for t in of), "size": sum(t.size for t in of)}
            for kind, of in self.kinds().items()
        }
        return {
            "source": self.source,
            "zeros": self.zeros,
            "size": self.size,
            "sparsity": self.zeros / max(1, self.size),
            "tensors": matrices,
            "kinds": kinds,
            "patterns": self.patterns(),
            "units": [asdict(unit) for unit in self.units],
            "unread": dict(self.unread),
        }

    def patterns(self) -> dict[str, dict[str, int]]:
        """Return, by pattern, how many matrices have such groups and satisfy it, and how many groups violate it."""
        found = {}
        for pattern in (f"{n}:{m}" for n, m in USUAL):
            of = [t.groups[pattern] for t in self.tensors if pattern in t.groups]
            found[pattern] = {
                "matrices": len(of),
                "satisfied": sum(g.violating == 0 for g in of),
                "groups": sum(g.groups for g in of),
                "violating": sum(g.violating for g in of),
            }
        return found

    def __str__(self) -> str:
        """Return a table of the zeros."""
        head = ("tensor", "shape", "dtype", "zeros", "N:M", "dead rows", "dead columns")
        lines = [self.source, *_columns([head, *(_line(t) for t in self.tensors)]), ""]
        totals = [*self.kinds().items(), ("all", self.tensors)]
        lines += _columns([("kind", "tensors", "parameters", "zeros"), *(_sum(kind, of) for kind, of in totals)])
        for pattern, found in self.patterns().items():
            if found["matrices"]:
                share = found["violating"] / max(1, found["groups"])
                lines.append(
                    f"{pattern}: {found['satisfied']} of {found['matrices']} matrices; {share:.1%} of all groups "
                    f"violate it"
                )
        for what in dict.fromkeys(unit.what for unit in self.units):
            units = [unit for unit in self.units if unit.what == what]
            lines.append(f"empty {what}: {sum(u.empty for u in units):,} of {sum(u.total for u in units):,}")
        for reason in dict.fromkeys(self.unread.values()):
            names = [name for name, why in self.unread.items() if why == reason]
            lines.append(f"NOT READ, {len(names)} tensors: {reason}: {names[0]}{', ...' if len(names) > 1 else ''}")
        return "\n".join(lines)


def sparsity(path_or_model: str | Path | nn.Module) -> Sparsity:
    """Count the zeros of a saved model, or of a module.

    Tensors are read one after the other and some rows at a time, so a model of any size takes little memory. Exports
    are read as the matrices that they represent: compressed rows, ``pack-quantized`` integers without an offset, GGUF.
    Tensors in other quantized formats, whose codes need a scale and maybe an offset, are listed as unread.

    Args:
        path_or_model: A model's folder, with one or several files of weights, or a run's (its ``hf``, else its last
            checkpoint); a ``.safetensors`` file or its index; a file that torch saved (``.bin``, ``.pt``, ``.ckpt``); a
            ``.gguf`` file (with the package gguf); or a module on one device.

    Raises:
        ValueError: The file does not exist, is incomplete, or is in another format.
    """
    source = open_source(path_or_model)
    tensors: list[TensorZeros] = []
    unread: dict[str, str] = {}
    lines: dict[str, Rows] = {}
    for stored in source.tensors():
        if (reason := _unreadable(stored)) is not None:
            unread[stored.name] = reason
        else:
            counted, lines[stored.name] = _count(stored)
            tensors.append(counted)
    if unread:  # scales may precede the tensors that they scale
        scales = {t.name for t in tensors if _SCALES.search(t.name)}
        unread |= dict.fromkeys(sorted(scales), "scales of a quantized format")
        tensors = [t for t in tensors if t.name not in scales]
    return Sparsity(source.name, tuple(tensors), tuple(empty_units(lines, source.config)), unread)


def _unreadable(stored: Stored) -> str | None:
    if stored.floating and not stored.dtype.startswith(("F4", "F6", "float4")):
        return None
    return f"{stored.dtype}, codes of a quantized format (or indices), whose numbers need its scales and offsets"


def _kind(stored: Stored) -> str:
    if len(stored.shape) < 2 or _BIAS.search(stored.name):
        return _VECTORS
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, stored.name)), "other")


def _count(stored: Stored) -> tuple[TensorZeros, Rows]:
    """Return the zeros of a tensor, and which of its rows and columns have non-zeros."""
    shape, kind = stored.shape, _kind(stored)
    size = int(torch.Size(shape).numel())
    if kind == _VECTORS or not size:
        kept = stored.rows(0, shape[0] if shape else 1) != 0 if size else torch.zeros(0, dtype=torch.bool)
        zeros = size - int(kept.sum())
        return TensorZeros(stored.name, kind, shape, stored.dtype, zeros, size), Rows(kept.flatten().cpu(), None)
    experts = len(shape) == 3 and kind == "mlp"  # a stack of matrices, not kernels
    matrix = shape[1:] if experts else shape
    width = int(torch.Size(matrix[1:]).numel())
    rows, columns = [], []
    groups: dict[str, Groups] = {}
    zeros = 0
    for first, last in [(i, i + 1) for i in range(shape[0])] if experts else [(0, shape[0])]:
        used = torch.zeros(width, dtype=torch.bool)
        at_once = max(1, _AT_ONCE // width // 8) * 8  # whole groups, if stored (in, out)
        for start in [0] if experts else range(first, last, at_once):
            part = stored.rows(first, last)[0] if experts else stored.rows(start, min(start + at_once, last))
            kept = _nonzero(part).reshape(-1, width).cpu()
            zeros += kept.numel() - int(torch.count_nonzero(kept))
            rows.append(kept.any(dim=1))
            used |= kept.any(dim=0)
            length = matrix[0] if stored.transposed else width
            for pattern, found in groups_of(kept.T if stored.transposed else kept, length).items():
                groups[pattern] = found + groups.get(pattern, Groups(0, 0))
        columns.append(used)
    outputs, inputs = torch.cat(rows), torch.cat(columns)
    if stored.transposed:
        outputs, inputs = inputs, outputs
    counted = TensorZeros(
        stored.name, kind, shape, stored.dtype, zeros, size, len(outputs), int((~outputs).sum()), len(inputs),
        int((~inputs).sum()), groups,
    )  # fmt: skip
    return counted, Rows(outputs, inputs)


def _nonzero(t: Tensor) -> Tensor:
    if t.dtype.itemsize == 1:  # float8: not every device can compare it
        return (t.view(torch.uint8) & 0x7F) != 0
    return t != 0


def _line(t: TensorZeros) -> tuple[str, ...]:
    near = t.groups.get("2:4")
    pattern = t.pattern or "-"
    if t.pattern is None and near is not None and t.sparsity >= _SPARSE:
        pattern = f"2:4 in {1 - near.violating / max(1, near.groups):.1%}"
    dead = (f"{t.dead_rows:,}/{t.rows:,}", f"{t.dead_columns:,}/{t.columns:,}") if t.rows else ("-", "-")
    return (t.name, "×".join(map(str, t.shape)), t.dtype, f"{t.sparsity:.2%}", pattern, *dead)


def _sum(kind: str, tensors: tuple[TensorZeros, ...]) -> tuple[str, ...]:
    zeros, size = sum(t.zeros for t in tensors), sum(t.size for t in tensors)
    return kind, f"{len(tensors):,}", f"{size:,}", f"{zeros / max(1, size):.2%}"


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    """Return lines with aligned fields, the first field to the left, others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    below = []
    for first, *others in lines:
        fields = [first.ljust(widths[0]), *(t.rjust(width) for t, width in zip(others, widths[1:], strict=True))]
        below.append("  ".join(fields).rstrip())
    return below
