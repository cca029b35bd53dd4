"""Evaluates models and compares them: perplexity by the published protocol, and tasks of lm-eval."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_lightning.evaluation.compare import Difference, Score, difference, table, to_dict
    from elsa_lightning.evaluation.tasks import zero_shot
    from elsa_lightning.evaluation.text import perplexity

__all__ = ["Difference", "Score", "difference", "perplexity", "table", "to_dict", "zero_shot"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"perplexity": "text", "zero_shot": "tasks"}.get(name, "compare")
    return getattr(import_module(f"{__name__}.{home}"), name)
