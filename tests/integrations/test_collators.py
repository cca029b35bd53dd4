"""Batches as Hugging Face collators make them: mappings that are no dicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BatchEncoding, DataCollatorForLanguageModeling, DataCollatorWithPadding

from elsa_lightning import CausalLM, ElsaCallback
from tests.callbacks.tiny import make_trainer

TEXTS = ["def f(x):", "    return x + 1", "import os", "class A: pass  # and a longer comment than the others"] * 3


def batches(folder: str, kind: type, **options: Any) -> DataLoader[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DataLoader([tokenizer(text) for text in TEXTS], batch_size=4, collate_fn=kind(tokenizer, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"), [(DataCollatorForLanguageModeling, {"mlm": False}), (DataCollatorWithPadding, {})]
)
def test_a_model_trains_validates_and_predicts_on_them(
    kind: type, options: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    data = batches(tiny_llama, kind, **options)
    assert isinstance(next(iter(data)), BatchEncoding)
    module = CausalLM(tiny_llama, distillation=0.5)
    trainer = make_trainer(tmp_path, ElsaCallback(0.75), max_steps=3)
    trainer.fit(module, data, data)
    assert module.dense_perplexity is not None and module.final_perplexity is not None
    losses = torch.cat(trainer.predict(module, data))  # type: ignore[arg-type]
    assert losses.shape == (len(TEXTS),) and bool(losses.isfinite().all())


def test_their_padding_is_not_scored(tiny_llama: str) -> None:
    module = CausalLM(tiny_llama)
    module.configure_model()
    batch = next(iter(batches(tiny_llama, DataCollatorForLanguageModeling, mlm=False)))
    as_dict, as_encoding = module(dict(batch))[0].loss, module(batch)[0].loss
    assert torch.equal(as_dict, as_encoding) and bool((batch["labels"] == -100).any())


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ([torch.ones(2, 8, dtype=torch.long)], "got list"),
        (BatchEncoding({"ids": torch.ones(2, 8, dtype=torch.long)}), r"got a mapping of \['ids'\]"),
        (BatchEncoding({"input_ids": [[1, 2], [3]]}), "got a mapping of"),
        (torch.ones(8, dtype=torch.long), r"got Tensor of shape \(8,\)"),
    ],
)
def test_other_batches_are_refused_in_a_line(batch: Any, found: str, tiny_llama: str) -> None:
    with pytest.raises(ValueError, match=rf"takes token ids \(batch, seq_len\), or a mapping .*{found}.*collate_fn"):
        CausalLM(tiny_llama)(batch)


def test_data_that_gives_lists_says_so(tiny_llama: str, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.ones(4, 8, dtype=torch.long)), batch_size=2)
    with pytest.raises(ValueError, match="CausalLM takes token ids"):
        make_trainer(tmp_path, ElsaCallback(0.75), max_steps=3).fit(CausalLM(tiny_llama), data)
