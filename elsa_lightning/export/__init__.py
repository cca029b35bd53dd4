"""What leaves the library: folders that load elsewhere."""

from elsa_lightning.export.cpu_sparse import load_cpu_sparse, save_cpu_sparse, to_cpu_sparse
from elsa_lightning.export.write import Options, export

__all__ = ["Options", "export", "load_cpu_sparse", "save_cpu_sparse", "to_cpu_sparse"]
