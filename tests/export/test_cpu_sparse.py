"""cpu-sparse: the same function and the same tokens as the dense model with zeros."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.export import export, load_cpu_sparse, save_cpu_sparse, to_cpu_sparse
from elsa_lightning.export.cpu_sparse import BLOCK, FILE, CSRLinear, shares_of_zeros
from tests.export.models import IDS, cut, sparse_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    return sparse_folder(tiny_llama, tmp_path_factory.mktemp("sparse") / "model")


def load(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.lists(st.sampled_from([0, 1, 2, 3, BLOCK + 1]), max_size=2),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_dense_layer(
    shape: tuple[int, int], batch: list[int], sparsity: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    cut(layer.weight, sparsity)
    sparse, x = CSRLinear.of(layer.weight, layer.bias), torch.randn(*batch, shape[1])
    torch.testing.assert_close(sparse(x), layer(x))
    torch.testing.assert_close(sparse(x.bfloat16()).float(), layer(x.bfloat16().float()), atol=0.1, rtol=0.1)
    assert sparse.zeros == int((layer.weight == 0).sum())
    assert sparse.col_indices.dtype == sparse.crow_indices.dtype == torch.int32
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))


@pytest.mark.parametrize("shape", [(2, 4), (1, 16), (0, 3), (1,)])
def test_inputs_of_another_width_are_refused_even_where_their_number_fits(shape: tuple[int, ...]) -> None:
    layer = CSRLinear.of(torch.eye(3, 8), None)
    with pytest.raises(ValueError, match=f"a layer of 8 inputs was given {shape[-1]}"):
        layer(torch.randn(shape))


def test_values_that_move_or_change_are_those_of_the_next_product() -> None:
    torch.manual_seed(0)
    layer, x = CSRLinear.of(torch.eye(6), None), torch.randn(1, 6)
    assert torch.equal(layer(x), x)
    layer.values.mul_(2)  # in their place
    assert torch.equal(layer(x), 2 * x)
    layer.load_state_dict({**layer.state_dict(), "values": torch.full((6,), 3.0)}, assign=True)
    assert torch.equal(layer(x), 3 * x)
    layer.values = torch.full((6,), 4.0)
    assert torch.equal(layer(x), 4 * x)
    layer._apply(lambda t: t.clone() if t.is_floating_point() else t)
    layer.values.zero_()
    assert not layer(x).any()


def test_greedy_tokens_are_those_of_the_dense_model_and_survive_saving(folder: Path, tmp_path: Path) -> None:
    dense = load(folder)
    sparse: Any = to_cpu_sparse(load(folder))
    assert sum(isinstance(module, CSRLinear) for module in sparse.modules()) == 14
    assert sparse.get_output_embeddings().weight is sparse.get_input_embeddings().weight  # tied: stays dense
    save_cpu_sparse(sparse, tmp_path)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for model in (sparse, load_cpu_sparse(tmp_path)):
        assert torch.equal(model.generate(IDS, **asked), dense.generate(IDS, **asked))
        assert torch.equal(model.generate(IDS[:1], **asked), dense.generate(IDS[:1], **asked))
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
    torch.save(sparse.state_dict(), tmp_path / "state.pt")  # tensors alone
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == sparse.state_dict().keys()
    reloaded = load_cpu_sparse(tmp_path)
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


def test_layers_below_the_break_even_stay_dense_and_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "in")
    main(["export", "--from", str(tmp_path / "in"), "--to", "cpu-sparse", "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "13 of 14 linear layers are kept as compressed sparse rows" in told
    assert "stays so: model.layers.1.mlp.up_proj." in told
    assert "Reloaded (in a fresh process, load_cpu_sparse)" in told
    assert (tmp_path / "out" / FILE).stat().st_size < (tmp_path / "in/model.safetensors").stat().st_size
    record = json.loads((tmp_path / "out/elsa.json").read_text())
    assert record["export"]["sparse layers"] == 13
    assert record["sparsity"]["model.layers.0.mlp.up_proj.weight"]["zeros"] == round(0.9 * 32 * 48)


def test_a_dense_model_is_refused(tiny_llama: str) -> None:
    with pytest.raises(ValueError, match=r"no linear layer has 60% zeros.* the sparsest has 0.00%"):
        to_cpu_sparse(load(tiny_llama))
    with pytest.raises(ValueError, match="share of zeros from 0 to 1, got 60"):
        to_cpu_sparse(load(tiny_llama), break_even=60)


def test_a_model_pruned_to_just_the_break_even_is_taken(tiny_llama: str, tmp_path: Path) -> None:
    """Where 60 % of the weights is no whole number, a set keeps one more."""
    model = load(tiny_llama)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            cut(module.weight, 0.6 - 0.5 / module.weight.numel())
    shares = shares_of_zeros(model)
    assert min(shares.values()) < 0.6
    model.save_pretrained(tmp_path / "in")
    said: list[str] = []
    export(tmp_path / "in", "cpu-sparse", tmp_path / "out", fresh=False, say=said.append)
    assert "14 of 14 linear layers are kept as compressed sparse rows, float32." in said
    with pytest.raises(UserError, match=r"no linear layer has 61% zeros.* the sparsest has 59\.96%"):
        to_cpu_sparse(model, 0.61)


class Gated(nn.Linear):
    """Derives from nn.Linear, and gives something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_what_derives_from_linear_is_swapped_where_it_only_multiplies() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    torch.manual_seed(0)
    scaled = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    model = nn.Sequential(FalconLinear(32, 32), Gated(32, 32), scaled, nn.Linear(32, 32))
    for module in (model[0], model[1], model[3]):
        cut(module.weight, 0.9)
    x = torch.randn(4, 32)
    expected = model(x)
    sparse = to_cpu_sparse(model)
    assert [isinstance(layer, CSRLinear) for layer in sparse] == [True, False, False, True]
    torch.testing.assert_close(sparse(x), expected)


