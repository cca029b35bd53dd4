"""Reloads an export in a process of its own, with the public libraries alone: ``python reload.py FOLDER IDS OUT``."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, ids: str, out: str) -> None:
    """Write the logits of token ids, and the zeros of every matrix once they were computed.

    Args:
        folder: Of the export.
        ids: safetensors file with ``ids``, int64 ``(batch, length)``.
        out: safetensors file to write.
    """
    logits, zeros, how = look(Path(folder), load_file(ids)["ids"])
    save_file({"logits": logits.contiguous()}, out, metadata={"zeros": json.dumps(zeros), "how": json.dumps(how)})


@torch.no_grad()
def look(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, int], str]:
    """Return the logits of token ids, the zeros of every matrix once they were computed, and what loaded the model."""
    model, how = load(folder)
    logits = model.eval()(ids).logits
    zeros = {name: int((t == 0).sum()) for name, t in model.state_dict().items() if t.dim() > 1}
    zeros |= {f"{name}.weight": m.zeros for name, m in model.named_modules() if hasattr(m, "zeros")}
    return logits, zeros, how


def load(folder: Path) -> tuple[Any, str]:
    """Return the model of an export, and what loaded it."""
    if (folder / "cpu_sparse.safetensors").is_file():
        from elsa_lightning.export.cpu_sparse import load_cpu_sparse

        return load_cpu_sparse(folder), "load_cpu_sparse"
    if "quantization_config" in json.loads((folder / "config.json").read_text()) and not find_spec(
        "compressed_tensors"
    ):
        from elsa_lightning.export.quantized import load_unpacked

        return load_unpacked(folder), "unpacked here, because compressed-tensors is not installed"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), "transformers"


if __name__ == "__main__":
    main(*sys.argv[1:])
