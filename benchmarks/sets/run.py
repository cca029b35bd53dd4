"""Sets × two strengths on the embedded model: perplexity after training, beside one shot and gradual pruning.

    python benchmarks/sets/run.py

Every row starts from the same dense weights. The trained methods see the same batches with Adam at one learning rate
that falls linearly to 0, clipping at 1, and the same number of steps: Elsa; gradual pruning to the same set, which has
Elsa's score, ramp and frozen phase and forgets what it cuts; and for grids the same training of the other set alone,
whose weights are then rounded. Sets that leave a smaller model are also compared with the same shape from random
weights (``from-random``) and from the dense model's, cut by magnitude (``cut-first``), both trained as any dense model;
and the smaller model's decoding is timed beside the dense one's, by turns, on one thread of the CPU. One shot takes the
dense weights to the set at once, by magnitude. What is reported is perplexity on the test text. Each result is appended
to ``--results`` when it is there, and runs that are in the file are not run again.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from decode.run import times
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
    Layers,
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
    "unstructured": (Unstructured(0.7, "tensor"), Unstructured(0.9, "tensor")),
    "unstructured, rows": (Unstructured(0.7, "row"), Unstructured(0.9, "row")),
    "unstructured, model": (Unstructured(0.7), Unstructured(0.9)),
    "unstructured, depth": (Unstructured(0.7, "tensor", depth=0.05), Unstructured(0.9, "tensor", depth=0.05)),
    "n:m of 4": (NM(2, 4), NM(1, 4)),
    "n:m of 8": (NM(4, 8), NM(1, 8)),
    "blocks": (Block(0.5, 4, 4), Block(0.7, 4, 4)),
    "by pattern": (
        ByPattern({"attn": NM(2, 4), "mlp": Unstructured(0.7, "tensor")}),
        ByPattern({"attn": NM(1, 4), "mlp": Unstructured(0.9, "tensor")}),
    ),
    "neurons": (Neurons(0.25), Neurons(0.5)),
    "neurons and heads": (
        ByPattern({"attn": Heads(0.33), "mlp": Neurons(0.33)}),
        ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)}),
    ),
    "layers": (Layers(0.25), Layers(0.5)),
    "bits": (Quantized(4, 32), Quantized(3, 32)),
    "2:4 and bits": (Quantized(4, 32, NM(2, 4)), Quantized(3, 32, NM(2, 4))),
    "unstructured and bits": (
        Quantized(4, 32, Unstructured(0.7, "tensor")),
        Quantized(4, 32, Unstructured(0.9, "tensor")),
    ),
}
RATES = {"bits": 1e-4}  # in place of --lr: so little is cut that at the others' rate training would lose more than that
SMALL = ("from-random", "cut-first")  # start with the smaller model
METHODS = ("one-shot", "gradual", "rounded", *SMALL, "elsa")
TITLES = {"one-shot": "one shot", "rounded": "then rounded", "from-random": "from random", "cut-first": "cut first"}
MARKS = ("<!-- table -->\n", "<!-- end of table -->")


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
    eval_segments: int


class Rows:
    """Results by case, those of earlier runs included."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = Results(arguments.results)
        self.rows = self.results.rows
        for row in self.rows:
            row.setdefault("eval_segments", 100)  # of lines from before it was kept

    def result(self, case: Case, constraint: Constraint | None) -> dict[str, Any]:
        """Return the case's line, running it if need be."""
        return self.results.of(case, lambda: self._run(case, constraint))

    def _run(self, case: Case, constraint: Constraint | None) -> dict[str, Any]:
        a = self.arguments
        seed_everything(case.seed, verbose=False)
        data = CalibrationData(
            name=a.text, tokenizer=case.model, seq_len=case.seq_len, batch_size=case.batch_size, seed=case.seed,
            eval_batch_size=16, eval_segments=case.eval_segments,
        )  # fmt: skip
        module = CausalLM(case.model, optimizer=lambda p: torch.optim.Adam(p, lr=case.lr))
        module.configure_model()
        assert module.model is not None
        start = time.perf_counter()
        if constraint is not None and case.method in SMALL:
            project(module, constraint)
            module.model = shrink(module.model)
            if case.method == "from-random":
                module.model = type(module.model)(module.model.config).train()
        callbacks = self._callbacks(case, constraint)
        if case.steps:
            fit = quiet_trainer(max_steps=case.steps, gradient_clip_val=1.0, limit_val_batches=0, callbacks=callbacks)
            fit.fit(module, data)
        if constraint is not None and case.method in ("one-shot", "gradual", "rounded"):
            project(module, constraint)  # of gradual pruning only values may change
        seconds = time.perf_counter() - start
        smaller = shrink(module.model) if constraint is not None and is_structured(constraint) else module.model
        zeros, entries = count_zeros(smaller, list(smaller.parameters()))
        file, packed = sizes(smaller)
        return {
            "perplexity": next(iter(quiet_trainer().test(module, data, verbose=False)[0].values())),
            "parameters": entries, "non_zero": entries - zeros, "bytes": file, "zipped": packed,
            "seconds": round(seconds, 1), **(decoding(smaller, case.model) if smaller is not module.model else {}),
        }  # fmt: skip

    def _callbacks(self, case: Case, constraint: Constraint | None) -> list[Callback]:
        if constraint is None or case.method in ("one-shot", *SMALL):
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


