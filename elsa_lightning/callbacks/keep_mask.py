"""KeepMask: fine-tunes a sparse model in any Lightning training without losing a zero."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.rng import restore_random_states
from elsa_lightning.callbacks.strategies import check_strategy
from elsa_lightning.errors import UserError
from elsa_lightning.keep import ZEROS, KeptZeros
from elsa_lightning.selection import Selection
from elsa_lightning.sets import Constraint
from elsa_lightning.sparse import MIN_SPARSITY, Frozen, check_min_sparsity, sparse_weights


class KeepMask(ElsaCallback):
    """Keeps the zeros of an already sparse model, while ``trainer.fit`` trains the rest.

    Works with any LightningModule and any torch optimizer, in automatic and manual optimisation::

        Trainer(callbacks=[KeepMask()])

    Weights that are 0 when training begins stay 0, so any pattern is preserved, N:M too. Gradients are masked before
    they are clipped; zeros are restored after every step and before each validation and save, and counted at the end.
    The length of the run need not be known. Checkpoints hold the masks, and ``ckpt_path`` resumes exactly.

    Args:
        min_sparsity: Least fraction of zeros of a tensor whose zeros are kept. Tensors with fewer zeros are left alone,
            and a line names them.
        targets: The tensors whose zeros are kept: ``all-linear``, regular expressions of parameter names, or both. None
            takes ``all-linear`` and every other matrix with so many zeros.
        ignore: Regular expressions of parameter names whose zeros may be lost.
        optimizer_index: The optimizer whose parameters are kept sparse, in a module with several.

    Raises:
        ValueError: An argument is out of range; or, when training begins, no tensor has so many zeros, or an adapter
            alone is trained.
    """

    def __init__(
        self,
        min_sparsity: float = MIN_SPARSITY,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        optimizer_index: int | None = None,
    ) -> None:
        super().__init__(constraint=ZEROS, targets=targets, ignore=ignore, optimizer_index=optimizer_index)
        self.min_sparsity = check_min_sparsity(min_sparsity)
        self._given = targets
        self._frozen = Frozen()

    @property
    def keep(self) -> KeptZeros:
        """The object that keeps the zeros, once training begins; ``keep.kept`` lists the tensors."""
        assert isinstance(self.admm, KeptZeros)
        return self.admm

    def _check(self, trainer: Trainer) -> None:
        check_strategy(trainer.strategy)
        if any(isinstance(c, ModelPruning) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("KeepMask and ModelPruning both mask the weights: remove ModelPruning from the callbacks")

    def _choose(self, trainer: Trainer, pl_module: LightningModule, trained: list[nn.Parameter]) -> Selection:
        return sparse_weights(
            pl_module, self._given, self.ignore, trained=trained, min_sparsity=self.min_sparsity
        )  # fmt: skip

    def _attach(
        self, optimizer: Optimizer, selection: Selection, constraint: Constraint, replicas: dist.ProcessGroup | None
    ) -> ADMM:
        return KeptZeros(
            optimizer, selection.parameters, min_sparsity=self.min_sparsity, begin=False, replicas=replicas
        )  # fmt: skip

    def _say_what_is_chosen(self, constraint: Constraint, selection: Selection) -> None:
        """Say nothing yet: the weights of a checkpoint may still be loaded."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the masks from a checkpoint's state, or from the weights, which are loaded by now."""
        loaded, self._loaded = self._loaded, None
        self._running, self.keep.paused = True, False
        if loaded:
            self.keep.load_state_dict(loaded["admm"])
            if not trainer.is_last_batch:  # else done before the loader drew the next order
                restore_random_states(loaded["rng"])
        if not self.keep.frozen:
            self.keep.begin()
        rank_zero_info(f"KeepMask: {self.keep.kept}")
        self._frozen = Frozen.of(pl_module, self.keep.later, self.min_sparsity)
        if self._frozen.tensors:
            rank_zero_info(f"KeepMask: {self._frozen}")
        self._monitors.begin(trainer, count=True)
        self._begin_journal(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the zeros of layers that were unfrozen, before they have gradients."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._follow()

    def _follow(self) -> bool:
        more = self.keep.follow()
        if more is not None:
            rank_zero_info(f"KeepMask: unfrozen, {more}")
        return more is not None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask gradients before they are clipped that hooks of parameters do not see: in flat slices (FSDP1), and of
        layers that were unfrozen since the batch began.
        """
        if self.admm is None or optimizer is not self.keep.optimizer or self.keep.paused:
            return
        if self._follow() or self.keep.tensors.flat:
            self.keep.mask_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore zeros that other hooks changed, then count all zeros, and warn if tensors lost some while unwatched.

        Raises:
            UserError: Some zeros were lost.
        """
        self._hold(trainer)
        self.keep.check()
        zeros = sum(t.zeros for t in self.keep.kept.kept)
        rank_zero_info(f"KeepMask: none of the {zeros:,} zeros kept was lost in {self.keep.step:,} optimizer steps")
        if (said := self._frozen.lost(pl_module, self.keep.tensors)) is not None:
            rank_zero_warn(f"KeepMask: {said}")
        self._monitors.end(trainer)
