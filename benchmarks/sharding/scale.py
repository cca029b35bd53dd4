"""Time and memory of the method's part of a training step at 7, 27 and 70 billion parameters, on paper.

    python benchmarks/sharding/scale.py
    python benchmarks/sharding/scale.py --measure

Nothing of the first was run: bytes and launches are those that ``benchmarks/step_overhead`` counted from the operations
of small tensors, pieces are those of the models' shapes on a GPU, and the rest are the assumptions of ``Gpu``. A time
is between two: at least what crosses once between memory and a cache that holds a piece, launches hidden behind it or
the other way round; at most all that the operations read and write, as if there was no cache, and then all launches.
``--measure`` runs the first model, whole or some of its blocks, on the GPU that is here, and prints as JSON what it
took beside what the paper says of as many weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elsa_lightning import ADMM, CausalLM, Unstructured
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import whole
from elsa_lightning.plan import plan
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select

HERE = Path(__file__).parents[1]
COUNTS = HERE / "step_overhead/counts.json"
PHASES = ("step", "update", "frozen")
COLUMNS = ("model", "GPUs", "run", "GiB held", "in a step", "optimizer", *PHASES, "training step", "share")


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU.

    Attributes:
        name: For people.
        bandwidth: Bytes a second of its memory, as its maker says.
        reached: Share of it that kernels reach which go over a tensor once.
        launch: Seconds from one kernel to the next where the host is what they wait for.
        flops: A second, of dense bfloat16 products.
        used: Share of these that a training step reaches.
    """

    name: str = "H100 SXM, 80 GB"
    bandwidth: float = 3.35e12
    reached: float = 0.8
    launch: float = 5e-6
    flops: float = 989e12
    used: float = 0.4

    def moving(self, size: float) -> float:
        """Return the seconds that so many bytes take."""
        return size / (self.bandwidth * self.reached)

    def span(self, row: dict[str, Any], weights: int, pieces: int) -> tuple[float, float]:
        """Return seconds at least and at most.

        Args:
            row: Of the counts.
            weights: Constrained, on this GPU.
            pieces: Of them.
        """
        launches = (row["kernels_a_piece"] * pieces + row["kernels"]) * self.launch
        return max(self.moving(row["bytes"] * weights), launches), self.moving(row["moved"] * weights) + launches


@dataclass(frozen=True)
class Run:
    """A way to train.

    Attributes:
        name: For people.
        form: Whose counts are its own.
        state: What its state is kept in.
        dtype: Of weights and gradients.
        optimizer: Bytes a parameter that its optimizer reads and writes in one pass.
    """

    name: str
    form: str
    state: StateDtype
    dtype: torch.dtype
    optimizer: float


RUNS = (  # weights and both moments are read and written, the gradient is read
    Run("Elsa", "linearized", "float32", torch.float32, 4 + 2 * (4 + 4 + 4)),
    Run("Elsa-L", "linearized, bfloat16 weights", "float8_e4m3fn", torch.bfloat16, 2 + 2 * (2 + 2 * (1 + 4 / 256))),
)


# What one launch of :mod:`elsa_lightning.layout.fused` does for all tensors, in place of the operations counted: bytes
# of a weight. Of Elsa-L 12 are for rounding: the weights set aside, zeroed, and the sum; these are 3 launches a piece.
FUSED = {
    ("Elsa", "step"): (4 + 8 + 1 / 8 + 8, 0), ("Elsa", "frozen"): (4 + 1 / 8 + 4, 0),
    ("Elsa-L", "step"): (2 + 12 + 4 + 1 / 8 + 2 + 2 / 32, 3), ("Elsa-L", "frozen"): (2 + 12 + 1 / 8 + 2, 3),
}  # fmt: skip


def counted(run: Run, gpus: int) -> dict[str, dict[str, Any]]:
    """Return bytes and launches of each phase; scores of whole matrices are only on one GPU."""
    counts = json.loads(COUNTS.read_text())["counts"]
    own = {one["phase"]: one for one in counts if one["form"] == run.form and one["state"] == run.state}
    own["update"] = own["update" if gpus == 1 else "update, sharded"]
    for phase, (size, launches) in ((phase, FUSED[run.name, phase]) for phase in PHASES if (run.name, phase) in FUSED):
        own[phase] = {"bytes": size, "moved": size, "kernels_a_piece": launches, "kernels": own[phase]["kernels"] + 1}
    return own


def make_optimizer(run: Run) -> Callable[[Any], torch.optim.Optimizer]:
    if run.dtype == torch.float32:
        return torch.optim.Adam
    from elsa_lightning.optim.adam8bit import Adam8bit

    return Adam8bit


