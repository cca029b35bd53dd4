"""ZeroShot: evaluates the model on zero-shot tasks before and after a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from elsa_lightning.adapters import uncompiled
from elsa_lightning.callbacks.strategies import check_whole, on_first
from elsa_lightning.callbacks.versions import unused
from elsa_lightning.errors import UserError
from elsa_lightning.evaluation.command import write_json
from elsa_lightning.evaluation.compare import Score, table, to_dict
from elsa_lightning.evaluation.tasks import PUBLISHED, check_lm_eval, check_tasks, zero_shot
from elsa_lightning.lm.text import load_tokenizer


class ZeroShot(Callback):
    """Runs tasks of lm-eval on the dense model before the first step and on the sparse one after the last.

    The Hugging Face model is looked for in the module's attribute ``model``. The callback prints a table, logs
    ``zero_shot/<task>_<metric>`` and writes ``evaluation.json`` into the logger's folder. Of several processes the
    first evaluates and the others wait.

    Args:
        tasks: Tasks of lm-eval; None takes the published seven (boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge, openbookqa), whose data is downloaded.
        include_path: Folder of your own task files, whose data may be local.
        limit: Evaluate at most so many items of each task, the first ones; None takes all.
        num_fewshot: Examples before each question.
        batch_size: Sequences in a batch.
        dense: Whether to evaluate before the first step, too.
        tokenizer: Hub name or folder; None takes the module's attribute ``path``, as in CausalLM.

    Raises:
        UserError: lm-eval is not installed.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int = 0,
        batch_size: int = 8,
        dense: bool = True,
        tokenizer: str | None = None,
    ) -> None:
        check_lm_eval()
        self.tasks = list(tasks or PUBLISHED)
        self.options: dict[str, Any] = {
            "include_path": include_path, "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size,
        }  # fmt: skip
        self.dense, self.tokenizer = dense, tokenizer
        self.before: list[Score] = []
        self.after: list[Score] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a sharded model, since no process has all of it."""
        if stage == "fit":
            check_whole(trainer, "ZeroShot", ", and call elsa evaluate on what the run leaves")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training that the model and tasks can be evaluated after it."""
        self._model(pl_module)
        on_first(trainer, lambda: check_tasks(self.tasks, self.options["include_path"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the dense model; a resumed run has its scores from the checkpoint."""
        if self.dense and trainer.global_step == 0:
            self.before = self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the final model after all callbacks have saved it; print, log and write the scores."""
        self.after = self._measure(trainer, pl_module)
        folder = trainer.log_dir or trainer.default_root_dir  # on every process: reading it is a broadcast
        if not trainer.is_global_zero:
            return
        rank_zero_info(table(self.after, self.before))
        figures = {f"zero_shot/{score.name}_{score.metric}": score.value for score in self.after}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
            logger.save()
        file = unused(Path(folder) / "evaluation.json")
        write_json(file, {"step": trainer.global_step, "figures": to_dict(self.after, self.before)})

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> list[Score]:
        def measured() -> list[Score]:
            model, tokenizer = self._model(pl_module)
            return zero_shot(model, load_tokenizer(tokenizer), self.tasks, **self.options)

        return on_first(trainer, measured) or []

    def _model(self, pl_module: LightningModule) -> tuple[Any, str]:
        """Return the model and the path of its tokenizer."""
        model = uncompiled(getattr(pl_module, "model", None))
        path = self.tokenizer or getattr(pl_module, "path", None)
        if not hasattr(model, "save_pretrained") or path is None:
            raise UserError(
                f"ZeroShot needs a Hugging Face model in the module's attribute 'model', and its tokenizer in 'path' "
                f"or ZeroShot(tokenizer=...); {type(pl_module).__name__} has not"
            )
        return model, path

    def state_dict(self) -> dict[str, Any]:
        """Return the dense model's scores, because a resumed run can no longer measure them."""
        scores = [dataclasses.asdict(score) for score in self.before]
        return {"before": [{**score, "parts": list(score["parts"].items())} for score in scores]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores."""
        self.before = [Score(**{**score, "parts": dict(score["parts"])}) for score in state_dict["before"]]
