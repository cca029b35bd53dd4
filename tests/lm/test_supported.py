"""Models and tokenizers that the language-model client refuses, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from elsa_lightning import CalibrationData, CausalLM
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.lm import EMBEDDED_MODEL, model_path


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("BertConfig", "a masked language model"),
        ("RobertaConfig", "a masked language model"),
        ("ModernBertConfig", "a masked language model"),
        ("T5Config", "an encoder–decoder"),
        ("BartConfig", "an encoder–decoder"),
        ("Gemma3Config", "a model of text with images or sound"),
        ("LlavaConfig", "a model of text with images or sound"),
        ("ViTConfig", "no language model"),
    ],
)
def test_other_models_than_decoders_are_refused_in_one_line(
    config: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(transformers, config)().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is {kind}.*: CausalLM and elsa fit take decoders"):
        CausalLM(str(tmp_path)).configure_model()
    for command in ("plan", "fit"):
        with pytest.raises(SystemExit) as end:
            main([command, "--config=configs/elsa.yaml", f"--model.name={tmp_path}", "--trainer.logger=false"])
        assert end.value.code == 1 and f"is {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config", "OPTConfig", "Gemma3TextConfig", "Qwen3MoeConfig"])
def test_decoders_are_taken(config: str, tmp_path: Path) -> None:
    getattr(transformers, config)(num_hidden_layers=1).save_pretrained(tmp_path)
    assert CausalLM(str(tmp_path)).on_meta().num_parameters() > 0


def test_a_bert_that_was_made_a_decoder_is_one(tmp_path: Path) -> None:
    transformers.BertConfig(is_decoder=True, num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path)
    assert CausalLM(str(tmp_path)).on_meta().num_parameters() > 0


def test_an_unknown_kind_of_model_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(UserError, match=r"could not be loaded: .*of tomorrow"):
        CausalLM(str(tmp_path)).on_meta()


def small(folder: Path, words: Any, vocabulary: int) -> str:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, text_file: Path, token_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    name = small(tmp_path / "smaller", words, 1000)
    message = "has token 2047, and model .*smaller' knows 1000: save the model's own tokenizer"
    with pytest.raises(SystemExit):
        main(["plan", "--config=configs/elsa.yaml", f"--model.name={name}"])
    assert "has token 2047" in capsys.readouterr().err

    def run(model: str, text: Path) -> None:
        data = CalibrationData(str(text), tokenizer=model, seq_len=16, batch_size=2, cache_dir=token_cache)
        Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False).fit(CausalLM(model), data)

    with pytest.raises(UserError, match=message):
        run(name, text_file)
    words.add_special_tokens({"pad_token": "[pad]"})  # as many do, and no text holds it
    name = small(tmp_path / "padded", words, 2048)
    run(name, text_file)
    (tmp_path / "b.txt").write_text(" [pad] " + text_file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"has token 2048, and model .*padded' knows 2048"):
        run(name, tmp_path / "b.txt")
