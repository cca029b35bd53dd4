"""Real runs of a small module, for reports of them."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from elsa_lightning import ElsaCallback

from ..callbacks.tiny import Net, loader, make_trainer

STEPS = 20


class Measured(Net):
    """Knows a perplexity before and after, as CausalLM does."""

    def __init__(self, final: float = 30.0) -> None:
        super().__init__()
        self.dense_perplexity, self.final_perplexity, self.protocol = 20.0, final, "a text, 3 segments"

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/perplexity", self.loss(batch).exp())


def run(folder: Path, *loggers: Logger, sparsity: float = 0.9, final: float = 30.0, **options: Any) -> Path:
    """Prune a small net, with TensorBoard if nothing else is said; return the folder of its journal."""
    chosen = list(loggers) or [TensorBoardLogger(folder, name="")]
    trainer = make_trainer(
        folder, ElsaCallback(sparsity=sparsity, interval=2), ModelCheckpoint(folder / "checkpoints"),
        logger=chosen if "logger" not in options else options.pop("logger"), log_every_n_steps=1, val_check_interval=3,
        max_steps=STEPS,
    )  # fmt: skip
    trainer.fit(Measured(final), loader(), loader(), **options)
    return Path(trainer.log_dir or folder)


def both(folder: Path) -> list[Logger]:
    return [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="table")]
