"""Samples: texts that the model generates before and after a run, to compare by reading."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from elsa_lightning.adapters import uncompiled
from elsa_lightning.callbacks.strategies import check_whole, on_first
from elsa_lightning.errors import UserError
from elsa_lightning.layout.precise import evaluating
from elsa_lightning.lm.text import load_tokenizer


class Samples(Callback):
    """Continues the same prompts greedily with the dense model before the first step and the sparse one after the last.

    The Hugging Face model is looked for in the module's attribute ``model``, and its tokenizer in ``path``, where
    :class:`~elsa_lightning.CausalLM` has them. The texts are in ``elsa_run.json`` and in ``elsa report``. Of several
    processes the first generates.

    Args:
        prompts: Texts to continue; None takes the beginnings of the first validation sequences.
        number: How many beginnings to take.
        prompt_tokens: Tokens of each beginning.
        new_tokens: Largest number of tokens that the model adds.

    Attributes:
        samples: ``prompt``, ``dense`` and ``sparse`` text of each prompt.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self, prompts: list[str] | None = None, number: int = 3, prompt_tokens: int = 24, new_tokens: int = 40
    ) -> None:
        if min(number, prompt_tokens, new_tokens) < 1 or prompts == []:
            raise UserError(
                f"number, prompt_tokens and new_tokens must be 1 or more, and prompts not empty; got {number}, "
                f"{prompt_tokens}, {new_tokens} and {prompts}"
            )
        self.prompts, self.number, self.prompt_tokens, self.new_tokens = prompts, number, prompt_tokens, new_tokens
        self.samples: list[dict[str, str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a sharded model, since no process has all of it."""
        if stage == "fit":
            check_whole(trainer, "Samples")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate with the dense model; a resumed run has its texts from the checkpoint."""
        if trainer.global_step == 0:
            self.samples = []
            self._write(trainer, pl_module, "dense")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate with the final model."""
        if trainer.global_step > 0:
            self._write(trainer, pl_module, "sparse")

    def _write(self, trainer: Trainer, pl_module: LightningModule, by: str) -> None:
        on_first(trainer, lambda: self._continue_all(trainer, pl_module, by))

    @torch.no_grad()
    def _continue_all(self, trainer: Trainer, pl_module: LightningModule, by: str) -> None:
        model = uncompiled(getattr(pl_module, "model", None))
        path = getattr(pl_module, "path", None)
        if not hasattr(model, "generate") or path is None:
            raise UserError(
                f"Samples needs a Hugging Face model that generates in the module's attribute 'model', and its "
                f"tokenizer in 'path'; {type(pl_module).__name__} has not: remove the callback"
            )
        with torch.random.fork_rng(), evaluating(model), trainer.precision_plugin.val_step_context():  # loaders draw
            self._continue(trainer, model, load_tokenizer(path), by)

    def _continue(self, trainer: Trainer, model: Any, tokenizer: Any, by: str) -> None:
        if not self.samples:
            self.samples = [{"prompt": prompt} for prompt in self.prompts or self._beginnings(trainer, tokenizer)]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for sample in self.samples:
            ids = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            ids = ids.to(next(model.parameters()).device)
            room = self.new_tokens if longest is None else min(self.new_tokens, longest - ids.shape[1])
            if room < 1 or not ids.numel():
                rank_zero_warn(
                    f"Samples: nothing can be added to the prompt {sample['prompt']!r} of {ids.shape[1]} tokens"
                )
                continue
            end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, num_beams=1,
                pad_token_id=end,
            )  # fmt: skip
            sample[by] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    def _beginnings(self, trainer: Trainer, tokenizer: Any) -> list[str]:
        """Return the beginnings of the first validation sequences; empty without such data."""
        loaders, found = trainer.val_dataloaders, list[str]()
        combined = CombinedLoader(loaders or [], "sequential")
        combined.limits = list(trainer.num_val_batches) if loaders is not None else []
        for batch, *_ in iter(combined):
            ids = batch.get("input_ids") if hasattr(batch, "get") else batch
            if not isinstance(ids, Tensor) or ids.dim() != 2:
                break
            found += [tokenizer.decode(row[: self.prompt_tokens], skip_special_tokens=True) for row in ids]
            if len(found) >= self.number:
                break
        if not found:
            rank_zero_warn("Samples: there are no validation sequences to begin with; give prompts=[...]")
        return found[: self.number]

    def state_dict(self) -> dict[str, Any]:
        """Return the texts, because a resumed run can no longer generate those of the dense model."""
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the texts."""
        self.samples = list(state_dict["samples"])
