"""The quality benchmark's own parts, where they could be wrong without anybody noticing."""

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from elsa_lightning import ADMM, CalibrationData, CausalLM, Unstructured
from elsa_lightning.selection import count_zeros, select

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))

import peers
import run


class Stack(nn.Module):
    """Two blocks of one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stack() -> tuple[nn.Module, list[Tensor]]:
    """Inputs that are correlated and of unequal size, so that what is done about it shows."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator) * torch.logspace(-1, 1, 48)
    return Stack(), [torch.randn(32, 48, generator=generator) @ mixing for _ in range(8)]


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
@pytest.mark.parametrize("name", run.ONE_SHOT)
def test_one_shot_methods_give_the_sparsity_asked_for(name: str, sparsity: float) -> None:
    model, inputs = stack()
    run.ONE_SHOT[name](model, sparsity, inputs)
    for p in select(model).parameters.values():
        assert int((p == 0).sum()) == sparsity * p.numel()
        if name == "wanda":
            assert ((p == 0).sum(dim=1) == sparsity * 48).all()


@pytest.mark.parametrize("step", [1, 8, 152, 153])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_gradual_pruning_ranks_by_the_same_second_moment_as_elsa(step: int, scale: float) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 10))
    optimizer = torch.optim.Adam([p], lr=1e-3)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=1000)
    p.grad = scale * torch.randn(6, 10)
    optimizer.step()
    admm.step = step
    tensors = list(admm.tensors.values())
    with admm._steadied(tensors):
        ours = tensors[0].importance(slice(0, 6))
    torch.testing.assert_close(peers.held(optimizer.state[p]["exp_avg_sq"], step), ours)


def test_sparsegpt_changes_a_layers_output_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    dense, inputs = stack()
    x = torch.cat(inputs)
    wanted = dense.blocks[0](x).detach()  # type: ignore[index, operator]
    errors = {}
    for name, method in run.ONE_SHOT.items():
        model = copy.deepcopy(dense)
        method(model, 0.5, inputs)
        errors[name] = float((model.blocks[0](x) - wanted).detach().square().mean())  # type: ignore[index, operator]
    assert errors["sparsegpt"] < 0.8 * errors["wanda"] < 0.8 * errors["magnitude"]


def test_transposed_layers_are_pruned_as_their_linear_twins() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, inputs = stack()
    twin = copy.deepcopy(linear)
    for block in twin.blocks:  # type: ignore[union-attr]
        conv = Conv1D(48, 48)
        conv.weight.data, conv.bias.data = block[0].weight.data.T.clone(), block[0].bias.data.clone()
        block[0] = conv
    for method in (peers.wanda, peers.sparsegpt):
        model, other = copy.deepcopy(linear), copy.deepcopy(twin)
        method(model, 0.5, inputs)
        method(other, 0.5, inputs)
        for a, b in zip(select(model).parameters.values(), select(other).parameters.values(), strict=True):
            torch.testing.assert_close(a, b.T)


