"""Memory and step time of pruning against plain fine-tuning, and `elsa plan`'s prediction beside them.

    python benchmarks/memory/run.py

Each row is a process of its own, so that its peak is its own: a Llama with random weights trains a few steps
before the frozen phase. On a GPU the peak is the device's, else the process's above what it held before the
model was made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.plan import plan
from elsa_lightning.selection import select

SIZES: dict[str, dict[str, int]] = {
    "4M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    "13M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "45M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
MODES: dict[str, tuple[str, str, StateDtype | None]] = {
    "Adam": ("Adam", "float32", None),
    "Elsa": ("Adam", "float32", "float32"),
    "Adam8bit, bf16": ("Adam8bit", "bfloat16", None),
    "Elsa-L, bf16 state": ("Adam8bit", "bfloat16", "bfloat16"),
    "Elsa-L, fp8 state": ("Adam8bit", "bfloat16", "float8_e4m3fn"),
}


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(size: str, mode: str, steps: int, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Train and return bytes and seconds."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    optimizer_name, dtype_name, state_dtype = MODES[mode]
    dtype, device = getattr(torch, dtype_name), "cuda" if torch.cuda.is_available() else "cpu"

    def make(parameters: Any) -> torch.optim.Optimizer:
        if optimizer_name == "Adam":
            return torch.optim.Adam(parameters, lr=1e-4)
        from elsa_lightning.optim.adam8bit import Adam8bit  # Adam is measured without bitsandbytes, too

        return Adam8bit(parameters, lr=1e-4)

    config = LlamaConfig(vocab_size=8192, **SIZES[size])
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        meta = build(config, dtype=dtype)
    planned = plan(meta, make, dtype=dtype, state_dtype=state_dtype, tokens=batch_size * seq_len, device=device)
    before = peak(device)
    with torch.device(device):
        model = build(config, dtype=dtype)
        batch = torch.randint(8192, (batch_size, seq_len))
    optimizer = make(model.parameters())
    if state_dtype is not None:
        ADMM(optimizer, select(model).parameters, Unstructured(0.9), total_steps=10**6, state_dtype=state_dtype)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    state = [(k, t) for p in optimizer.state.values() for k, t in p.items() if torch.is_tensor(t) and "qmap" not in k]
    return {
        "parameters": planned.parameters,
        "constrained": planned.constrained,
        "states": sum(t.numel() * t.element_size() for _, t in state),
        "elsa": sum(t.numel() * t.element_size() for k, t in state if k.startswith("elsa")),
        "planned": sum(size for name, size in planned.exact.items() if "state" in name),
        "peak": peak(device) - before,
        "planned_peak": planned.total(),
        "seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["4M", "13M", "45M"], help="(%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: all)")
    parser.add_argument("--steps", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps, arguments.batch_size, arguments.seq_len)))
        return
    print("| size | run | states, MB | planned | Elsa, bytes a weight | peak, MB | planned | ms a step |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for mode in arguments.modes:
            command = [sys.executable, *sys.argv, "--one", size, mode]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            print(
                f"| {size} | {mode} | {row['states'] / 1e6:.1f} | {row['planned'] / 1e6:.1f} | "
                f"{row['elsa'] / max(1, row['constrained']):.3f} | {row['peak'] / 1e6:.0f} | "
                f"{row['planned_peak'] / 1e6:.0f} | {1e3 * row['seconds']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
