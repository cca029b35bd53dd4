"""Sets × two strengths on the embedded model: perplexity after training, beside one shot and gradual pruning.

    python benchmarks/sets/run.py

Every row starts from the same dense weights. The trained methods see the same batches with Adam at one learning rate
that falls linearly to 0, clipping at 1, and the same number of steps: Elsa; gradual pruning to the same set, which has
Elsa's score, ramp and frozen phase and forgets what it cuts; and for grids the same training of the other set alone,
whose weights are then rounded. One shot takes the dense weights to the set at once, by magnitude. What is reported is
perplexity on the test text. Each result is appended to ``--results`` when it is there, and runs that are in the file
are not run again.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from peers import GradualSet
from results import Results, quiet_trainer

from elsa_lightning import (
    NM,
    Block,
    ByPattern,
    CalibrationData,
    CausalLM,
    ElsaCallback,
    Heads,
    Neurons,
    Quantized,
    Unstructured,
    project,
    shrink,
)
from elsa_lightning.lm import EMBEDDED_MODEL
from elsa_lightning.selection import count_zeros
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.structured import is_structured

SETS: dict[str, tuple[Constraint, Constraint]] = {  # the gentler first
    "unstructured": (Unstructured(0.7), Unstructured(0.9)),
    "unstructured, rows": (Unstructured(0.7, "row"), Unstructured(0.9, "row")),
    "unstructured, model": (Unstructured(0.7, "model", floor=0.02), Unstructured(0.9, "model", floor=0.02)),
    "unstructured, depth": (Unstructured(0.7, depth=0.05), Unstructured(0.9, depth=0.05)),
    "n:m of 4": (NM(2, 4), NM(1, 4)),
    "n:m of 8": (NM(4, 8), NM(1, 8)),
    "blocks": (Block(0.5, 4, 4), Block(0.7, 4, 4)),
    "by pattern": (
        ByPattern({"attn": NM(2, 4), "mlp": Unstructured(0.7)}),
        ByPattern({"attn": NM(1, 4), "mlp": Unstructured(0.9)}),
    ),
    "neurons": (Neurons(0.25), Neurons(0.5)),
    "neurons and heads": (
        ByPattern({"attn": Heads(0.33), "mlp": Neurons(0.33)}),
        ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)}),
    ),
    "bits": (Quantized(4, 32), Quantized(3, 32)),
    "2:4 and bits": (Quantized(4, 32, NM(2, 4)), Quantized(3, 32, NM(2, 4))),
    "unstructured and bits": (Quantized(4, 32, Unstructured(0.7)), Quantized(4, 32, Unstructured(0.9))),
}
METHODS = ("one-shot", "gradual", "rounded", "elsa")


@dataclass(frozen=True)
class Case:
    """One run, and so one line of the results."""

    model: str
    name: str
    constraint: str
    method: str
    seed: int
    steps: int
    seq_len: int
    batch_size: int
    lr: float


class Rows:
    """Results by case, those of earlier runs included."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = Results(arguments.results)
        self.rows = self.results.rows

    def result(self, case: Case, constraint: Constraint | None) -> dict[str, Any]:
        """Return the case's line, running it if need be."""
        return self.results.of(case, lambda: self._run(case, constraint))

    def _run(self, case: Case, constraint: Constraint | None) -> dict[str, Any]:
        a = self.arguments
        seed_everything(case.seed, verbose=False)
        data = CalibrationData(
            name=a.text, tokenizer=case.model, seq_len=case.seq_len, batch_size=case.batch_size, seed=case.seed,
            eval_batch_size=16, eval_segments=a.eval_segments,
        )  # fmt: skip
        module = CausalLM(case.model, optimizer=lambda p: torch.optim.Adam(p, lr=case.lr))
        module.configure_model()
        start = time.perf_counter()
        callbacks = self._callbacks(case, constraint)
        if case.steps:
            fit = quiet_trainer(max_steps=case.steps, gradient_clip_val=1.0, limit_val_batches=0, callbacks=callbacks)
            fit.fit(module, data)
        if constraint is not None and case.method in ("one-shot", "gradual", "rounded"):
            project(module, constraint)  # of gradual pruning only values may change
        seconds = time.perf_counter() - start
        zeros, _ = count_zeros(module, list(module.parameters()))
        assert module.model is not None
        whole = sum(p.numel() for p in module.model.parameters())
        smaller = shrink(module.model) if constraint is not None and is_structured(constraint) else module.model
        file, packed = sizes(smaller)
        return {
            "perplexity": next(iter(quiet_trainer().test(module, data, verbose=False)[0].values())),
            "parameters": smaller.num_parameters(), "non_zero": whole - zeros, "bytes": file, "zipped": packed,
            "seconds": round(seconds, 1),
        }  # fmt: skip

    def _callbacks(self, case: Case, constraint: Constraint | None) -> list[Callback]:
        if constraint is None or case.method == "one-shot":
            return []
        if case.method == "elsa":
            return [ElsaCallback(constraint=constraint)]
        if case.method == "rounded":
            assert isinstance(constraint, Quantized)
            return [] if constraint.inside is None else [ElsaCallback(constraint=constraint.inside)]
        return [GradualSet(constraint)]


