"""Everything that wants a GPU, on the one that is here, in less than ten minutes: ``make gpu``.

    PYTHONPATH=. python benchmarks/gpu.py

Tests marked ``gpu``, runs of the embedded model, step times beside plain Adam, memory beside the plan, the projection
beside ``torch.topk``, and 2:4 kernels beside dense ones, with the torch that is installed. Each is a process of its
own with a time limit. What fails or cannot run is noted with the reason and the rest goes on; the exit status is 1 if
anything failed. One JSON and one Markdown table, named after the card, go to ``benchmarks/gpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
BUDGET = 570.0  # seconds of all parts together
RESULT = "RESULT"  # in a command: the file or folder that it writes
GIB = 2**30
ON_GPU = r"mark\.gpu|def test_\w+\([^)]*\bdevice\b"  # a test of the mark, or of the fixture that sets it
PACKAGES = ("torch", "triton", "bitsandbytes", "lightning", "transformers", "numpy")
Found = tuple[Any, list[tuple[str, str]]]  # for the JSON, and cases with what was found for the table
Status = Literal["ran", "failed", "not run"]


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: For people.
        command: What runs.
        read: Reads what was found from the file and from what was printed.
        seconds: Most that it may take.
        needs: Modules without which it cannot run.
        memory: Bytes of the card without which it cannot run.
        capability: Likewise the least compute capability.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Path, str], Found]
    seconds: float
    needs: tuple[str, ...] = ()
    memory: int = 0
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Card:
    """The GPU: its name, bytes, and compute capability, which only NVIDIA's have."""

    name: str
    memory: int
    capability: tuple[int, int]


