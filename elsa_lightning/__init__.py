"""Sparse training by ADMM (Elsa; Lee et al., 2026, arXiv:2510.01650), for PyTorch Lightning and any PyTorch loop.

``ElsaCallback`` prunes in a Lightning Trainer, ``ADMM`` in any loop that steps an optimizer; ``KeepMask`` and
``KeptZeros`` fine-tune a sparse model without losing zeros. ``Unstructured``, ``NM``, ``Block`` and others are the sets
to which weights are constrained; ``select`` chooses the weights. ``CausalLM`` and ``CalibrationData`` are a language
model and its text; ``project``, ``shrink`` and ``sparsity`` work on a model without training.

Names are imported on first use, so importing the package loads neither transformers nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_lightning.admm import ADMM
    from elsa_lightning.callbacks import ElsaCallback, KeepMask
    from elsa_lightning.inspection import sparsity
    from elsa_lightning.keep import KeptZeros
    from elsa_lightning.lm.data import CalibrationData
    from elsa_lightning.lm.module import CausalLM
    from elsa_lightning.oneshot import project
    from elsa_lightning.schedule import Schedule
    from elsa_lightning.selection import select
    from elsa_lightning.sets import (
        NM,
        Block,
        ByPattern,
        Experts,
        Heads,
        Layers,
        Neurons,
        Quantized,
        Unstructured,
        Width,
    )
    from elsa_lightning.slicing import shrink

__version__ = "0.1.0"
__all__ = [
    "ADMM",
    "NM",
    "Block",
    "ByPattern",
    "CalibrationData",
    "CausalLM",
    "ElsaCallback",
    "Experts",
    "Heads",
    "KeepMask",
    "KeptZeros",
    "Layers",
    "Neurons",
    "Quantized",
    "Schedule",
    "Unstructured",
    "Width",
    "project",
    "select",
    "shrink",
    "sparsity",
]

_HOMES = {
    "ADMM": "admm",
    "Block": "sets",
    "ByPattern": "sets",
    "CalibrationData": "lm.data",
    "CausalLM": "lm.module",
    "ElsaCallback": "callbacks",
    "Experts": "sets",
    "Heads": "sets",
    "KeepMask": "callbacks",
    "KeptZeros": "keep",
    "Layers": "sets",
    "NM": "sets",
    "Neurons": "sets",
    "Quantized": "sets",
    "Schedule": "schedule",
    "Unstructured": "sets",
    "Width": "sets",
    "project": "oneshot",
    "select": "selection",
    "shrink": "slicing",
    "sparsity": "inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
