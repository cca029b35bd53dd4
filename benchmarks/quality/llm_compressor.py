"""llm-compressor's own Wanda and SparseGPT, in a Python of its own: its versions of torch and transformers are others.

    python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0+cpu
    python benchmarks/quality/run.py --llm-compressor llmc/bin/python --methods wanda-llmc sparsegpt-llmc ...

The benchmark writes the dense model and the calibration batches into a folder, and this file, which that Python runs
there, writes the pruned weights beside them. It imports nothing of elsa_lightning.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Prune = Callable[[Any, float, Sequence[Tensor]], None]


def pruner(python: str, method: str) -> Prune:
    """Return a one-shot method as in ``peers.py``.

    Args:
        python: Interpreter that has llm-compressor.
        method: ``wanda`` or ``sparsegpt``.
    """

    def prune(module: Any, sparsity: float, calibration: Sequence[Tensor]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            module.model.save_pretrained(folder / "dense")
            torch.save(torch.cat(list(calibration)), folder / "ids.pt")
            subprocess.run([python, __file__, str(folder), method, str(sparsity)], check=True)
            pruned = torch.load(folder / "pruned.pt", weights_only=True)
        own = dict(module.model.named_parameters())
        with torch.no_grad():
            for key, weight in pruned.items():
                own[key].copy_(weight)

    return prune


def main(folder: Path, method: str, sparsity: float) -> None:
    """Prune the model of a folder."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    ids = torch.load(folder / "ids.pt", weights_only=True)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    recipe = [kind(sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])]
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}, "")), pad_token="")
    oneshot(  # which wants a tokenizer, though all is tokenized
        model=model, processor=unused, dataset=Dataset.from_dict(rows), recipe=recipe, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), output_dir=None, shuffle_calibration_samples=False,
    )  # fmt: skip
    torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "pruned.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
