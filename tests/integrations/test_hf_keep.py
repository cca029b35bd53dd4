"""KeepMaskTrainerCallback in a real transformers.Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

from transformers import TrainerCallback

from elsa_lightning.integrations.hf_keep import KeepMaskTrainerCallback
from tests.callbacks.tiny import assert_same
from tests.integrations.test_hf_trainer import STEPS, checkpoint, make_model, make_trainer, read


@torch.no_grad()
def sparse_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose attention is 2:4 and whose MLP is 70 % zeros, but for one dense matrix."""
    model = make_model(dtype)
    numbers = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "_proj" in name and "gate" not in name:
            if "self_attn" in name:
                p.view(-1, 4)[:, ::2] = 0
            else:
                p.masked_fill_(torch.rand(p.shape, generator=numbers) < 0.7, 0)
    return model


def masks() -> dict[str, Tensor]:
    return {n: p != 0 for n, p in sparse_model().named_parameters() if "_proj" in n and "gate" not in n}


def assert_zeros_kept(model: Any) -> None:
    found = masks()
    assert len(found) == 12
    for name, mask in found.items():
        p = model.get_parameter(name)
        assert not p[~mask].any() and p[mask].all(), name


def train(folder: Path, *others: TrainerCallback, resume: Path | None = None, dtype: Any = torch.float32,
          **options: Any) -> tuple[Any, KeepMaskTrainerCallback]:  # fmt: skip
    keep = KeepMaskTrainerCallback()
    trainer = make_trainer(folder, *others, keep, model=sparse_model(dtype), **({"max_grad_norm": 0.1} | options))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, keep


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.5},
        {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1},
        {"bf16": True},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "sgd"},
    ],
    ids=str,
)
def test_no_zero_is_lost_in_memory_or_on_disk(options: dict[str, Any], tmp_path: Path) -> None:
    trainer, keep = train(tmp_path, **options)
    assert keep.keep.step == STEPS
    for model in (trainer.model, read(checkpoint(tmp_path)), read(checkpoint(tmp_path, 3))):
        assert_zeros_kept(model)
    kept = keep.keep.kept
    assert len(kept.kept) == 12 and [t.pattern for t in kept.kept].count("2:4") == 8
    assert sorted(t.name for t in kept.left_alone) == [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]
    assert not trainer.model._state_dict_pre_hooks


def test_gradients_are_masked_before_they_are_clipped(tmp_path: Path) -> None:
    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name, mask in masks().items():
                assert not model.get_parameter(name).grad[~mask].any()

    train(tmp_path, Looks())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [1, 5])
def test_a_resumed_run_is_the_run_to_the_bit(at: int, dtype: torch.dtype, tmp_path: Path) -> None:
    train(tmp_path / "whole", dtype=dtype)
    train(tmp_path / "again", dtype=dtype, resume=checkpoint(tmp_path / "whole", at))
    one, other = (checkpoint(tmp_path / name) for name in ("whole", "again"))
    assert_same(dict(read(one).state_dict()), dict(read(other).state_dict()))
    one_, other_ = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other))
    assert_same(one_, other_)
    states = [json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"] for folder in (one, other)]
    assert states[0]["KeepMaskTrainerCallback"] == states[1]["KeepMaskTrainerCallback"]


def test_the_best_of_all_evaluations_is_loaded(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer, _ = train(tmp_path, metric_for_best_model="loss", **options)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == max(losses, key=lambda step: losses[step])
    assert_zeros_kept(trainer.model)


def test_dense_models_and_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensor has min_sparsity=0\.05 zeros"):
        make_trainer(tmp_path, KeepMaskTrainerCallback()).train()
    with pytest.raises(ValueError, match="min_sparsity must be a fraction"):
        KeepMaskTrainerCallback(min_sparsity=-1)


def test_an_adapter_needs_no_mask(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(sparse_model(), peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"trains an adapter alone, .*merge_and_keep_zeros"):
        make_trainer(tmp_path, KeepMaskTrainerCallback(), model=model).train()
