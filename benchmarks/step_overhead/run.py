"""What ElsaCallback adds to an optimizer step: the same loop with plain Adam and with each form of the prox.

    python benchmarks/step_overhead/run.py --interval 32

The loops take turns, one projection interval at a time, in one process on the same weights and batches, so
that a machine whose speed drifts slows all of them. Prints a Markdown table of medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from elsa_lightning import ADMM, CausalLM, Unstructured
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select


def loop(model: str, form: str | None, interval: int, batch: torch.Tensor) -> Callable[[], float]:
    """Return a function that trains for one interval and returns seconds a step."""
    module = CausalLM(model)
    module.configure_model()
    module.to(batch.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    if form is not None:
        steps = 10**6
        ADMM(
            optimizer,
            select(module).parameters,
            Unstructured(0.9),
            total_steps=steps,
            schedule=Schedule(
                interval=interval,
                shape="constant",
                ramp=0.0,
                frozen=1 - 1 / steps if form == "frozen" else 0.0,  # from the first step on
            ),
            prox="linearized" if form == "frozen" else form,  # type: ignore[arg-type]
        )

    def run() -> float:
        start = time.perf_counter()
        for _ in range(interval):
            optimizer.zero_grad()
            module(batch)[0].loss.backward()
            optimizer.step()
        if batch.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / interval

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pydocs-2m", help="name or folder (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=32, help="steps between projections (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="intervals timed of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default: %(default)s)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = torch.randint(1000, (arguments.batch_size, arguments.seq_len), device=device)
    forms: list[str | None] = [None, "linearized", "feedback", "decoupled", "coupled", "frozen"]
    loops = {form or "Adam alone": loop(arguments.model, form, arguments.interval, batch) for form in forms}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(arguments.rounds + 1):
        for name, run in loops.items():
            seconds = run()
            if round_ > 0:  # the first is the warm-up
                times[name].append(seconds)
    print(f"{arguments.model}, batch {arguments.batch_size} × {arguments.seq_len}, K = {arguments.interval}, {device}")
    print("| loop | ms a step | ratio to Adam alone |\n|---|---|---|")
    for name, seconds_ in times.items():
        ratios = [ours / plain for ours, plain in zip(seconds_, times["Adam alone"], strict=True)]
        print(f"| {name} | {1e3 * statistics.median(seconds_):.1f} | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
