"""Every example of docs/integrations.md runs and prunes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.S | re.M))
NEEDS = {
    "transformers.Trainer": "accelerate", "A sparse model in transformers.Trainer": "accelerate", "TRL": "trl",
    "PEFT": "peft", "accelerate": "accelerate",
}  # fmt: skip


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def test_every_example_has_its_section() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 10


@pytest.mark.parametrize("section", EXAMPLES)
def test_example_runs_and_prunes(
    section: str, tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if section in NEEDS:
        pytest.importorskip(NEEDS[section])
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "your-model")
    pruned = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for name, p in pruned.named_parameters():
            if "proj" in name:
                p.masked_fill_(torch.rand_like(p) < 0.9, 0)
    pruned.save_pretrained(tmp_path / "pruned-model")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    ids = torch.randint(1, 2048, (24, 12))
    names = {
        "model": model,
        "batches": torch.randn(40, 4, 32).unbind(),
        "loss": lambda model, batch: F.mse_loss(model(batch), batch[:, :2]),
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
    }
    if section == "TRL":
        from datasets import Dataset

        names["texts"] = Dataset.from_dict({"text": ["def f(x): return x", "import os", "class A: pass"] * 8})
    exec(compile(EXAMPLES[section], "integrations.md", "exec"), names)
    if "model(input" in EXAMPLES[section]:
        weights = AutoModelForCausalLM.from_pretrained("merged").get_parameter("model.layers.0.mlp.up_proj.weight")
    elif "trainer" in names:
        layers = names["trainer"].model.get_submodule("model.layers")  # type: ignore[attr-defined]
        weights = torch.cat([m.weight.flatten() for m in layers.modules() if type(m) is nn.Linear])
    else:
        weights = torch.cat([layer.weight.flatten() for layer in (model[0], model[2])])
    assert zeros(weights) == pytest.approx(0.9, abs=0.03 if "pruned-model" in EXAMPLES[section] else 0.01)
