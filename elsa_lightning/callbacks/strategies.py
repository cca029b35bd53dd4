"""Checks of Trainers and strategies, and what sharding strategies need before a model is saved or loaded."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.optim import Optimizer

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.saves import MethodHook
from elsa_lightning.checkpoints import check_loadable_by_fsdp1, saved_state_keys
from elsa_lightning.errors import UserError


def check_trainer(trainer: Trainer) -> None:
    """Raise UserError if weights cannot be constrained under this Trainer."""
    check_strategy(trainer.strategy)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (ModelPruning, WeightAveraging, StochasticWeightAveraging)):
            raise UserError(
                f"ElsaCallback and {type(callback).__name__} both rewrite the weights, and the zeros would be lost; "
                f"remove {type(callback).__name__} from the callbacks"
            )
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        raise UserError(
            "ElsaCallback needs to know how long the run is, to schedule its penalty: set the Trainer's max_steps or "
            "max_epochs (max_time may end it earlier)"
        )


SHARDING = (FSDPStrategy, ModelParallelStrategy)
_PATIENCE = timedelta(days=7)  # timeout of waiting processes; the end of the first process is noticed at once anyway
T = TypeVar("T")


def on_first(trainer: Trainer, work: Callable[[], T]) -> T | None:
    """Call ``work`` on the first process while the others wait, however long; every process must call this.

    The others wait in a separate process group, because that of training times out after half an hour.

    Args:
        trainer: The run's Trainer.
        work: A function that does not need the other processes.

    Returns:
        The result of ``work``; None on the other processes.

    Raises:
        Exception: An exception of ``work``; on the other processes a UserError, so that all end.
    """
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return work() if trainer.is_global_zero else None
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    found, failed, told = None, None, [""]
    if trainer.is_global_zero:
        try:
            found = work()
        except Exception as error:
            failed = error
            told = [str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    if failed is not None:
        raise failed
    if told[0]:
        raise UserError(f"process 0 failed, and with it the run: {told[0]}")
    return found


def check_whole(trainer: Trainer, who: str, instead: str = "") -> None:
    """Raise UserError if the model is sharded, for a callback that needs the whole model in one process.

    Args:
        trainer: The run's Trainer.
        who: Name of the callback.
        instead: Further advice, after leaving the callback out.
    """
    if isinstance(trainer.strategy, SHARDING):
        raise UserError(
            f"{who} needs the whole model on one device, and {type(trainer.strategy).__name__} shards it: leave the "
            f"callback out{instead}"
        )


def choose_optimizer(optimizers: list[Optimizer], index: int | None) -> Optimizer:
    """Return the optimizer whose parameters are constrained.

    Raises:
        UserError: There is no optimizer, none with that index, or several and no index was given.
    """
    names = ", ".join(f"{i}: {type(o).__name__}" for i, o in enumerate(optimizers))
    if not any(group["params"] for optimizer in optimizers for group in optimizer.param_groups):  # Lightning's mock
        raise UserError("the module has no optimizer (configure_optimizers returns none): nothing trains its weights")
    if index is None and len(optimizers) > 1:
        raise UserError(
            f"the module has {len(optimizers)} optimizers ({names}); say whose weights to prune with optimizer_index"
        )
    if not 0 <= (index or 0) < len(optimizers):
        raise UserError(f"optimizer_index is {index}, and the module's optimizers are {names}")
    return optimizers[index or 0]


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError if weights cannot be constrained under this strategy."""
    works = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
    if not isinstance(strategy, works) or isinstance(strategy, DeepSpeedStrategy):
        raise UserError(
            f"ElsaCallback works on one device, with strategy 'ddp' or 'fsdp', and with ModelParallelStrategy "
            f"(FSDP2), not with {type(strategy).__name__}, which hides the parameters it constrains; to shard a "
            f"model use lightning.pytorch.strategies.ModelParallelStrategy and shard it in configure_model, as "
            f"CausalLM does"
        )
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs["use_orig_params"]:
        raise UserError(
            "ElsaCallback needs FSDPStrategy with use_orig_params=True, Lightning's default: without it the "
            "weights of a layer cannot be told from its bias"
        )


def check_optimizer_of_fsdp(optimizer: Optimizer) -> None:
    """Raise ValueError if FSDP1 cannot save the state of this optimizer."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"{type(optimizer).__name__} of bitsandbytes trains under FSDPStrategy, but its state cannot be saved; use "
            f"elsa_lightning.optim.adam8bit.Adam8bit, which has the same kernels"
        )


def watch_fsdp(strategy: FSDPStrategy, before_saving: Callable[[], None]) -> MethodHook:
    """Call ``before_saving`` before FSDP1 gathers a state, and check before loading that it can load a checkpoint."""
    save, load = strategy.lightning_module_state_dict, strategy.load_checkpoint

    def saving() -> dict[str, Any]:
        before_saving()
        return save()

    def loading(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        check_loadable_by_fsdp1(Path(strategy.broadcast(checkpoint_path)))
        return load(checkpoint_path, *args, **kwargs)

    return MethodHook(strategy, lightning_module_state_dict=saving, load_checkpoint=loading)


def expect_what_is_loaded(
    strategy: ModelParallelStrategy, module: LightningModule, admm: ADMM, optimizer_index: int
) -> None:
    """Allocate state when a checkpoint is about to be loaded; only the strategy is told its path."""
    load = strategy.load_checkpoint

    def expecting(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        hook.remove()
        path = Path(strategy.broadcast(checkpoint_path))
        keys = saved_state_keys(path, module, admm.optimizer, optimizer_index)
        admm.expect(keys)
        trained = (p for group in admm.optimizer.param_groups for p in group["params"])  # others have other keys
        unused = [p for p in trained if p.requires_grad and p not in keys]
        for p in unused:  # else torch requires state that a parameter without gradient never had
            p.requires_grad_(False)
        try:
            return load(checkpoint_path, *args, **kwargs)
        finally:
            for p in unused:
                p.requires_grad_(True)

    hook = MethodHook(strategy, load_checkpoint=expecting)