def sizes(model: Any) -> tuple[int, int]:
    """Return the bytes of the saved weights, and of these deflated."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        contents = [file.read_bytes() for file in Path(folder).glob("*.safetensors")]
    return sum(map(len, contents)), sum(len(zlib.compress(content, 6)) for content in contents)


def cases(a: argparse.Namespace) -> Iterator[tuple[Case, Constraint | None]]:
    """Yield what the command line asks for, one seed after the other."""
    shape = (a.seq_len, a.batch_size)
    for seed in range(a.seeds):
        if seed == 0:
            yield Case(a.model, "dense", "", "dense", 0, 0, *shape, 0.0), None
        for name in a.sets:
            for constraint in SETS[name]:
                for method in a.methods:
                    once = method == "one-shot"
                    if (once and seed > 0) or (method == "rounded" and not isinstance(constraint, Quantized)):
                        continue
                    steps, lr = (0, 0.0) if once else (a.steps, a.lr)
                    yield Case(a.model, name, repr(constraint), method, seed, steps, *shape, lr), constraint


def table(rows: list[dict[str, Any]], a: argparse.Namespace) -> str:
    """Return test perplexities as Markdown, the best in bold, and how far Elsa is ahead of the best of the others."""
    mine = [row for row in rows if row["model"] == a.model]
    dense = next((row["perplexity"] for row in mine if row["method"] == "dense"), float("nan"))
    lines = [
        f"{a.model}, dense {dense:.2f}; {a.steps} steps of {a.batch_size} × {a.seq_len} tokens, rate {a.lr:g}",
        "",
        "| set | one shot | gradual | then rounded | Elsa | ahead by | parameters | non-zero | MB | zip, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        for constraint in map(repr, SETS[name]):
            here = [row for row in mine if row["constraint"] == constraint and row["steps"] in (0, a.steps)]
            here = [row for row in here if row["lr"] in (0.0, a.lr)]
            found = {m: [row["perplexity"] for row in here if row["method"] == m] for m in METHODS}
            means = {m: statistics.mean(values) for m, values in found.items() if values}
            if not means:
                continue
            best = min(means.values())
            cells = [
                f"**{means[m]:.2f}**" if means.get(m) == best else f"{means[m]:.2f}" if m in means else "–"
                for m in METHODS
            ]
            others = [value for m, value in means.items() if m != "elsa"]
            ahead = f"{1 - means['elsa'] / min(others):+.1%}" if "elsa" in means and others else "–"
            last = next((row for row in here if row["method"] == "elsa"), here[0])
            bytes_ = " | ".join(f"{last[key] / 1e6:.2f}" for key in ("bytes", "zipped"))
            size = f"{last['parameters']:,} | {last['non_zero']:,} | {bytes_}"
            lines.append(f"| `{constraint}` | " + " | ".join(cells) + f" | {ahead} | {size} |")
    return "\n".join(lines)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=EMBEDDED_MODEL, help="a hub name or a folder (default: %(default)s)")
    add("--text", default="pydocs", help="as --data.name (default: %(default)s)")
    add("--sets", nargs="+", default=list(SETS), choices=SETS, help="(default: all)")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    add("--seeds", type=int, default=1, help="seeds 0, 1, ... of data order (default: %(default)s)")
    add("--steps", type=int, default=200, help="optimizer steps of trained methods (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate of all (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    add("--eval-segments", type=int, default=400, help="test segments (default: %(default)s)")
    add("--results", type=Path, default=here / "results.jsonl", help="(default: %(default)s)")
    add("--report-only", action="store_true", help="only print the table of the results there are")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = Rows(arguments)
    if not arguments.report_only:
        for case, constraint in cases(arguments):
            rows.result(case, constraint)
    print("\n" + table(rows.rows, arguments))


if __name__ == "__main__":
    main()