def test_a_falcon_is_exported_and_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Falcon's layers are a subclass of nn.Linear."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2
    )
    model = FalconForCausalLM(config).eval()
    for module in model.transformer.modules():
        if isinstance(module, nn.Linear):
            cut(module.weight, 0.9)
    model.save_pretrained(tmp_path / "in")
    main(["export", "--from", str(tmp_path / "in"), "--to", "cpu-sparse", "--output", str(tmp_path / "out")])
    assert "8 of 8 linear layers are kept as compressed sparse rows" in capsys.readouterr().out
    torch.testing.assert_close(load_cpu_sparse(tmp_path / "out")(IDS % 96).logits, model(IDS % 96).logits)
    with pytest.raises(SystemExit):
        main(["export", "--from", str(tmp_path / "in"), "--to", "quantized", "--output", str(tmp_path / "q")])
    assert "beside its output layer, only FalconLinear, and compressed-tensors knows no" in capsys.readouterr().err


def test_gpt2_whose_weights_are_stored_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    for module in model.modules():
        if isinstance(module, Conv1D):
            cut(module.weight, 0.8)
    ids = IDS % 96
    expected = model(ids).logits
    save_cpu_sparse(to_cpu_sparse(model), tmp_path)
    reloaded = load_cpu_sparse(tmp_path)
    assert sum(isinstance(module, CSRLinear) for module in reloaded.modules()) == 8
    torch.testing.assert_close(reloaded(ids).logits, expected)


def test_indices_that_point_outside_are_refused_and_other_folders_too(folder: Path, tmp_path: Path) -> None:
    save_cpu_sparse(to_cpu_sparse(load(folder)), tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        metadata = tensors.metadata()
    state["model.layers.0.mlp.up_proj.col_indices"][3] = 1 << 20
    save_file(state, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match="indices point outside of a matrix of 32 columns"):
        load_cpu_sparse(tmp_path)
    with pytest.raises(FileNotFoundError, match="give a folder that elsa export --to cpu-sparse wrote"):
        load_cpu_sparse(folder)
