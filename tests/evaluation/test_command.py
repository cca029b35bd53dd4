"""elsa evaluate on what runs and exports leave; perplexity alone, which needs no lm-eval."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.cli import main
from elsa_lightning.evaluation import Score, perplexity, to_dict
from elsa_lightning.evaluation.command import write_json
from elsa_lightning.evaluation.models import load
from elsa_lightning.export.cpu_sparse import save_cpu_sparse, to_cpu_sparse


def evaluated(output: Path, *arguments: str) -> dict[str, Any]:
    main(["evaluate", *arguments, "--segments", "4", "--output", str(output), "--device", "cpu"])
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_a_checkpoint_is_measured_as_the_model_that_it_holds(
    tiny_llama: str, token_cache: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, elsa = CausalLM(tiny_llama), ElsaCallback(sparsity=0.75)
    trainer = Trainer(
        max_steps=3, accelerator="cpu", devices=1, callbacks=[elsa], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(
        module, CalibrationData(str(text_file), tokenizer=tiny_llama, seq_len=32, batch_size=2, cache_dir=token_cache)
    )
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    report = evaluated(tmp_path / "e.json", str(tmp_path / "run.ckpt"), "--perplexity", str(text_file))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (row,) = report["figures"]
    assert row["value"] == pytest.approx(perplexity(module.model, tokenizer, str(text_file), segments=4).value)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert row["dense"]["value"] == pytest.approx(perplexity(dense, tokenizer, str(text_file), segments=4).value)
    assert report["dense"] == tiny_llama and row["difference"]["how"] == "paired"


def test_a_dtype_is_that_of_both_and_without_a_dense_model_it_is_said(
    tiny_llama: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--perplexity", str(text_file), "--dtype", "bfloat16"]
    (row,) = evaluated(tmp_path / "e.json", tiny_llama, "--against", "pydocs-2m", "--seq-len", "48", *texts)["figures"]
    assert (
        row["protocol"].endswith("4 segments of 48 tokens, no BOS, bfloat16") and row["difference"]["how"] == "paired"
    )
    capsys.readouterr()
    (row,) = evaluated(tmp_path / "e.json", tiny_llama, *texts)["figures"]
    assert "dense" not in row and "no dense model to compare with: give --against NAME" in capsys.readouterr().out


def test_an_export_is_measured_as_it_computes(
    tiny_llama: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p[torch.rand(p.shape) < 0.9] = 0
    folder = tmp_path / "cpu"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = perplexity(model, tokenizer, str(text_file), segments=4).value
    save_cpu_sparse(to_cpu_sparse(model), folder)
    tokenizer.save_pretrained(folder)
    (row,) = evaluated(tmp_path / "e.json", str(folder), "--perplexity", str(text_file))["figures"]
    assert row["value"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(SystemExit) as end:
        evaluated(tmp_path / "e.json", str(folder), "--perplexity", str(text_file), "--dtype", "bfloat16")
    told = capsys.readouterr().err
    assert end.value.code == 1 and "is a cpu-sparse export, which computes in float32: leave --dtype out" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody/nothing"], "model 'nobody/nothing' is no folder, and could not be had from the hub"),
        (["./nowhere"], "model name './nowhere' is a path that does not exist"),
        (["pydocs-2m", "--perplexity", "./nowhere"], "--perplexity './nowhere' is not 'pydocs', 'c4' or 'wikitext2'"),
        (["pydocs-2m", "--perplexity", "pydocs,./nowhere"], "--perplexity './nowhere' is not 'pydocs', 'c4'"),
        (["pydocs-2m", "--against", "./nowhere"], "--against './nowhere' does not exist"),
        (["pydocs-2m", "--perplexity", "wikitext2"], "downloading Salesforce/wikitext (wikitext2) failed"),
        (["pydocs-2m", "--seq-len", "4096"], "seq_len must be from 2 to the 512 tokens"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], told: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [] if "--perplexity" in arguments else ["--perplexity", str(text_file)]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments, *texts, "--device", "cpu"])
    printed = capsys.readouterr().err
    assert end.value.code == 1 and f"elsa: error: {told}" in printed and "data.name" not in printed


def test_what_was_measured_is_written_although_the_dense_model_fails(
    tiny_llama: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "e.json", tiny_llama, "--against", str(broken), "--perplexity", str(text_file))
    report = json.loads((tmp_path / "e.json").read_text())
    assert [row["value"] > 1 for row in report["figures"]] == [True]


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    figures = to_dict([Score("a", "perplexity", math.inf, math.nan, 4), Score("b", "perplexity", math.nan, None, 4)])
    write_json(tmp_path / "e.json", {"figures": figures})
    read = json.loads((tmp_path / "e.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [(row["value"], row["error"]) for row in read["figures"]] == [(None, None)] * 2


def test_a_cast_leaves_the_frequencies_of_rotary_embeddings_as_a_saved_model_has_them(tmp_path: Path) -> None:
    module = CausalLM("pydocs-2m")
    module.configure_model()
    module.to(torch.bfloat16)
    module.model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(module.path).save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    asked = load(str(tmp_path / "saved"), None, "bfloat16", "cpu").model
    ids = torch.randint(2000, (1, 500), generator=torch.Generator().manual_seed(0))
    for model in (module.model, asked):
        found = {name: b for name, b in model.named_buffers() if name.endswith("inv_freq")}
        assert found and all(buffer.dtype == torch.float32 for buffer in found.values())
        assert torch.equal(model(ids).logits, loaded(ids).logits)
