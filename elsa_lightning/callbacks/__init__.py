"""Lightning callbacks."""

from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.export import SaveHuggingFace

__all__ = ["ElsaCallback", "SaveHuggingFace"]
