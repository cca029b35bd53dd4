"""CausalLM: the true objective, the schedule, the perplexities, and every family of models."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.errors import UserError
from elsa_lightning.layout.precise import evaluating
from elsa_lightning.lm.sharded import fill
from elsa_lightning.selection import select


def trainer(**options: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{**quiet, "enable_model_summary": False, "num_sanity_val_steps": 0, **options})


@pytest.fixture
def data(token_cache: str) -> CalibrationData:
    return CalibrationData(seq_len=32, batch_size=4, eval_segments=12, train_sequences=400, cache_dir=token_cache)


def loaded(name: str, **options: Any) -> CausalLM:
    module = CausalLM(name, **options)
    module.configure_model()
    return module


def test_the_loss_is_the_shifted_cross_entropy(tiny_llama: str) -> None:
    module = loaded(tiny_llama)
    ids = torch.randint(1, 2048, (3, 20), generator=torch.Generator().manual_seed(0))
    output, _ = module(ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    padded, labels = module({"input_ids": ids, "attention_mask": mask})
    kept = F.cross_entropy(padded.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(padded.loss, kept)
    assert (labels[0, 10:] == -100).all() and (labels[1:] != -100).all()


def test_distillation_mixes_the_dense_models_distribution_into_the_target(
    tiny_llama: str, data: CalibrationData
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watched(CausalLM):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                logits = self(batch)[0].logits[:, :-1].flatten(0, 1).log_softmax(-1)
            seen.append((batch, logits, loss.detach()))
            return loss

    module = Watched(tiny_llama, distillation=0.25, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    fit = trainer(max_steps=3, limit_val_batches=0)
    fit.fit(module, data)
    assert module.model is not None and not any("teacher" in name for name, _ in module.named_modules())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.model.parameters())
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    for batch, logits, loss in seen:
        teacher = dense(batch).logits[:, :-1].float().softmax(-1).flatten(0, 1)
        hard = F.one_hot(batch[:, 1:].flatten(), logits.shape[1])
        expected = -((0.75 * hard + 0.25 * teacher) * logits).sum(-1).mean()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": 1.5}, "from 0 to 1, got 1.5"),
        ({"feature_distillation": -1.0}, "a weight of 0 or more, got -1.0"),
        ({"distillation": 0.5, "pretrained": False}, "needs a trained model"),
        ({"feature_distillation": 0.5, "pretrained": False}, "needs a trained model"),
        ({"teacher": "folder"}, "nothing is learnt from teacher='folder': set distillation=1.0"),
    ],
)
def test_distillation_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(**options)


def test_a_sparse_model_learns_from_the_dense_one(tiny_llama: str, data: CalibrationData, tmp_path: Path) -> None:
    sparse = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for p in select(sparse).parameters.values():
        p.data[:, ::2] = 0
    sparse.save_pretrained(tmp_path / "sparse")
    seen = []

    class Watched(CausalLM):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                seen.append((batch, self(batch)[0].logits[:, :-1].log_softmax(-1), loss.detach()))
            return loss

    module = Watched(str(tmp_path / "sparse"), distillation=1.0, teacher=tiny_llama)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learns from this start")
        trainer(max_steps=2, callbacks=[ElsaCallback(0.75)]).fit(module, data)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    for batch, logits, loss in seen:
        wanted = dense(batch).logits[:, :-1].float().softmax(-1)
        torch.testing.assert_close(loss, -(wanted * logits).sum(-1).mean())


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"vocab_size": 99}, {}, "vocab_size is 2048 of .* and 99 of teacher .* the same tokenizer"),
        (
            {"num_hidden_layers": 3},
            {"feature_distillation": 1.0},
            "num_hidden_layers is 2 of .* feature_distillation=0",
        ),
        (None, {}, "is a path that does not exist"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_it_is_loaded(
    sizes: dict[str, int] | None, options: dict[str, Any], message: str, tiny_llama: str,
    data: CalibrationData, tmp_path: Path,
) -> None:  # fmt: skip
    teacher = tmp_path / "teacher"
    if sizes is not None:
        config = AutoConfig.from_pretrained(tiny_llama)
        config.update(sizes)
        config.save_pretrained(teacher)  # there are no weights
    module = CausalLM(tiny_llama, distillation=1.0, teacher=str(teacher), **options)
    module.setup("test")  # only training needs it
    with pytest.raises(UserError, match=message):
        trainer(max_steps=1).fit(module, data)


def test_checkpointed_gradients_are_the_gradients(tiny_llama: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = loaded(tiny_llama, gradient_checkpointing=checkpointing)
        ids = torch.randint(1, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
        module(ids)[0].loss.backward()
        assert module.model is not None and module.model.is_gradient_checkpointing == checkpointing
        gradients.append([p.grad for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 0.75, 0.5, 0.25]), ("constant", [0.5, 1.0, 1.0, 1.0, 1.0])],
)
def test_the_learning_rate_warms_up_and_decays_over_the_whole_run(
    schedule: Any, expected: list[float], tiny_llama: str, data: CalibrationData
) -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module = CausalLM(
        tiny_llama, optimizer=lambda params: Recording(params, lr=1.0), lr_schedule=schedule, warmup_steps=2
    )
    trainer(max_steps=6, limit_val_batches=0).fit(module, data)
    assert rates[1:] == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_dense_perplexity_is_that_of_the_untouched_model(
    precision: Any, tiny_llama: str, data: CalibrationData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed_everything(0, verbose=False)
    untouched = trainer(precision=precision).validate(CausalLM(tiny_llama), data, verbose=False)[0]["val/perplexity"]
    module = CausalLM(tiny_llama)
    run = trainer(max_steps=3, precision=precision, callbacks=[])
    with caplog.at_level("INFO"):
        run.fit(module, data)
    assert module.dense_perplexity == pytest.approx(untouched, rel=1e-6)
    assert module.final_perplexity is not None and module.final_perplexity != module.dense_perplexity
    for words in ("pydocs validation, 12 segments of 32 tokens", precision, f"{untouched:.3f}", "dense →"):
        assert words in caplog.text
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.dense_perplexity == module.dense_perplexity and again.name == tiny_llama
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.float(), other.float())


def closing_table(run: Trainer, module: CausalLM, data: CalibrationData, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level("INFO"):
        run.fit(module, data)
    (table,) = [r.getMessage() for r in caplog.records if "perplexity on" in r.getMessage()]
    return table


@pytest.mark.parametrize("targets", [["mlp.up_proj"], ["embed_tokens"], ["all-linear"]])
def test_the_closing_table_counts_what_the_run_constrained(
    targets: list[str], tiny_llama: str, data: CalibrationData, caplog: pytest.LogCaptureFixture
) -> None:
    module, elsa = CausalLM(tiny_llama), ElsaCallback(sparsity=0.75, targets=targets)
    table = closing_table(trainer(max_steps=6, callbacks=[elsa]), module, data, caplog)
    assert elsa.admm is not None
    weights, all_ = (
        sum(p.numel() for p in ps) for ps in ([t.p for t in elsa.admm.tensors.values()], module.parameters())
    )
    zeros = sum(int((p == 0).sum()) for p in module.parameters())
    assert f"({weights:,} constrained weights of {all_:,} parameters)" in table
    (final,) = [line.split() for line in table.splitlines() if line.startswith("  final")]
    assert final[:5] == ["final", "75.00", "%", f"{zeros / all_:.2%}"[:-1], "%"]


def test_a_start_that_is_sparse_and_distilled_from_is_called_so(
    tiny_llama: str, data: CalibrationData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name, p in model.named_parameters():
        if "proj" in name:
            p.data[:, ::2] = 0
    model.save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path), distillation=0.5)
    module_of_data = CalibrationData(
        tokenizer=tiny_llama, seq_len=32, batch_size=4, eval_segments=12, train_sequences=400,
        cache_dir=str(data.cache_dir),
    )  # fmt: skip
    run = trainer(max_steps=6, callbacks=[ElsaCallback(sparsity=0.75)])
    with pytest.warns(UserWarning, match=r"50\.00 % of the constrained weights are zero before the first step"):
        table = closing_table(run, module, module_of_data, caplog)
    assert table.splitlines()[2].split()[:3] == ["start", "50.00", "%"] and "learnt from that start" in table
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again._start == module._start


def test_the_closing_table_says_when_only_some_batches_were_measured(
    tiny_llama: str, data: CalibrationData, caplog: pytest.LogCaptureFixture
) -> None:
    table = closing_table(trainer(max_steps=2, limit_val_batches=2), CausalLM(tiny_llama), data, caplog)
    assert "12 segments of 32 tokens, the first 2 of 3 batches alone (limit_val_batches)" in table.splitlines()[0]


def test_prediction_gives_each_sequence_its_loss(tiny_llama: str, token_cache: str) -> None:
    data = CalibrationData(seq_len=32, batch_size=4, eval_segments=10, cache_dir=token_cache)
    module = CausalLM(tiny_llama)
    predicted = trainer().predict(module, data)
    assert predicted is not None
    losses = torch.cat(predicted)  # type: ignore[arg-type]
    (tested,) = trainer().test(module, data, verbose=False)
    assert losses.shape == (10,)
    assert math.exp(losses.mean()) == pytest.approx(tested["test/perplexity"], rel=1e-6)


def test_random_weights_come_from_the_configuration(tiny_llama: str) -> None:
    pretrained, random = loaded(tiny_llama), loaded(tiny_llama, pretrained=False)
    assert pretrained.model is not None and random.model is not None
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(pretrained.model.get_parameter(name), original.get_parameter(name))
    assert not torch.equal(random.model.get_parameter(name), original.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "./no/such/model"}, FileNotFoundError, "'./no/such/model' is a path that does not exist"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of .* got 'int8'"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be 0 or more"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalLM(**options)


def test_a_model_that_cannot_be_loaded_says_what_can() -> None:
    with pytest.raises(OSError, match=r"model 'facebook/opt-125m' could not be loaded(?s:.)*pydocs-2m"):
        loaded("facebook/opt-125m")


def test_sequences_longer_than_the_model_takes_are_refused(tiny_llama: str, token_cache: str) -> None:
    data = CalibrationData(seq_len=128, eval_segments=4, cache_dir=token_cache)
    with pytest.raises(ValueError, match=r"sequences of 128 tokens, and .* takes at most 64: set --data\.seq_len 64"):
        trainer(max_steps=1).fit(CausalLM(tiny_llama), data)


def test_tensorboard_has_the_dense_perplexity_as_a_line_and_the_final_one_to_compare_runs_by(
    tiny_llama: str, data: CalibrationData, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = CausalLM(tiny_llama)
    trainer(max_steps=6, val_check_interval=2, logger=logger, callbacks=[ElsaCallback(sparsity=0.5)]).fit(module, data)
    events = EventAccumulator(str(logger.log_dir)).Reload()
    line = [(event.step, event.value) for event in events.Scalars("val/dense_perplexity")]
    assert sorted({step for step, _ in line}) == [0, 2, 4, 6]
    assert [value for _, value in line] == [pytest.approx(module.dense_perplexity, rel=1e-6)] * len(line)
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(module.final_perplexity, rel=1e-6)
    layout = events.summary_metadata["custom_scalars__config__"].plugin_data
    assert layout.plugin_name == "custom_scalars"


def test_sharded_models_read_the_buffers_that_were_saved(tiny_llama: str, tmp_path: Path) -> None:
    """Gemma 4's layer_scalar and DeepSeek-V3's e_score_correction_bias are such buffers."""

    def built(scale: float) -> Any:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
        model.model.layers[0].register_buffer("scale", torch.tensor([scale]))
        model.model.layers[0].register_buffer("passing", torch.tensor([scale]), persistent=False)
        return model

    saved, filled = built(0.3), built(1.0)
    saved.save_pretrained(tmp_path)
    fill(filled, str(tmp_path), None, lambda: pytest.fail("the files have all weights"))
    for name, t in saved.state_dict().items():
        assert torch.equal(filled.state_dict()[name], t), name
    assert float(filled.model.layers[0].passing) == 1  # is not in the files


def test_computed_buffers_stay_in_float32_and_modes_of_layers_as_they_were(tiny_llama: str) -> None:
    """As in transformers, which loads weights in 16 bits and computes frequencies in float32."""
    module = loaded(tiny_llama).bfloat16()
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert module.model is not None and module.model.dtype == torch.bfloat16
    ours, theirs = dict(module.model.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys() and any(buffer.dtype == torch.float32 for buffer in ours.values())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in ours.items())
    module.train()
    first = next(module.model.children()).eval()  # somebody freezes its dropout
    with pytest.raises(KeyError), evaluating(module):
        assert not any(layer.training for layer in module.modules())
        raise KeyError
    assert module.training and not any(layer.training for layer in first.modules())
