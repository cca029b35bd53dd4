"""Methods × sparsities × seeds on models: perplexity at equal training tokens, as a table and a plot.

    python benchmarks/quality/run.py

Every method starts from the same dense weights and sees the same batches (of its seed) with Adam, a learning
rate that falls linearly to 0 and clipping at 1. Each trained method has its learning rate chosen from the same
trials by validation perplexity at 60 % (for 50 to 70 %) and at 90 % (above), which go on while the best is at their
edge, and some peers a setting of their own in further ones; what is reported is perplexity on the test text, which
no trial sees. Every result is appended to ``--results`` when it is there, and runs that are in the file are not run
again.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from lightning.pytorch import Callback, seed_everything
from llm_compressor import pruner
from models import CONFIGS, SECOND, made_model
from peers import GradualPruning, MaskedFineTuning, SmallDense, magnitude, parameters, sparsegpt, take_zeros, wanda
from results import Results, quiet_trainer

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback, Unstructured
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.lm import EMBEDDED_MODEL
from elsa_lightning.selection import count_zeros
from elsa_lightning.sets.unstructured import AT_ONCE

ONE_SHOT = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
LOW: dict[str, StateDtype] = {"elsa-l-bf16": "bfloat16", "elsa-l-fp8": "float8_e4m3fn"}  # bf16 weights, Adam8bit
PEERS = (
    "magnitude+ft", "wanda+ft", "gradual-fisher", "gradual", "gradual-global", "elsa-published",
    "elsa-published-constant",
)  # fmt: skip
ELSEWHERE = {"wanda-llmc": "wanda", "sparsegpt-llmc": "sparsegpt"}  # llm-compressor's own
SMALL = "dense-small"
ONWARD = ("sparsegpt+elsa-tensor", "sparsegpt+gradual")  # from the 70 % that SparseGPT cuts on
AGAIN = {"elsa-again": "elsa-tensor", "gradual-again": "gradual"}  # the dense model trained anew, on the mask found
FORMS = {"elsa-feedback": "feedback", "elsa-decoupled": "decoupled"}  # at their own penalty
TRAINED = (*PEERS, SMALL, "elsa-coupled", *FORMS, "elsa-tensor", "elsa", *LOW, *AGAIN, *ONWARD)
RATES = {0.6: (2.5e-4, 5e-4, 1e-3, 2e-3), 0.9: (1e-3, 2e-3, 4e-3, 8e-3)}  # tried at this sparsity
BEYOND = 2  # further rates, while the best one is the first or the last
SETTINGS = {  # every rate is tried with the first, then the best rate with the others, and the best of these again
    "elsa-published": ("λ", (0.01, 0.003, 0.03, 0.1, 0.3)),
    "elsa-published-constant": ("λ", (0.01, 0.003, 0.03, 0.1, 0.3)),
    "elsa-coupled": ("λ", (0.1, 0.003, 0.01, 0.03, 0.3)),
    "gradual": ("ramp from", (0.0, 0.7)),
    "gradual-global": ("ramp from", (0.0, 0.7)),
    "gradual-again": ("ramp from", (0.0, 0.7)),
    "sparsegpt+gradual": ("ramp from", (AT_ONCE, 0.0)),
    SMALL: ("warm-up", (0.1, 0.0)),
}
CALIBRATION = 16  # batches that one-shot methods look at, the first ones of training
ALL = (*ONE_SHOT, *ELSEWHERE, *TRAINED)
TRIAL_SEED = 1000
LINE = 4  # sparsities that make a line of the plot


@dataclass(frozen=True)
class Case:
    """One run, and so one line of the results."""

    model: str
    method: str
    sparsity: float
    seed: int
    steps: int
    seq_len: int
    batch_size: int
    distillation: float
    lr: float
    setting: float | None
    split: str
    features: float = 0.0
    interval: int | None = None


class Arena:
    """Runs cases that have no result yet."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = Results(arguments.results)
        self.rows = self.results.rows
        self.places = {EMBEDDED_MODEL: (EMBEDDED_MODEL, "pydocs")}

    def result(self, case: Case) -> dict[str, Any]:
        """Return the case's line, running it if need be."""
        return self.results.of(case, lambda: self._run(case))

    def _place(self, model: str) -> tuple[str, str]:
        if model in CONFIGS and model not in self.places:
            self.places[model] = made_model(model, self.arguments.cache)
        return self.places.get(model, (model, self.arguments.text))

    def _run(self, case: Case) -> dict[str, Any]:
        seed_everything(case.seed, verbose=False)
        model, text = self._place(case.model)
        data = CalibrationData(
            name=text, eval_name=self.arguments.eval_text, tokenizer=model, seq_len=case.seq_len,
            batch_size=case.batch_size, seed=case.seed, eval_batch_size=self.arguments.eval_batch_size,
            eval_segments=self.arguments.eval_segments,
        )  # fmt: skip
        kind: Any = bitsandbytes.optim.Adam8bit if case.method in LOW else torch.optim.Adam
        beta2 = 0.95 if case.method.startswith("elsa-published") else 0.999
        make = lambda p: kind(p, lr=case.lr, betas=(0.9, beta2))  # noqa: E731
        options = {"optimizer": make, "distillation": case.distillation, "feature_distillation": case.features}
        if case.method == SMALL:
            warmup = round((case.setting or 0.0) * case.steps)
            module: CausalLM = SmallDense(model, case.sparsity, warmup_steps=warmup, **options)
        else:
            module = CausalLM(model, **options)
        module.configure_model()
        before = _memory(reset=True)
        start, tokens = time.perf_counter(), 0
        first = case.method.partition("+")[0]
        if first in ONE_SHOT or first in ELSEWHERE:
            prune = ONE_SHOT[first] if first in ONE_SHOT else pruner(self.arguments.llm_compressor, ELSEWHERE[first])
            data.prepare_data()
            data.setup("fit")
            batches = iter(data.train_dataloader())
            at_first = min(case.sparsity, AT_ONCE) if case.method in ONWARD else case.sparsity
            prune(module, at_first, [next(batches) for _ in range(CALIBRATION)])
            tokens = CALIBRATION * case.seq_len * case.batch_size * (first != "magnitude")
        if case.method in AGAIN:
            searched = CausalLM(model, **options)
            searched.configure_model()
            tokens += self._fit(replace(case, method=AGAIN[case.method]), searched, copy.deepcopy(data))
            take_zeros(searched, module)
        if case.method in TRAINED:
            tokens += self._fit(case, module, data)
        seconds, peak = time.perf_counter() - start, _memory() - before
        evaluate = quiet_trainer().validate if case.split == "validation" else quiet_trainer().test
        zeros, weights = count_zeros(module)
        return {
            "perplexity": next(iter(evaluate(module, data, verbose=False)[0].values())),
            "zeros": zeros / weights, "parameters": parameters(module) - zeros,
            "tokens": tokens, "seconds": round(seconds, 1), "peak_mb": peak,
        }  # fmt: skip

    def _fit(self, case: Case, module: CausalLM, data: CalibrationData) -> int:
        """Train as the case says; return how many tokens that took."""
        callback = self._callback(case)
        quiet_trainer(
            max_steps=case.steps, gradient_clip_val=1.0, limit_val_batches=0,
            callbacks=[callback] if callback is not None else [],
            precision="bf16-true" if case.method in LOW else self.arguments.precision,
        ).fit(module, data)  # fmt: skip
        return case.steps * case.seq_len * case.batch_size

    def _callback(self, case: Case) -> Callback | None:
        method = case.method.rpartition("+")[2]
        if method == "ft" or method in AGAIN:
            return MaskedFineTuning()
        if method == "gradual-fisher":
            return GradualPruning(case.sparsity, power=1.0)
        if method.startswith("gradual"):
            scope: Any = "model" if method == "gradual-global" else "tensor"
            return GradualPruning(case.sparsity, scope, start=case.setting or 0.0)
        if method == "elsa":
            return ElsaCallback(case.sparsity)
        alike = Unstructured(case.sparsity, scope="tensor")
        if method == "elsa-tensor":
            return ElsaCallback(constraint=alike)
        if case.method in LOW:
            return ElsaCallback(constraint=alike, state_dtype=LOW[case.method])
        if case.method in FORMS:
            return ElsaCallback(constraint=alike, prox=FORMS[case.method])  # type: ignore[arg-type]
        if case.method.startswith("elsa-"):  # K in the published proportion: 32 of 4096 steps
            assert case.setting is not None
            return ElsaCallback(
                constraint=alike, prox="coupled" if case.method == "elsa-coupled" else "published",
                penalty=case.setting, penalty_schedule="constant" if case.method.endswith("constant") else "cosine",
                interval=case.interval or max(1, round(case.steps / 128)), ramp=0, frozen=0,
            )  # fmt: skip
        return None

    def tuned(self, case: Case) -> Case:
        """Return the case with the settings that did best in its trials."""
        if case.method not in TRAINED:
            return case
        if self.arguments.lr is not None:
            setting = self.arguments.setting if case.method in SETTINGS else None
            return replace(case, lr=self.arguments.lr, setting=setting)
        at = 0.6 if case.sparsity <= 0.7 else 0.9
        steps = self.arguments.trial_steps or case.steps
        distillation = self.arguments.trial_distillation
        trial = replace(
            case, method="elsa-tensor" if case.method in LOW else case.method, sparsity=at, seed=TRIAL_SEED,
            steps=steps, split="validation",
            distillation=case.distillation if distillation is None else distillation,
        )  # fmt: skip
        settings: tuple[float | None, ...] = SETTINGS[case.method][1] if case.method in SETTINGS else (None,)
        best = self._best(replace(trial, lr=lr, setting=settings[0]) for lr in RATES[at])
        best = self._best(replace(best, setting=setting) for setting in settings)
        rates = list(RATES[at])
        best = self._best(replace(best, lr=lr) for lr in rates)
        while best.lr in (rates[0], rates[-1]) and len(rates) < len(RATES[at]) + BEYOND:
            rates = [best.lr / 2, *rates] if best.lr == rates[0] else [*rates, best.lr * 2]
            best = self._best(replace(best, lr=lr) for lr in rates)
        return replace(case, lr=best.lr, setting=best.setting)

    def _best(self, trials: Iterable[Case]) -> Case:
        return min(trials, key=lambda trial: float(self.result(trial)["perplexity"]))

    def sensitivity(self) -> None:
        """Try learning rates from a quarter to four times the best, beyond those that were tried already."""
        a = self.arguments
        for model in a.models:
            for method in a.methods:
                for sparsity in RATES if method in TRAINED else ():
                    of = (a.steps, a.seq_len, a.batch_size, a.distillation, 0.0, None, "validation")
                    best = self.tuned(Case(model, method, sparsity, TRIAL_SEED, *of))
                    for factor in (0.25, 0.5, 2.0, 4.0):
                        self.result(replace(best, lr=best.lr * factor))

    def cases(self) -> Iterator[Case]:
        """Yield what the command line asks for, one seed after the other."""
        a = self.arguments
        for seed in range(a.seeds):
            for model in a.models:
                for method in ("dense", *a.methods):
                    for sparsity in (0.0,) if method == "dense" else a.sparsities:
                        if method not in TRAINED and seed > 0:
                            continue  # the weights are the same; only Wanda and SparseGPT see other text
                        distillation = a.distillation if method in TRAINED else 0.0
                        steps = a.steps if method in TRAINED else 0
                        split, order = ("validation", TRIAL_SEED + seed) if a.trials else ("test", seed)
                        yield Case(
                            model, method, sparsity, order, steps, a.seq_len, a.batch_size, distillation, 0.0, None,
                            split, a.features if method in TRAINED else 0.0,
                            a.interval if method in SETTINGS and method.startswith("elsa-") else None,
                        )  # fmt: skip


