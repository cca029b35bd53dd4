"""What the strategies that shard a model need before it is saved or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
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


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError if the weights cannot be constrained under a strategy."""
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
    """Raise ValueError if FSDP1 could not save an optimizer's state."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"{type(optimizer).__name__} of bitsandbytes trains under FSDPStrategy, but its state cannot be saved; use "
            f"elsa_lightning.optim.adam8bit.Adam8bit, which has the same kernels"
        )


def watch_fsdp(strategy: FSDPStrategy, before_saving: Callable[[], None]) -> MethodHook:
    """See what is saved before FSDP1 gathers it, and that it can load what is to be loaded."""
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
    """Make room for a checkpoint's state when it is about to be loaded; only the strategy is told which it is."""
    load = strategy.load_checkpoint

    def expecting(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        hook.remove()
        path = Path(strategy.broadcast(checkpoint_path))
        keys = saved_state_keys(path, module, admm.optimizer, optimizer_index)
        admm.expect(keys)
        unused = [p for p in module.parameters() if p.requires_grad and p not in keys]
        for p in unused:  # else torch insists on state that a parameter without gradient never had
            p.requires_grad_(False)
        try:
            return load(checkpoint_path, *args, **kwargs)
        finally:
            for p in unused:
                p.requires_grad_(True)

    hook = MethodHook(strategy, load_checkpoint=expecting)
