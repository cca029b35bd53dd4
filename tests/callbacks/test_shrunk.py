"""A run whose set removes units ends in a smaller model: of the embedded one, by the command line, of a mixture."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from elsa_lightning import ByPattern, CausalLM, ElsaCallback, Experts, Heads, Neurons, Unstructured
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from tests.callbacks.test_export import ARCHITECTURES, tokens
from tests.callbacks.tiny import make_trainer

BOTH = ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)})


def fit(name: str, constraint: Any, folder: Path, *callbacks: Any) -> Any:
    """Return the model as training left it, in evaluation mode."""
    torch.manual_seed(0)
    module = CausalLM(name=name)
    make_trainer(folder, ElsaCallback(constraint=constraint), *callbacks, max_steps=8).fit(module, tokens())
    return module.model.eval()  # type: ignore[union-attr]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def assert_same_logits(one: Any, other: Any) -> None:
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_half_of_the_embedded_models_neurons_and_heads(tmp_path: Path) -> None:
    whole = SaveHuggingFace(str(tmp_path / "whole"), dtype="float32", shrink=False)
    small = SaveHuggingFace(str(tmp_path / "small"), dtype="float32")
    masked = fit("pydocs-2m", BOTH, tmp_path, whole, small)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = reloaded.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (256, 3, 3)
    saved = size(tmp_path / "whole") - size(tmp_path / "small")
    assert saved == pytest.approx(4 * 1_769_472 / 2, rel=0.01)  # half of what is not embeddings or norms
    assert_same_logits(reloaded, masked)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), masked)
    assert config.vocab_size == 2048 and reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert masked.config.intermediate_size == 512 and (tmp_path / "small/tokenizer.json").exists()


def test_a_mixture_in_training_is_the_one_that_is_saved(tmp_path: Path) -> None:
    settings = copy.deepcopy(ARCHITECTURES["mixtral"][0])
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings)).save_pretrained(tmp_path / "dense")
    masked = fit(str(tmp_path / "dense"), Experts(0.5), tmp_path, SaveHuggingFace(str(tmp_path / "hf")))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert reloaded.config.num_local_experts == 2
    assert_same_logits(reloaded, masked)


def test_a_set_of_single_weights_shrinks_only_when_asked(tiny_llama: str, tmp_path: Path) -> None:
    kept = SaveHuggingFace(str(tmp_path / "kept"))
    asked = SaveHuggingFace(str(tmp_path / "asked"), shrink=True)
    masked = fit(tiny_llama, Unstructured(0.97, scope="row"), tmp_path, kept, asked)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").config.intermediate_size == 48
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "asked")
    assert reloaded.config.intermediate_size < 48  # each row of down keeps one of 48, so that some column has none
    assert_same_logits(reloaded, masked)


def test_what_cannot_be_shrunk_is_refused_before_training(tmp_path: Path) -> None:
    settings = ARCHITECTURES["opt"][0]
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **settings)).save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="heads of 'opt' cannot be removed"):
        fit(str(tmp_path / "opt"), BOTH, tmp_path)
    neox = AutoConfig.for_model("gpt_neox", vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    AutoModelForCausalLM.from_config(neox).save_pretrained(tmp_path / "neox")
    with pytest.raises(UserError, match=r"looked for a Hugging Face model whose config\.model_type is one of"):
        fit(str(tmp_path / "neox"), Unstructured(0.5), tmp_path, SaveHuggingFace(str(tmp_path / "hf"), shrink=True))


def test_one_command_ends_in_a_small_folder(tiny_llama: str, text_file: Path, token_cache: str, tmp_path: Path) -> None:
    common = [
        f"--model.name={tiny_llama}", f"--data.name={text_file}", f"--data.cache_dir={token_cache}",
        "--data.seq_len=32", "--data.eval_segments=8", "--trainer.max_steps=8", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--model.distillation=0",
    ]  # fmt: skip
    main(["fit", "--config=configs/shrink.yaml", *common, f"--trainer.default_root_dir={tmp_path / 'a'}"])
    given = ["--elsa.sparsity=null", "--elsa.constraint=elsa_lightning.Neurons", "--elsa.constraint.fraction=0.25"]
    main(["fit", "--config=configs/elsa.yaml", *given, *common, f"--trainer.default_root_dir={tmp_path / 'b'}"])
    found = []
    for run in ("a", "b"):
        (folder,) = (tmp_path / run).rglob("hf")
        config = AutoModelForCausalLM.from_pretrained(folder).config
        found.append((config.intermediate_size, config.num_key_value_heads))
        assert "_ties" not in yaml.safe_load((folder.parent / "config.yaml").read_text())["elsa"]
    assert found == [(24, 1), (36, 2)]
