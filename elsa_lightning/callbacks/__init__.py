"""Lightning callbacks: ElsaCallback prunes, KeepMask fine-tunes what is sparse; the others are for around these.

SaveHuggingFace and Export write the model when training ends, SaveOnTerminate a checkpoint when a run is to stop;
Samples and ZeroShot look at the model at every validation.
"""

from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.export import SaveHuggingFace
from elsa_lightning.callbacks.formats import Export
from elsa_lightning.callbacks.keep_mask import KeepMask
from elsa_lightning.callbacks.samples import Samples
from elsa_lightning.callbacks.terminate import SaveOnTerminate
from elsa_lightning.callbacks.zero_shot import ZeroShot

__all__ = ["ElsaCallback", "Export", "KeepMask", "Samples", "SaveHuggingFace", "SaveOnTerminate", "ZeroShot"]