def _memory(reset: bool = False) -> int:
    """Return the peak since the last reset in MiB: of the device where there is one, else of the process."""
    gc.collect()
    if reset and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or memory that an earlier run left would be used again and not count
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def table(rows: list[dict[str, Any]], model: str, steps: int, distillation: float, features: float = 0.0) -> str:
    """Return the test perplexities of one model and budget as Markdown: mean ± standard deviation (seeds)."""
    tests = [r for r in rows if r["model"] == model and r["split"] == "test"]
    dense = [r["perplexity"] for r in tests if r["method"] == "dense"]
    of = (steps, distillation, features)
    here = [r for r in tests if (r["steps"], r["distillation"], r.get("features", 0.0)) == of]
    sparsities = sorted({r["sparsity"] for r in here})
    if distillation == features == 0:
        here += [r for r in tests if r["method"] not in TRAINED and r["sparsity"] in sparsities]
    lines = [
        f"{model}, dense {dense[0] if dense else float('nan'):.2f}, {steps} steps, distillation {distillation:g}"
        + (f", features {features:g}" if features else ""),
        "",
        "| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " | tokens | seconds | + MiB |",
        "|---|" + "---|" * (len(sparsities) + 3),
    ]
    found = {(m, s): [r["perplexity"] for r in here if (r["method"], r["sparsity"]) == (m, s)]
             for m in ALL for s in sparsities}  # fmt: skip
    best = {s: min(statistics.mean(v) for (_, at), v in found.items() if v and at == s) for s in sparsities}
    for method in ALL:
        mine = [r for r in here if r["method"] == method]
        if not mine:
            continue
        cells = []
        for sparsity in sparsities:
            if not (values := found[method, sparsity]):
                cells.append("–")
                continue
            mean = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append((f"**{mean:.2f}**" if mean == best[sparsity] else f"{mean:.2f}") + f"{spread} ({len(values)})")
        tokens, seconds, peak = (statistics.median(r[key] for r in mine) for key in ("tokens", "seconds", "peak_mb"))
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {tokens:,.0f} | {seconds:.0f} | {peak:.0f} |")
    return "\n".join(lines)


