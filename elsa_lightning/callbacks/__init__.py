"""Lightning callbacks: ElsaCallback prunes a model, KeepMask fine-tunes a sparse one; the others serve such runs.

SaveHuggingFace and Export write the model when training ends, SaveOnTerminate a checkpoint when a run has to stop;
Samples and ZeroShot evaluate the model before and after a run.
"""

from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.export import SaveHuggingFace
from elsa_lightning.callbacks.formats import Export
from elsa_lightning.callbacks.keep_mask import KeepMask
from elsa_lightning.callbacks.samples import Samples
from elsa_lightning.callbacks.terminate import SaveOnTerminate
from elsa_lightning.callbacks.zero_shot import ZeroShot

__all__ = ["ElsaCallback", "Export", "KeepMask", "Samples", "SaveHuggingFace", "SaveOnTerminate", "ZeroShot"]
