"""The model card: describes a sparse model, with the hub's metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elsa_lightning.export.folders import CARD, RECORD, write
from elsa_lightning.export.record import Record

_PAPER = "[Elsa](https://arxiv.org/abs/2510.01650) (ADMM on the training loss)"
_BLOCK = re.compile(r"(?<![^.])(\d+)(?![^.])")
_USE = {
    "hf": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")',
    "cpu-sparse": 'from elsa_lightning.export import load_cpu_sparse\n\nmodel = load_cpu_sparse("path/to/this/folder")',
}
_WHAT = {
    "hf": "The weights are stored dense, with exact zeros: they load anywhere, and are as large and as fast as a dense "
    "model's unless what loads them makes use of zeros.",
    "shrunk": "What was zero as a whole (neurons, heads, layers) is cut out: the model is smaller and loads like any "
    "other.",
    "quantized": "Linear layers are stored as packed integers with a scale a group (`pack-quantized` of "
    "compressed-tensors, which must be installed). Zeros are kept. transformers unpacks them at the first forward "
    "pass.",
    "cpu-sparse": "Linear layers with enough zeros are stored without them (compressed sparse rows, float32), for "
    "decoding on a CPU.",
    "gguf": "For llama.cpp. Zeros are stored like any other value.",
}


def write_card(folder: Path, record: Record) -> None:
    """Write README.md and elsa.json, each atomically."""
    write(folder / RECORD, record.to_json())
    write(folder / CARD, card(record))


def card(record: Record) -> str:
    """Return the model card of a record; unknown facts are left out."""
    parts = [
        f"---\n{_metadata(record)}\n---",
        f"# {record.title}, {_share(record.zeros)} zeros" if record.zeros[1] else f"# {record.title}",
        _summary(record),
        *[f"> {note}" for note in record.notes],
        _perplexity(record),
        _speed(record),
        _settings("Method", [*record.method, {"convergence": record.convergence} if record.convergence else {}]),
        _settings("Training", [record.training]),
        _settings("Data", [record.data]),
        _settings("Export", [record.export]),
        _sparsity(record.sparsity),
        f"## Use\n\n```python\n{_USE.get(record.format, _USE['hf'])}\n```" if record.format != "gguf" else "",
        f"## Command\n\n```\n{record.command}\n```" if record.command else "",
        _settings("Versions", [record.versions]),
        f"`{RECORD}` has the same for machines, with the zeros of every matrix.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(record: Record) -> str:
    from huggingface_hub import ModelCardData

    values: dict[str, Any] = {"tags": ["sparse", "pruning", "elsa"], "pipeline_tag": "text-generation"}
    if record.format in ("hf", "shrunk", "quantized"):
        values["library_name"] = "transformers"
    if record.base_hub_name:
        values["base_model"] = record.base_hub_name
    if record.data_hub_name:
        values["datasets"] = [record.data_hub_name]
    return str(ModelCardData(**values).to_yaml())


def _summary(record: Record) -> str:
    made = f"Pruned with {_PAPER}." if record.method else ""
    base = f"From {f'`{record.title}`' if record.base_model else 'a model that its folder does not name'}."
    zeros, size = record.zeros
    share = f"{zeros:,} of {size:,} weights in its sparse matrices are exactly zero." if size else ""
    dtype = f"Weights in {record.dtype}." if record.dtype else ""
    return " ".join(part for part in (base, made, share, dtype, _WHAT[record.format]) if part)


def _share(zeros: tuple[int, int]) -> str:
    return f"{zeros[0] / max(1, zeros[1]):.1%}".replace("%", " %")


def _perplexity(record: Record) -> str:
    its = f"this export, reloaded{f' in {other}' if (other := record.perplexity.get('exported in')) else ''}"
    names = {"dense": "dense", "start": "start", "sparse": "sparse", "exported": its}
    rows = [(said, record.perplexity[name]) for name, said in names.items() if name in record.perplexity]
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in rows)
    protocol = record.perplexity.get("protocol")
    return "## Perplexity\n\n" + (f"On {protocol}.\n\n" if protocol else "") + f"| | perplexity |\n|---|---|\n{table}"


def _speed(record: Record) -> str:
    known = record.speed
    if not known:
        return ""
    dense = f"| dense, {known.get('dense dtype')} | {known['dense']:,.1f} |"
    table = f"| | tokens/s |\n|---|---|\n{dense}\n| this export, {known.get('dtype')} | {known['exported']:,.1f} |"
    return f"## Speed\n\nOf {known.get('protocol')}; on other machines measure anew.\n\n{table}"


def _settings(title: str, mappings: list[dict[str, Any]]) -> str:
    rows = [(name, value) for mapping in mappings for name, value in mapping.items() if value is not None]
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{table}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _sparsity(sparsity: dict[str, tuple[int, int]]) -> str:
    """Return a table of zeros by block, and of matrices outside of blocks."""
    blocks: dict[str, list[tuple[int, int]]] = {}
    for name, counts in sparsity.items():
        found = _BLOCK.search(name)
        blocks.setdefault(f"block {found[1]}" if found else name.removesuffix(".weight"), []).append(counts)
    rows = []
    for block, each in blocks.items():
        whole = (sum(zeros for zeros, _ in each), sum(size for _, size in each))
        shares = sorted(each, key=lambda c: c[0] / max(1, c[1]))
        rows.append(f"| {block} | {len(each)} | {_share(whole)} | {_share(shares[0])} | {_share(shares[-1])} |")
    if not rows:
        return ""
    head = "| | matrices | zeros | least | most |\n|---|---|---|---|---|\n"
    return "## Sparsity\n\n" + head + "\n".join(rows)
