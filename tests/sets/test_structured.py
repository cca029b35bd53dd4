"""Neurons, heads, layers and experts of every known family: the projection, training, and the smaller model."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from elsa_lightning import ADMM, NM, ByPattern, Experts, Heads, Layers, Neurons, Quantized, Width, shrink
from elsa_lightning.errors import UserError
from elsa_lightning.export.formats import has_experts
from elsa_lightning.families import find
from elsa_lightning.layout.kernels import is_transposed
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint, Member, Tie, Tied
from elsa_lightning.sets.base import WholePoints
from elsa_lightning.sets.structured import is_structured

COMMON = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROTARY = COMMON | {
    "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 32, "attention_bias": True,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT2 = COMMON | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
OPT = COMMON | {
    "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "word_embed_proj_dim": 16,
    "max_position_embeddings": 32,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

DENSE: dict[str, dict[str, Any]] = {
    "llama": ROTARY | TIED | {"mlp_bias": True},
    "mistral": ROTARY | UNTIED,
    "qwen2": ROTARY | TIED,
    "qwen3": ROTARY | UNTIED,
    "gemma": ROTARY | TIED,
    "gemma2": ROTARY | TIED,
    "gemma3_text": ROTARY | TIED,
    "opt": OPT,
    "gpt2": GPT2,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": ROTARY | EXPERTS | UNTIED,
    "qwen2_moe": ROTARY | EXPERTS | UNTIED | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": ROTARY | EXPERTS | UNTIED | {"mlp_only_layers": [1]},
}
HEADED = [name for name in (*DENSE, *MIXTURES) if name not in ("opt", "gpt2")]
UNBIASED = {"attention_bias": False, "mlp_bias": False}
IDS = torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def make(kind: str, **changed: Any) -> Any:
    """Return a model whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    settings = (DENSE | MIXTURES)[kind] | changed
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@torch.no_grad()
def impose(constraint: Constraint, model: nn.Module) -> Constraint:
    """Project a model's weights onto a set, by magnitude."""
    constraint = constraint.fitted(model)
    chosen = select(model, quiet=True).within(constraint).parameters
    transposed = [name for name, p in chosen.items() if is_transposed(p)]
    constraint.check({name: p.shape for name, p in chosen.items()}, transposed)
    points = WholePoints([(p.detach(), None) for p in chosen.values()], list(chosen), [n in transposed for n in chosen])
    for p, mask in zip(chosen.values(), list(constraint.support(points)), strict=True):
        p.mul_(mask.view(p.shape))
    return constraint


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def assert_shrinks(model: Any, folder: Path) -> Any:
    """Fail unless the smaller model is saved as a plain folder with the same logits; return it reloaded."""
    before, state = logits(model), copy.deepcopy(model.state_dict())
    small = shrink(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    for found in (logits(small), logits(reloaded)):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
    tokens = reloaded.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0))
    return reloaded


@pytest.mark.parametrize("kind", DENSE)
def test_half_of_the_neurons_are_gone(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    impose(Neurons(0.5), model)
    small = assert_shrinks(model, tmp_path)
    before = {name: p.shape for name, p in model.named_parameters()}
    changed = {name: p.shape for name, p in small.named_parameters() if p.shape != before[name]}
    assert changed and all(shape.numel() * 2 == before[name].numel() for name, shape in changed.items())


@pytest.mark.parametrize("kind", HEADED)
def test_half_of_the_heads_are_gone_with_their_keys_and_values(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    impose(Heads(0.5), model)
    small = assert_shrinks(model, tmp_path)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (4, 2, 6) or (
        kind == "qwen2_moe" and small.config.num_attention_heads == 4
    )


@pytest.mark.parametrize("kind", DENSE)
def test_layers_without_output_are_gone_and_what_their_biases_added_is_not(kind: str, tmp_path: Path) -> None:
    model = make(kind, **(UNBIASED if kind not in ("opt", "gpt2") else {}))
    impose(Layers(1 / 3), model)
    small = assert_shrinks(model, tmp_path)
    assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("gone", [(0,), (1, 2), (0, 2)])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "gemma3_text"])