def trials(rows: list[dict[str, Any]], models: list[str]) -> str:
    """Return the validation perplexity at every learning rate that was tried as Markdown, the best in bold."""
    here = [r for r in rows if r["split"] == "validation" and r["model"] in models and r["method"] in TRAINED]
    rates = sorted({r["lr"] for r in here})
    lines = [
        "| model | steps, distillation | zeros | method | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---|---|---|---|" + "---|" * len(rates),
    ]
    keys = ("model", "steps", "distillation", "sparsity", "method", "setting")

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*(row[key] for key in keys[:4]), ALL.index(row["method"]), row["setting"] or 0.0)

    for first in {order(r): r for r in sorted(here, key=order)}.values():
        mine = {r["lr"]: r["perplexity"] for r in here if all(r[key] == first[key] for key in keys)}
        cells = ["" if lr not in mine else f"**{p:.2f}**" if (p := mine[lr]) == min(mine.values()) else f"{p:.2f}"
                 for lr in rates]  # fmt: skip
        name = first["method"]
        if name in SETTINGS:
            name += f", {SETTINGS[name][0]} {first['setting']:g}"
        budget = f"{first['steps']}, {first['distillation']:g}"
        lines.append(f"| {first['model']} | {budget} | {first['sparsity']:.0%} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], models: list[str], steps: int, path: Path) -> None:
    """Draw perplexity against sparsity, without and with distillation, for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors: dict[str, str] = {}
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        tests = [r for r in rows if r["model"] == model and r["split"] == "test"]
        for method in (m for m in ALL if m not in LOW):  # those lie on top of elsa
            for distillation, style, marker in ((0.0, "-", "o"), (1.0, "--", "D")):
                mine = [r for r in tests if r["method"] == method and r["distillation"] == distillation]
                mine = [r for r in mine if method not in TRAINED or r["steps"] == steps]
                xs = sorted({r["sparsity"] for r in mine})
                if len(xs) < LINE:
                    continue
                colors.setdefault(method, "black" if method == "elsa" else f"C{len(colors)}")
                axis.plot(
                    [100 * x for x in xs],
                    [statistics.mean(r["perplexity"] for r in mine if r["sparsity"] == x) for x in xs],
                    linestyle=style, marker=marker, markersize=4, linewidth=2.5 if method == "elsa" else 1.2,
                    label=method + (" + distillation" if distillation else ""), color=colors[method],
                )  # fmt: skip
        dense = [r["perplexity"] for r in tests if r["method"] == "dense"]
        if dense:
            axis.axhline(dense[0], color="gray", linewidth=0.8, label="dense")
            axis.set_ylim(0.95 * dense[0], 6 * dense[0])
        axis.set(yscale="log", xlabel="zeros, %", ylabel="test perplexity", title=f"{model}, {steps} steps")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=[EMBEDDED_MODEL, SECOND],
        help=f"{EMBEDDED_MODEL}, {', '.join(CONFIGS)}, hub names, folders",
    )
    add("--text", default="c4", help="text for other models, as --data.name (default: %(default)s)")
    add("--eval-text", help="text that perplexity is measured on, as --data.eval_name (default: held out of --text)")
    add("--eval-batch-size", type=int, default=16, help="(default: %(default)s)")
    add("--precision", default="32-true", help="of training, but of elsa-l's (default: %(default)s)")
    add("--methods", nargs="+", default=[*ONE_SHOT, *PEERS, "elsa"], choices=ALL, help="(default: the peers and elsa)")
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95], help="(default: %(default)s)")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... of data order (default: %(default)s)")
    add("--steps", type=int, default=200, help="optimizer steps of trained methods (default: %(default)s)")
    add("--trial-steps", type=int, help="steps of the tuning trials (default: as --steps)")
    add("--trial-distillation", type=float, help="distillation of the tuning trials (default: as --distillation)")
    add("--lr", type=float, help="learning rate of every trained method, instead of trials")
    add("--trials", action="store_true", help="with --lr: as a tuning trial, by validation text and in its own order")
    add("--setting", type=float, help="with --lr: λ of the published form, or where gradual pruning's ramp begins")
    add("--interval", type=int, help="K of the published forms (default: 32 of 4096 steps, in proportion)")
    add("--sensitivity", action="store_true", help="also try rates within 4 times of the best at 60 and 90 %%")
    add("--distillation", type=float, default=0.0, help="for every trained method (default: %(default)s)")
    add("--features", type=float, default=0.0, help="likewise, feature distillation (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    add("--eval-segments", type=int, default=400, help="test segments (default: %(default)s)")
    add("--results", type=Path, default=here / "results.jsonl", help="(default: %(default)s)")
    add("--cache", type=Path, default=here / ".cache", help="for the models it makes (default: %(default)s)")
    add("--report-only", action="store_true", help="only print the tables of the results there are, and draw the plot")
    add("--llm-compressor", help="Python that has llm-compressor, for its methods")
    arguments = parser.parse_args()
    if arguments.llm_compressor is None and any(method in ELSEWHERE for method in arguments.methods):
        parser.error(f"{' and '.join(ELSEWHERE)} need --llm-compressor PYTHON; llm_compressor.py says how to make one")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arena = Arena(arguments)
    if not arguments.report_only:
        for case in arena.cases():
            arena.result(arena.tuned(case))
        if arguments.sensitivity:
            arena.sensitivity()
    for model in arguments.models:
        tests = [r for r in arena.rows if (r["model"], r["split"]) == (model, "test")]
        for budget in sorted({(r["steps"], r["distillation"], r.get("features", 0.0)) for r in tests if r["steps"]}):
            print("\n" + table(arena.rows, model, *budget))
    print("\n" + trials(arena.rows, arguments.models))
    plot(arena.rows, arguments.models, arguments.steps, arguments.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
