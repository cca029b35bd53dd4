"""Reloads an export in a process of its own, with the public libraries alone.

``python reload.py FOLDER GIVEN OUT PRECISION``
"""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Look(NamedTuple):
    """What an export gives back.

    Attributes:
        logits: Of the token ids that were given.
        zeros: Of every matrix, once the logits were computed.
        how: What loaded the model.
        perplexity: On the text that was given, or None.
    """

    logits: torch.Tensor
    zeros: dict[str, int]
    how: str
    perplexity: float | None


def main(folder: str, given: str, out: str, precision: str) -> None:
    """Write what an export gives back.

    Args:
        folder: Of the export.
        given: safetensors file with ``ids``, int64 ``(batch, length)``, and maybe ``segments`` and ``labels``.
        out: safetensors file to write.
        precision: To measure perplexity in, as Lightning names them.
    """
    found = look(Path(folder), load_file(given), precision)
    words = {name: json.dumps(getattr(found, name)) for name in ("zeros", "how", "perplexity")}
    save_file({"logits": found.logits.contiguous()}, out, metadata=words)


@torch.no_grad()
def look(folder: Path, given: dict[str, torch.Tensor], precision: str) -> Look:
    """Load an export and return what it gives back; see :func:`main`."""
    model, how = load(folder)
    logits = model.eval()(given["ids"]).logits
    zeros = {name: int((t == 0).sum()) for name, t in model.state_dict().items() if t.dim() > 1}
    zeros |= {f"{name}.weight": m.zeros for name, m in model.named_modules() if hasattr(m, "zeros")}
    found = perplexity(model, given["segments"], given["labels"], precision) if "segments" in given else None
    return Look(logits, zeros, how, found)


@torch.no_grad()
def perplexity(model: Any, segments: torch.Tensor, labels: torch.Tensor, precision: str) -> float:
    """Return exp of the mean next-token negative log-likelihood, summed in float64.

    Args:
        model: In evaluation mode.
        segments: Token ids ``(segments, length)``.
        labels: The same, -100 where nothing is scored.
        precision: Of the weights, or of autocast around them, as Lightning names them.
    """
    model.to(_WEIGHTS.get(precision, torch.float32))
    narrow = _AUTOCAST.get(precision)
    total, count = 0.0, 0
    with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
        for ids, scored in zip(segments, labels, strict=True):
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), scored[1:], reduction="sum").double())
            count += int((scored[1:] != -100).sum())
    mean = total / max(1, count)
    return math.exp(mean) if mean < 700 else math.inf


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
