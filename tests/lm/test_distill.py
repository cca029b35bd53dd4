"""CausalLM beside its dense original: the same loss by chunks and whole, in every family, with padding and features."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from elsa_lightning import CausalLM
from elsa_lightning.lm.distill import Distillation
from tests.callbacks.tiny import make_trainer

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[PreTrainedConfig, bool]] = {  # and whether its logits are its head's alone
    "llama": (LlamaConfig(**SIZES), True),
    "gpt2": (GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64), True),
    "opt": (OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=True), True),
    "capped": (Gemma2Config(**SIZES, query_pre_attn_scalar=16, final_logit_softcapping=30.0), False),
    "scaled": (GraniteConfig(**SIZES, logits_scaling=4.0), False),
    "mixture": (MixtralConfig(**SIZES, **EXPERTS), True),
    "balanced": (MixtralConfig(**SIZES, **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.1), False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bool]:
    """A folder of a random model without dropout."""
    config, chunked = FAMILIES[request.param]
    for name in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("families") / request.param
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder), chunked


def begun(name: str, **options: Any) -> CausalLM:
    """Return a module that has its teacher, and has moved away from it."""
    module = CausalLM(name, **options)
    module.configure_model()
    module.on_fit_start()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=numbers))
    return module


def batch(padded: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1:, 12 - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step(module: CausalLM, of: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    loss = module.training_step(of, 0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def expected(module: CausalLM, of: dict[str, Tensor]) -> Tensor:
    """Return the loss by its definition, of whole logits."""
    assert module.model is not None and module._distillation is not None
    output, labels = module(of)
    with torch.no_grad():
        wanted = module._distillation.teacher(**of, output_hidden_states=True, use_cache=False)
    kept = labels[:, 1:] != -100
    soft = F.cross_entropy(output.logits[:, :-1][kept], wanted.logits[:, :-1][kept].float().softmax(-1))
    hard = F.cross_entropy(output.logits[:, :-1][kept], labels[:, 1:][kept])
    loss: Tensor = output.loss + module.distillation * (soft - hard)  # what a model adds to its loss stays whole
    hidden = module.model(**of, output_hidden_states=True, use_cache=False).hidden_states[1:]
    seen = of["attention_mask"].bool()
    near = [
        ((s[seen] - t[seen]).square().sum(-1) / t[seen].float().square().sum(-1)).mean()
        for s, t in zip(hidden, wanted.hidden_states[1:], strict=True)
    ]
    return loss + module.feature_distillation * torch.stack(near).mean()


@pytest.mark.parametrize(("distillation", "features"), [(0.3, 0.0), (1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("at_once", [2**25, 5 * 300])
def test_the_loss_is_its_definition_in_every_family_whole_and_in_chunks(
    family: tuple[str, bool], distillation: float, features: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distillation, "logits_at_once", at_once)
    module = begun(family[0], distillation=distillation, feature_distillation=features)
    assert module._distillation is not None and module._distillation.chunked(module.model) == family[1]
    loss, gradients = step(module, batch())
    module.zero_grad()
    wanted = expected(module, batch())
    torch.testing.assert_close(loss, wanted.detach())
    wanted.backward()
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("student", ["scaled", "balanced", "capped"])
def test_a_student_whose_logits_are_more_than_its_heads_is_asked_too(student: str) -> None:
    """Its loss is its own also where the teacher's logits are plain; asking changes neither mode nor random state."""
    teacher, model = (AutoModelForCausalLM.from_config(FAMILIES[name][0]) for name in ("llama", student))
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    of = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"]}
    distillation = Distillation(teacher.eval(), 0.5, 0.0)
    state = torch.get_rng_state()
    assert not distillation.chunked(model)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    found, own = distillation(model, of), model(**of)
    torch.testing.assert_close(found.by_labels, own.loss.detach())
    logits = own.logits[:, :-1].flatten(0, 1)
    soft = F.cross_entropy(logits, teacher(**of).logits[:, :-1].flatten(0, 1).softmax(-1))
    hard = F.cross_entropy(logits, of["labels"][:, 1:].flatten())
    torch.testing.assert_close(found.loss, own.loss + 0.5 * (soft - hard))


def test_padding_counts_nowhere(tiny_llama: str) -> None:
    module = begun(tiny_llama, distillation=1.0, feature_distillation=1.0)
    of = batch()
    of["attention_mask"][:] = 1
    of["attention_mask"][:, 8:] = 0
    torch.testing.assert_close(step(module, of)[0], step(module, of["input_ids"][:, :8])[0])  # type: ignore[arg-type]


def test_checkpointed_and_compiled_models_have_the_same_loss_and_gradients(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distillation, "logits_at_once", 5 * 2048)
    found = {}
    for kind in ("plain", "checkpointed", "compiled"):
        module = begun(
            tiny_llama, distillation=0.5, feature_distillation=1.0, gradient_checkpointing=kind == "checkpointed"
        )
        assert module.model is not None
        if kind == "compiled":
            module.model.compile(backend="eager")
        with torch.no_grad():
            module.eval()
            module(batch())
            module.train()
        found[kind] = [step(module, batch(padded)) for padded in (4, 2)]
    for kind in ("checkpointed", "compiled"):
        for (loss, gradients), (expected_loss, others) in zip(found[kind], found["plain"], strict=True):
            torch.testing.assert_close(loss, expected_loss)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, others[name], msg=name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_in_half_precision(
    precision: Any, tiny_llama: str, token_cache: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elsa_lightning import CalibrationData

    data = CalibrationData(str(text_file), tokenizer=tiny_llama, seq_len=32, batch_size=2, cache_dir=token_cache)
    losses = []
    for at_once in (2**25, 7 * 2048):
        monkeypatch.setattr(Distillation, "logits_at_once", at_once)
        torch.manual_seed(0)
        module = CausalLM(
            tiny_llama, distillation=0.5, feature_distillation=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        trainer = make_trainer(tmp_path, max_steps=3, precision=precision)
        trainer.fit(module, data)
        losses.append(trainer.callback_metrics["train/loss"])
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