def test_any_layers_can_go(kind: str, gone: tuple[int, ...], tmp_path: Path) -> None:
    more = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]} if "gemma" in kind else {}
    model = make(kind, **(UNBIASED if "gemma" in kind else {}), **more)
    (tie,) = Layers(0.5).fitted(model).ties({})
    with torch.no_grad():
        for member in tie.members:
            if member.first in gone:
                model.get_parameter(member.name).zero_()
    small = assert_shrinks(model, tmp_path)
    assert small.config.num_hidden_layers == 3 - len(gone)
    if more:
        assert small.config.layer_types == [t for i, t in enumerate(more["layer_types"]) if i not in gone]


@pytest.mark.parametrize("kind", MIXTURES)
def test_half_of_the_experts_are_gone_with_their_rows_in_the_router(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    dense = logits(model)
    Experts(0.5).fitted(model)
    assert torch.equal(logits(model), dense)  # nothing is passed over yet
    impose(Experts(0.5), model)
    small = assert_shrinks(model, tmp_path)
    assert small.config.num_experts == 2
    plain = make(kind)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(logits(plain), logits(model))  # whose routers still choose what is zero
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_both_widths_at_once_by_pattern_and_to_a_budget(tmp_path: Path) -> None:
    for constraint in (ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)}), Width(keep=14_000)):
        model = make("qwen3")
        impose(constraint, model)
        small = assert_shrinks(model, tmp_path / type(constraint).__name__)
        assert small.config.num_key_value_heads == 2
    assert 14_000 - 3 * (3 * 32) < small.num_parameters() <= 14_000


