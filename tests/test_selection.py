"""What is constrained in each family of models, and what is said about the rest."""

import ast
import re
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.errors import UserError
from elsa_lightning.selection import Selection, count_zeros, select

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}
MOE = {**LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, tuple[Any, dict[str, Any], int]] = {  # the last is the matrices of a block
    "llama": (tf.LlamaConfig, LLAMA, 7),
    "opt": (tf.OPTConfig, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 6),
    "gpt2": (tf.GPT2Config, {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}, 4),
    "gemma": (tf.GemmaConfig, {**LLAMA, "head_dim": 8}, 7),
    "qwen3": (tf.Qwen3Config, {**LLAMA, "head_dim": 8}, 7),
    "qwen3 moe": (tf.Qwen3MoeConfig, MOE, 6),
    "mixtral": (tf.MixtralConfig, MOE, 6),
    "gpt-oss": (tf.GptOssConfig, {**MOE, "head_dim": 8}, 6),
}
EXPERTS = (tf.Qwen3MoeConfig, tf.MixtralConfig, tf.GptOssConfig)


def build(config: Any, options: dict[str, Any], **more: Any) -> nn.Module:
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config(**{**options, **more}))
    return model


def advised(selection: Selection, argument: str) -> list[str]:
    """Return the patterns of ``targets=`` or ``ignore=`` in a warning, as a user would copy them."""
    warning = selection.warning()
    assert warning is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of \d in a plain string
        found = [ast.literal_eval(text) for text in re.findall(rf"{argument}=(\[.*?'\])", warning)]
    assert found, warning
    return [pattern for patterns in found for pattern in patterns]


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
    fused = {name for name, p in selection.parameters.items() if p.dim() == 3}
    assert len(fused) == (4 if config in EXPERTS else 0) and all("experts" in name for name in fused)
    assert not any("bias" in name or "router" in name for name in selection.parameters)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert selection.total == sum(unique.values())
    assert selection.constrained == sum(unique[id(p)] for p in selection.parameters.values())
    assert f"{selection.constrained / selection.total:.1%}" in selection.summary()
    assert "\n" not in selection.summary() and not selection.heads
    assert selection.warning() is None


class Layers(nn.Module):
    """Every layer of torch that multiplies, once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bag = nn.Embedding(30, 8), nn.EmbeddingBag(20, 8)
        self.linear, self.bilinear = nn.Linear(8, 9), nn.Bilinear(4, 5, 6)
        self.convolutions = nn.ModuleDict(
            {
                "one": nn.Conv1d(8, 6, 3), "two": nn.Conv2d(8, 6, 3), "three": nn.Conv3d(8, 6, 3),
                "grouped": nn.Conv2d(8, 6, 3, groups=2), "up": nn.ConvTranspose2d(8, 6, 3),
                "depthwise": nn.Conv2d(8, 16, 3, groups=8), "depthwise_up": nn.ConvTranspose1d(8, 8, 3, groups=8),
                "grey": nn.Conv2d(1, 6, 3),
            }
        )  # fmt: skip
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.lstm, self.gru = nn.LSTM(8, 10, 2, bidirectional=True, proj_size=4), nn.GRU(8, 10)
        self.cell = nn.GRUCell(8, 10)
        self.norms = nn.ModuleList([nn.LayerNorm((4, 8)), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
        self.positions = nn.Parameter(torch.zeros(1, 7, 8))
        self.classes = nn.Parameter(torch.zeros(1, 1, 8))
        self.fc = nn.Linear(8, 5)


def test_all_linear_is_every_weight_that_multiplies() -> None:
    model = Layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = select(model)
    recurrent = {
        name for name, p in model.named_parameters() if name.startswith(("lstm", "gru", "cell")) and p.dim() == 2
    }
    assert len(recurrent) == 12 + 2 + 2
    kernels = {f"convolutions.{name}.weight" for name in ("one", "two", "three", "grouped", "up", "grey")}
    attention = {"attention.in_proj_weight", "attention.out_proj.weight", "cross.out_proj.weight"} | {
        f"cross.{name}_proj_weight" for name in "qkv"
    }
    assert selection.parameters.keys() == {"linear.weight", "bilinear.weight"} | kernels | attention | recurrent
    assert selection.dense["embeddings and output layers"] == 30 * 8 + 20 * 8 + 8 * 5 + 5
    assert selection.dense["depthwise kernels"] == 16 * 9 + 8 * 3
    assert selection.warning() is None


def test_depthwise_kernels_are_constrained_where_they_are_named() -> None:
    named = select(Layers(), ["all-linear", r"depthwise.*weight"])
    assert len(named.parameters) - len(select(Layers()).parameters) == 2 and named.dense["depthwise kernels"] == 0


# ---------------------------------------------------------------------- output layers


class ResNet(nn.Module):
    """As torchvision's, with as many hidden layers called ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "fc": nn.Linear(8, 8)}))
        self.fc = nn.Linear(8, 10)


