"""gguf and shrunk: what they need, what they refuse, and that a failure leaves nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch

from elsa_lightning.cli import main
from elsa_lightning.export import Options, export
from elsa_lightning.export.gguf import _compare, check_gguf
from tests.export.models import sparse_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    return sparse_folder(tiny_llama, tmp_path_factory.mktemp("sparse") / "model")


def test_types_that_lose_zeros_and_a_missing_converter_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, message in (
        ("q4_1", "q4_1 has an offset a block, in which zeros are lost: give one of f32, f16, bf16, q8_0, q4_0"),
        ("q5_0", "q5_0 is not written here; write f16, and let llama-quantize make it"),
        ("f16", "none was found: clone https://github.com/ggml-org/llama.cpp"),
    ):
        with pytest.raises(ValueError, match=r"--gguf-type|--to gguf") as refused:
            check_gguf(kind, None)
        assert message in str(refused.value)
    with pytest.raises(SystemExit):
        main(["export", "--from", str(folder), "--to", "gguf", "--output", str(tmp_path / "out")])
    assert "none was found" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_converter_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "convert.py").write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    options = Options(converter=str(tmp_path / "convert.py"))
    with pytest.raises(ValueError, match="does not take this model: NotImplementedError: BPE pre-tokenizer"):
        export(folder, "gguf", tmp_path / "out", options=options, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["convert.py"]


def test_other_zeros_and_other_values_are_found() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(8, 16).masked_fill(torch.rand(8, 16) < 0.7, 0) for _ in range(3)]

    def compare(theirs: list[torch.Tensor], kind: str) -> str:
        return _compare([(t.numel(), t) for t in ours], [(t.numel(), t) for t in theirs], kind)

    assert "none lost" in compare([t[torch.randperm(8)] for t in reversed(ours)], "f32")  # orders may be others
    fewer = [torch.where(t == 0, 1e-6, t) for t in ours]
    with pytest.raises(ValueError, match="has other zeros"):
        compare(fewer, "f16")
    with pytest.raises(ValueError, match=r"lost .* zeros"):
        compare(fewer, "q8_0")
    with pytest.raises(ValueError, match="has other values"):
        compare([2 * t for t in ours], "q8_0")
    more = [torch.where(t.abs() < 0.01, 0, t) for t in ours]
    assert "none lost" in compare(more, "q8_0")  # small values round to zero


def test_a_model_without_empty_units_is_not_cut(
    tiny_llama: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = sparse_folder(tiny_llama, tmp_path_factory.mktemp("half") / "model", 0.3)
    with pytest.raises(ValueError, match="no neuron, head, layer or expert of this model is zero as a whole"):
        export(folder, "shrunk", tmp_path / "out", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_empty_neurons_are_cut_out_and_logits_stay(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    width = model.config.intermediate_size
    with torch.no_grad():
        for layer in model.model.layers:
            for p, dim in ((layer.mlp.gate_proj, 0), (layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
                p.weight.index_fill_(dim, torch.arange(0, width, 2), 0)
    model.save_pretrained(tmp_path / "sparse")
    export(tmp_path / "sparse", "shrunk", tmp_path / "out", say=lambda line: None)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert smaller.config.intermediate_size == width // 2
    ids = torch.arange(12)[None]
    assert torch.allclose(smaller(ids).logits, model(ids).logits, atol=1e-5)
