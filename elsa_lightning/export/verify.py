"""What was written is loaded again, in a fresh process, and compared with what it was made of."""

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
    """What a folder must give back when it is loaded.

    Attributes:
        logits: Of :func:`probe`'s token ids.
        sparsity: (zeros, entries) of each matrix.
        tolerance: Largest difference of logits, relative to the largest of them.
        does: What the export did, for the card.
        rounded: Whether values are others than the model's.
        checked: What to say of a folder that its writer has read back, and transformers does not load.
    """

    logits: Tensor
    sparsity: dict[str, tuple[int, int]]
    tolerance: float
    does: dict[str, Any] = field(default_factory=dict)
    checked: str | None = None
    rounded: bool = False


def probe(model: Any) -> Tensor:
    """Return token ids that a model's logits are compared on, ``(2, 16)``."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def made_of(model: Any, does: dict[str, Any] | None = None) -> Made:
    """Return what an export of a model must give back."""
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
    """Load a folder and compare; return what to say of it, and what it gave back.

    Args:
        folder: Of the export.
        ids: Of :func:`probe`.
        made: What must come back.
        fresh: Load it in a process of its own.
        text: ``segments`` and ``labels`` to measure perplexity on, if that is wanted.
        precision: To measure in, as Lightning names them.
        dense: Folder of the dense model, to compare speed with.

    Raises:
        UserError: It does not load, or logits or zeros are not those of the model.
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