def vgg() -> nn.Module:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 8, 3)), "classifier": nn.Sequential(*layers)})


def squeezenet() -> nn.Module:
    return nn.ModuleDict({"features": nn.Conv2d(3, 8, 3), "classifier": nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())})


def many_tasks() -> nn.Module:
    heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))})
    return nn.ModuleDict({"body": nn.Linear(8, 8), "heads": heads, "loss": nn.BCELoss()})


def tasks_by_name() -> nn.Module:
    """The heads of a detector; what has such a name before other layers is a hidden one."""
    names = ["stem_head", "body", "cls_head", "bbox_head", "value_head"]
    return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


def encoder_in_front() -> nn.Module:
    """The encoder's ``fc`` is a hidden layer, because the decoder takes what it returns."""
    return nn.ModuleDict(
        {"encoder": ResNet(), "decoder": nn.ModuleDict({"up": nn.Linear(10, 8), "out": nn.Linear(8, 3)})}
    )


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (ResNet, ["fc.weight"]),
        (lambda: nn.ModuleDict({"net": ResNet(), "loss": nn.MSELoss()}), ["net.fc.weight"]),
        (vgg, ["classifier.4.weight"]),
        (squeezenet, ["classifier.0.weight"]),
        (many_tasks, ["heads.a.weight", "heads.b.1.weight"]),
        (tasks_by_name, ["bbox_head.weight", "cls_head.weight", "value_head.weight"]),
        (lambda: nn.ModuleDict({"up": nn.Linear(8, 8), "multi_head": nn.MultiheadAttention(8, 2)}), []),
        (encoder_in_front, []),
        (lambda: nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})]), []),
        (lambda: nn.Linear(3, 2), []),
    ],
)  # fmt: skip
def test_a_classifier_stays_dense_and_is_told_with_how_to_prune_it(make: Any, heads: list[str]) -> None:
    model = make()
    selection = select(model)
    assert sorted(selection.heads) == heads
    every = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert selection.parameters.keys() == every - set(heads)
    if heads:
        added = re.findall(r"'(.+?)'", selection.summary().split("to prune it too add")[1])
        assert select(model, ["all-linear", *added]).parameters.keys() == every
    else:
        assert "output layer:" not in selection.summary()