@pytest.mark.parametrize("kind", ["gradual", "gradual-global", "masked"])
def test_trained_peers_end_with_exactly_the_zeros_asked_for(
    kind: str, tiny_llama: str, text_file: Path, token_cache: str
) -> None:
    data = CalibrationData(str(text_file), tokenizer=tiny_llama, seq_len=32, batch_size=2, cache_dir=token_cache)
    module = CausalLM(tiny_llama, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    module.configure_model()
    if kind == "masked":
        peers.magnitude(module, 0.8, [])
        callback = peers.MaskedFineTuning()
    else:
        callback = peers.GradualPruning(0.8, "tensor" if kind == "gradual" else "model")  # type: ignore[assignment]
    before = {name: p.detach().clone() for name, p in select(module).parameters.items()}
    Trainer(max_steps=12, limit_val_batches=0, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, accelerator="cpu").fit(module, data)  # fmt: skip
    zeros, weights = count_zeros(module)
    assert zeros == (
        round(0.8 * weights) if kind == "gradual-global" else sum(round(0.8 * p.numel()) for p in before.values())
    )
    for name, p in select(module).parameters.items():
        assert not torch.equal(p, before[name])
        if kind == "masked":
            assert torch.equal(p == 0, before[name] == 0)


def test_a_second_run_of_the_benchmark_runs_nothing(
    tiny_llama: str,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results.jsonl"
    command = [
        "run.py", "--models", tiny_llama, "--text", str(text_file), "--methods", "magnitude", "elsa",
        "--sparsities", "0.5", "--seeds", "2", "--steps", "2", "--seq-len", "32", "--batch-size", "2",
        "--eval-segments", "4", "--results", str(results), "--cache", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(run, "plot", lambda *_: None)  # matplotlib is not among what the tests need
    run.main()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    tried = [row["lr"] for row in rows if row["split"] == "validation"]
    assert [(row["method"], row["split"]) for row in rows] == [
        ("dense", "test"), ("magnitude", "test"), *len(tried) * [("elsa", "validation")], *2 * [("elsa", "test")]
    ]  # fmt: skip
    assert tried[: len(run.RATES[0.6])] == list(run.RATES[0.6])
    assert len(tried) == len(set(tried)) <= len(run.RATES[0.6]) + run.BEYOND
    best = min((row for row in rows if row["split"] == "validation"), key=lambda row: row["perplexity"])
    assert {row["lr"] for row in rows if row["method"] == "elsa" and row["split"] == "test"} == {best["lr"]}
    first = capsys.readouterr().out
    run.main()
    assert len(results.read_text().splitlines()) == len(rows)
    again = capsys.readouterr().out
    assert first.endswith(again) and "| elsa | " in again


@pytest.mark.parametrize("method", run.SETTINGS)
def test_a_method_with_a_setting_has_it_tried_too(method: str) -> None:
    arena = run.Arena(argparse.Namespace(results=Path("none"), trial_steps=None, trial_distillation=None, lr=None))
    case = run.Case("m", method, 0.9, 0, 100, 128, 8, 0.0, 0.0, None, "test")
    settings = run.SETTINGS[method][1]
    tried = []

    def result(trial: run.Case) -> dict[str, float]:
        tried.append((trial.lr, trial.setting))
        assert trial.setting is not None and trial.split == "validation"
        return {"perplexity": abs(trial.lr - 2e-3) + abs(trial.setting - settings[-1])}

    arena.result = result  # type: ignore[method-assign]
    chosen = arena.tuned(case)
    assert (chosen.lr, chosen.setting, chosen.split) == (2e-3, settings[-1], "test")
    assert len(set(tried)) == 2 * len(run.RATES[0.9]) + len(settings) - 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_small_dense_peer_has_as_many_parameters_as_a_pruned_model_has_weights(
    kind: str, sparsity: float, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    heads = {"llama": {"num_attention_heads": 4, "num_key_value_heads": 2}, "gpt2": {"n_head": 4}}[kind]
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, **heads}
    config: Any = LlamaConfig(**sizes, intermediate_size=160) if kind == "llama" else GPT2Config(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pruned = CausalLM(str(tmp_path))
    pruned.configure_model()
    peers.magnitude(pruned, sparsity, [])
    small = peers.SmallDense(str(tmp_path), sparsity, distillation=0.5)
    small.configure_model()
    left = sum(int((p != 0).sum()) for p in select(pruned).parameters.values())
    left += peers.parameters(pruned) - sum(p.numel() for p in select(pruned).parameters.values())
    assert 0.98 * left <= peers.parameters(small) <= left
    small.on_fit_start()  # its teacher is the wide one
    loss = small.training_step(torch.randint(1, 300, (2, 8)), 0)
    loss.backward()
    assert bool(loss.isfinite()) and all(p.grad is not None for p in small.parameters())
    assert small._distillation is not None and peers.parameters(small._distillation.teacher) == peers.parameters(pruned)


def test_a_library_in_another_python_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--methods", "wanda-llmc"])
    with pytest.raises(SystemExit):
        run.main()
    assert "need --llm-compressor PYTHON" in capsys.readouterr().err


def test_lines_that_are_older_than_a_setting_have_its_default(tmp_path: Path) -> None:
    case = run.Case("m", "elsa", 0.9, 0, 100, 128, 8, 0.0, 1e-3, None, "test")
    old = {key: value for key, value in vars(case).items() if key not in ("features", "interval")}
    (tmp_path / "lines.jsonl").write_text(json.dumps({**old, "perplexity": 1.0}) + "\n")
    results = run.Results(tmp_path / "lines.jsonl")
    assert results.of(case, lambda: pytest.fail("runs again"))["perplexity"] == 1.0
    assert results.of(replace(case, features=1.0), lambda: {"perplexity": 2.0})["perplexity"] == 2.0


def test_the_table_of_trials_is_of_trained_methods_alone() -> None:
    case = run.Case("m", "elsa", 0.9, 1000, 10, 8, 2, 0.0, 0.001, None, "validation")
    rows = [
        {**vars(case), "perplexity": 3.0},
        {**vars(replace(case, lr=0.002)), "perplexity": 2.0},
        {**vars(replace(case, method="dense", sparsity=0.0, steps=0, lr=0.0)), "perplexity": 1.0},
    ]
    assert run.trials(rows, ["m"]).splitlines()[2:] == ["| m | 10, 0 | 90% | elsa | 3.00 | **2.00** |"]
