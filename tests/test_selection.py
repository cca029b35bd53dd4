"""What is constrained in each family of models, and what is said about the rest."""

import re
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from elsa_lightning.selection import count_zeros, select

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}
MOE = {**LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, tuple[Any, dict[str, Any], int]] = {  # the last is the Linear or Conv1D layers of a block
    "llama": (tf.LlamaConfig, LLAMA, 7),
    "opt": (tf.OPTConfig, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 6),
    "gpt2": (tf.GPT2Config, {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}, 4),
    "gemma": (tf.GemmaConfig, {**LLAMA, "head_dim": 8}, 7),
    "qwen3": (tf.Qwen3Config, {**LLAMA, "head_dim": 8}, 7),
}


def build(config: Any, options: dict[str, Any], **more: Any) -> nn.Module:
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config(**{**options, **more}))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matrix_and_neither_head_nor_embedding(family: str, tied: bool) -> None:
    config, options, per_block = FAMILIES[family]
    model = build(config, options, tie_word_embeddings=tied)
    selection = select(model)
    assert len(selection.parameters) == 2 * per_block
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}  # type: ignore[operator]
    assert len(outside) == (1 if tied else 2)
    assert not outside & {id(p) for p in selection.parameters.values()}
    assert all(p.dim() == 2 for p in selection.parameters.values())
    unique = {id(p): p.numel() for p in model.parameters()}
    assert selection.total == sum(unique.values())
    assert selection.constrained == sum(unique[id(p)] for p in selection.parameters.values())
    assert f"{selection.constrained / selection.total:.1%}" in selection.summary()
    assert selection.warning() is None


@pytest.mark.parametrize("config", [tf.Qwen3MoeConfig, tf.MixtralConfig])
def test_fused_experts_are_left_out_loudly_until_named(config: Any) -> None:
    model = build(config, MOE)
    selection = select(model)
    warning = selection.warning()
    assert warning is not None and "LOW COVERAGE" in warning and "experts" in warning
    named = select(model, ["all-linear", "experts"])
    assert named.warning() is None
    assert named.constrained > 2 * selection.constrained
    assert {p.dim() for name, p in named.parameters.items() if "experts" in name} == {3}
    assert select(model, ignore=["expert"]).warning() is None, "said to be dense, they are no surprise"


def test_without_hugging_face_a_layer_of_the_vocabularys_size_is_the_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.decoder = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50)

    assert list(select(Model()).parameters) == ["body.weight"]
    assert list(select(nn.Linear(3, 2)).parameters) == ["weight"]


class Decoder(nn.Module):
    """As nanoGPT's, with as many positions as the blocks are wide."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(32, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)) for _ in range(blocks))
        self.head = nn.Linear(32, 50)


def test_a_hidden_layer_of_the_shape_of_an_embedding_is_no_head() -> None:
    selection = select(Decoder(2))
    assert len(selection.parameters) == 4 and selection.head == "head"
    assert "taken for the head by its shape: head" in selection.summary()


def test_frozen_weights_stay_dense_and_are_told() -> None:
    model = Decoder(4)
    model.blocks[:3].requires_grad_(False)
    selection = select(model)
    assert list(selection.parameters) == ["blocks.3.0.weight", "blocks.3.1.weight"]
    warning = selection.warning()
    assert warning is not None and "Frozen ones (requires_grad False) are never constrained" in warning
    assert select(model, ignore=[r"blocks\.[0-2]"]).warning() is None
    with pytest.raises(ValueError, match="frozen parameters"):
        select(model.requires_grad_(False))


def test_convolutions_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 4, groups=8), nn.Linear(8, 8))
    assert list(select(model).parameters) == ["1.weight"]
    with pytest.raises(ValueError, match=r"targets select '0.weight', a convolution's kernels"):
        select(model, [r"weight$"])


def test_a_weight_that_is_registered_elsewhere_first_is_found() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(8, 8)
            self.first = nn.ParameterList([layer.weight])
            self.layer = layer

    assert list(select(Shared()).parameters) == ["first.0"]


def test_the_suggested_targets_cover_what_was_left_out() -> None:
    model = build(tf.Qwen3MoeConfig, MOE)
    warning = select(model).warning()
    assert warning is not None
    targets = re.findall(r"'(.+?)'", warning.split("targets=")[1].split("], or")[0])
    assert len(targets) == 3 and "\\\\" not in warning
    assert select(model, targets).warning() is None


def test_patterns_add_restrict_and_ignore() -> None:
    model = build(*FAMILIES["llama"][:2])
    assert len(select(model, [r"mlp\..*weight"]).parameters) == 6
    assert len(select(model, ignore=["down_proj"]).parameters) == 12
    assert len(select(model, ["all-linear", "embed_tokens"]).parameters) == 15


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["mpl"], [], "targets: 'mpl' matches no parameter of the model; names look like model.embed"),
        (["all-linear"], ["lm_heed"], "ignore: 'lm_heed' matches no parameter"),
        (["(["], [], r"targets: '\(\[' is no regular expression"),
        (["norm"], [], "which is no matrix"),
        (["all-linear"], ["proj"], "nothing to constrain"),
    ],
)
def test_a_bad_pattern_is_named(targets: list[str], ignore: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(build(*FAMILIES["llama"][:2]), targets, ignore)


def test_zeros_are_counted_over_the_constrained_weights() -> None:
    model = build(*FAMILIES["llama"][:2])
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # type: ignore[operator]
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[:, :4] = 0
    assert count_zeros(model) == (24 * 4, select(model).constrained)
