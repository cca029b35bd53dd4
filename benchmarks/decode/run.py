"""Decoding speed, first-token latency and memory on a CPU: the dense model and its exports, in one process.

    python benchmarks/decode/run.py --shape wide --sparsity 0.5 0.7 0.8 0.9 0.95 --threads 1
    python benchmarks/decode/run.py --shape smollm2 --gguf exports/gguf-q8_0/model.gguf

Weights are random: speed does not depend on them. Greedy tokens of each sparse export are compared with those of the
dense model with the same zeros. `hf` is the dense model; `shrunk` has lost so much of its neurons, not of all
weights. All variants are measured in turn, several times over, so that what else the machine does falls on all alike;
medians count. On one thread the default clock is the processor's time, which a busy machine lengthens least. Files of
GGUF are decoded by llama.cpp where xllamacpp is installed (pip install xllamacpp).

Memory is what the weights hold after decoding, and, of each variant saved and loaded in a process of its own, what this
process holds once it has decoded (resident) and held at most (peak), on Linux. Both have Python and its libraries in
them, whose size is printed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elsa_lightning.export import save_cpu_sparse, to_cpu_sparse
from elsa_lightning.export.cpu_sparse import CSRLinear
from elsa_lightning.export.measure import processor
from elsa_lightning.export.quantized import write_quantized
from elsa_lightning.export.reload import load
from elsa_lightning.slicing import shrink

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3},
    "wide": {"vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
             "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip


def build(shape: str, layers: int | None) -> Any:
    """Return a random Llama of a shape, float32, with as many layers as that or as told."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **(SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})),
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def prune(model: Any, sparsity: float) -> Any:
    """Return a copy whose linear layers, but the head, have so many zeros at random places."""
    model = copy.deepcopy(model)
    made = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.masked_fill_(torch.rand(module.weight.shape, generator=made) < sparsity, 0)
    return model


def quantize(model: Any, folder: Path) -> Any:
    """Write the W4A16 export and return what transformers makes of it: unpacked at the first forward pass."""
    from transformers import AutoModelForCausalLM

    write_quantized(copy.deepcopy(model), folder, bits=4, group_size=64)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def shrunk(model: Any, fraction: float) -> Any:
    """Return a copy that is smaller by such a share of its neurons."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, : round(fraction * model.config.intermediate_size)] = 0
    return shrink(model).eval()


def megabytes(model: Any) -> float:
    """Return the memory of a model's weights, shared ones once."""
    if isinstance(model, LlamaCpp):
        return model.file.stat().st_size / 1e6
    stores = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values()) / 1e6


class LlamaCpp:
    """A file of GGUF in llama.cpp.

    Args:
        file: The model.
        threads: To use.
    """

    def __init__(self, file: Path, threads: int) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path, given.n_ctx, given.warmup = str(file), 1024, False
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        self.file, self.server = file, xllamacpp.Server(given)

    def complete(self, prompt: list[int], tokens: int) -> None:
        """Decode so many tokens."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert answer["usage"]["completion_tokens"] == tokens, answer

    def times(self, prompt: torch.Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
        """Return seconds to the first token, and for each one after it."""
        marks = [clock()]
        for count in (1, 1 + tokens):
            self.complete(prompt[0].tolist(), count)
            marks.append(clock())
        first = marks[1] - marks[0]
        return first, [(marks[2] - marks[1] - first) / tokens]


@torch.no_grad()
def times(model: Any, prompt: torch.Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Return seconds to the first token, and for each one after it."""
    if isinstance(model, LlamaCpp):
        return model.times(prompt, tokens, clock)
    start = clock()
    out = model(prompt, use_cache=True)
    first, each = clock() - start, []
    for _ in range(tokens):
        start = clock()
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        each.append(clock() - start)
    return first, each


def greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    """Return eight greedy tokens."""
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return out[0, prompt.shape[1] :].tolist()


def variants(
    dense: Any, sparsities: list[float], break_even: float, prompt: torch.Tensor, place: Path
) -> dict[str, Any]:
    """Return the models to measure; a sparse one must give the tokens of the dense one with its zeros.

    Args:
        dense: Of which they are made.
        sparsities: To prune it to.
        break_even: Least share of zeros of a layer that is kept sparse.
        prompt: Token ids ``(1, length)``.
        place: Folder for what is saved on the way, under the variant's name.
    """
    made = {"dense float32": dense, "dense bfloat16": copy.deepcopy(dense).bfloat16()}
    for sparsity in sparsities:
        zeros = prune(dense, sparsity)
        expected = greedy(zeros, prompt)
        made[f"cpu-sparse {sparsity:.0%}"] = to_cpu_sparse(zeros, break_even)
        assert greedy(zeros, prompt) == expected, f"{sparsity}: other tokens than the dense model's"
        made[f"shrunk {sparsity:.0%}"] = shrunk(dense, sparsity)
        gc.collect()
    if find_spec("compressed_tensors"):
        made["quantized W4A16"] = quantize(prune(dense, sparsities[-1]), place / "quantized W4A16")
    return made


def measured(models: dict[str, Any], given: argparse.Namespace, prompt: torch.Tensor) -> list[dict[str, Any]]:
    """Return a line for each variant, all of them decoded in turn."""
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    first: dict[str, list[float]] = {name: [] for name in models}
    each: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(given.rounds):
        for name, model in models.items():
            begun, steps = times(model, prompt, given.tokens, clock)
            first[name].append(begun)
            each[name] += steps
    lines = []
    for name, model in models.items():
        step, base = statistics.median(each[name]), {}
        for dtype in ("float32", "bfloat16"):
            dense = each[f"dense {dtype}"]
            base[f"times_{dtype}"] = statistics.median(dense) / step
            base[f"times_{dtype}_of_minima"] = min(dense) / min(each[name])
        speed = {"tokens_per_second": 1 / step, "first_token_seconds": statistics.median(first[name])}
        lines.append({"variant": name, **speed, **base, "weights_mb": megabytes(model)})
    return lines