@pytest.mark.parametrize("share", [0.55, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt2", "qwen2"])
def test_a_budget_is_met_to_a_neuron(kind: str, share: float, tmp_path: Path) -> None:
    model = make(kind)
    with pytest.raises(UserError, match="keep=1 parameters of a model of") as refusal:
        Width(1).fitted(model)
    least, most = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", str(refusal.value))[-2:])
    keep, total = least + round(share * (most - least)), model.num_parameters()
    assert total == most
    impose(Neurons(0.5), one := make(kind))
    neurons = 24 if kind == "opt" else 64 if kind == "gpt2" else 20
    a_neuron = (total - shrink(one).num_parameters()) * 2 // neurons
    impose(Width(keep), model)
    small = assert_shrinks(model, tmp_path)
    assert keep - a_neuron < small.num_parameters() <= keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_file_of_so_many_bytes_is_met_to_a_neuron(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The header may take fewer bytes than are reserved for each tensor's entry."""
    model = make(kind).to(dtype)
    with pytest.raises(UserError, match="keep_bytes=1 bytes of a model of") as refusal:
        Width(keep_bytes=1).fitted(model)
    least, most = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", str(refusal.value))[-2:])
    tensors = sum(1 for _ in model.parameters())
    for share in (0.0, 0.5, 1.0):
        keep = least + round(share * (most - least))
        impose(Width(keep_bytes=keep), changed := copy.deepcopy(model))
        (small := shrink(changed)).save_pretrained(tmp_path / str(share))
        size = (tmp_path / str(share) / "model.safetensors").stat().st_size
        a_neuron = 3 * (3 if kind != "gpt2" else 2) * 33 * dtype.itemsize
        assert keep - a_neuron - 60 * tensors < size <= keep
        assert (small.num_parameters() == model.num_parameters()) == (share == 1.0)
    with pytest.raises(UserError, match="keep_bytes"):
        Width(keep_bytes=least - 1).fitted(model)


# ---------------------------------------------------------------------- projections

SETS: dict[str, tuple[Constraint, str, int]] = {  # with a model and the units of each tie that survive
    "neurons": (Neurons(0.75), "qwen3", 5),
    "heads": (Heads(0.5), "qwen3", 2),
    "neurons, transposed": (Neurons(0.9), "gpt2", 6),
    "layers": (Layers(0.5), "opt", 1),
    "experts": (Experts(0.5), "mixtral", 2),
}


def entries(model: nn.Module, members: Any, unit: int) -> Iterator[tuple[str, Tensor]]:
    """Yield which entries of each tensor a unit has."""
    for name, axis, each, first in members:
        mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
        along = mask.movedim({0: -2, 1: -1, 2: 0}[axis], 0)
        start = (unit - first) * each
        if 0 <= start < len(along):
            along[start : start + each] = True
        yield name, mask


@pytest.mark.parametrize("name", SETS)
def test_the_units_that_stay_are_the_best_of_all_choices_and_stay_unchanged(name: str) -> None:
    constraint, kind, kept = SETS[name]
    model = make(kind)
    fitted = constraint.fitted(model)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    impose(constraint, model)
    for tie in fitted.ties({})[:2]:  # type: ignore[attr-defined]
        units = [dict(entries(model, tie.members, unit)) for unit in range(tie.units)]
        costs = [float(sum(dense[n][mask].double().square().sum() for n, mask in each.items())) for each in units]
        survivors = [i for i, each in enumerate(units) if any(model.get_parameter(n)[m].any() for n, m in each.items())]
        assert len(survivors) == kept == tie.kept
        if math.comb(tie.units, kept) < 20_000:
            choices = itertools.combinations(range(tie.units), kept)
            assert tuple(survivors) == max(choices, key=lambda chosen: sum(costs[i] for i in chosen))
        else:
            assert set(survivors) == set(sorted(range(tie.units), key=lambda i: -costs[i])[:kept])
        for i, each in enumerate(units):
            for n, mask in each.items():
                assert torch.equal(model.get_parameter(n)[mask], dense[n][mask] * (i in survivors))
    once = copy.deepcopy(model.state_dict())
    impose(constraint, model)
    assert all(torch.equal(t, once[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-42])
def test_equal_units_go_by_their_number(fill: float) -> None:
    model = make("qwen3")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        fitted = Neurons(0.75).fitted(model)
        chosen = select(model, quiet=True).within(fitted).parameters
        points = WholePoints([(torch.full_like(p, fill), None) for p in chosen.values()], list(chosen))
    for mask in fitted.support(points):
        assert torch.equal(mask.any(dim=0), mask.all(dim=0))
        assert mask.any(dim=0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_the_number_of_units_falls_along_the_ramp() -> None:
    fitted = Neurons(0.5).fitted(make("llama"))
    assert [fitted.relaxed(t).ties({})[0].kept for t in (0.0, 0.5, 1.0)] == [20, 15, 10]
    assert fitted.relaxed(1.0) == fitted == Neurons(0.5) and repr(fitted) == "Neurons(fraction=0.5)"


# ---------------------------------------------------------------------- training


@dataclass(frozen=True)
class OneColumn(Tied):
    """The best column of the matrix."""

    def ties(self, shapes: Any) -> list[Tie]:
        return [Tie(shapes["p"][1], 1, (Member("p", 1),))]


def test_a_unit_returns_when_it_remembers_twice_the_size_of_one_that_is_kept() -> None:
    """Single weights, here with N:M, return as soon as their dual exceeds a kept weight."""
    for constraint, inertia in ((OneColumn(), 1.0), (ByPattern({"p": OneColumn()}), 1.0), (NM(1, 2), 0.0)):
        p = nn.Parameter(torch.tensor([[1.0, 0.95], [1.0, 0.95]]))
        optimizer = torch.optim.SGD([p], lr=1.0)
        schedule = Schedule(interval=1, ramp=0, frozen=0, penalty=1.0)
        ADMM(optimizer, {"p": p}, constraint, total_steps=100, schedule=schedule, prox="feedback")
        for n in range(20):  # the second column's memory: 0.95, 1.05, ...
            p.grad = torch.tensor([[0.0, -0.1 * (n > 0)]] * 2)
            optimizer.step()
            back = 0.95 + 0.1 * n > 1 + inertia
            assert p.any(dim=0).tolist() == [not back, back], n
            if back:
                break
        else:
            raise AssertionError("it never came back")


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("prox", ["linearized", "decoupled"])
@pytest.mark.parametrize("name", SETS)
def test_training_ends_in_the_set_resumes_to_the_bit_and_shrinks(
    name: str, prox: Any, state_dtype: Any, tmp_path: Path
) -> None:
    constraint, kind, kept = SETS[name]
    data = torch.randint(3, 48, (10, 2, 12), generator=torch.Generator().manual_seed(1))

    def run(stop: int | None, saved: Any = None) -> Any:
        model = make(kind).train()
        if saved is not None:
            model.load_state_dict(saved[0])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        fitted = constraint.fitted(model)
        chosen = select(model, quiet=True).within(fitted).parameters
        admm = ADMM(optimizer, chosen, fitted, total_steps=10, prox=prox, state_dtype=state_dtype)
        if saved is not None:
            optimizer.load_state_dict(saved[1])
            admm.load_state_dict(saved[2])
        for batch in data[admm.step : stop]:
            optimizer.zero_grad()
            torch.manual_seed(admm.step)  # for dropout
            model(batch, labels=batch).loss.backward()
            optimizer.step()
        if stop is not None:
            return copy.deepcopy((model.state_dict(), optimizer.state_dict(), admm.state_dict()))
        admm.finish()
        assert admm.last_stationarity is None or 0 < float(admm.last_stationarity.distance) < math.inf
        return model.eval(), fitted

    model, fitted = run(None)
    resumed, _ = run(None, run(6))
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in model.state_dict().items())
    for tie in fitted.ties({}):
        units = [dict(entries(model, tie.members, unit)) for unit in range(tie.units)]
        live = [any(bool(model.get_parameter(n)[m].any()) for n, m in each.items()) for each in units]
        assert sum(live) == kept
    if state_dtype == "float32":
        assert_shrinks(model, tmp_path)


# ---------------------------------------------------------------------- what cannot be


class Elsewhere(nn.Module):
    """A model that is none of Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def other() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **ROTARY | {"hidden_size": 48}))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Neurons(1.0), r"share of neurons that is removed, in \[0, 1\), got 1"),
        (lambda: Heads(-0.1), "share of heads"),
        (lambda: Layers(2), "share of layers"),
        (lambda: Experts(1), "share of experts"),
        (lambda: Width(0.5), "a number of parameters, 1 or more, such as 30e6, got 0.5"),
        (lambda: Width(), "keep .* or keep_bytes"),
        (lambda: Width(3e6, keep_bytes=3e6), "one of the two"),
        (
            lambda: Heads(0.25).fitted(make("llama")),
            r"leaves 3 of 4 groups .* LlamaConfig of hidden_size 32 refuses; "
            r"possible fractions are 0, 0.5, 0.75",
        ),
        (lambda: Heads(0.25).fitted(make("gemma3_text")), "possible fractions are 0, 0.5, 0.75"),
        (lambda: Heads(0.5).fitted(make("opt")), "heads of 'opt' cannot be removed: its config has no head_dim"),
        (lambda: Heads(0.5).fitted(make("gpt2")), "heads of 'gpt2' cannot be removed"),
        (lambda: Neurons(0.5).fitted(make("mixtral")), r"'mixtral' has its neurons in experts: Experts\(fraction\)"),
        (lambda: Width(10_000).fitted(make("mixtral")), "'mixtral' has its neurons in experts"),
        (lambda: Layers(0.5).fitted(make("mixtral")), "cannot be removed: it is a mixture of experts"),
        (lambda: Layers(0.5).fitted(make("llama")), "a layer still adds model.layers.0.self_attn.o_proj.bias"),
        (lambda: Layers(0.5).fitted(make("opt", do_layer_norm_before=False)), "end in a norm"),
        (lambda: Layers(0.5).fitted(make("gpt2", scale_attn_by_inverse_layer_idx=True)), "number of the block"),
        (lambda: Experts(0.5).fitted(make("llama")), "'llama' is no mixture of experts"),
        (lambda: Experts(0.75).fitted(make("mixtral")), "leaves 1 of 4 experts, and each token takes 2 .* of 0.5"),
        (lambda: Neurons(0.5).fitted(Elsewhere()), "is one of llama, .* and found no model with a config"),
        (lambda: Neurons(0.5).fitted(other()), "found GPTNeoXForCausalLM of model_type 'gpt_neox'"),
        (lambda: Neurons(0.5).fitted(make("llama").model), "looked for 'model.layers.0.self_attn.o_proj' and found"),
        (lambda: shrink(Elsewhere()), "looked for a Hugging Face model"),
        (lambda: shrink(nn.ModuleDict({"inner": make("llama")})), "which is .inner of this one"),
        (lambda: Neurons(0.5).check({"w": torch.Size((4, 4))}), r"give Neurons\(fraction=0.5\).fitted\(model\)"),
    ],
)
def test_what_cannot_be_is_refused_before_training(make_it: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_it()


def test_a_tensor_that_has_no_such_units_is_refused() -> None:
    fitted = Heads(0.5).fitted(make("qwen3"))
    shapes = {name: p.shape for name, p in make("qwen3").named_parameters() if fitted.covers(name)}
    fitted.check(shapes)
    with pytest.raises(UserError, match=r"o_proj.weight of shape \(32, 47\) has 47 along axis 1"):
        fitted.check(shapes | {"model.layers.0.self_attn.o_proj.weight": torch.Size((32, 47))})
    with pytest.raises(UserError, match=r"layers.1.self_attn.\w+.weight has units that Heads removes and is not con"):
        fitted.check({name: shape for name, shape in shapes.items() if "1.self_attn" not in name})


class Wrapped(nn.Module):
    """Has the config of the model in it, and maybe a frozen teacher in front."""

    def __init__(self, model: Any, teacher: Any = None) -> None:
        super().__init__()
        self.config, self.teacher, self.model = model.config, teacher, model


def test_the_model_that_trains_is_found_in_a_wrapper_with_its_config_and_a_teacher() -> None:
    model, teacher = make("llama"), make("llama").requires_grad_(False)
    assert find(Wrapped(model)).model is model
    assert find(Wrapped(model, teacher)).model is model
    assert find(Wrapped(teacher)).model is teacher
    names = select(Wrapped(model, teacher), quiet=True).within(Neurons(0.5).fitted(Wrapped(model, teacher))).parameters
    assert names and all(name.startswith("model.model.layers") for name in names)


def test_a_grid_around_units_is_structured_as_they_are() -> None:
    assert is_structured(Quantized(8, inside=Neurons(0.5))) and not is_structured(Quantized(8, inside=NM(2, 4)))
    assert has_experts([Quantized(8, inside=Experts(0.5))]) and not has_experts([Quantized(8)])


# ---------------------------------------------------------------------- shrinking what nobody constrained


def test_layers_with_fewer_zeros_decide_the_width_and_others_keep_some(tmp_path: Path) -> None:
    model = make("qwen3")
    with torch.no_grad():
        for layer, zeros in zip(model.model.layers, (9, 3, 5), strict=True):
            layer.mlp.down_proj.weight[:, -zeros:] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # heads of one layer only: the others have all of them
    small = assert_shrinks(model, tmp_path)
    assert small.config.intermediate_size == 17 and small.config.num_key_value_heads == 4


def test_heads_that_a_config_cannot_do_without_stay(tmp_path: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :12] = 0  # one group of four; three would be six heads of a width of 32
            layer.mlp.down_proj.weight[:, 0] = 0
    assert assert_shrinks(model, tmp_path).config.num_key_value_heads == 4


def test_what_has_no_zeros_stays_and_what_is_all_zeros_keeps_one(tmp_path: Path) -> None:
    model = make("mistral")
    assert shrink(model).num_parameters() == model.num_parameters()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    small = assert_shrinks(model, tmp_path)
    assert (small.config.num_hidden_layers, small.config.intermediate_size, small.config.num_key_value_heads) == (
        1,
        1,
        1,
    )


def test_dtype_and_generation_settings_stay() -> None:
    model = make("llama").bfloat16()
    model.generation_config.temperature = 0.5
    impose(Neurons(0.5), model)
    small = shrink(model)
    assert small.dtype == torch.bfloat16 and small.generation_config.temperature == 0.5 and not small.training
    torch.testing.assert_close(logits(small), logits(model), rtol=0.05, atol=0.05)


def test_a_fresh_process_without_this_library_loads_it(tmp_path: Path) -> None:
    model = make("qwen3")
    impose(ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)}), model)
    shrink(model).save_pretrained(tmp_path)
    torch.save((IDS, logits(model)), tmp_path / "expected.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "ids, expected = torch.load('expected.pt')\n"
        "found = AutoModelForCausalLM.from_pretrained('.').eval()(ids).logits\n"
        "assert 'elsa_lightning' not in sys.modules\n"
        "torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_unstructured_zeros_in_one_matrix_of_a_unit_remove_nothing(tmp_path: Path) -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()  # its neurons still pass on what their biases give
    assert shrink(model).num_parameters() == model.num_parameters()
