"""Models that the benchmark makes: other architectures, sizes, tokenizers and texts than the embedded one."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, MixtralConfig, PreTrainedTokenizerFast, Qwen2Config

from elsa_lightning import CalibrationData, CausalLM

SECOND, THIRD, FOURTH = "packages-1m", "docstrings-1m", "mixture-2m"
END = "<|endoftext|>"


def sources(limit: int = 12_000_000) -> Iterator[str]:
    """Yield the sources of the installed torch and transformers, interleaved by a fixed stride, up to ``limit``."""
    files: list[Path] = []
    for package in ("torch", "transformers"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        files += sorted(Path(spec.origin).parent.rglob("*.py"))
    for offset in range(7):
        for file in files[offset::7]:
            text = file.read_text(errors="ignore")
            if 500 < len(text) < 100_000:
                limit -= len(text)
                yield text
            if limit < 0:
                return


def docstrings(limit: int = 8_000_000) -> Iterator[str]:
    """Yield the docstrings of each of :func:`sources`'s files as one text, up to ``limit``; mostly English."""
    for source in sources(10**9):
        try:
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, _DOCUMENTED)]
        except SyntaxError:
            continue
        text = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 100)
        if len(text) > 500:
            limit -= len(text)
            yield text
        if limit < 0:
            return


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
TEXTS = {SECOND: sources, THIRD: docstrings, FOURTH: docstrings}
CONFIGS = {
    SECOND: GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, architectures=["GPT2LMHeadModel"],
    ),
    THIRD: Qwen2Config(
        vocab_size=2048, max_position_embeddings=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ),
    FOURTH: MixtralConfig(
        vocab_size=2048, max_position_embeddings=256, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.02, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        architectures=["MixtralForCausalLM"],
    ),
}  # fmt: skip


def made_model(name: str, cache: Path, steps: int = 1500) -> tuple[str, str]:
    """Return (model folder, text folder), pre-training the model on the first call.

    4 layers of width 128 and 2048 tokens of vocabulary; ``steps`` of 16 × 128 tokens.
    """
    folder, text = cache / name, cache / f"{name}-text"
    if (folder / "model.safetensors").exists():
        return str(folder), str(text)
    text.mkdir(parents=True, exist_ok=True)
    documents = list(TEXTS[name]())
    random.Random(0).shuffle(documents)  # what is held out comes last, and is to be like the rest
    (text / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS[name](4_000_000),
        trainers.BpeTrainer(
            vocab_size=2048, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    start = cache / f"{name}-random"
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=256
    ).save_pretrained(start)
    CONFIGS[name].save_pretrained(start)
    seed_everything(0, verbose=False)
    module = CausalLM(
        str(start),
        pretrained=False,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        lr_schedule="cosine",
        warmup_steps=100,
    )
    data = CalibrationData(name=str(text), tokenizer=str(start), seq_len=128, batch_size=16)
    Trainer(max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, limit_val_batches=0).fit(
        module, data
    )
    assert module.model is not None
    partial = cache / f"{name}-partial"
    module.model.save_pretrained(partial)
    for file in start.glob("tokenizer*"):
        (partial / file.name).write_bytes(file.read_bytes())
    partial.rename(folder)
    return str(folder), str(text)
