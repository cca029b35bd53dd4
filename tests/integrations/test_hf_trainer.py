"""ElsaTrainerCallback in a real transformers.Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from elsa_lightning.integrations.hf_trainer import ElsaTrainerCallback
from elsa_lightning.sets import Quantized, Unstructured
from tests.callbacks.tiny import assert_same

STEPS = 16


def make_model(dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def data(length: int = 64) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (length, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": STEPS,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1, "seed": 3,
    }  # fmt: skip
    args = TrainingArguments(**(quiet | options))
    return Trainer(model or make_model(), args, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks))


def elsa(**options: Any) -> ElsaTrainerCallback:
    return ElsaTrainerCallback(**({"sparsity": 0.9, "interval": 3} | options))


def checkpoint(folder: Path, step: int = STEPS) -> Path:
    return folder / f"checkpoint-{step}"


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in all matrices of the blocks, to two digits."""
    found = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    assert len(found) == 14
    return round(sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found), 2)


def read(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)  # type: ignore[no-any-return]


class At(TrainerCallback):
    """Sets something at the end of a step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.what, True)


def test_the_last_checkpoint_and_the_saved_model_have_the_zeros(tmp_path: Path) -> None:
    callback = elsa()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert callback.admm is not None and callback.admm.finished and callback.admm.step == STEPS
    for model in (trainer.model, read(checkpoint(tmp_path)), read(tmp_path / "saved")):
        assert sparsity(model) == 0.9
    assert read(tmp_path / "saved").get_output_embeddings().weight.count_nonzero() > 0.9 * 64 * 32
    assert not trainer.model._state_dict_pre_hooks


def test_the_schedule_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = elsa()
    make_trainer(tmp_path, callback, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=2).train()
    assert callback.admm is not None
    assert callback.admm.total_steps == callback.admm.step == 2 * 64 // (2 * 4)
    assert callback.admm.finished


@pytest.mark.parametrize("at", [5, 13], ids=["mask-moves", "mask-fixed"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adafactor"}], ids=str)
def test_a_resumed_run_is_the_run_to_the_bit(options: dict[str, Any], at: int, tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", elsa(), **options).train()
    again = make_trainer(tmp_path / "again", elsa(), **options)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path / "whole", at)))
    one, other = (checkpoint(tmp_path / name) for name in ("whole", "again"))
    assert_same(dict(read(one).state_dict()), dict(read(other).state_dict()))
    one_, other_ = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other))
    assert_same(one_, other_)
    states = [json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"] for folder in (one, other)]
    assert states[0]["ElsaTrainerCallback"] == states[1]["ElsaTrainerCallback"]
    assert sparsity(again.model) == 0.9


def test_callbacks_made_anew_by_the_trainer_go_on_too(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", elsa()).train()
    again = make_trainer(tmp_path / "again", elsa(), restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path / "whole", 5)))
    one, other = (dict(read(checkpoint(tmp_path / name)).state_dict()) for name in ("whole", "again"))
    assert_same(one, other)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint makes callbacks anew"):
        make_trainer(
            tmp_path, elsa(sparsity=None, constraint=Unstructured(0.9)), restore_callback_states_from_checkpoint=True
        )


def test_bfloat16_weights_go_on_to_the_bit_or_are_refused_before_training(tmp_path: Path) -> None:
    def run(folder: str, state_dtype: Any = "bfloat16", resume: Path | None = None) -> None:
        trainer = make_trainer(tmp_path / folder, elsa(state_dtype=state_dtype), model=make_model(torch.bfloat16))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))

    with pytest.raises(ValueError, match=r"is bfloat16, to which the Trainer would round the float32 state"):
        run("refused", "float32")
    run("whole")
    run("again", resume=checkpoint(tmp_path / "whole", 5))
    one, other = (dict(read(checkpoint(tmp_path / name)).state_dict()) for name in ("whole", "again"))
    assert_same(one, other)


def test_settings_that_changed_are_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path, elsa(), max_steps=3).train()
    with pytest.raises(ValueError, match=r"other settings \(constraint"):
        make_trainer(tmp_path, elsa(sparsity=0.8)).train(resume_from_checkpoint=str(checkpoint(tmp_path, 3)))


def test_a_dense_run_can_be_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, max_steps=4).train()
    callback = elsa()
    trainer = make_trainer(tmp_path, callback)
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 4)))
    assert "so pruning begins here and has the remaining 12 optimizer steps" in caplog.text
    assert callback.admm is not None and callback.admm.step == 12 and sparsity(trainer.model) == 0.9


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    callback = elsa()
    trainer = make_trainer(tmp_path, callback)
    for _ in range(2):
        trainer.train()
        assert callback.admm is not None and callback.admm.step == STEPS and sparsity(trainer.model) == 0.9


def test_figures_are_in_the_trainers_logs_and_reach_those_who_write_them(tmp_path: Path) -> None:
    class Writer(TrainerCallback):
        def __init__(self) -> None:
            self.seen: set[str] = set()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen |= set(logs)

    writer = Writer()
    trainer = make_trainer(tmp_path, writer, elsa())
    trainer.train()
    names = {"elsa/sparsity", "elsa/primal_residual", "elsa/mask_flips", "elsa/penalty", "elsa/stationarity"}
    assert names <= writer.seen
    logged = json.loads((checkpoint(tmp_path) / "trainer_state.json").read_text())["log_history"]
    course = [entry["elsa/sparsity"] for entry in logged if "elsa/sparsity" in entry]
    assert course == sorted(course) and course[-1] == pytest.approx(0.9, abs=0.01) and len(course) >= 4


def test_the_best_model_is_a_sparse_one(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    callback = elsa(sparsity=None, constraint=Unstructured(0.9, scope="tensor"))
    trainer = make_trainer(tmp_path, callback, metric_for_best_model="loss", greater_is_better=True, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    fixed = 16 - int(0.4 * 16)
    best = max((step for step in losses if step >= fixed), key=lambda step: losses[step])
    assert max(losses, key=lambda step: losses[step]) < fixed, "else this shows nothing"
    assert trainer.state.best_global_step == best
    assert Path(trainer.state.best_model_checkpoint or "") == checkpoint(tmp_path, best)
    assert sparsity(trainer.model) == 0.9
    assert_same(dict(trainer.model.state_dict()), dict(read(checkpoint(tmp_path, best)).state_dict()))


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_model_stays_as_it_was_measured_on_a_grid_too(
    stopped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The scales of the last step are others, and would move its weights to other levels."""

    class Worse(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)  # so that the first one counted is the best

    stop = [EarlyStoppingCallback(4)] if stopped else []  # after an evaluation that nothing is saved after
    trainer = make_trainer(
        tmp_path, elsa(sparsity=None, constraint=Quantized(bits=2, group_size=16)), Worse(), *stop, learning_rate=3e-2,
        eval_strategy="steps", eval_steps=1, save_strategy="best", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = 16 - int(0.4 * 16)
    assert trainer.state.best_global_step == best and trainer.state.global_step == (best + 4 if stopped else STEPS)
    assert_same(dict(trainer.model.state_dict()), dict(read(checkpoint(tmp_path, best)).state_dict()))
    assert "were moved after" not in caplog.text


def test_without_an_evaluation_of_the_sparse_model_none_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 7, "metric_for_best_model": "loss"}
    stop = At(8, "should_training_stop")
    trainer = make_trainer(tmp_path, elsa(), stop, load_best_model_at_end=True, **options)
    trainer.train()
    assert sparsity(trainer.model) == 0.9
    assert "so load_best_model_at_end had none to load" in caplog.text


