"""quantized: packed integers whose zeros are zeros, and whose grid is found where there is one."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elsa_lightning.anatomy import stacks
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export
from elsa_lightning.export.quantized import check_groups, find_grid, load_unpacked, pack, unpack, write_quantized
from tests.export.models import IDS, sparse_folder, zeros

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    return sparse_folder(tiny_llama, tmp_path_factory.mktemp("sparse") / "model")


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def on_grid(bits: int, dtype: torch.dtype, group: int, largest: int, seed: int = 0) -> Tensor:
    """Return ``(6, 64)`` on a symmetric grid whose groups use codes up to ``largest``, many of them 0."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, (6, 64), generator=made)
    codes[torch.rand(codes.shape, generator=made) < 0.7] = 0
    codes[0] = 0
    scales = (torch.rand(6, 64 // group, generator=made) * 0.01 + 1e-3).to(dtype)
    return (codes.view(6, -1, group).to(dtype) * scales[..., None]).view(6, 64)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([16, 32, 64]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 999),
)
def test_weights_on_a_symmetric_grid_lose_nothing_whatever_codes_they_use(
    bits: int, dtype: torch.dtype, group: int, share: float, seed: int
) -> None:
    weight = on_grid(bits, dtype, group, max(1, int(share * (2 ** (bits - 1) - 1))), seed)
    assert torch.equal(find_grid(weight, bits, group).weight(), weight)
    assert torch.equal(find_grid(weight, bits, 16).weight(), weight)  # smaller groups share the scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_keeps_zeros_signs_and_half_a_step(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128).to(dtype)
    weight[torch.rand(64, 128) < 0.8] = 0
    weight[3] = 0
    weight[4] = torch.finfo(dtype).smallest_normal / 8  # whose scale would be 0
    grid = find_grid(weight, bits, 32)
    rounded = grid.weight()
    assert rounded.isfinite().all() and (grid.scales > 0).all()
    assert (rounded[weight == 0] == 0).all() and (rounded * weight >= 0).all()
    most = 2 ** (bits - 1) - 1
    assert int(grid.codes.abs().max()) <= most
    step = grid.scales.double().repeat_interleave(32, dim=1)
    loss = (rounded.double() - weight.double()).abs()[5:]
    slack = 2 * most * torch.finfo(dtype).eps  # of the scale's own rounding, and of the product's
    assert (loss <= step[5:] * (0.5 + slack)).all()


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 4), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_packing_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    most = 2 ** (bits - 1)
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(-most, most, (rows, columns), generator=made, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32)) and packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 0)])
def test_what_is_written_is_the_rounded_model(
    bits: int, group: int, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    model = load(folder, dtype)
    before = zeros(model)
    cost = write_quantized(model, tmp_path, bits, group)
    assert cost["layers"] == 14 and 0 < cost["relative error of the weights"] < 0.2
    read = load_unpacked(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert all(count >= before[name] for name, count in zeros(read).items())


def test_a_model_on_the_grid_is_not_rounded_and_another_says_what_it_cost(
    folder: Path, tmp_path: Path, tiny_llama: str
) -> None:
    model = load(folder)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    for seed, layer in enumerate(layers):
        size = layer.weight.numel()
        values = on_grid(4, torch.float32, 16, 6, seed).flatten().repeat(size // 384 + 1)[:size]
        layer.weight.data.copy_(values.view_as(layer.weight))
    model.save_pretrained(tmp_path / "grid")
    told: list[str] = []
    export(tmp_path / "grid", "quantized", tmp_path / "w4", options=Options(4, 16), fresh=False, say=told.append)
    assert any("nothing was rounded" in line for line in told)
    assert torch.equal(load_unpacked(tmp_path / "w4")(IDS).logits, model(IDS).logits)
    export(folder, "quantized", tmp_path / "w8", options=Options(8, 16), fresh=False, say=told.append)
    assert any("moved the weights by" in line for line in told)
    record = json.loads((tmp_path / "w8/elsa.json").read_text())
    assert record["export"]["exact layers"] == 0 and record["export"]["relative change of the logits"] > 0
    noted = "measured before the weights were rounded"
    assert noted not in (tmp_path / "w8/README.md").read_text()  # nobody measured one
    measured = {"perplexity": {"sparse": 7.0}}
    shutil.copytree(folder, tmp_path / "measured")
    (tmp_path / "measured/elsa.json").write_text(json.dumps(measured))
    for name, expected in (("measured", True), ("grid", False)):
        (tmp_path / name / "elsa.json").write_text(json.dumps(measured))
        options = Options(4, 16)
        export(tmp_path / name, "quantized", tmp_path / "out", options=options, fresh=False, say=told.append)
        assert (noted in (tmp_path / "out/README.md").read_text()) == expected
    assert (tmp_path / "w4/model.safetensors").stat().st_size < (tmp_path / "w8/model.safetensors").stat().st_size


def test_a_model_in_several_files_stays_whole(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="100KB")
    write_quantized(model, tmp_path, 4, 16)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sum(name.endswith("weight_packed") for name in where) == 14
    assert torch.equal(load_unpacked(tmp_path)(IDS).logits, model(IDS).logits)


def test_group_sizes_that_do_not_divide_a_row_are_refused_with_those_that_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"group_size 128 does not divide the 32 columns of model.layers.0.* give 16, or 0, which"
    ):
        export(folder, "quantized", tmp_path / "out", say=lambda line: None)
    with pytest.raises(ValueError, match=r"group_size -1 does not divide"):
        export(folder, "quantized", tmp_path / "out", options=Options(4, -1), say=lambda line: None)
    with pytest.raises(ValueError, match=r"bits must be one of \(4, 8\), got 3"):
        export(folder, "quantized", tmp_path / "out", options=Options(3, 16), say=lambda line: None)
    assert not (tmp_path / "out").exists()


CHILD = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig
assert "elsa_lightning" not in sys.modules
how = {} if sys.argv[3] == "lazy" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", **how).eval()
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(expected["ids"]).logits
assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
state = model.state_dict()
assert all(torch.equal(state[name], weight) for name, weight in expected["state"].items())
"""


@needs_library
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "how"),
    [(4, 16, torch.float32, "lazy"), (8, 16, torch.bfloat16, "lazy"), (4, 0, torch.float16, "lazy"),
     (8, 0, torch.float32, "dequantize")],
)  # fmt: skip
def test_it_loads_in_plain_transformers_in_a_fresh_process(
    bits: int, group: int, dtype: torch.dtype, how: str, folder: Path, tmp_path: Path
) -> None:
    model = load(folder, dtype)
    write_quantized(model, tmp_path / "out", bits, group)
    with torch.no_grad():
        logits = model(IDS).logits
    torch.save({"ids": IDS, "logits": logits, "state": model.state_dict()}, tmp_path / "expected.pt")
    arguments = [str(tmp_path / "out"), str(tmp_path / "expected.pt"), how]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_library
def test_packing_is_that_of_the_library() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in (4, 8):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 19), dtype=torch.int8)
        assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


def test_kernels_and_positions_are_no_stack_of_experts() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels, self.out = nn.Conv1d(4, 4, 3), nn.Linear(32, 32)
            self.position = nn.Parameter(torch.zeros(1, 8, 32))

    model = Mixer()
    assert check_groups(model, 4, 16).keys() == {"out"} and stacks(model) == []
    model.gate_up = nn.Parameter(torch.zeros(4, 32, 32))
    assert stacks(model) == ["gate_up"]
    with pytest.raises(UserError, match="gate_up is a stack of experts"):
        check_groups(model, 4, 16)
