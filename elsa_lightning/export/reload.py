"""Reloads an export in a separate process, with public libraries alone, and measures it.

``python reload.py FOLDER GIVEN OUT PRECISION DENSE``
"""

import itertools
import json
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PROMPT, TOKENS, ROUNDS = 16, 8, 8  # tokens of the prompt, timed tokens, rounds
_SECONDS = 20.0  # after so many seconds no further round begins


class Look(NamedTuple):
    """What was measured on a reloaded export.

    Attributes:
        logits: Logits of the given token ids.
        zeros: Number of zeros of every matrix, counted after the logits were computed.
        how: The loader that was used.
        perplexity: Perplexity on the given text, or None.
        speed: Tokens a second in decoding, of the export and of the dense model (``exported``, ``dense``), with their
            dtypes (``dtype``, ``dense_dtype``) and ``threads``; empty if no text or dense model was given, or the
            models can take no further tokens.
    """

    logits: torch.Tensor
    zeros: dict[str, int]
    how: str
    perplexity: float | None
    speed: dict[str, Any]


def main(folder: str, given: str, out: str, precision: str, dense: str) -> None:
    """Load an export and write the results of :func:`look`.

    Args:
        folder: Folder of the export.
        given: safetensors file with ``ids``, int64 ``(batch, length)``, and maybe ``segments`` and ``labels``.
        out: safetensors file to write.
        precision: Precision of the perplexity, as Lightning names it.
        dense: Folder of the dense model to decode in turn with the export, or empty.
    """
    found = look(Path(folder), load_file(given), precision, Path(dense) if dense else None)
    words = {name: json.dumps(getattr(found, name)) for name in ("zeros", "how", "perplexity", "speed")}
    save_file({"logits": found.logits.contiguous()}, out, metadata=words)


@torch.no_grad()
def look(folder: Path, given: dict[str, torch.Tensor], precision: str, dense: Path | None = None) -> Look:
    """Load an export and measure it; see :func:`main`."""
    model, how = load(folder)
    logits = model.eval()(given["ids"]).logits
    zeros = {name: int((t == 0).sum()) for name, t in model.state_dict().items() if t.dim() > 1}
    zeros |= {f"{name}.weight": m.zeros for name, m in model.named_modules() if hasattr(m, "zeros")}
    if "segments" not in given:
        return Look(logits, zeros, how, None, {})
    speed = {} if dense is None else speeds(model, dense, given["segments"])
    return Look(logits, zeros, how, perplexity(model, given["segments"], given["labels"], precision), speed)


def speeds(model: Any, dense: Path, segments: torch.Tensor) -> dict[str, Any]:
    """Return tokens a second, medians over single tokens; see :class:`Look`.

    The two models decode one sequence greedily, in turn, so that other load on the machine affects both.

    Args:
        model: The exported model.
        dense: Folder of the dense model.
        segments: Token ids ``(segments, length)``; the prompt is the beginning of the first.
    """
    prompt = segments[:1, :PROMPT]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + TOKENS
    tokens = min(TOKENS, longest - prompt.shape[1])
    if tokens < 1 or not prompt.numel():
        return {}
    models = {"": model, "dense_": load(dense)[0].eval()}
    took: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name, each in models.items():
            took[name] += _times(each, prompt, tokens)
        if time.perf_counter() - began > _SECONDS:
            break
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, each in models.items():
        found[name.rstrip("_") or "exported"] = 1 / median(took[name])
        found[f"{name}dtype"] = str(next(t.dtype for t in each.state_dict().values() if t.is_floating_point()))[6:]
    return found


class _Clock:
    """A streamer for ``generate`` that records the time of every token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def _times(model: Any, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Return the seconds of each token after the first, or of the first if there is only one."""
    clock = _Clock()
    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, num_beams=1, pad_token_id=0, streamer=clock,
    )  # fmt: skip
    marks = clock.marks[1:] if tokens > 1 else clock.marks  # the streamer gets the prompt first
    return [after - before for before, after in itertools.pairwise(marks)]


@torch.no_grad()
def perplexity(model: Any, segments: torch.Tensor, labels: torch.Tensor, precision: str) -> float:
    """Return exp of the mean next-token negative log-likelihood, summed in float64.

    Args:
        model: The model, in evaluation mode.
        segments: Token ids ``(segments, length)``.
        labels: The same, -100 where nothing is scored.
        precision: Precision of the weights, or of autocast around them, as Lightning names it.
    """
    each = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    model.to(_WEIGHTS.get(precision, torch.float32))
    for module, name, buffer in each:
        if name in module._non_persistent_buffers_set:  # e.g. rotary frequencies, which must not be rounded
            module._buffers[name] = buffer
    narrow = _AUTOCAST.get(precision)
    total, count = 0.0, 0
    with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
        for ids, scored in zip(segments, labels, strict=True):
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), scored[1:], reduction="sum").double())
            count += int((scored[1:] != -100).sum())
    mean = total / max(1, count)
    return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN


def load(folder: Path) -> tuple[Any, str]:
    """Return the model of an export, and the name of its loader."""
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
