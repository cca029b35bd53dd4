"""Exports of sparse models to formats that load elsewhere. Names load when first used, like those of the package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_lightning.export.cpu_sparse import load_cpu_sparse, save_cpu_sparse, to_cpu_sparse
    from elsa_lightning.export.formats import Options
    from elsa_lightning.export.semi_structured import to_semi_structured, why_not_semi_structured
    from elsa_lightning.export.write import export

__all__ = [
    "Options",
    "export",
    "load_cpu_sparse",
    "save_cpu_sparse",
    "to_cpu_sparse",
    "to_semi_structured",
    "why_not_semi_structured",
]
_HOMES = {
    "Options": "formats",
    "export": "write",
    "to_semi_structured": "semi_structured",
    "why_not_semi_structured": "semi_structured",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'cpu_sparse')}"), name)