def test_early_stopping_waits_for_the_sparse_model(tmp_path: Path) -> None:
    callback = elsa()
    trainer = make_trainer(
        tmp_path, callback, EarlyStoppingCallback(1, early_stopping_threshold=100.0), eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert callback.admm is not None and callback.admm.step == 16 - int(0.4 * 16) + 1, "one evaluation after the first"
    assert sparsity(trainer.model) == 0.9


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_is_stopped_has_the_zeros_says_so_and_goes_on(
    before: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: Path, *stop: TrainerCallback, **options: Any) -> Trainer:
        callbacks = (*stop, elsa()) if before else (elsa(), *stop)
        trainer = make_trainer(folder, *callbacks)
        trainer.train(**options)
        return trainer

    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "stopped", At(6, "should_training_stop"))
    assert "Elsa is unfinished: 6 of 16 optimizer steps" in caplog.text
    for model in (stopped.model, read(checkpoint(tmp_path / "stopped", 6))):
        assert sparsity(model) == 0.9
    again = run(tmp_path / "again", resume_from_checkpoint=str(checkpoint(tmp_path / "stopped", 6)))
    assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))


def test_weights_that_are_changed_after_the_last_step_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Averages(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.1)

    trainer = make_trainer(tmp_path, elsa(), Averages(), eval_strategy="steps", eval_steps=STEPS)
    trainer.train()
    assert "and are 0 again" in caplog.text  # said at the next save, or at the end of training
    assert sparsity(trainer.model) == 0.9


def test_a_compiled_model_is_pruned(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        trainer = make_trainer(tmp_path, elsa(), torch_compile=True, torch_compile_backend="eager")
        trainer.train()
    assert sparsity(read(checkpoint(tmp_path))) == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sparsity": None}, "give sparsity"), ({"sparsity": 1.5}, "sparsity"), ({"interval": 0}, "interval must be")],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elsa(**options)


def test_what_shards_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed or the Trainer's FSDP"):
        elsa().on_init_end(args, None, None)  # type: ignore[arg-type]


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="has a PEFT adapter, and the Trainer saves the adapter alone"):
        make_trainer(tmp_path, elsa(), model=model).train()


def test_a_trl_trainer_prunes(tiny_llama: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=6, per_device_train_batch_size=2, max_length=32,
        disable_tqdm=True, save_steps=6, bf16=False, dataset_num_proc=None, gradient_checkpointing=False,
    )  # fmt: skip
    texts = Dataset.from_dict({"text": ["def f(x): return x", "import os", "class A: pass", "x = 1"] * 4})
    trainer = trl.SFTTrainer(tiny_llama, args=args, train_dataset=texts, callbacks=[elsa()])
    trainer.train()
    assert sparsity(read(checkpoint(tmp_path, 6))) == 0.9
