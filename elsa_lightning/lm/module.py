"""CausalLM: trains any Hugging Face causal language model, as a LightningModule."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from tqdm.auto import tqdm

from elsa_lightning.callbacks.ends import attached, trains_nothing
from elsa_lightning.errors import UserError
from elsa_lightning.layout.precise import evaluating, precise_buffers
from elsa_lightning.layout.sharded import match_names
from elsa_lightning.lm import EMBEDDED_MODEL
from elsa_lightning.lm.distill import Distillation
from elsa_lightning.lm.perplexity import TokenPerplexity
from elsa_lightning.lm.pretrained import Pretrained
from elsa_lightning.lm.sharded import block_policy
from elsa_lightning.lm.supported import check_tokens
from elsa_lightning.report import Zeros, perplexity_table
from elsa_lightning.selection import count_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Tensor | Mapping[str, Tensor]


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the inputs of a model."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = f"a mapping of {sorted(inputs)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"CausalLM takes token ids (batch, seq_len), or a mapping with them as input_ids, and got {found}"
            + (f" of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else "")
            + ": change the data's collate_fn"
        )
    return inputs


class CausalLM(LightningModule):
    """Any Hugging Face causal language model, trained on its next-token loss.

    The module knows nothing of pruning: add :class:`~elsa_lightning.ElsaCallback` to the Trainer. A pretrained model's
    perplexity is measured on the validation data before the first step and after the last, and both are printed at the
    end. With ``ModelParallelStrategy`` (FSDP2) the model is sharded by its blocks, and no process ever holds it whole;
    with ``FSDPStrategy`` (FSDP1) it is sharded by its blocks after every process has loaded it whole.

    Batches are token ids ``(batch, seq_len)``, or a mapping with ``input_ids`` and optionally
    ``attention_mask`` and ``labels`` (-100 is not scored), as Hugging Face collators make them.

    Args:
        name: Hub name (``facebook/opt-125m``) or folder of the model; ``pydocs-2m`` is the small one that
            comes with the package and needs no network.
        pretrained: Load the weights. False starts from random weights with the model's configuration.
        optimizer: Any torch optimizer; projections are weighted by the second moment of an Adam. The default is an Adam
            without weight decay at 2.0001e-4, a rate that nobody would write: ``elsa fit`` takes it for none given, and
            chooses one (``learning_rate`` of ElsaCallback).
        lr_schedule: Shape of the learning rate over the whole run, after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        dtype: The dtype in which weights are loaded. For mixed precision keep float32 and set ``trainer.precision``
            to bf16-mixed.
        distillation: Weight, from 0 to 1, of the dense model's next-token distribution in the training target,
            against the text's own next token. The dense model takes 2 bytes a parameter (bfloat16) on each device,
            and one more forward pass a step. What the model adds to its loss (``output_router_logits`` of a mixture of
            experts) stays whole.
        teacher: Name or folder of the teacher, if it is not this model as it was before the first step: the dense
            model from which a sparse one was made, or a larger one with the same vocabulary.
        feature_distillation: Weight of the distance of the blocks' outputs from the dense model's
            (``feature_distance``), added to the loss. It stores the outputs of the dense model's blocks, tokens ×
            width × blocks in bfloat16.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        attn_implementation: As in ``from_pretrained``; None lets transformers choose.
        revision: Branch, tag or commit of ``name`` on the hub.
        trust_remote_code: Run model code from the hub. Only for sources you trust.
    """

    def __init__(
        self,
        name: str = EMBEDDED_MODEL,
        pretrained: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2.0001e-4),
        lr_schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_steps: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        distillation: float = 0.0,
        feature_distillation: float = 0.0,
        teacher: str | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise UserError(f"warmup_steps must be 0 or more optimizer steps, got {warmup_steps}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype must be one of 'float32', 'bfloat16', 'float16', got {dtype!r}")
        if not 0 <= distillation <= 1:
            raise UserError(f"distillation is a weight from 0 to 1, got {distillation}")
        if not 0 <= feature_distillation < float("inf"):
            raise UserError(f"feature_distillation is a weight of 0 or more, got {feature_distillation}")
        self.distillation, self.feature_distillation = distillation, feature_distillation
        if self.distils and not pretrained and teacher is None:
            raise UserError(
                "distillation needs a trained model to learn from: set pretrained or teacher, or distillation=0 and "
                "feature_distillation=0"
            )
        if teacher is not None and not self.distils:
            raise UserError(f"nothing is learnt from teacher={teacher!r}: set distillation=1.0, or leave teacher out")
        self.save_hyperparameters(ignore=["optimizer"])
        self.name = name
        self.source = Pretrained(name, "model.name", revision, trust_remote_code, attn_implementation)
        self.path = self.source.path
        self.pretrained = pretrained
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.dtype_name = dtype
        self.teacher = teacher
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PreTrainedModel | None = None
        self.given_dtype: torch.dtype | None = None  # dtype in the model's folder, known once that was read
        self._distillation: Distillation | None = None  # not a submodule, so not in checkpoints
        self.perplexity = TokenPerplexity()
        self.dense_perplexity: float | None = None
        self.final_perplexity: float | None = None
        self.protocol: str | None = None  # of both perplexities, once measured
        self._start: Zeros | None = None  # zeros of the model before the first step
        self._measured_by: dict[str, Any] | None = None  # how the run of a checkpoint measured perplexity
        self._table: str | None = None
        self.register_load_state_dict_pre_hook(match_names)  # type: ignore[no-untyped-call]

    def setup(self, stage: str) -> None:
        """Refuse an unsuitable teacher before anything is loaded; only training needs one."""
        if stage == "fit" and self.teacher is not None:
            self.source.check_teacher(self.teacher_source, self.feature_distillation > 0)

    def configure_model(self) -> None:
        """Load the model; Lightning calls this once the strategy and precision are known."""
        if self.model is not None:
            return
        self.given_dtype = self.source.config().dtype
        self.model = self._load(self.source, self.dtype_name, self.pretrained)
        assert self.model is not None
        check_tokens(self.model.config, None if self._trainer is None else self.trainer, self.name)
        self.model.train()
        if isinstance(strategy := self._strategy(), FSDPStrategy):
            strategy.kwargs.setdefault("auto_wrap_policy", block_policy(self.model))
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _strategy(self) -> Strategy | None:
        return None if self._trainer is None else self.trainer.strategy

    @property
    def teacher_source(self) -> Pretrained:
        """Where the teacher of distillation comes from: as the model itself, unless another was named."""
        if self.teacher is None:
            return self.source
        return replace(self.source, name=self.teacher, option="model.teacher", revision=None)

    def _load(self, source: Pretrained, dtype: str, weights: bool) -> Any:
        """Return a model, sharded if the strategy has a device mesh (FSDP2)."""
        if (mesh := self.device_mesh) is None:
            return source.build(dtype, weights)
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"CausalLM shards its model over the data-parallel dimension alone, and tensor_parallel_size is "
                f"{mesh['tensor_parallel'].size()}: set tensor_parallel_size: 1"
            )
        return source.sharded(dtype, mesh["data_parallel"], self.trainer.strategy.root_device, weights)

    def on_meta(self) -> Any:
        """Return the model on the meta device: only its configuration is read."""
        return self.source.on_meta(self.dtype_name)

    def on_fit_start(self) -> None:
        """Load the teacher of distillation; with ``max_steps=0`` prune at once instead."""
        if self._trainer is not None and trains_nothing(self._trainer):
            self._prune_at_once()
        elif self.distils:
            weights = self.pretrained or self.teacher is not None
            teacher = self._load(self.teacher_source, "bfloat16", weights).eval().requires_grad_(False)
            teacher = teacher if self.device_mesh is not None else teacher.to(self.device)
            self._distillation = Distillation(teacher, self.distillation, self.feature_distillation)

    def on_fit_end(self) -> None:
        """Release the teacher."""
        self._distillation = None

    @property
    def distils(self) -> bool:
        """Whether the run uses distillation."""
        return self.distillation > 0 or self.feature_distillation > 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the module, but keep computed float32 buffers in float32, as transformers does at loading."""
        with precise_buffers(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> tuple[Any, Tensor]:
        """Return the model's output (``loss``, ``logits``) and the labels of a batch; padding is not scored.

        Raises:
            ValueError: The batch is neither token ids nor a mapping with them, or too long for the model.
        """
        inputs = self._labelled(batch)
        assert self.model is not None
        return self.model(**inputs, use_cache=False), inputs["labels"]

    def _labelled(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's inputs, with labels."""
        inputs = _inputs(batch)
        assert self.model is not None
        ids = inputs["input_ids"]
        self.check_length(self.model.config, ids.shape[1])
        if "labels" not in inputs:
            mask = inputs.get("attention_mask")
            inputs["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
        return inputs

    def check_length(self, config: Any, seq_len: int) -> None:
        """Raise ValueError if sequences are too long for a model of this configuration."""
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and seq_len > longest:
            raise UserError(
                f"the data has sequences of {seq_len} tokens, and {self.name!r} takes at most {longest}: "
                f"set --data.seq_len {longest} or less"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the batch, in nats a token; ``train/loss`` is without distillation."""
        if self._distillation is None:
            loss: Tensor = self(batch)[0].loss
            self.log("train/loss", loss.detach(), prog_bar=True)
            return loss
        found = self._distillation(self.model, self._labelled(batch))
        self.log("train/loss", found.by_labels, prog_bar=True)
        return found.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch; ``val/perplexity`` is logged once per validation run."""
        self._score(batch)
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch; ``test/perplexity`` is logged once per test run."""
        self._score(batch)
        self.log("test/perplexity", self.perplexity, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return each sequence's mean next-token negative log-likelihood, in nats: ``(batch,)``."""
        output, labels = self(batch)
        metric = TokenPerplexity().to(self.device)
        losses = []
        for logits, target in zip(output.logits[:, :-1], labels[:, 1:], strict=True):
            metric.reset()
            metric.update(logits[None], target[None])
            losses.append(metric.compute().log())
        return torch.stack(losses)

    def _score(self, batch: Batch) -> None:
        output, labels = self(batch)
        self.perplexity.update(output.logits[:, :-1], labels[:, 1:])

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the learning-rate schedule over all of the run's optimizer steps."""
        from transformers import get_scheduler

        assert self.model is not None
        optimizer = self.optimizer(p for p in self.model.parameters() if p.requires_grad)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) and self.lr_schedule not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"lr_schedule {self.lr_schedule!r} needs to know how long the run is, and max_time or max_epochs=-1 do "
                f"not say it: set trainer.max_steps too, or model.lr_schedule=constant"
            )
        schedule = get_scheduler(
            "constant_with_warmup" if self.lr_schedule == "constant" else self.lr_schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(steps) if math.isfinite(steps) else None,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, but by FSDP1's own method under FSDP1, where Lightning cannot clip by norm."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            cast(FullyShardedDataParallel, strategy.model).clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _prune_at_once(self) -> None:
        """Measure, prune without training, and measure again."""
        if not attached(self.trainer):
            return
        self.on_train_start()
        for admm in attached(self.trainer):
            admm.finish()
        self.on_train_end()

    def on_train_start(self) -> None:
        """Measure the dense model; a resumed run has its perplexity from the checkpoint."""
        if self.pretrained and self.dense_perplexity is None and self.global_step == 0:
            self.dense_perplexity, self._start = self._measure("dense perplexity"), self._zeros()
            if self._start.sparse and self.distils and self.teacher is None:
                rank_zero_warn(
                    f"{self._start.shares()[0]} of the constrained weights are zero before the first step, and "
                    f"distillation learns from this start and not from a dense model: give that as model.teacher, or "
                    f"set distillation to 0"
                )
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # show both in one chart
                names = ["val/perplexity", "val/dense_perplexity"]
                logger.experiment.add_custom_scalars({"elsa": {"perplexity": ["Multiline", names]}})
        self._log_dense()

    def on_validation_start(self) -> None:
        """Check that a resumed run measures on the same text as the run of its checkpoint."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._forget_other_text()

    def _forget_other_text(self) -> None:
        """Drop a checkpoint's dense perplexity if it was measured on other text than this run uses."""
        before = self._measured_by
        if not before or not (now := self.evaluation()):  # unknown, or not known yet
            return
        self._measured_by = None
        if changed := sorted(key for key in {*now, *before} if now.get(key) != before.get(key)):
            self.dense_perplexity = None
            rank_zero_warn(
                f"the resumed run measures perplexity on other text than its checkpoint did ({', '.join(changed)} "
                f"changed), so the dense model's perplexity is left out: it was of the former"
            )

    def _log_dense(self) -> None:
        """Log the dense perplexity with every measurement, so that charts show it as a line."""
        if (dense := self.dense_perplexity) is not None:
            for logger in self.trainer.loggers:
                logger.log_metrics({"val/dense_perplexity": dense}, step=self.global_step)

    def on_validation_end(self) -> None:
        """Continue the line of the dense perplexity."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._log_dense()

    def on_train_end(self) -> None:
        """Measure the final model for the closing table."""
        self.final_perplexity = self._measure("final perplexity")
        if self.final_perplexity is None:
            return
        self._forget_other_text()
        self._log_dense()
        for logger in self.trainer.loggers:
            hp_metric = {"hp_metric": self.final_perplexity} if isinstance(logger, TensorBoardLogger) else {}
            logger.log_metrics({"val/final_perplexity": self.final_perplexity, **hp_metric}, step=self.global_step)
        dense, zeros = self.dense_perplexity, self._start
        self.protocol = self._protocol()
        self._table = perplexity_table(
            model=self.name,
            start=None if dense is None or zeros is None else (dense, zeros),
            final=(self.final_perplexity, self._zeros()),
            protocol=self.protocol,
            distilled=self.distils,
        )

    @property
    def started_sparse(self) -> bool:
        """Whether the run began with a model that was sparse already."""
        return self._start is not None and self._start.sparse

    def _zeros(self) -> Zeros:
        """Count the zeros of the constrained weights; without an ElsaCallback, of those it would constrain."""
        constrained = [tensor.p for admm in attached(self.trainer) for tensor in admm.tensors.values()]
        return Zeros(*count_zeros(self, constrained or None), *count_zeros(self, self.parameters()))

    def teardown(self, stage: str) -> None:
        """Print the closing table, now that no progress bar can overwrite it."""
        if self._table is not None:
            rank_zero_info(self._table)
            self._table = None

    @torch.no_grad()
    def _measure(self, title: str) -> float | None:
        """Return the perplexity over the validation data, or None without such data."""
        if not self.trainer.enable_validation:
            return None
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()  # Lightning does so only when training begins
        loaders = self.trainer.val_dataloaders
        if loaders is None:
            return None
        combined = CombinedLoader(loaders, "sequential")
        combined.limits = list(self.trainer.num_val_batches)
        self.perplexity.reset()
        whole = cast(nn.Module, self.trainer.strategy.model) if isinstance(self._strategy(), FSDPStrategy) else self
        hidden = not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        with evaluating(self), self.trainer.precision_plugin.val_step_context():
            total = int(sum(self.trainer.num_val_batches))
            every = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a file gets a line at each refresh
            bar = tqdm(combined, title, total=total, leave=False, dynamic_ncols=True, disable=hidden, mininterval=every)
            for batch, _, _ in bar:
                output, labels = whole(self.trainer.strategy.batch_to_device(batch))
                self.perplexity.update(output.logits[:, :-1], labels[:, 1:])
        value = float(self.perplexity.compute())
        self.perplexity.reset()
        return value

    def _protocol(self) -> str:
        protocol = getattr(getattr(self.trainer, "datamodule", None), "protocol", None)
        text = "the validation data" if protocol is None else protocol()
        loaders = CombinedLoader(self.trainer.val_dataloaders, "sequential").flattened
        done, whole = sum(self.trainer.num_val_batches), sum(sized_len(loader) or 0 for loader in loaders)
        part = f", the first {int(done)} of {whole} batches alone (limit_val_batches)" if done < whole else ""
        return f"{text}{part}, {self.trainer.precision}"

    def evaluation(self) -> dict[str, Any]:
        """Return how this run measures perplexity, so that it can be repeated; empty if unknown."""
        data: Any = getattr(self.trainer, "datamodule", None)
        loaders = self.trainer.val_dataloaders
        if loaders is None or not hasattr(data, "evaluation") or not self.trainer.enable_validation:
            return {}
        done, whole = sum(self.trainer.num_val_batches), len(loaders)
        if done < whole and self.trainer.world_size > 1:  # the segments depend on the processes
            return {}
        found: dict[str, Any] = {**data.evaluation(), "precision": str(self.trainer.precision)}
        return found | ({"first": int(done) * data.eval_batch_size} if done < whole else {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the dense perplexity, which a resumed run can no longer measure, and how it was measured."""
        checkpoint["evaluation"] = self.evaluation()
        checkpoint["dense_perplexity"] = self.dense_perplexity
        checkpoint["start_zeros"] = self._start and list(self._start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the dense perplexity.

        Raises:
            ValueError: A run is resumed from a checkpoint of weights alone.
        """
        self.dense_perplexity = checkpoint.get("dense_perplexity")
        self._measured_by = checkpoint.get("evaluation")
        zeros = checkpoint.get("start_zeros")
        self._start = zeros and Zeros(*zeros)
        if self._trainer is None or not self.trainer.training:
            return
        if "lr_schedulers" not in checkpoint:  # the optimizer's states of a distributed one are elsewhere
            raise UserError(
                "the checkpoint of ckpt_path holds weights only, and a run cannot go on from them; save without "
                "save_weights_only, or start a new run from a Hugging Face folder with --model.name"
            )
        theirs = checkpoint.get("hyper_parameters", {})
        changed = [key for key, value in self.hparams.items() if key in theirs and theirs[key] != value]
        if changed:
            changes = ", ".join(f"{key}: {theirs[key]} there, {self.hparams[key]} here" for key in changed)
            rank_zero_warn(
                f"the resumed run goes on with other settings of the model than its checkpoint's ({changes})"
            )
