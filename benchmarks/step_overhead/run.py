"""What pruning adds to an optimizer step: counted bytes, kernels and waits, and times beside plain Adam.

    python benchmarks/step_overhead/run.py

Counts, of each form, state dtype and phase: bytes a constrained weight that cross between memory and a cache which
holds a piece, and bytes that the operations read and write in all, as on a device whose cache does not; operations
for each piece of weights and for the whole step; and how often the host waits for the device. They need no GPU.

Times: the same loop with plain Adam and with each form. The loops take turns in one process on the same weights and
batches, so that a machine whose speed drifts slows all of them: step by step on a CPU, one interval at a time
on a GPU, whose queue would run empty between single steps.

Prints Markdown tables, of medians and ratios, and writes all of it to ``--results``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from counts import as_sharded, table_row

from elsa_lightning import ADMM, CausalLM, Unstructured
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select

FORMS = ("linearized", "feedback", "decoupled", "coupled")
COUNTED = ("form", "state", "phase", "bytes", "moved", "kernels_a_piece", "kernels", "looks_a_piece", "looks")
PLAIN = {"float32": "Adam alone", "bfloat16": "Adam8bit alone"}  # by the dtype of the weights


def adam8bit(parameters: Any, lr: float = 1e-4) -> torch.optim.Optimizer:
    from elsa_lightning.optim.adam8bit import Adam8bit  # the others are timed without bitsandbytes, too

    return Adam8bit(parameters, lr=lr)


def counted() -> list[dict[str, Any]]:
    """Return the counts of all forms with all state dtypes in all phases; the frozen phase is the same for all.

    Early updates, those of the first 150 steps, also measure means of F̂.
    """
    rows = []
    for form in FORMS:
        for state in get_args(StateDtype):
            rows += [table_row(form, state, phase) for phase in ("step", "update")]
            with as_sharded():
                rows.append({**table_row(form, state, "update"), "phase": "update, sharded"})
            if form == "linearized":
                rows.append({**table_row(form, state, "update", early=True), "phase": "update, early"})
    rows.append(table_row("linearized", "float32", "frozen"))
    little = {"weights": torch.bfloat16, "make": lambda p: adam8bit(p, lr=1e-3)}
    for phase in ("step", "update", "frozen"):
        row = table_row("linearized", "float8_e4m3fn", phase, **little)
        rows.append({**row, "form": "linearized, bfloat16 weights"})
    with as_sharded():
        row = table_row("linearized", "float8_e4m3fn", "update", **little)
    rows.append({**row, "form": "linearized, bfloat16 weights", "phase": "update, sharded"})
    return rows


def loop(model: str, form: str | None, state: str, weights: str, interval: int, batch: torch.Tensor) -> Any:
    """Return a function that trains for some steps and returns the seconds that they took."""
    module = CausalLM(model)
    module.configure_model()
    module.to(batch.device, getattr(torch, weights))
    make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam if weights == "float32" else adam8bit
    optimizer = make(module.parameters(), lr=1e-4)
    if form is not None:
        steps = 10**6
        ADMM(
            optimizer, select(module).parameters, Unstructured(0.9), total_steps=steps,
            schedule=Schedule(
                interval=interval, shape="constant", ramp=0.0,
                frozen=1 - 1 / steps if form == "frozen" else 0.0,  # from the first step on
            ),
            prox="linearized" if form == "frozen" else form,  # type: ignore[arg-type]
            state_dtype=state,  # type: ignore[arg-type]
        )  # fmt: skip

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            module(batch)[0].loss.backward()
            optimizer.step()
        if batch.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def timed(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Return medians and ratios of the loops."""
    batch = torch.randint(1000, (arguments.batch_size, arguments.seq_len), device=device)
    cases: dict[str, tuple[str | None, str, str]] = {}
    if arguments.forms:
        cases["Adam alone"] = (None, "float32", "float32")
    cases |= {form: (form, "float32", "float32") for form in arguments.forms}
    if arguments.little:
        cases["Adam8bit alone"] = (None, "float32", "bfloat16")
        for state in ("bfloat16", "float8_e4m3fn"):
            cases[f"Elsa-L, {state}"] = ("linearized", state, "bfloat16")
    loops = {name: loop(arguments.model, *case, arguments.interval, batch) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    turn = arguments.interval if batch.is_cuda else 1
    for round_ in range(arguments.rounds + 1):
        seconds = dict.fromkeys(loops, 0.0)
        for _ in range(arguments.interval // turn):
            for name, run in loops.items():
                seconds[name] += run(turn) / arguments.interval
        if round_ > 0:  # the first is the warm-up
            for name in loops:
                times[name].append(seconds[name])
    rows = []
    for name, seconds_ in times.items():
        plain = times[PLAIN[cases[name][2]]]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds_, plain, strict=True))
        rows.append({"loop": name, "ms": round(1e3 * statistics.median(seconds_), 2), "ratio": round(ratio, 4)})
    return rows


def table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pydocs-2m", help="name or folder (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=32, help="steps between projections (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="intervals timed of each; 0 counts only (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--forms", nargs="*", default=[*FORMS, "frozen"], help="which are timed (default: all)")
    parser.add_argument("--little", action="store_true", help="time Elsa-L beside 8-bit Adam, too")
    parser.add_argument("--uncounted", action="store_true", help="only time; counts are the same on any machine")
    parser.add_argument("--results", type=Path, help="where to write a JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    rows = {
        "counts": [] if arguments.uncounted else counted(),
        "times": timed(arguments, device) if arguments.rounds else [],
    }
    if rows["counts"]:
        print(table(COUNTED, rows["counts"]))
    if rows["times"]:
        size = f"{arguments.model}, batch {arguments.batch_size} × {arguments.seq_len}, K = {arguments.interval}"
        print(f"\n{size}, {name}\n\n{table(('loop', 'ms', 'ratio'), rows['times'])}")
    if arguments.results is not None:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "results"}
        told = {"device": name, "torch": torch.__version__, "settings": settings, **rows}
        part = arguments.results.with_suffix(".part")
        part.write_text(json.dumps(told, indent=1) + "\n")
        part.replace(arguments.results)


if __name__ == "__main__":
    main()
