"""gguf and shrunk: what they need, what they refuse, and that a failure leaves nothing."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
        ("q4_1", "q4_1 has an offset a block, in which zeros are lost: give one of f32, f16, bf16, q8_0"),
        ("q4_0", "q4_0 is not written by llama.cpp's converter; write f16, and let llama-quantize make it"),
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


def test_a_smaller_model_that_computes_something_else_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "elsa_lightning.shrink", None)
    with pytest.raises(ValueError, match="cannot cut a model smaller"):
        export(folder, "shrunk", tmp_path / "out", say=lambda line: None)

    def shrink(model: Any) -> Any:
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        return model

    made = ModuleType("elsa_lightning.shrink")
    monkeypatch.setitem(sys.modules, "elsa_lightning.shrink", made)
    made.shrink = shrink  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the smaller model's logits differ by"):
        export(folder, "shrunk", tmp_path / "out", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    made.shrink = lambda model: model  # type: ignore[attr-defined]
    export(folder, "shrunk", tmp_path / "out", fresh=False, say=lambda line: None)
    assert (tmp_path / "out/elsa.json").exists()
