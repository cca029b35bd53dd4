"""elsa export --measure: the perplexity of what was written is the one that the run measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.callbacks import Export, SaveHuggingFace
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export
from elsa_lightning.lm.perplexity import TokenPerplexity
from elsa_lightning.reports.page import page
from elsa_lightning.reports.runs import read_runs
from tests.callbacks.tiny import At, crash, every_step, make_trainer
from tests.export.models import run, sparse_folder

pytestmark = pytest.mark.filterwarnings("ignore:Elsa:UserWarning", "ignore:From a checkpoint:UserWarning")


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, text_file: Path,
    token_cache: str,
) -> Path:  # fmt: skip
    """A run on text, measured on 5 of its segments."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(0, verbose=False)
    data = CalibrationData(str(text_file), tokenizer=tiny_llama, seq_len=32, batch_size=2, cache_dir=token_cache)
    module = CausalLM(name=tiny_llama)
    trainer = make_trainer(
        folder, ElsaCallback(sparsity=0.75, interval=2), SaveHuggingFace(str(folder / "hf")),
        every_step(folder / "checkpoints"), max_steps=6, precision=request.param, limit_val_batches=3,
    )  # fmt: skip
    trainer.fit(module, data)
    return folder


def exported(source: Path, to: str, output: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    export(source, to, output, measure=True, say=told.append, **({"fresh": False} | options))
    return json.loads((output / "elsa.json").read_text()), told


def test_the_hf_export_has_the_perplexity_that_the_run_measured(finished: Path, tmp_path: Path) -> None:
    record, told = exported(finished, "hf", tmp_path / "out", fresh="bf16" not in finished.name)
    perplexity = record["perplexity"]
    assert perplexity["exported"] == pytest.approx(perplexity["sparse"], rel=1e-3)
    assert any("as recorded, up to" in line for line in told)
    assert f"| this export, reloaded | {perplexity['exported']:.3f} |" in (tmp_path / "out/README.md").read_text()
    assert record["evaluation"]["first"] == 6  # three batches of two
    assert "speed" not in record  # which is that of the dense model
    # what is exported further is measured anew, or nothing is said
    export(tmp_path / "out", "hf", tmp_path / "again", fresh=False, say=lambda line: None)
    again = json.loads((tmp_path / "again/elsa.json").read_text())
    assert "exported" not in again["perplexity"]


def test_it_is_the_perplexity_of_the_metric(finished: Path, tmp_path: Path) -> None:
    record, _ = exported(finished, "hf", tmp_path / "out")
    known = {name: value for name, value in record["evaluation"].items() if name not in ("precision", "first")}
    data = CalibrationData(tokenizer=str(finished / "hf"), **known)
    data.setup("validate")
    model, metric = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), TokenPerplexity()
    with torch.no_grad():
        for sequence in data._sets["validation"]:
            if metric.count == 6 * 31:
                break
            ids = sequence[None]  # type: ignore[call-overload]
            metric.update(model(ids).logits[:, :-1], ids[:, 1:])
    assert record["perplexity"]["exported"] == pytest.approx(float(metric.compute()), rel=5e-3)


def test_rounding_says_what_it_cost_and_cpu_sparse_is_measured_in_float32(finished: Path, tmp_path: Path) -> None:
    record, told = exported(finished, "quantized", tmp_path / "four", options=Options(4, 16))
    cost = record["perplexity"]["exported"] / record["perplexity"]["sparse"] - 1
    assert cost != 0 and any(f"rounding cost {cost:+.2%}" in line for line in told)
    assert not any("measured before the weights were rounded" in note for note in record.get("notes", []))
    record, told = exported(finished, "cpu-sparse", tmp_path / "sparse")
    assert record["perplexity"]["exported"] == pytest.approx(record["perplexity"]["sparse"], rel=5e-3)
    mixed = record["evaluation"]["precision"] == "bf16-mixed"
    assert record["perplexity"].get("exported in") == ("32-true" if mixed else None)
    for folder in ("four", "sparse"):  # timed beside the dense model
        record = json.loads((tmp_path / folder / "elsa.json").read_text())
        assert min(record["speed"]["exported"], record["speed"]["dense"]) > 0
        card = (tmp_path / folder / "README.md").read_text()
        assert f"| this export, float32 | {record['speed']['exported']:,.1f} |" in card
    assert any(re.match(r"Decodes [\d.,]+ tokens/s, the dense model \(float32\) ", line) for line in told)


def test_the_report_of_the_run_has_size_and_speed_beside_the_dense_model(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed (the extra report)")
    record, told = exported(finished, "cpu-sparse", tmp_path / "sparse")
    assert told[-1] == f"Beside its run: elsa report {finished} {tmp_path / 'sparse'}"
    (found,) = read_runs([finished, tmp_path / "sparse"])
    ours = next(saved for saved in found.saved if saved.format == "cpu-sparse")
    assert (ours.tokens_per_second, ours.dense_speed) == (record["speed"]["exported"], record["speed"]["dense"])
    dense = AutoModelForCausalLM.from_pretrained(finished / "hf")
    assert ours.dense_size == 4 * dense.num_parameters() > ours.size
    text = page([found])
    assert "On disk, dense → cpu-sparse" in text and "Tokens a second, dense → cpu-sparse" in text
    assert 'id="pareto-bytes"' in text
    exported(finished, "hf", tmp_path / "again")  # whose record has the perplexity in another order
    assert len(read_runs([finished, tmp_path / "sparse", tmp_path / "again"])) == 1


def test_a_checkpoint_knows_how_to_measure(finished: Path, tmp_path: Path) -> None:
    last, _ = exported(finished / "checkpoints/6.ckpt", "hf", tmp_path / "last")
    run_record = json.loads((finished / "hf/elsa.json").read_text())
    assert last["perplexity"]["exported"] == pytest.approx(run_record["perplexity"]["sparse"], rel=1e-3)
    assert last["perplexity"]["dense"] == run_record["perplexity"]["dense"]
    narrow, _ = exported(finished / "checkpoints/6.ckpt", "cpu-sparse", tmp_path / "narrow", dtype="bfloat16")
    assert (narrow["speed"]["dense dtype"], narrow["speed"]["dtype"]) == ("bfloat16", "float32")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    middle, told = exported(finished / "checkpoints/4.ckpt", "hf", tmp_path / "middle")
    assert "sparse" not in middle["perplexity"] and any(line.startswith("Perplexity") for line in told)


def test_another_model_or_another_text_is_not_taken_for_it(
    finished: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    AutoModelForCausalLM.from_pretrained(finished / "hf").save_pretrained(theirs)
    for file in (finished / "hf").iterdir():
        if file.suffix != ".safetensors":
            (theirs / file.name).write_bytes(file.read_bytes())
    weights = load_file(theirs / "model.safetensors")
    save_file({name: 3 * t for name, t in weights.items()}, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="and nothing was rounded in between: it is not kept"):
        exported(theirs, "hf", tmp_path / "out")
    record = json.loads((theirs / "elsa.json").read_text())
    record["evaluation"]["eval_segments"] = 5
    (theirs / "elsa.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"and the text is now .* 5 segments"):
        exported(theirs, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_cannot_be_measured_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    foreign = sparse_folder(tiny_llama, tmp_path / "foreign")
    with pytest.raises(UserError, match="nothing is known of that here"):
        exported(foreign, "hf", tmp_path / "out")
    with pytest.raises(UserError, match="measure is for CausalLM on CalibrationData"):
        run(tiny_llama, tmp_path, Export(["hf"], measure=True), At(1, crash))