def pieces_of(shape: torch.Size, gpus: int) -> int:
    """Return in how many pieces a GPU works on its rows of a tensor."""
    *stack, rows, n = shape
    held = torch.empty((*stack, -(-rows // gpus), n), device="meta")
    return sum(1 for _ in Rows(whole(held), held).pieces())


def row(model: nn.Module, name: str, gpus: int, run: Run, gpu: Gpu, tokens: int, interval: int) -> dict[str, Any]:
    """Return one line of the table; seconds, bytes and shares as numbers."""
    own = counted(run, gpus)
    planned = plan(model, make_optimizer(run), dtype=run.dtype, state_dtype=run.state)
    shapes = [p.shape for p in select(model, quiet=True).parameters.values()]
    weights, pieces = -(-planned.constrained // gpus), sum(pieces_of(shape, gpus) for shape in shapes)
    spans = {phase: gpu.span(own[phase], weights, pieces) for phase in PHASES}
    training = 6 * planned.parameters * tokens / (gpu.flops * gpu.used)
    each = [
        ((interval - 1) * step + update) / interval for step, update in zip(spans["step"], spans["update"], strict=True)
    ]
    return {
        "model": name, "GPUs": gpus, "run": run.name, "parameters": planned.parameters, "weights": weights,
        "pieces": pieces, "held": sum(planned.exact.values()) / gpus, "most": planned.total(gpus),
        "optimizer": gpu.moving(run.optimizer * planned.parameters / gpus), **spans, "training": training,
        "share": [seconds / training for seconds in each],
    }  # fmt: skip


def measure(folder: str, blocks: int | None, run: Run, gpu: Gpu, tokens: int) -> dict[str, Any]:
    """Return seconds on the GPU that is here, of the method without its optimizer, beside those on paper.

    Args:
        folder: With a config.json; weights are random.
        blocks: The first so many; None for all.
        run: Which.
        gpu: What the paper assumes.
        tokens: Of one sequence that is trained on.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = blocks or config.num_hidden_layers
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("cuda"):
        model = build(config, dtype=run.dtype)
        batch = torch.randint(config.vocab_size, (1, tokens))
    chosen, training = select(model, quiet=True).parameters, []
    for _ in range(4):  # the first is the warm-up
        model.zero_grad()
        training.append(seconds_of(lambda: model(input_ids=batch, labels=batch, use_cache=False).loss.backward()))
    make, many, interval = make_optimizer(run), 10**6, 4
    found: dict[str, list[float]] = defaultdict(list)
    for phase, frozen in (("optimizer", None), ("step", 0.0), ("frozen", 1 - 1 / many)):
        optimizer = make(model.parameters())
        schedule = Schedule(interval=interval, ramp=0.0, frozen=frozen or 0.0)
        if frozen is not None:
            ADMM(optimizer, chosen, Unstructured(0.9), total_steps=many, schedule=schedule, state_dtype=run.state)
        for step in range(1, 4 * interval + 1):
            took = seconds_of(optimizer.step)
            if step > interval:  # a first step takes memory, and a first update has no thresholds to begin with
                found["update" if phase == "step" and step % interval == 0 else phase].append(took)
        optimizer.state.clear()
        del optimizer
        gc.collect()
    own = counted(run, 1)
    weights = sum(p.numel() for p in chosen.values())
    pieces = sum(pieces_of(p.shape, 1) for p in chosen.values())
    alone = statistics.median(found["optimizer"])
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": Path(folder).name, "blocks": config.num_hidden_layers, "run": run.name, "tokens": tokens,
        "parameters": parameters, "weights": weights, "pieces": pieces, "peak": torch.cuda.max_memory_allocated(),
        "training": [statistics.median(training[1:]), 6 * parameters * tokens / (gpu.flops * gpu.used)],
        "optimizer": [alone, gpu.moving(run.optimizer * parameters)],
        **{phase: [statistics.median(found[phase]) - alone, *gpu.span(own[phase], weights, pieces)]
           for phase in PHASES},
    }  # fmt: skip


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long the GPU takes for some work that is given to it when it is idle."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def cells(line: dict[str, Any]) -> list[str]:
    """Return a line as the table says it: GiB, milliseconds, percent."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"

    return [
        line["model"], str(line["GPUs"]), line["run"], *(f"{line[key] / 2**30:.1f}" for key in ("held", "most")),
        ms(line["optimizer"]), *(" – ".join(map(ms, line[phase])) for phase in PHASES), ms(line["training"]),
        " – ".join(f"{100 * share:.2g} %" for share in line["share"]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [str(HERE / "memory" / name) for name in ("llama-2-7b", "gemma-2-27b", "llama-2-70b")]
    parser.add_argument("--models", nargs="+", default=models, help="folders with a config.json (default: the three)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 16, 64], help="of each model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="on a GPU and step (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=32, help="steps between updates (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="where to write a JSON")
    parser.add_argument("--measure", action="store_true", help="run the first model on the GPU that is here")
    parser.add_argument("--blocks", type=int, help="with --measure: only so many blocks (default: all)")
    parser.add_argument(
        "--run", choices=[run.name for run in RUNS], default="Elsa-L", help="with --measure (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        if not torch.cuda.is_available():
            parser.error("--measure needs a CUDA device, and torch sees none")
        (run,) = (run for run in RUNS if run.name == arguments.run)
        print(json.dumps(measure(arguments.models[0], arguments.blocks, run, Gpu(), min(arguments.tokens, 2048))))
        return
    if len(arguments.gpus) != len(arguments.models):
        parser.error(f"--gpus has {len(arguments.gpus)} numbers for {len(arguments.models)} models: give one for each")
    gpu, lines = Gpu(), []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for config, gpus in zip(arguments.models, arguments.gpus, strict=True):
        model = CausalLM(config).on_meta()
        for run in RUNS:
            lines.append(row(model, Path(config).name, gpus, run, gpu, arguments.tokens, arguments.interval))
            print(f"| {' | '.join(cells(lines[-1]))} |", flush=True)
    if arguments.results is not None:
        told = {"assumed": {**asdict(gpu), "tokens": arguments.tokens, "interval": arguments.interval}, "rows": lines}
        part = arguments.results.with_suffix(".part")
        part.write_text(json.dumps(told, indent=1) + "\n")
        part.replace(arguments.results)


if __name__ == "__main__":
    main()