def decoding(smaller: Any, dense: str, rounds: int = 5, tokens: int = 32) -> dict[str, float]:
    """Return greedy tokens a second of a model, and of the dense one, on one thread, by the processor's time.

    They take turns, so that what else the machine does falls on both alike; medians count.
    """
    other = CausalLM(dense)
    other.configure_model()
    assert other.model is not None
    models = {"decode": smaller.eval(), "decode_dense": other.model.eval()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompt = torch.arange(16)[None]
    for turn in range(rounds + 1):
        for name, model in models.items():
            _, each = times(model, prompt, tokens, time.process_time)
            seconds[name] += each if turn else []  # the first warms up
    torch.set_num_threads(threads)
    return {name: round(1 / statistics.median(each), 1) for name, each in seconds.items()}


def applies(method: str, constraint: Constraint) -> bool:
    """Say whether a method can be had of a set."""
    if method == "rounded":
        return isinstance(constraint, Quantized)
    return method not in SMALL or is_structured(constraint)


def cases(a: argparse.Namespace) -> Iterator[tuple[Case, Constraint | None]]:
    """Yield what the command line asks for, one seed after the other."""
    shape = (a.seq_len, a.batch_size)
    for seed in range(a.seeds):
        if seed == 0:
            yield Case(a.model, "dense", "", "dense", 0, 0, *shape, 0.0, a.eval_segments), None
        for name in a.sets:
            for constraint in SETS[name]:
                for method in a.methods:
                    once = method == "one-shot"
                    if (once and seed > 0) or not applies(method, constraint):
                        continue
                    steps, lr = (0, 0.0) if once else (a.steps, RATES.get(name, a.lr))
                    case = Case(a.model, name, repr(constraint), method, seed, steps, *shape, lr, a.eval_segments)
                    yield case, constraint


def table(rows: list[dict[str, Any]], a: argparse.Namespace) -> str:
    """Return test perplexities as Markdown, the best in bold, and how far Elsa is ahead of the best of the others."""
    protocol = {key: getattr(a, key) for key in ("model", "seq_len", "batch_size", "eval_segments")}
    mine = [row for row in rows if protocol == {key: row[key] for key in protocol}]
    dense = next((row["perplexity"] for row in mine if row["method"] == "dense"), float("nan"))
    titles = ["set", *(TITLES.get(m, m) for m in METHODS[:-1]), "Elsa", "ahead by"]
    titles += ["parameters", "non-zero", "MB", "zip, MB", "tokens/s", "× dense"]
    lines = [
        f"{a.model}, dense {dense:.2f}; {a.steps} steps of {a.batch_size} × {a.seq_len} tokens, rate {a.lr:g}, "
        f"{a.eval_segments} test segments, {a.seeds} seed(s)",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    for name, constraint in ((each, repr(one)) for each in SETS for one in SETS[each]):
        here = [row for row in mine if row["constraint"] == constraint and row["seed"] < a.seeds]
        runs = [(0, 0.0), (a.steps, RATES.get(name, a.lr))]
        here = [row for row in here if (row["steps"], row["lr"]) in runs]
        if here:
            lines.append(f"| `{constraint}` | {' | '.join(cells(here))} |")
    return "\n".join(lines)


def cells(here: list[dict[str, Any]]) -> list[str]:
    """Return what the table says of one set."""
    found = {m: [row["perplexity"] for row in here if row["method"] == m] for m in METHODS}
    means = {m: statistics.mean(values) for m, values in found.items() if values}
    best = min(means.values())
    shown = {m: f"**{mean:.2f}**" if mean == best else f"{mean:.2f}" for m, mean in means.items()}
    said = [shown.get(m, "–") for m in METHODS]
    others = [value for m, value in means.items() if m != "elsa"]
    said.append(f"{1 - means['elsa'] / min(others):+.1%}" if "elsa" in means and others else "–")
    last = next((row for row in here if row["method"] == "elsa"), here[0])
    non_zero = min(last["parameters"], last["non_zero"])  # once of the model before it was made smaller
    said += [f"{last['parameters']:,}", f"{non_zero:,}"]
    said += [f"{last[key] / 1e6:.2f}" for key in ("bytes", "zipped")]
    timed = "decode" in last  # not in lines from before it was measured, and not where no parameters go
    return [*said, *([f"{last['decode']:,.0f}", f"{last['decode'] / last['decode_dense']:.2f}"] if timed else "––")]


def put(text: str, file: Path) -> None:
    """Put a table into a file, in place of the one between its marks."""
    before, mark, rest = file.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise SystemExit(f"{file} has no lines {MARKS[0].strip()} and {MARKS[1]} for the table")
    file.write_text(f"{before}{mark}\n{text}\n\n{end}{after}")


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
    add("--into", type=Path, help="put the table into this file too, in place of the one there, such as README.md here")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = Rows(arguments)
    if not arguments.report_only:
        for case, constraint in cases(arguments):
            rows.result(case, constraint)
    found = table(rows.rows, arguments)
    print("\n" + found)
    if arguments.into is not None:
        put(found, arguments.into)


if __name__ == "__main__":
    main()
