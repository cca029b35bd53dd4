"""Perplexity of the embedded model after pruning, by method.

    python benchmarks/quality.py --sparsity 0.9 --steps 500

Every trained method sees the same batches in the same order, from the same dense weights, with the same
optimizer and learning-rate schedule; perplexity is on all held-out text. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.projections import unstructured
from elsa_lightning.selection import count_zeros, select


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    method: str
    sparsity: float
    perplexity: float
    tokens: int
    seconds: float


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(devices=1, **{**quiet, **options})


def perplexity(module: CausalLM, data: CalibrationData) -> float:
    return float(trainer().validate(module, data, verbose=False)[0]["val/perplexity"])


def measured(method: str, module: CausalLM, data: CalibrationData, tokens: int, seconds: float) -> Result:
    zeros, weights = count_zeros(module)
    return Result(method, zeros / weights, perplexity(module, data), tokens, seconds)


@torch.no_grad()
def prune_by_magnitude(module: CausalLM, sparsity: float) -> None:
    for p in select(module).parameters.values():
        p.masked_fill_(~unstructured(p, None, p.numel() - round(sparsity * p.numel())), 0)


def results(arguments: argparse.Namespace) -> Iterator[Result]:
    data = CalibrationData(seq_len=arguments.seq_len, batch_size=arguments.batch_size, tokenizer=arguments.model)
    tokens = arguments.steps * arguments.batch_size * arguments.seq_len

    def dense() -> CausalLM:
        seed_everything(arguments.seed, verbose=False)
        module = CausalLM(arguments.model, optimizer=lambda params: torch.optim.Adam(params, lr=arguments.lr))
        module.configure_model()
        return module

    yield measured("dense", dense(), data, 0, 0.0)
    module = dense()
    prune_by_magnitude(module, arguments.sparsity)
    yield measured("magnitude, one-shot", module, data, 0, 0.0)
    methods = {
        "Elsa, published form": ElsaCallback(
            arguments.sparsity, prox="coupled", penalty=arguments.published_penalty, ramp=0, frozen=0
        ),
        "Elsa, decoupled": ElsaCallback(arguments.sparsity, prox="decoupled"),
        "Elsa, default (tracked)": ElsaCallback(arguments.sparsity),
    }
    for method, callback in methods.items():
        module = dense()
        start = time.perf_counter()
        trainer(max_steps=arguments.steps, gradient_clip_val=1.0, limit_val_batches=0, callbacks=[callback]).fit(
            module, data
        )
        yield measured(method, module, data, tokens, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pydocs-2m", help="name or folder (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of zeros (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--published-penalty", type=float, default=0.1, help="λ of the published form (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print("| method | sparsity | perplexity | training tokens | seconds |\n|---|---|---|---|---|")
    for row in results(arguments):
        print(
            f"| {row.method} | {row.sparsity:.2%} | {row.perplexity:.2f} | {row.tokens:,} | {row.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
