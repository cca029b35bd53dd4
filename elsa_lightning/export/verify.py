"""Verifies an export: loads it again, in a fresh process, and compares it with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.export import reload
from elsa_lightning.export.folders import zeros_of


@dataclass(frozen=True)
class Made:
    """The properties that a reloaded export must have.

    Attributes:
        logits: Logits of :func:`probe`'s token ids.
        sparsity: (zeros, entries) of each matrix.
        tolerance: Largest allowed difference of logits, relative to the largest logit.
        does: What the export did, for the card.
        rounded: Whether values differ from the model's by rounding.
        checked: Message about a folder that transformers cannot load, and that its writer has checked itself.
    """

    logits: Tensor
    sparsity: dict[str, tuple[int, int]]
    tolerance: float
    does: dict[str, Any] = field(default_factory=dict)
    checked: str | None = None
    rounded: bool = False


def probe(model: Any) -> Tensor:
    """Return the token ids for comparing a model's logits, ``(2, 16)``."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def made_of(model: Any, does: dict[str, Any] | None = None) -> Made:
    """Return the properties that an export of a model must have."""
    logits = model(probe(model)).logits
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
    return Made(logits.float(), zeros_of(model.state_dict()), tolerance, does or {})


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def verify(
    folder: Path, ids: Tensor, made: Made, fresh: bool, text: Mapping[str, Tensor] | None = None, precision: str = "",
    dense: Path | None = None,
) -> tuple[str, reload.Look]:  # fmt: skip
    """Load an export and compare it; return a message, and what was measured.

    Args:
        folder: Folder of the export.
        ids: Token ids from :func:`probe`.
        made: The properties that it must have.
        fresh: Load it in a separate process.
        text: ``segments`` and ``labels`` for measuring perplexity, if that is wanted.
        precision: Precision of that measurement, as Lightning names it.
        dense: Folder of the dense model, for comparing speed.

    Raises:
        UserError: The export does not load, or its logits or zeros are not those of the model.
    """
    look = _reloaded(folder, {"ids": ids, **(text or {})}, precision, fresh, dense)
    logits = look.logits.float()
    off = difference(logits, made.logits) if logits.shape == made.logits.shape else float("inf")
    if not off <= made.tolerance:
        raise UserError(f"what was written gives other logits ({off:.1e} of the largest apart), and is not kept")
    wrong = [name for name, (count, _) in made.sparsity.items() if look.zeros.get(name) != count]
    if wrong:
        raise UserError(
            f"what was written has {look.zeros.get(wrong[0])} zeros in {wrong[0]}, not as many as the model"
        )
    exact = "the same" if off == 0 else f"within {off:.0e}"
    where = f"in a fresh process, {look.how}" if fresh else look.how
    return f"Reloaded ({where}): logits {exact}, zeros the same.", look


def _reloaded(
    folder: Path, given: Mapping[str, Tensor], precision: str, fresh: bool, dense: Path | None
) -> reload.Look:
    if not fresh:
        return reload.look(folder, dict(given), precision, dense)
    with tempfile.TemporaryDirectory() as place:
        asked, got = Path(place, "ids.safetensors"), Path(place, "logits.safetensors")
        save_file(dict(given), asked)
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-P",
            reload.__file__,
            str(folder),
            str(asked),
            str(got),
            precision,
            str(dense or ""),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"what was written does not load, and is not kept: {done.stderr.strip().splitlines()[-1:]}")
        with safe_open(got, framework="pt") as tensors:
            words = [json.loads(tensors.metadata()[key]) for key in ("zeros", "how", "perplexity", "speed")]
            return reload.Look(tensors.get_tensor("logits"), *words)
