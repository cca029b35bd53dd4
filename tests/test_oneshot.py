"""One shot: a model brought into a set without training, by a call and by a fit of no steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from elsa_lightning import NM, Block, ByPattern, ElsaCallback, Quantized, Unstructured, project
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from tests.callbacks.tiny import Net, every_step, fit, loader, make_trainer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Conv1D(8, 32), nn.Conv2d(4, 6, 2))


def test_each_tensor_gets_what_the_set_says_by_magnitude() -> None:
    one, dense = model(), model()
    shares = project(one, Unstructured(0.75, "tensor"))
    assert shares == dict.fromkeys(["0.weight", "2.weight", "3.weight"], 0.75)
    for index in (0, 2, 3):
        x, before = one[index].weight, dense[index].weight
        kept = x != 0
        assert torch.equal(x[kept], before[kept])
        assert float(before[~kept].abs().max()) <= float(before[kept].abs().min())
    assert torch.equal(one[0].bias, dense[0].bias)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_importance_decides_instead(memory: torch.memory_format) -> None:
    one = model()
    one[3].to(memory_format=memory)
    keep = {name: torch.rand(p.shape) < 0.25 for name, p in one.named_parameters() if p.dim() > 1}
    dense = {name: p.detach().clone() for name, p in one.named_parameters()}
    shares = project(one, Unstructured(0.5, "tensor"), importance={name: mask.float() for name, mask in keep.items()})
    for name, share in shares.items():
        x, want = one.get_parameter(name), keep[name]
        assert share == 0.5
        assert torch.equal(x[want], dense[name][want])  # few enough that all of them fit


def test_patterns_targets_and_what_is_ignored() -> None:
    one, dense = model(), model()
    shares = project(one, ByPattern({"0": NM(2, 4), "2": Quantized(4, 8)}), ignore=["3"])
    assert shares.keys() == {"0.weight", "2.weight"} and shares["0.weight"] == 0.5
    assert torch.equal(one[3].weight, dense[3].weight)
    grid = one[2].weight.detach().T.reshape(8, 4, 8)
    levels = (grid / grid.abs().amax(-1, keepdim=True) * 7).unique()
    assert len(levels) > 7 and float((one[2].weight - dense[2].weight).abs().max()) > 0


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({}, "nothing for '0.weight'"),
        ({"0.weight": torch.ones(3)}, r"shape \(3,\)"),
        ({"0.weight": -torch.ones(32, 16)}, "negative or not finite"),
        ({"0.weight": torch.full((32, 16), torch.nan)}, "negative or not finite"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused_before_anything_changes(importance: Any, message: str) -> None:
    one, dense = model(), model()
    with pytest.raises(UserError, match=message):
        project(one, Unstructured(0.5), importance=importance)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), dense.parameters(), strict=True))


def test_a_fit_of_no_steps_prunes_anybodys_module(tmp_path: Path) -> None:
    callback = ElsaCallback(constraint=Block(0.75, 4, 4))
    net = Net()
    make_trainer(tmp_path, callback, max_steps=0).fit(net, loader())
    for layer in (net.layers[0], net.layers[3]):
        assert int((layer.weight == 0).sum()) == 0.75 * layer.weight.numel()  # type: ignore[union-attr, operator]


def test_a_fit_of_no_steps_goes_on_with_no_run(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_steps=2)
    with pytest.raises(UserError, match="leave ckpt_path out"):
        fit(tmp_path, resume=tmp_path / "2.ckpt", max_steps=0)


def test_elsa_fit_of_no_steps_measures_and_saves(
    tiny_llama: str,
    text_file: Path,
    token_cache: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    grid = '{"class_path": "elsa_lightning.Quantized", "init_args": {"bits": 4, "group_size": 16, "inside": '
    main([
        "fit", "--config", "configs/elsa.yaml", "--model.name", tiny_llama, "--data.name", str(text_file),
        "--data.cache_dir", token_cache, "--data.seq_len=32", "--data.eval_segments=4", "--trainer.max_steps=0",
        "--elsa.sparsity=null", "--elsa.constraint", grid + '{"class_path": "elsa_lightning.NM", '
        '"init_args": {"n": 2, "m": 4}}}}', f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
    ])  # fmt: skip
    said = "".join(capsys.readouterr()) + caplog.text
    assert "dense" in said and "final" in said and " test --config" in said
    (folder,) = tmp_path.rglob("hf")
    weight = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.down_proj.weight
    assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    codes = weight.detach().view(-1, 16) / weight.detach().view(-1, 16).abs().amax(1, keepdim=True)
    assert len((codes * 7 * 100).round().unique()) < 100  # few levels