def junit(file: Path, _: str) -> Found:
    """Return how many tests passed, which failed, and why others were skipped."""
    passed, failed, skipped = 0, [], {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        if wrong is not None:
            failed.append({"test": name, "why": (wrong.get("message") or "")[:500]})
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message") or ""
        else:
            passed += 1
    cases = [("all", f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")]
    cases += [(one["test"], f"FAILED: {one['why'].splitlines()[0] if one['why'] else ''}") for one in failed]
    cases += [(name, f"skipped: {why}") for name, why in skipped.items()]
    return {"passed": passed, "failed": failed, "skipped": skipped}, cases


def times(file: Path, _: str) -> Found:
    """Return times of steps."""
    told = json.loads(file.read_text())
    return told, [(row["loop"], f"{row['ms']} ms a step, {row['ratio']} of Adam alone") for row in told["times"]]


def projections(file: Path, _: str) -> Found:
    """Return times of projections."""
    rows = json.loads(file.read_text())
    cases = [
        (f"{row['entries']:,} entries", f"topk {row['topk_ms']:.2f} ms, ours {row['ours_ms']:.2f}, "
         f"near the last threshold {row['near_ms']:.2f}") for row in rows
    ]  # fmt: skip
    return rows, cases


def memory(_: Path, printed: str) -> Found:
    """Return bytes beside those planned."""
    row = json.loads(printed.splitlines()[-1])
    exact = "as planned" if row["states"] == row["planned"] else f"planned {row['planned'] / 1e6:.1f} MB"
    return row, [
        ("states", f"{row['states'] / 1e6:.1f} MB, {exact}"),
        ("peak", f"{row['peak'] / 1e6:.0f} MB, planned {row['planned_peak'] / 1e6:.0f}; {1e3 * row['seconds']:.1f} ms"),
    ]


def journal(folder: Path, _: str) -> Found:
    """Return how a run of ``elsa fit`` went."""
    told = json.loads(next(folder.rglob("elsa_run.json")).read_text())
    metrics = told["notes"][-1]["metrics"] if told["notes"] else {}
    perplexity = told["record"].get("perplexity", {})
    kept = {key: told.get(key) for key in ("status", "device", "step", "seconds", "peak_memory", "error")}
    numbers = {"sparsity": metrics.get("elsa/sparsity"), **{key: perplexity.get(key) for key in ("dense", "sparse")}}
    cases = [
        ("all", f"{told['status']} after {told['step']} steps, {told['seconds']:.0f} s, peak "
         f"{(told['peak_memory'] or 0) / 1e6:.0f} MB"),
        ("perplexity", ", ".join(f"{key} {value:.4g}" for key, value in numbers.items() if value is not None)),
    ]  # fmt: skip
    return {**kept, "perplexity": perplexity, "metrics": metrics}, cases


def scale(_: Path, printed: str) -> Found:
    """Return times at scale beside those on paper."""
    row = json.loads(printed.splitlines()[-1])
    cases = [("size", f"{row['parameters']:,} parameters, {row['pieces']} pieces, peak {row['peak'] / GIB:.1f} GiB")]
    for phase in ("training", "optimizer", "step", "update", "frozen"):
        took, *paper = row[phase]
        cases.append((phase, f"{1e3 * took:.1f} ms, on paper {' to '.join(f'{1e3 * one:.1f}' for one in paper)}"))
    return row, cases


def kernels(_: Path, printed: str) -> Found:
    """Return times of products."""
    rows = json.loads(printed.splitlines()[-1])
    cases = [
        (f"{row['outputs']} × {row['inputs']}, {row['rows']} rows", f"dense {row['dense_us']:.0f} µs, 2:4 "
         f"{row['sparse_us']:.0f}; × {row['dense_us'] / row['sparse_us']:.2f}; differ by {row['error']:.1e}")
        for row in rows
    ]  # fmt: skip
    return rows, cases


def parts() -> list[Part]:
    """Return all there is, the most telling first."""
    here, overhead = sys.executable, "benchmarks/step_overhead"
    files = sorted((ROOT / "tests").rglob("test_*.py"))  # only those, lest others miss what only they need
    marked = [str(f) for f in files if re.search(ON_GPU, f.read_text(encoding="utf-8"))]
    tests = (here, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors",
             f"--junitxml={RESULT}", *marked)  # fmt: skip
    fit = (here, "-m", "elsa_lightning", "fit", "--config")
    short = ("--trainer.accelerator", "gpu", "--trainer.max_steps", "200", "--trainer.val_check_interval", "200",
             "--data.eval_segments", "128", "--trainer.default_root_dir", RESULT)  # fmt: skip
    step = (here, f"{overhead}/run.py", "--uncounted", "--rounds", "3", "--results", RESULT)
    sizes = tuple(map(str, (1 << 20, 1 << 22, 1 << 24, 1 << 26)))
    of_step = ("--steps", "4", "--batch-size", "1", "--seq-len", "512")
    paper = (here, "benchmarks/sharding/scale.py", "--measure", "--run")
    found = [
        Part("tests", tests, junit, 240, ("pytest",)),
        Part("embedded model, Elsa", (*fit, "configs/elsa.yaml", *short), journal, 90),
        Part("embedded model, Elsa-L", (*fit, "configs/elsa_l.yaml", *short), journal, 90, ("bitsandbytes",)),
        Part("step time", step, times, 60),
        Part("step time, Elsa-L", (*step, "--forms", "--little"), times, 60, ("bitsandbytes",)),
        Part("projection", (here, f"{overhead}/projection.py", "--entries", *sizes, "--results", RESULT), projections,
             60),
        Part("2:4 kernels", (here, "benchmarks/semi_structured.py"), kernels, 60, capability=(8, 0)),
        Part("scale, 2 B, Elsa", (*paper, "Elsa", "--blocks", "8"), scale, 60, memory=50 * GIB),
        Part("scale, 7 B, Elsa-L", (*paper, "Elsa-L"), scale, 90, ("bitsandbytes",), 70 * GIB),
    ]  # fmt: skip
    for size, full, little in (("45M", 2 * GIB, 2 * GIB), ("1B", 30 * GIB, 15 * GIB)):
        for mode in ("Adam", "Elsa", "Adam8bit, bf16", "Elsa-L, bf16 state", "Elsa-L, fp8 state"):
            in_8_bits = "bf16" in mode or "fp8" in mode
            command = (here, "benchmarks/memory/run.py", "--one", size, mode, *of_step)
            needs = ("bitsandbytes",) if in_8_bits else ()
            found.append(Part(f"memory, {size}, {mode}", command, memory, 60, needs, little if in_8_bits else full))
    return found


def why_not(part: Part, card: Card, left: float) -> str | None:
    """Return why a part cannot run here, or None."""
    missing = [module for module in part.needs if find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if part.memory > card.memory:
        return f"takes about {part.memory / GIB:.0f} GiB, and the card has {card.memory / GIB:.0f}"
    if part.capability > card.capability:
        return f"needs compute capability {part.capability[0]}.{part.capability[1]} of an NVIDIA card"
    return None if left > 0 else "the time of all parts was over"


def run(part: Part, card: Card, left: float) -> dict[str, Any]:
    """Run a part and return what came of it; nothing that it does stops the others.

    Args:
        part: What to run.
        card: On which.
        left: Seconds left of all.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told: dict[str, Any] = {
        "part": part.name, "status": "not run", "date": date, "seconds": 0.0, "found": None, "cases": [],
    }  # fmt: skip
    if (reason := why_not(part, card, left)) is not None:
        return {**told, "why": reason}
    start, limit = time.monotonic(), min(part.seconds, left)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [word.replace(RESULT, str(result)) for word in part.command]
        status, printed, said = _call(command, limit)
        why = None if status == 0 else _reason(said or printed, status, limit)
        try:
            told["found"], told["cases"] = part.read(result, printed)
        except Exception as error:  # whatever a broken part left behind
            why = why or f"what it found cannot be read: {type(error).__name__}: {error}"
    outcome: Status = "ran" if why is None else "failed"
    return {**told, "status": outcome, "seconds": round(time.monotonic() - start, 1), "why": why}


def _call(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Return status (None: out of time), output and errors of a command, of which nothing is left running."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True, env={"HF_HUB_OFFLINE": "1", **os.environ},
    )  # fmt: skip
    try:
        printed, said = process.communicate(timeout=seconds)
        return process.returncode, printed, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, said = process.communicate()
        return None, printed, said
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def _reason(said: str, status: int | None, limit: float) -> str:
    if status is None:
        return f"took longer than {limit:.0f} s"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return f"status {status}: {(errors or lines or ['it said nothing'])[-1][:300]}"


def markdown(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return all of it as one table."""
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    days = sorted({row["date"][:10] for row in rows})
    of = f"{about['card']}, {about['memory'] / GIB:.0f} GiB; {', '.join(days)}; Python {about['python']}, {packages}"
    lines = [of, "", "| part | seconds | case | found |", "|---|---|---|---|"]  # fmt: skip
    for row in rows:
        told = [*([("", f"**{row['status']}**: {row['why']}")] if row["why"] else []), *row["cases"]]
        for case, what in told:
            cells = (row["part"], str(row["seconds"]), case, what)
            lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def file_of(folder: Path, card: str, ending: str) -> Path:
    """Return where the results of a card are."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}{ending}"


def earlier(folder: Path, card: str) -> list[dict[str, Any]]:
    """Return what parts found that were run before."""
    file = file_of(folder, card, ".json")
    return list(json.loads(file.read_text(encoding="utf-8"))["parts"]) if file.is_file() else []


def write(folder: Path, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the JSON and the table, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps({**about, "parts": rows}, indent=1) + "\n", ".md": markdown(about, rows)}
    written = []
    for ending, text in texts.items():
        part = file_of(folder, about["card"], ".part")
        part.write_text(text, encoding="utf-8")
        written.append(part.replace(file_of(folder, about["card"], ending)))
    return written


def run_all(all_parts: Sequence[Part], card: Card, folder: Path, budget: float = BUDGET) -> int:
    """Run all parts, write what came of them beside what others found before, and return the exit status."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    about = {
        "card": card.name, "memory": card.memory, "capability": list(card.capability), "packages": versions,
        "python": platform.python_version(),
    }  # fmt: skip
    end, rows, found = time.monotonic() + budget, [], {row["part"]: row for row in earlier(folder, card.name)}
    for part in all_parts:
        rows.append(row := run(part, card, end - time.monotonic()))
        found[part.name] = row
        print(
            f"{part.name}: {row['status']}, {row['seconds']} s" + (f": {row['why']}" if row["why"] else ""), flush=True
        )
        files = write(folder, about, list(found.values()))  # each time, so that an interrupted run leaves what it has
    print(*files)
    return int(any(row["status"] == "failed" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks/gpu", help="where to write (%(default)s)")
    parser.add_argument("--only", default="", help="run parts whose name this regular expression finds (default: all)")
    arguments = parser.parse_args()
    if find_spec("torch") is None:
        sys.exit(f"torch is not installed for {sys.executable}: name one that has it, make gpu PYTHON=python3")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no CUDA device is seen by torch {torch.__version__} of {sys.executable}: nothing was run")
    chosen = [part for part in parts() if re.search(arguments.only, part.name)]
    if not chosen:
        sys.exit(f"--only {arguments.only}: finds no part of these: {', '.join(part.name for part in parts())}")
    seen = torch.cuda.get_device_properties(0)
    capability = (seen.major, seen.minor) if torch.version.cuda is not None else (0, 0)
    sys.exit(run_all(chosen, Card(seen.name, seen.total_memory, capability), arguments.folder))


if __name__ == "__main__":
    main()