@pytest.mark.parametrize("kind", ["SequenceClassification", "QuestionAnswering", "TokenClassification"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Llama"])
def test_the_heads_of_hugging_face_models(family: str, kind: str) -> None:
    options = {**LLAMA, "n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 24, "pad_token_id": 0}
    if family == "DistilBert":
        options = {
            k: v for k, v in options.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        }
    model = getattr(tf, f"{family}For{kind}")(getattr(tf, f"{family}Config")(**options))
    selection = select(model)
    (head,) = selection.heads
    assert model.get_parameter(head).shape == (2, 16) and head not in selection.parameters
    hidden = {name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name}
    assert selection.parameters.keys() == hidden - {head}


class Decoder(nn.Module):
    """As nanoGPT's, with as many positions as the blocks are wide, and an output layer of any name."""

    def __init__(self, blocks: int, last: str = "out") -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(32, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)) for _ in range(blocks))
        setattr(self, last, nn.Linear(32, 50))


@pytest.mark.parametrize(("last", "told"), [("out", "shape"), ("head", "name")])
def test_without_hugging_face_the_last_layer_of_the_vocabularys_size_is_the_head(last: str, told: str) -> None:
    selection = select(Decoder(1, last))
    assert len(selection.parameters) == 2 and selection.heads == {f"{last}.weight": told}
    assert f"taken for the output layer: {last}.weight (by its {told})" in selection.summary()


def test_a_hidden_layer_of_the_shape_of_an_embedding_is_no_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.wide, self.out = nn.Embedding(50, 8), nn.Linear(8, 50), nn.Linear(50, 3)

    assert select(Model()).parameters.keys() == {"wide.weight", "out.weight"}


def test_a_layer_that_is_taken_for_the_head_by_its_shape_and_is_most_of_the_model_is_a_warning() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.wide = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50)

    with pytest.warns(UserWarning, match="has an embedding's shape, is taken for the output layer and stays dense"):
        selection = select(Model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(Model(), advised(selection, "targets")).parameters.keys() == {"body.weight", "wide.weight"}
        assert select(Model(), ignore=advised(selection, "ignore")).parameters.keys() == {"body.weight"}


# ---------------------------------------------------------------------- what is left out, and advice


def trains(model: nn.Module, selection: Selection, loss: Any) -> None:
    """Prune for some steps, and look at the zeros."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    admm = ADMM(optimizer, selection.parameters, Unstructured(0.5, "tensor"), total_steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    admm.finish()
    for p in selection.parameters.values():
        assert p.isfinite().all() and float((p == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


class Own(nn.Module):
    """Weights of somebody's own layers, many of the same size, beside a small Linear."""

    def __init__(self) -> None:
        super().__init__()
        for place in range(12):
            setattr(self, f"mix_{chr(97 + place)}", nn.Parameter(torch.randn(8, 8) / 8))
        self.kernels = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.gain, self.pos_table = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.zeros(8, 8))
        self.layer, self.layer_bias = nn.Linear(8, 8), nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        for place in range(12):
            x = x @ getattr(self, f"mix_{chr(97 + place)}")
        x = nn.functional.conv2d(x[:, :, None, None], self.kernels, padding=1)[:, :, 0, 0] * self.gain[:, 0]
        return self.layer(x + self.pos_table.mean(0) + self.layer_bias.mean(0))  # type: ignore[no-any-return]


def test_advice_can_be_followed_to_its_end() -> None:
    model = Own()
    with pytest.warns(UserWarning, match="LOW COVERAGE"):
        selection = select(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed = select(model, advised(selection, "targets"))
        select(model, ignore=advised(selection, "ignore"))
    assert followed.constrained >= 0.9 * (13 * 64 + 8 * 8 * 9)
    assert not {"gain", "pos_table", "layer_bias"} & {*followed.parameters, *selection.left_out}
    trains(model, followed, lambda m: m(torch.randn(4, 8)).square().mean())


def test_frozen_weights_stay_dense_and_are_told_once_with_what_says_that_it_is_meant() -> None:
    model = Decoder(4)
    model.blocks[:3].requires_grad_(False)
    selection = select(model, quiet=True)
    assert list(selection.parameters) == ["blocks.3.0.weight", "blocks.3.1.weight"]
    warning = selection.warning()
    assert warning is not None and "Frozen ones (requires_grad False) are never constrained" in warning
    assert "targets=" not in warning, "no pattern constrains what is frozen"
    followed = select(model, ignore=advised(selection, "ignore"))
    assert followed.warning() is None and followed.parameters.keys() == selection.parameters.keys()
    with pytest.raises(ValueError, match="frozen parameters"):
        select(model.requires_grad_(False))


class LoRA(nn.Module):
    """A layer as PEFT wraps it."""

    adapter_layer_names = ("lora_A", "lora_B", "other_adapter")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.other_adapter = nn.ParameterDict({"default": nn.Parameter(torch.zeros(4, 4))})


def test_adapters_are_not_pruned_unless_a_pattern_means_them_alone() -> None:
    model = nn.ModuleDict({"q_proj": LoRA(nn.Linear(16, 16)), "v_proj": LoRA(nn.Linear(16, 16))})
    bases = {"q_proj.base_layer.weight", "v_proj.base_layer.weight"}
    selection = select(model)
    assert selection.parameters.keys() == bases and selection.dense["adapters"] == 2 * (4 * 16 + 16)
    assert select(model, ["q_proj.*weight"], quiet=True).parameters.keys() == {"q_proj.base_layer.weight"}
    assert select(model, ["lora_A"], quiet=True).parameters.keys() == {
        f"{name}_proj.lora_A.default.weight" for name in "qv"
    }
    for layer in model.values():
        layer.base_layer.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"adapters \(LoRA\) are not pruned"):
        select(model)


