"""Collects what a run knows about the model that it leaves, for the model card."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.ends import attached
from elsa_lightning.export.record import Record, command, settings_of, versions
from elsa_lightning.rate import peak
from elsa_lightning.watch import verdict

_SCALAR = (bool, int, float, str)


def run_record(trainer: Trainer, module: LightningModule, **known: Any) -> Record:
    """Return the record of a run at its end.

    Args:
        trainer: The run's Trainer.
        module: The module that was trained; less is known about modules other than CausalLM.
        known: More fields of the record.
    """
    methods = attached(trainer)
    return Record(
        base_model=_base_model(module),
        method=[settings_of(admm.state_dict()) for admm in methods],
        training=_training(trainer, module),
        data=_data(getattr(trainer, "datamodule", None)),
        perplexity=_perplexity(module),
        evaluation=module.evaluation() if is_causal_lm(module) else {},  # type: ignore[operator]
        convergence=_convergence(methods),
        notes=_notes(methods),
        command=command(),
        versions=versions(),
        **known,
    )


def is_causal_lm(module: LightningModule) -> bool:
    """Return whether a module is CausalLM, which this file must not import."""
    return hasattr(module, "given_dtype") and hasattr(module, "dense_perplexity")


def _base_model(module: LightningModule) -> str | None:
    if is_causal_lm(module):
        known: Any = module
        return str(known.name) if known.pretrained else None
    name = getattr(getattr(getattr(module, "model", None), "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _training(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    ours = module.hparams.items() if is_causal_lm(module) else ()  # other modules' may be secrets
    arguments = {name: value for name, value in ours if isinstance(value, _SCALAR) and name != "name"}
    found: dict[str, Any] = {"optimizer steps": trainer.global_step, "precision": trainer.precision, **arguments}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for optimizer in trainer.optimizers:
        defaults: dict[str, Any] = getattr(optimizer, "defaults", {})
        numbers = {k: v for k, v in defaults.items() if isinstance(v, (float, tuple))}
        numbers |= {"lr": peak(optimizer, schedulers)} if "lr" in numbers else {}  # the run may have chosen it
        found.setdefault("optimizer", []).append(
            f"{type(optimizer).__name__}({', '.join(f'{k}={v}' for k, v in numbers.items())})"
        )
    found["optimizer"] = ", ".join(found.get("optimizer", []))
    found["gradient clipping"] = trainer.gradient_clip_val
    found["gradient accumulation"] = trainer.accumulate_grad_batches if trainer.accumulate_grad_batches != 1 else None
    found["processes"] = trainer.world_size if trainer.world_size > 1 else None
    return {name: value for name, value in found.items() if value not in (None, "")}


def _data(data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    source = getattr(data, "source", None)
    known = {name: getattr(data, name, None) for name in ("seq_len", "batch_size", "train_sequences", "seed")}
    named = {"name": getattr(source, "name", None) or type(data).__name__}
    return named | {name: value for name, value in known.items() if isinstance(value, _SCALAR)}


def _perplexity(module: LightningModule) -> dict[str, Any]:
    dense, sparse = getattr(module, "dense_perplexity", None), getattr(module, "final_perplexity", None)
    found = {"start" if getattr(module, "started_sparse", False) else "dense": dense, "sparse": sparse}
    found["protocol"] = getattr(module, "protocol", None)
    return {name: value for name, value in found.items() if value is not None} if sparse or dense else {}


def _convergence(methods: list[ADMM]) -> str | None:
    done = [admm for admm in methods if admm.finished and admm.last_update is not None]
    return "; ".join(verdict(admm.last_update, admm.last_stationarity) for admm in done) or None


def _notes(methods: list[ADMM]) -> list[str]:
    return [
        f"The run was ended at step {admm.step} of {admm.total_steps}: its zeros are exact, and were not trained with "
        f"as planned."
        for admm in methods
        if not admm.finished
    ]
