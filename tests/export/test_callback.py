"""Export at the end of fit: as elsa export does it, and refused before training where it cannot be."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from elsa_lightning import ElsaCallback
from elsa_lightning.callbacks import Export, SaveHuggingFace
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export, load_cpu_sparse
from elsa_lightning.export.write import WRITERS
from elsa_lightning.sets import NM, Quantized, Unstructured
from tests.callbacks.tiny import At, Crash, assert_same, crash
from tests.export.models import IDS, run

pytestmark = pytest.mark.filterwarnings("ignore:Elsa:UserWarning", "ignore:Export:UserWarning")


def assert_same_tensors(one: Path, other: Path) -> None:
    (a,), (b,) = one.glob("*.safetensors"), other.glob("*.safetensors")
    assert_same(load_file(a), load_file(b), a.name)


def test_it_writes_what_the_command_writes(tiny_llama: str, tmp_path: Path) -> None:
    callback = Export(["cpu-sparse", "quantized", "hf"], str(tmp_path / "out"), options=Options(8, 16))
    saver = SaveHuggingFace(str(tmp_path / "saved"))
    run(tiny_llama, tmp_path, callback, saver)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cpu-sparse", "hf", "quantized"]
    assert callback.exported.keys() == {"cpu-sparse", "quantized", "hf"}
    assert callback.place == tmp_path / "out/hf"
    for name in callback.to:
        export(tmp_path / "saved", name, tmp_path / name, options=Options(8, 16), fresh=False, say=lambda line: None)
        assert_same_tensors(tmp_path / name, tmp_path / "out" / name)
        ours, theirs = (json.loads((place / name / "elsa.json").read_text()) for place in (tmp_path, tmp_path / "out"))
        assert ours == theirs and "sparse" in ours["perplexity"] and ours["format"] == name
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    sparse = load_cpu_sparse(tmp_path / "out/cpu-sparse")
    assert torch.allclose(dense(IDS).logits, sparse(IDS).logits, atol=1e-5)


def test_the_next_run_replaces_its_folders_and_another_runs_stay(tiny_llama: str, tmp_path: Path) -> None:
    def once(*more: Any) -> Export:
        callback = Export(["hf"], str(tmp_path / "out"))
        run(tiny_llama, tmp_path, callback, *more, steps=4)
        return callback

    (tmp_path / "out/hf").mkdir(parents=True)
    (tmp_path / "out/hf/config.json").write_text("{}")
    assert once().exported["hf"] == tmp_path / "out/hf"
    meanwhile = At(2, lambda trainer: (tmp_path / "out/hf/config.json").write_text("{}") and None)
    (tmp_path / "out/hf/config.json").unlink()
    assert once(meanwhile).exported["hf"] == tmp_path / "out_1/hf"
    assert (tmp_path / "out/hf/config.json").read_text() == "{}"
    with pytest.raises(Crash):
        once(At(2, crash))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["hf"]


def test_where_one_fails_the_others_and_the_model_are_there(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("disk is full")

    monkeypatch.setitem(WRITERS, "quantized", full)
    callback = Export(["quantized", "cpu-sparse"], str(tmp_path / "out"), options=Options(8, 16))
    with pytest.raises(
        UserError, match=r"quantized could not be exported.*disk is full; the trained model is in .*out/hf"
    ):
        run(tiny_llama, tmp_path, callback)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cpu-sparse", "hf"]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert torch.allclose(kept(IDS).logits, load_cpu_sparse(tmp_path / "out/cpu-sparse")(IDS).logits, atol=1e-5)


def test_what_cannot_be_made_is_refused_before_training(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for make, message in (
        (lambda: Export([]), "at least one format"),
        (lambda: Export(["hf", "hf"]), "each once"),
        (lambda: Export(["onnx"]), "--to must be one of hf"),  # type: ignore[list-item]
        (lambda: Export(["gguf"]), "none was found: clone"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    never = At(1, crash)  # training does not begin
    for callback, message in (
        (Export(["hf", "shrunk"]), "no set of this run asks for that"),
        (Export(["quantized"], options=Options(4, 7)), "group_size 7 does not divide the 32 columns"),
        (Export(["cpu-sparse"], options=Options(break_even=0.8)), "from 80% zeros on, and this run leaves 75%"),
    ):
        with pytest.raises(UserError, match=message):
            run(tiny_llama, tmp_path, callback, never)
    if find_spec("gguf"):
        (tmp_path / "convert.py").write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
        four = Options(gguf_type="q4_0", converter=str(tmp_path / "convert.py"))
        with pytest.raises(UserError, match=r"this run's set has none .*Unstructured"):
            run(tiny_llama, tmp_path, Export(["gguf"], options=four), never)
        with pytest.raises(UserError, match="does not take this model: NotImplementedError: BPE pre-tokenizer"):
            run(tiny_llama, tmp_path, Export(["gguf"], options=replace(four, gguf_type="f16")), never)
    with pytest.raises(UserError, match=r"convert\.py' is a file: give another folder"):
        (tmp_path / "convert.py").touch()
        run(tiny_llama, tmp_path, Export(["hf"], str(tmp_path / "convert.py/out")), never)
    (tmp_path / "out/quantized").mkdir(parents=True)
    (tmp_path / "out/quantized/thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex'"):
        run(tiny_llama, tmp_path, Export(["quantized"], str(tmp_path / "out"), options=Options(4, 16)), never)


@pytest.mark.parametrize(
    ("constraint", "given", "expected"),
    [
        (Quantized(8, 32, NM(2, 4)), Options(), (8, 32)),
        (Quantized(4), Options(), (4, 0)),
        (Quantized(4, 16), Options(bits=8), (8, 16)),
        (Quantized(2, 16), Options(), (4, 16)),  # there is no format of 2 bits
        (Unstructured(0.9), Options(group_size=0), (4, 0)),
        (None, Options(), (4, 128)),
    ],
)
def test_bits_and_groups_are_those_of_the_grid_it_was_trained_on(
    constraint: Any, given: Options, expected: tuple[int, int]
) -> None:
    its = given.on_grid(constraint)
    assert (its.bits, its.group_size) == expected


def test_a_model_trained_on_a_grid_is_exported_without_rounding(tiny_llama: str, tmp_path: Path) -> None:
    from lightning.pytorch import seed_everything
    from torch.utils.data import DataLoader

    from elsa_lightning import CausalLM
    from tests.callbacks.tiny import make_trainer

    seed_everything(0, verbose=False)
    ids = torch.randint(3, 2000, (24, 16), generator=torch.Generator().manual_seed(0))
    elsa = ElsaCallback(constraint=Quantized(4, 16, Unstructured(0.5)), interval=2)
    trainer = make_trainer(tmp_path, elsa, Export(["quantized"], str(tmp_path / "out")), max_steps=8)
    trainer.fit(CausalLM(name=tiny_llama), DataLoader(list(ids), batch_size=2))  # type: ignore[arg-type]
    done = json.loads((tmp_path / "out/quantized/elsa.json").read_text())["export"]
    assert done["scheme"] == "W4A16, groups of 16" and done["exact layers"] == done["layers"] == 14
