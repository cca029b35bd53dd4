"""Hugging Face causal language models as a LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from elsa_lightning.lm import EMBEDDED_MODEL, model_path
from elsa_lightning.lm.perplexity import TokenPerplexity
from elsa_lightning.report import perplexity_table
from elsa_lightning.selection import count_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Tensor | dict[str, Tensor]


class CausalLM(LightningModule):
    """Any Hugging Face causal language model, trained on its next-token loss.

    Knows nothing of pruning: add :class:`~elsa_lightning.ElsaCallback` to the Trainer. A pretrained model's
    perplexity is measured on the validation data before the first step and after the last, and both are
    printed at the end.

    Batches are token ids ``(batch, seq_len)``, or a dict with ``input_ids`` and optionally
    ``attention_mask`` and ``labels`` (-100 is not scored).

    Args:
        name: Hub name (``facebook/opt-125m``) or folder of the model; ``pydocs-2m`` is the small one that
            comes with the package and needs no network.
        pretrained: Load the weights. False starts from random weights with the model's configuration.
        optimizer: Any torch optimizer. The published method uses Adam without weight decay; the second
            moment of an Adam is what weighs the projection.
        lr_schedule: Shape of the learning rate over the whole run, after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        dtype: Dtype the weights are loaded in. Keep float32 and set ``trainer.precision`` to bf16-mixed
            for mixed precision.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        attn_implementation: As in ``from_pretrained``; None lets transformers choose.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run model code that comes from the hub. Only for sources you trust.
    """

    def __init__(
        self,
        name: str = EMBEDDED_MODEL,
        pretrained: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2e-4),
        lr_schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_steps: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more optimizer steps, got {warmup_steps}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be one of 'float32', 'bfloat16', 'float16', got {dtype!r}")
        self.save_hyperparameters(ignore=["optimizer"])
        self.name = name
        self.path = model_path(name)
        self.pretrained = pretrained
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.model: PreTrainedModel | None = None
        self.perplexity = TokenPerplexity()
        self.dense_perplexity: float | None = None
        self.final_perplexity: float | None = None

    def configure_model(self) -> None:
        """Load the model; Lightning calls this once the strategy and precision are known."""
        if self.model is not None:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        source = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype_name)}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        try:
            if self.pretrained:
                self.model = AutoModelForCausalLM.from_pretrained(self.path, **source, **options)
            else:
                config = AutoConfig.from_pretrained(self.path, **source)
                build: Any = AutoModelForCausalLM.from_config
                self.model = build(config, trust_remote_code=self.trust_remote_code, **options)
        except OSError as error:
            raise OSError(
                f"model {self.name!r} could not be loaded: {error}\nWithout a network give the path of a folder "
                f"that save_pretrained wrote, or --model.name {EMBEDDED_MODEL}, the model that comes with the package."
            ) from error
        self.model.train()
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: Batch) -> tuple[Any, Tensor]:
        """Return the model's output (``loss``, ``logits``) and the labels of a batch; padding is not scored.

        Raises:
            ValueError: The sequences are longer than the model can take.
        """
        assert self.model is not None
        inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
        ids = inputs["input_ids"]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"the data has sequences of {ids.shape[1]} tokens, and {self.name!r} takes at most {longest}: "
                f"set --data.seq_len {longest} or less"
            )
        if "labels" not in inputs:
            mask = inputs.get("attention_mask")
            inputs["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
        return self.model(**inputs, use_cache=False), inputs["labels"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean next-token negative log-likelihood of the batch, in nats."""
        output, _ = self(batch)
        loss: Tensor = output.loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

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
        schedule = get_scheduler(
            "constant_with_warmup" if self.lr_schedule == "constant" else self.lr_schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Measure the dense model, unless a checkpoint brought its perplexity along."""
        if self.pretrained and self.dense_perplexity is None and self.global_step == 0:
            self.dense_perplexity = self._measure("dense perplexity")

    def on_train_end(self) -> None:
        """Measure the final model and print the closing table."""
        self.final_perplexity = self._measure("final perplexity")
        if self.final_perplexity is None:
            return
        zeros, constrained = count_zeros(self)
        for logger in self.trainer.loggers:
            logger.log_metrics({"val/final_perplexity": self.final_perplexity}, step=self.global_step)
        rank_zero_info(
            perplexity_table(
                model=self.name,
                dense=self.dense_perplexity,
                final=self.final_perplexity,
                sparsity=zeros / max(constrained, 1),
                protocol=self._protocol(),
            )
        )

    @torch.no_grad()
    def _measure(self, title: str) -> float | None:
        """Return the perplexity over the validation data, or None when there is none."""
        loaders = self.trainer.val_dataloaders
        if loaders is None or not self.trainer.enable_validation:
            return None
        combined = CombinedLoader(loaders, "sequential")
        combined.limits = list(self.trainer.num_val_batches)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        self.perplexity.reset()
        hidden = not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        with self.trainer.precision_plugin.val_step_context():
            total = int(sum(self.trainer.num_val_batches))
            for batch, _, _ in tqdm(combined, title, total=total, disable=hidden, leave=False, dynamic_ncols=True):
                self._score(self.trainer.strategy.batch_to_device(batch))
        value = float(self.perplexity.compute())
        self.perplexity.reset()
        for module, training in modes.items():
            module.training = training
        return value

    def _protocol(self) -> str:
        protocol = getattr(getattr(self.trainer, "datamodule", None), "protocol", None)
        text = "the validation data" if protocol is None else protocol()
        return f"{text}, {self.trainer.precision}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the dense perplexity, which a resumed run can no longer measure."""
        checkpoint["dense_perplexity"] = self.dense_perplexity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the dense perplexity."""
        self.dense_perplexity = checkpoint.get("dense_perplexity")