@pytest.mark.parametrize("norm", [weight_norm, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_parametrized_weight_is_left_out_with_a_warning_and_refused_by_name(norm: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm(nn.Conv1d(8, 16, 3)), norm(nn.Linear(16, 16)))
    with pytest.warns(UserWarning, match="Weights that a parametrization computes"):
        selection = select(model)
    assert selection.parameters.keys() == {"0.weight"}
    warning = selection.warning()
    assert warning is not None and "targets=" not in warning
    assert select(model, ignore=advised(selection, "ignore")).warning() is None
    for pattern in [name for name, _ in model.named_parameters() if name.startswith("1.") and "bias" not in name]:
        with pytest.raises(ValueError, match=r"from which a parametrization .* computes '1\.weight'"):
            select(model, [re.escape(pattern)])
    with pytest.raises(ValueError, match="weight is computed by a parametrization, which must be removed"):
        select(norm(nn.Linear(16, 16)))


def test_the_weights_of_another_optimizer_are_neither_constrained_nor_named() -> None:
    gan = nn.ModuleDict({"generator": nn.Linear(8, 8), "discriminator": Own()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = select(gan, trained=gan["generator"].parameters())
    assert selection.parameters.keys() == {"generator.weight"}
    assert selection.dense["other optimizers'"] == sum(p.numel() for p in gan["discriminator"].parameters())
    with pytest.raises(ValueError, match="of them are not among the optimizer's"):
        select(gan, ["discriminator.*kernels"], trained=gan["generator"].parameters())


def test_a_weight_that_is_registered_elsewhere_first_is_found() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(8, 8)
            self.first = nn.ParameterList([layer.weight])
            self.layer = layer

    assert list(select(Shared()).parameters) == ["first.0"]


def test_patterns_add_restrict_and_ignore() -> None:
    model = build(*FAMILIES["llama"][:2])
    assert len(select(model, [r"mlp\..*weight"], quiet=True).parameters) == 6
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


def test_a_lazy_module_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        select(nn.Sequential(nn.LazyLinear(8)))


def test_zeros_are_counted_over_the_constrained_weights() -> None:
    model = build(*FAMILIES["llama"][:2])
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # type: ignore[operator]
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[:, :4] = 0
    assert count_zeros(model) == (24 * 4, select(model).constrained)
    chosen = [model.get_input_embeddings().weight]  # type: ignore[operator]
    assert count_zeros(model, chosen) == (64 * 16, 64 * 16)


def test_a_layer_that_normalises_its_weights_multiplies_all_the_same() -> None:
    class NormedLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)

    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), NormedLinear(16, 8), nn.Linear(8, 4))
    assert list(select(model, ["all-linear"]).parameters) == ["0.weight", "2.weight", "3.weight"]


def test_weights_without_entries_are_left_out_and_complex_ones_or_those_on_meta_refused_before_a_step() -> None:
    with warnings.catch_warnings(action="ignore"):  # of initialising nothing
        empty = nn.Linear(8, 0), nn.Linear(0, 8)
    model = nn.Sequential(nn.Linear(8, 8), *empty, nn.Linear(8, 8, dtype=torch.complex64))
    for targets in (["all-linear"], ["weight"]):
        selection = select(model, targets, ["^3"])
        assert selection.parameters.keys() == {"0.weight"} and not selection.left_out
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(
        UserError, match=r"^3.weight is complex64, .* leave it out, in select\(\) with ignore="
    ) as refused:
        ADMM(optimizer, select(model), Unstructured(0.5), total_steps=9)
    ignore = re.findall(r"'(.*)'", str(refused.value))
    ADMM(optimizer, select(model, ignore=ignore), Unstructured(0.5), total_steps=9)
    meta = nn.Linear(8, 8, device="meta")
    with pytest.raises(UserError, match=r"^weight is on the meta device, .* materialise the model first"):
        ADMM(torch.optim.Adam(meta.parameters()), select(meta), Unstructured(0.5), total_steps=9)
