"""`make gpu`: what fails or cannot run is noted and stops nothing, and the commands of its parts exist."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_decode_benchmark import script

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "step_overhead"))


@pytest.fixture(scope="module")
def gpu() -> Any:
    return script("gpu.py")


def part(gpu: Any, name: str, code: str, **options: Any) -> Any:
    def read(_: Path, printed: str) -> Any:
        return json.loads(printed), [("case", printed)]

    return gpu.Part(name, (sys.executable, "-S", "-c", code), read, options.pop("seconds", 20), **options)


def test_a_part_that_fails_stops_no_other(gpu: Any, tmp_path: Path) -> None:
    parts = [
        part(gpu, "raises", "print(1); raise ValueError('no such thing')"),
        part(gpu, "hangs", "import os; os.system('sleep 60; true')", seconds=0.5),
        part(gpu, "mumbles", "print('not JSON')"),
        part(gpu, "module", "print(1)", needs=("no_such_module",)),
        part(gpu, "large", "print(1)", memory=2**40),
        part(gpu, "new", "print(1)", capability=(99, 0)),
        part(gpu, "good", "print(7)"),
    ]
    card = gpu.Card("A card | with a bar", 2**30, (8, 0))
    assert gpu.run_all(parts, card, tmp_path / "new") == 1
    (told,) = (json.loads(file.read_text()) for file in (tmp_path / "new").glob("*.json"))
    found = {row["part"]: row for row in told["parts"]}
    assert [row["status"] for row in found.values()] == ["failed"] * 3 + ["not run"] * 3 + ["ran"]
    assert found["raises"]["why"] == "status 1: ValueError: no such thing" and found["raises"]["found"] == 1
    assert found["hangs"]["why"] == "took longer than 0 s" and found["hangs"]["seconds"] < 10
    assert found["mumbles"]["why"].startswith("what it found cannot be read: JSONDecodeError")
    assert found["module"]["why"] == "no_such_module is not installed"
    assert found["large"]["why"] == "takes about 1024 GiB, and the card has 1"
    assert found["new"]["why"] == "needs compute capability 99.0 of an NVIDIA card"
    assert found["good"]["found"] == 7 and found["good"]["why"] is None
    assert told["card"] == card.name and told["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    (table,) = (file.read_text() for file in (tmp_path / "new").glob("*.md"))
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + len(parts) and all(line.count("|") == 5 for line in lines)
    assert found["good"]["date"][:10] in table and sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "a-card-with-a-bar.json", "a-card-with-a-bar.md",
    ]  # fmt: skip
    assert gpu.run_all([part(gpu, "good", "print(8)")], card, tmp_path / "new") == 0  # the others' results are kept
    again = json.loads((tmp_path / "new" / "a-card-with-a-bar.json").read_text())["parts"]
    assert (
        [row["part"] for row in again] == list(found) and again[-1]["found"] == 8 and again[:-1] == told["parts"][:-1]
    )


def test_what_only_cannot_run_is_no_failure_and_the_time_of_all_is_kept(gpu: Any, tmp_path: Path) -> None:
    parts = [part(gpu, "good", "print(7)"), part(gpu, "module", "print(1)", needs=("no_such_module",))]
    assert gpu.run_all(parts, gpu.Card("card", 0, (0, 0)), tmp_path) == 0
    assert gpu.run_all(parts, gpu.Card("card", 0, (0, 0)), tmp_path, budget=0.0) == 0
    told = json.loads((tmp_path / "card.json").read_text())
    assert told["parts"][0]["why"] == "the time of all parts was over"


def test_tests_are_counted_and_named(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such GPU')\ndef test_c(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-c", os.devnull,
               f"--junitxml={gpu.RESULT}", str(tmp_path))  # fmt: skip
    told = gpu.run(gpu.Part("tests", command, gpu.junit, 60), gpu.Card("card", 0, (0, 0)), 60.0)
    assert told["status"] == "failed" and told["found"]["passed"] == 1
    assert [one["test"] for one in told["found"]["failed"]] == ["test_x::test_b"]
    assert told["found"]["skipped"] == {"test_x::test_c": "no such GPU"}
    assert told["cases"][0] == ("all", "1 passed, 1 failed, 1 skipped")


SMALL = {
    "step time": ["--rounds", "1", "--interval", "1", "--batch-size", "1", "--seq-len", "8", "--forms", "decoupled"],
    "projection": ["--rounds", "1", "--entries", "4096"],
    "memory, 45M, Elsa": ["--one", "4M", "Elsa", "--steps", "2", "--seq-len", "8"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu itself runs them here")
@pytest.mark.parametrize("name", SMALL)
def test_commands_are_understood_and_what_they_write_is_read(
    name: str, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (chosen,) = (part for part in gpu.parts() if part.name == name)
    result = tmp_path / "result"
    arguments = [word.replace(gpu.RESULT, str(result)) for word in chosen.command[2:]]
    monkeypatch.setattr(sys, "argv", [chosen.command[1], *arguments, *SMALL[name]])
    script(chosen.command[1].removeprefix("benchmarks/")).main()
    found, cases = chosen.read(result, capsys.readouterr().out)
    assert found and cases and all(case and what for case, what in cases)


def test_tests_that_want_a_gpu_are_found(gpu: Any) -> None:
    (tests,) = (part for part in gpu.parts() if part.name == "tests")
    names = {Path(word).name for word in tests.command if word.endswith(".py")}
    assert {"test_semi_structured.py", "test_gpu.py", "test_devices.py"} <= names


def test_the_time_of_all_is_below_ten_minutes(gpu: Any) -> None:
    assert gpu.BUDGET < 600 and len({part.name for part in gpu.parts()}) == len(gpu.parts())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"ARGS=--folder {tmp_path / 'results'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no CUDA device is seen by torch" in done.stderr.splitlines()[0]
    assert not (tmp_path / "results").exists() and done.stdout == ""
