"""docs/story.md runs from top to bottom: prune, export, measure, fine-tune, export again, zeros unchanged."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from elsa_lightning.cli import main

PAGE = Path(__file__).parents[1] / "docs/story.md"


@pytest.mark.filterwarnings("ignore:Elsa:UserWarning")
def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_cache: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", token_cache)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.S)
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "bash", "python"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        else:
            for line in block.splitlines():
                main(shlex.split(line)[1:])
    assert len(names["pruned"]) > 10 and names["tuned"]["exported"] < names["tuned"]["start"]
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"hf", "w8", "cpu", "tuned"}
    assert {path.name for path in (tmp_path / "exports/tuned").iterdir()} == {"hf", "cpu-sparse"}
