"""Models on a grid in GGUF: every weight comes back from Q4_0 and Q8_0 as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from elsa_lightning import CausalLM, ElsaCallback
from elsa_lightning.callbacks import Export
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export
from elsa_lightning.export.blocks import on_grid, to_blocks
from elsa_lightning.sets import Quantized, Unstructured
from tests.callbacks.tiny import make_trainer

gguf: Any = pytest.importorskip("gguf", reason="reads what was packed")
from gguf.quants import dequantize  # noqa: E402

# what llama.cpp's converter does of a Llama: its names, and the rows of queries and keys in another order
CONVERTER = """
import argparse, json
import gguf
from safetensors.numpy import load_file

parser = argparse.ArgumentParser()
parser.add_argument("--outtype")
parser.add_argument("--vocab-only", action="store_true")
parser.add_argument("--outfile")
parser.add_argument("model")
given = parser.parse_args()
config = json.load(open(given.model + "/config.json"))
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_name("a model")
writer.add_block_count(config["num_hidden_layers"])
writer.add_token_list(["a", "b", "ü"])
writer.add_token_scores([0.0, -1.5, 2.0])
writer.add_file_type({"f32": 0, "q8_0": 7}.get(given.outtype, 0))
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
for name, t in () if given.vocab_only else load_file(given.model + "/model.safetensors").items():
    for part, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
        if part in name:
            t = t.reshape(heads, 2, -1, t.shape[1]).swapaxes(1, 2).reshape(t.shape)
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = given.outtype == "q8_0" and t.ndim > 1
    data = gguf.quants.quantize(t, kind) if rounded else t
    writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind if rounded else None)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def grid(rows: int, columns: int, bits: int, group: int, scales: tuple[float, float] = (-10, -5)) -> Tensor:
    """Return integers times scales of bfloat16, most of them zero."""
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (rows, columns // group, group)) * (
        torch.rand(rows, columns // group, group) < 0.4
    )
    powers = torch.empty(rows, columns // group, 1).uniform_(*scales)
    codes[0] = 0  # whole blocks of zeros
    return (codes * powers.exp2().bfloat16().float()).view(rows, columns)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_a_matrix_on_a_grid_comes_back(bits: int, group: int) -> None:
    torch.manual_seed(bits + group)
    weight = grid(24, 512, bits, group)
    found = on_grid(weight, bits)
    assert found is not None
    back = dequantize(to_blocks(found, bits), gguf.GGMLQuantizationType[f"Q{bits}_0"])
    assert torch.equal(torch.from_numpy(back), weight)


def test_what_the_format_cannot_hold_is_no_grid() -> None:
    torch.manual_seed(0)
    assert on_grid(torch.randn(4, 64), 4) is None
    assert on_grid(grid(4, 48, 4, 16), 4) is None  # of 48 columns there are no blocks
    assert on_grid(grid(4, 64, 4, 16), 4) is None  # two scales in a block
    assert on_grid(grid(4, 64, 8, 32), 4) is None
    assert on_grid(grid(4, 64, 4, 32, (-30, -28)), 4) is None  # below float16
    assert on_grid(grid(4, 64, 4, 32, (17, 18)), 4) is None  # above it
    assert on_grid(grid(64, 64, 4, 32, (-17, -14)), 4) is not None  # its subnormal numbers will do
    assert on_grid(grid(64, 64, 8, 32, (-17, -14)), 8) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """A Llama whose attention is on a grid of 4 bits, and whose MLP is on one of 8."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("grid")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.copy_(grid(*p.shape, 4 if "attn" in name else 8, 32))
    model.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(place / "model")
    (place / "convert.py").write_text(CONVERTER)
    return place


@pytest.mark.parametrize(("kind", "part"), [("q4_0", "attn"), ("q8_0", "")])
def test_a_model_on_a_grid_is_packed_exactly(kind: str, part: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    told: list[str] = []
    options = Options(gguf_type=kind, converter=str(folder / "convert.py"))
    export(folder / "model", "gguf", tmp_path / "out", options=options, say=told.append)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    read = gguf.GGUFReader(str(tmp_path / "out/model.gguf"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {t.name: t for t in read.tensors}
    packed = 0
    for name, p in model.named_parameters():
        t = tensors.pop(names.get_name(name, (".weight",)))
        back = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        for some, heads in (("q_proj", 4), ("k_proj", 2)):
            if some in name:
                back = back.view(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        assert torch.equal(back, p.data), name
        assert (t.tensor_type.name == kind.upper()) == ("proj" in name and part in name), name
        packed += t.tensor_type.name == kind.upper()
    assert not tensors
    assert any(f"{packed} of 15 matrices are on a grid and packed exactly" in line for line in told)
    assert read.fields["general.file_type"].contents() == {"q4_0": 2, "q8_0": 7}[kind]
    assert read.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ü"]
    assert read.fields["tokenizer.ggml.scores"].contents() == [0.0, -1.5, 2.0]
    assert "notes" not in json.loads((tmp_path / "out/elsa.json").read_text())  # nothing was rounded


def test_a_model_on_no_grid_is_refused_in_four_bits_and_rounded_in_eight(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.mul_(torch.rand_like(p) + 0.5)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    for kind in ("q4_0", "q8_0"):
        options = Options(gguf_type=kind, converter=str(folder / "convert.py"))
        if kind == "q4_0":
            with pytest.raises(UserError, match="no matrix lies on a grid of 4 bits in groups of 32"):
                export(tmp_path / "model", "gguf", tmp_path / "out", options=options, say=lambda line: None)
        else:
            export(tmp_path / "model", "gguf", tmp_path / "out", options=options, say=lambda line: None)
    types = {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "out/model.gguf")).tensors}
    assert types == {"Q8_0", "F32"}


@pytest.mark.filterwarnings("ignore:Elsa:UserWarning")
def test_a_run_on_a_grid_ends_in_blocks(folder: Path, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    ids = torch.randint(3, 2000, (24, 16), generator=torch.Generator().manual_seed(0))
    options = Options(gguf_type="q4_0", converter=str(folder / "convert.py"))
    callback = Export(["gguf"], str(tmp_path / "out"), options=options)
    elsa = ElsaCallback(constraint=Quantized(4, 32, Unstructured(0.5)), interval=2)
    trainer = make_trainer(tmp_path, elsa, callback, max_steps=8)
    trainer.fit(CausalLM(name=str(folder / "model")), DataLoader(list(ids), batch_size=2))  # type: ignore[arg-type]
    types = [t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "out/gguf/model.gguf")).tensors]
    assert types.count("Q4_0") == 14