def held() -> dict[str, float]:
    """Return the MB that this process holds and held at most, as Linux counts them."""
    told = Path("/proc/self/status").read_text()
    names = {"resident": "VmRSS", "peak": "VmHWM"}
    return {name: int(re.findall(rf"{key}:\s+(\d+) kB", told)[0]) * 1024 / 1e6 for name, key in names.items()}


def memory_of(path: Path, given: argparse.Namespace) -> dict[str, float]:
    """Return the MB that a process of its own holds before and after it loads a saved model, after decoding, at most.

    Args:
        path: Folder of the model, or file of GGUF.
        given: The command line.
    """
    told = ["--prompt", str(given.prompt), "--tokens", str(given.tokens), "--threads", str(given.threads)]
    command = [sys.executable, __file__, "--memory-of", str(path), *told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{path} could not be loaded to measure its memory: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_this_process(path: Path, given: argparse.Namespace, prompt: torch.Tensor) -> dict[str, float]:
    """Return what :func:`memory_of` does."""
    if path.is_dir():
        from transformers import LlamaForCausalLM  # noqa: F401, which loading would count to the model
    before = held()["resident"]
    model = LlamaCpp(path, given.threads) if path.is_file() else load(path)[0].eval()
    loaded = held()
    times(model, prompt, given.tokens, time.perf_counter)
    after = held()
    return {
        "before_mb": before, "loaded_mb": loaded["resident"], "loading_peak_mb": loaded["peak"],
        "resident_mb": after["resident"], "peak_mb": after["peak"],
    }  # fmt: skip


def memories(models: dict[str, Any], given: argparse.Namespace, place: Path) -> dict[str, dict[str, float]]:
    """Return the memory of each variant, saved where it is not yet, one after the other; none where Linux is not."""
    if not Path("/proc/self/status").is_file():
        return {}
    found = {}
    for name, model in models.items():
        if isinstance(model, LlamaCpp):
            found[name] = memory_of(model.file, given)
            continue
        folder = place / name
        if any(isinstance(module, CSRLinear) for module in model.modules()):
            folder.mkdir()
            save_cpu_sparse(model, folder)
        elif not folder.exists():
            model.save_pretrained(folder)
        found[name] = memory_of(folder, given)
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--layers", type=int, help="other than the shape has")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument(
        "--break-even", type=float, default=0.0, help="layers with fewer zeros stay dense (default: none)"
    )
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="files to decode with llama.cpp")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16, help="tokens before the first one that is decoded")
    parser.add_argument("--tokens", type=int, default=16, help="that are decoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("cpu", "wall"), help="default: cpu on one thread, else wall")
    parser.add_argument("--json", type=Path, help="append results to this file, a line a variant")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.clock = given.clock or ("cpu" if given.threads == 1 else "wall")
    if given.gguf and not find_spec("xllamacpp"):
        parser.error("--gguf takes llama.cpp: pip install xllamacpp")
    torch.set_num_threads(given.threads)
    prompt = torch.randint(5, 500, (1, given.prompt), generator=torch.Generator().manual_seed(2))
    if given.memory_of is not None:
        print(json.dumps(in_this_process(given.memory_of, given, prompt)))
        return
    with tempfile.TemporaryDirectory() as place:
        models = variants(build(given.shape, given.layers), given.sparsity, given.break_even, prompt, Path(place))
        models |= {f"llama.cpp {file.parent.name}": LlamaCpp(file, given.threads) for file in given.gguf}
        lines, memory = measured(models, given, prompt), memories(models, given, Path(place))
    lines = [line | memory.get(line["variant"], {}) for line in lines]
    told(lines, given)


def told(lines: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print the lines as a table, and append them to the file that was asked for."""
    load = os.getloadavg()[0]
    layers = f" of {given.layers} layers" if given.layers else ""
    print(
        f"{given.shape}{layers}, {given.threads} thread(s), prompt of {given.prompt}, {given.tokens} tokens, "
        f"{given.rounds} rounds, {given.clock} time; load {load:.1f} on {os.cpu_count()} cores; sparse and dense "
        f"models' tokens are equal"
    )
    if "before_mb" in lines[0]:
        least = min(line["before_mb"] for line in lines)
        print(f"each process holds {least:.0f} MB before it loads a model; resident and peak have them in")
    head = f"{'':20}{'tokens/s':>9}{'× float32':>10}{'× bfloat16':>11}{'first token, ms':>16}"
    print(f"{head}{'weights, MB':>12}{'resident':>9}{'peak':>7}")
    for line in lines:
        speed = f"{line['tokens_per_second']:>9.1f}{line['times_float32']:>10.2f}{line['times_bfloat16']:>11.2f}"
        memory = "".join(f"{line[key]:>{n}.0f}" for key, n in (("resident_mb", 9), ("peak_mb", 7)) if key in line)
        first = f"{line['first_token_seconds'] * 1e3:>16.0f}{line['weights_mb']:>12.0f}"
        print(f"{line['variant']:20}{speed}{first}{memory}")
    if given.json is not None:
        asked = {
            name: getattr(given, name) for name in ("shape", "layers", "threads", "clock", "prompt", "tokens", "rounds")
        }
        where = {"load": load, "cores": os.cpu_count(), "processor": processor(), "torch": torch.__version__}
        with given.json.open("a") as file:
            file.writelines(
                json.dumps({"date": date.today().isoformat(), **asked, **line, **where}) + "\n" for line in lines
            )


if __name__ == "__main__":
    main()
