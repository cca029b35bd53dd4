"""KeepMaskTrainerCallback: fine-tunes a sparse model inside transformers.Trainer without losing zeros."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from elsa_lightning.adapters import has_adapter
from elsa_lightning.admm import ADMM
from elsa_lightning.integrations.hf_trainer import ElsaTrainerCallback
from elsa_lightning.keep import ZEROS, KeptZeros
from elsa_lightning.sparse import MIN_SPARSITY, Frozen, check_min_sparsity, sparse_weights

log = logging.getLogger(__name__)


class KeepMaskTrainerCallback(ElsaTrainerCallback):
    """Keeps the zeros of an already sparse model while a ``transformers.Trainer`` trains the rest.

    Works with subclasses of the Trainer too, such as TRL's::

        Trainer(model, args, train_dataset=data, callbacks=[KeepMaskTrainerCallback()])

    Gradients are masked before ``max_grad_norm`` clips them, every checkpoint has the zeros, and they are counted when
    training ends. Runs resumed by ``resume_from_checkpoint`` are bit-identical.

    Args:
        min_sparsity: See :class:`~elsa_lightning.KeepMask`, as for all other arguments.
        targets: The tensors whose zeros are kept.
        ignore: Regular expressions of parameter names whose zeros may be lost.

    Raises:
        ValueError: An argument is out of range; or, when training begins, no tensor has so many zeros, the Trainer
            shards the model (DeepSpeed, FSDP) or trains an adapter (PEFT).
    """

    def __init__(
        self, min_sparsity: float = MIN_SPARSITY, targets: list[str] | None = None, ignore: list[str] | None = None
    ) -> None:
        super().__init__(constraint=ZEROS, targets=targets, ignore=ignore)
        self.min_sparsity, self._given = check_min_sparsity(min_sparsity), targets
        self._arguments = {"min_sparsity": min_sparsity, "targets": targets, "ignore": self.ignore}
        self._restorable = True

    @property
    def keep(self) -> KeptZeros:
        """The object that keeps the zeros, once training begins; ``keep.kept`` lists the tensors."""
        assert isinstance(self.admm, KeptZeros)
        return self.admm

    def _begin(self) -> None:
        super()._begin()
        self._counts = True  # the model already has its final sparsity
        self._frozen = Frozen()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the masks from the weights, or from the checkpoint of a resumed run."""
        if has_adapter(kwargs["model"]):
            sparse_weights(kwargs["model"])  # raises with advice about adapters
        super().on_train_begin(args, state, control, **kwargs)
        if not self.keep.frozen:
            self.keep.begin()
        if state.is_world_process_zero:
            log.info("KeepMask: %s", self.keep.kept)
        self._frozen = Frozen.of(kwargs["model"], self.keep.later, self.min_sparsity)
        if self._frozen.tensors and state.is_world_process_zero:
            log.info("KeepMask: %s", self._frozen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the zeros of layers that were unfrozen, before they have gradients."""
        super().on_step_begin(args, state, control, **kwargs)
        if (more := self.keep.follow()) is not None and state.is_world_process_zero:
            log.info("KeepMask: unfrozen, %s", more)

    def _attach(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int, replicas: dist.ProcessGroup | None
    ) -> tuple[ADMM, list[tuple[int, str]]]:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = sparse_weights(model, self._given, self.ignore, trained=trained, min_sparsity=self.min_sparsity)
        keep = KeptZeros(
            optimizer, chosen.parameters, min_sparsity=self.min_sparsity, begin=False, replicas=replicas
        )  # fmt: skip
        return keep, []

    def _check_dtypes(self, args: TrainingArguments) -> None:
        """Accept any dtype: masks are integers, which every dtype holds."""

    def _say_late(self, state: TrainerState) -> None:
        """Say nothing: the zeros are in the weights, so a late start is no problem."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore zeros that something else changed, with a warning, and count all zeros.

        Raises:
            UserError: Some zeros were lost.
        """
        self.keep.finish()
        self._detach()
        said = self._frozen.lost(kwargs["model"], self.keep.tensors)
        if state.is_world_process_zero:
            zeros = sum(t.zeros for t in self.keep.kept.kept)
            log.info("KeepMask: none of the %d zeros kept was lost in %d optimizer steps", zeros, self.keep.step)
            if said is not None:
                log.warning("KeepMask: %s", said)
