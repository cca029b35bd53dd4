"""The benchmark of sets: what it compares a set with, and that lines of earlier versions stay readable."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from elsa_lightning import Heads, Neurons, Unstructured
from elsa_lightning.sets import ByPattern

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "sets" / "run.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("sets_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sets_benchmark", module)
    spec.loader.exec_module(module)
    units = ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)})
    monkeypatch.setattr(module, "SETS", {"neurons and heads": (units,), "unstructured": (Unstructured(0.5),)})
    return module


def command(monkeypatch: pytest.MonkeyPatch, results: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(results), *arguments])


def test_units_are_compared_with_the_same_shape_trained_densely_and_timed(
    bench: Any, tiny_llama: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, readme = tmp_path / "results.jsonl", tmp_path / "README.md"
    readme.write_text(f"before\n{''.join(bench.MARKS)}after\n")
    options = ["--model", tiny_llama, "--text", str(text_file), "--steps", "2", "--seq-len", "16", "--batch-size", "2"]
    options += ["--eval-segments", "4", "--into", str(readme)]
    command(monkeypatch, results, *options)
    bench.main()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    trained = ["one-shot", "gradual", "from-random", "cut-first", "elsa"]
    assert [row["method"] for row in rows] == ["dense", *trained, "one-shot", "gradual", "elsa"]
    dense, units, single = rows[0], rows[1:6], rows[6:]
    assert len({row["perplexity"] for row in rows}) >= len(rows) - 1  # where no unit returns Elsa is gradual pruning
    assert len({(row["parameters"], row["bytes"]) for row in units}) == 1
    assert units[0]["parameters"] < dense["parameters"] == single[0]["parameters"]
    assert all(row["decode"] > 0 and row["decode_dense"] > 0 for row in units)
    assert not any("decode" in row for row in [dense, *single])
    at_random = next(row for row in units if row["method"] == "from-random")
    assert at_random["non_zero"] == at_random["parameters"]

    first = readme.read_text()
    assert first.startswith("before\n<!-- table -->\n") and first.endswith("<!-- end of table -->after\n")
    assert re.search(rf"\| {units[-1]['decode']:,.0f} \| \d\.\d\d \|", first)
    command(monkeypatch, results, *options, "--report-only")
    bench.main()
    assert readme.read_text() == first and len(results.read_text().splitlines()) == len(rows)


def test_lines_from_before_a_column_was_measured_are_reported(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {
        "model": "m", "name": "neurons and heads", "constraint": repr(bench.SETS["neurons and heads"][0]), "seed": 0,
        "steps": 3, "seq_len": 128, "batch_size": 8, "lr": 0.1, "parameters": 50, "non_zero": 80, "bytes": 4e6,
        "zipped": 2e6, "seconds": 1.0,
    }  # fmt: skip
    lines = [{**old, "method": "elsa", "perplexity": 9.0}, {**old, "method": "gradual", "perplexity": 10.0}]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for segments, shown in (("100", True), ("400", False)):  # all older lines are of 100
        command(monkeypatch, tmp_path / "old.jsonl", "--report-only", "--model", "m", "--steps", "3", "--lr", "0.1",
                "--eval-segments", segments)  # fmt: skip
        bench.main()
        row = "| – | 10.00 | – | – | – | **9.00** | +10.0% | 50 | 50 | 4.00 | 2.00 | – | – |"
        assert (row in capsys.readouterr().out) == shown


def test_a_file_without_marks_is_left_alone(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(SystemExit, match="has no lines <!-- table -->"):
        bench.put("| a |", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "text"
