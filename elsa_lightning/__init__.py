"""Elsa: surrogate-free pruning of language models by ADMM, for PyTorch Lightning.

Lee et al., 2026 (arXiv:2510.01650). Names load when they are first used, so that importing the package
costs nothing of transformers or datasets.
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
    "Unstructured",
    "Width",
    "project",
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
    "Unstructured": "sets",
    "Width": "sets",
    "project": "oneshot",
    "shrink": "slicing",
    "sparsity": "inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
