"""The first of several processes exports, the others wait for it, and an error there is an error everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_lightning.export import load_cpu_sparse
from tests.distributed.test_strategies import STRATEGIES, launch
from tests.export.models import IDS

EACH = {"ddp": ["hf", "cpu-sparse", "quantized"], "fsdp1": ["cpu-sparse"], "fsdp2": ["shrunk"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, text_file: Path, token_cache: str) -> Path:
    """Runs on two processes that export, and such as cannot."""
    place = tmp_path_factory.mktemp("exports")
    own = place / "own.txt"
    shutil.copy(text_file, own)
    model = {"model": tiny_llama, "text": str(text_file), "cache": token_cache, "sparsity": 0.8}
    runs: list[dict[str, Any]] = [
        {"name": how, "how": how, "to": to, **model, **({"neurons": 0.5} if "shrunk" in to else {})}
        for how, to in EACH.items()
    ]
    runs += [
        {"name": "no-folder", "how": "fsdp2", "to": ["hf"], "spoilt": str(place / "no-folder"), **model},
        {"name": "no-text", "how": "ddp", "to": ["hf"], "spoilt": str(own), **model, "text": str(own)},
    ]
    status, said = launch(2, place, *runs)
    assert status == 0, said
    return place


@pytest.mark.parametrize("how", STRATEGIES)
def test_every_format_is_written_verified_and_measured(how: str, folder: Path) -> None:
    assert sorted(path.name for path in (folder / how).iterdir()) == sorted(EACH[how])
    for name in EACH[how]:
        perplexity = json.loads((folder / how / name / "elsa.json").read_text())["perplexity"]
        most = 0.05 if name == "quantized" else 1e-3
        assert perplexity["exported"] == pytest.approx(perplexity["sparse"], rel=most)


def test_they_are_the_model_of_the_run(folder: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folder / "ddp/hf")
    pruned = [m.weight for m in dense.model.layers.modules() if isinstance(m, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in pruned) == round(0.8 * sum(w.numel() for w in pruned))
    for how in ("ddp", "fsdp1"):  # which make the same steps
        sparse = load_cpu_sparse(folder / how / "cpu-sparse")
        assert torch.allclose(dense(IDS).logits, sparse(IDS).logits, atol=1e-3)
    assert AutoModelForCausalLM.from_pretrained(folder / "fsdp2/shrunk").config.intermediate_size == 24


@pytest.mark.parametrize(("name", "message"), [("no-folder", "no-folder'"), ("no-text", "hf could not be exported")])
def test_what_the_first_process_cannot_do_ends_all_with_its_reason(name: str, message: str, folder: Path) -> None:
    told = [(folder / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(message in one for one in told)
    assert told[1].startswith("process 0 failed, and with it the run: ") and told[1].endswith(told[0])


def test_the_model_is_kept_where_an_export_fails(folder: Path) -> None:
    kept = AutoModelForCausalLM.from_pretrained(folder / "no-text/hf")
    assert f"the trained model is in {folder / 'no-text/hf'}" in (folder / "no-text-1.txt").read_text()
    assert int((kept.model.layers[0].mlp.up_proj.weight == 0).sum()) > 0
