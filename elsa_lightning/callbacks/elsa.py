"""ElsaCallback: prunes during any Lightning training, by attaching ADMM to the module's optimizer."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from elsa_lightning import rate
from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.ends import (
    attached,
    had_ended,
    is_early,
    is_last_step,
    is_stopping,
    total_steps,
    trains_nothing,
    unfinished,
)
from elsa_lightning.callbacks.export import SaveHuggingFace
from elsa_lightning.callbacks.figures import Figures, log_settings
from elsa_lightning.callbacks.journal import Journal
from elsa_lightning.callbacks.monitors import Monitors
from elsa_lightning.callbacks.record import is_causal_lm
from elsa_lightning.callbacks.rng import random_states, restore_random_states
from elsa_lightning.callbacks.samples import Samples
from elsa_lightning.callbacks.saves import BeforeSaving, MethodHook, Saves
from elsa_lightning.callbacks.strategies import (
    check_optimizer_of_fsdp,
    check_trainer,
    choose_optimizer,
    expect_what_is_loaded,
    watch_fsdp,
)
from elsa_lightning.errors import UserError
from elsa_lightning.forms import Prox, make_form
from elsa_lightning.layout.fsdp1 import mark_slices, settle
from elsa_lightning.layout.lowbit import StateDtype, check_state_dtype
from elsa_lightning.layout.sharded import match_names
from elsa_lightning.report import shares_line
from elsa_lightning.schedule import PenaltySchedule, Schedule
from elsa_lightning.selection import ALL_LINEAR, Selection, select
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.unstructured import one_of
from elsa_lightning.watch import verdict


class ElsaCallback(Callback):
    """Prunes the model during ``trainer.fit`` by ADMM (Lee et al., 2026, arXiv:2510.01650).

    Works with any LightningModule and any torch optimizer, in automatic and manual optimisation::

        Trainer(callbacks=[ElsaCallback(sparsity=0.9)], max_steps=1000)

    The loss stays the module's own. The state is in the optimizer's state, so Lightning's checkpoints hold it and
    ``ckpt_path`` resumes exactly. The zeros are exact before the checkpoint of the last step is written; a run that
    ends early gets exact zeros too, and can be resumed. With ``max_steps=0`` the model is brought into the set at
    once, by magnitude.

    Args:
        sparsity: Fraction of zeros in all constrained tensors together, 0 ≤ sparsity < 1.
        constraint: The set of sparse weights, if it is not ``Unstructured(sparsity)``. Give one of the two.
        penalty: How strongly the weights, or the dual of pruned weights, are bound to the set: κ, without a unit, for
            ``linearized``, ``decoupled`` and ``feedback``; the published λ for ``coupled`` and ``published``. None
            takes the form's default: 4, 2, 2, 0.01, 0.01.
        penalty_schedule: How the penalty reaches that value.
        prox: The form of the x-update. ``linearized``: the weights are on the set after every step, and the dual of
            pruned weights sums their optimizer steps, scaled so that gradient noise alone cannot bring a weight back;
            ``decoupled``: a pull towards the set in the optimizer's metric; ``coupled``: a pull through the gradient;
            ``published``: the same, exactly as in the paper; ``feedback``: a dual that never forgets, for short runs.
        interval: Optimizer steps between projections; None takes a 256th of the ADMM phase, at most 32.
        ramp: Fraction of all steps over which the sparsity rises from 70 % to its target. A target of 70 % or less
            holds from the first projection; neurons, heads, layers and experts are removed one by one from the start.
        frozen: Fraction of all steps, the last ones, in which the mask is fixed and the zeros are exact.
        state_dtype: The dtype of the number that the method stores for each weight: ``float32``, ``bfloat16`` or
            ``float8_e4m3fn``.
        targets: What to constrain: ``all-linear`` (every weight that multiplies, except embeddings, output layers,
            adapters and depthwise convolutions), or regular expressions of parameter names, or both.
        ignore: Regular expressions of parameter names that stay dense.
        optimizer_index: The optimizer whose parameters are pruned, in a module with several; those of the others stay
            dense.
        total_steps: Optimizer steps of the whole run, if Lightning's count differs: with manual optimisation that does
            not step at every batch, or several optimizers that step unequally. None asks Lightning.
        learning_rate: ``auto`` scales the learning rates of an Adam, and of its schedule, to a peak that suits how much
            the set takes from the weights and how wide and deep the model is; see :mod:`elsa_lightning.rate`. None
            keeps the optimizer's rate, and warns if it is far from that one; but ``elsa fit`` takes ``auto`` if its
            default optimizer is given no rate.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        constraint: Constraint | None = None,
        penalty: float | None = None,
        penalty_schedule: PenaltySchedule = Schedule.shape,
        prox: Prox = "linearized",
        interval: int | None = Schedule.interval,
        ramp: float = Schedule.ramp,
        frozen: float = Schedule.frozen,
        state_dtype: StateDtype = "float32",
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        optimizer_index: int | None = None,
        learning_rate: Literal["auto"] | None = None,
        total_steps: int | None = None,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise UserError(f"total_steps must be 1 or more optimizer steps, or None, got {total_steps}")
        self.total_steps = total_steps
        if learning_rate not in ("auto", None):
            raise UserError(
                f"learning_rate is 'auto' or None, got {learning_rate!r}: a number belongs to the optimizer (in YAML "
                f"model.optimizer.init_args.lr)"
            )
        self.learning_rate = learning_rate
        self.constraint = one_of(sparsity, constraint)
        self.schedule = Schedule(penalty, penalty_schedule, interval, ramp, frozen)
        make_form(prox).check(self.schedule, self.constraint)
        self.prox = prox
        self.state_dtype = check_state_dtype(state_dtype)
        self.targets = list(targets or [ALL_LINEAR])
        self.ignore = list(ignore or [])
        self.optimizer_index = optimizer_index
        self.admm: ADMM | None = None
        self._first_step = 0  # optimizer steps made before pruning began
        self._hooks: list[RemovableHandle | MethodHook | Saves] = []  # on module, strategy, trainer and optimizer
        self._saves: Saves | None = None
        self._running = False
        self._monitors = Monitors()
        self._names: RemovableHandle | None = None
        self._fits = True
        self._loaded: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        """Reset what belongs to one fit: logging, journal, and flags."""
        self._figures, self._journal = Figures(), Journal()
        self._short = False  # whether the run ends before its schedule does
        self._moved = False  # whether it was warned that something changed weights after the zeros were exact

    # ------------------------------------------------------------------ start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsuitable Trainer, before any data or model is loaded."""
        self._loaded, self._fits = None, stage == "fit"  # a checkpoint is restored after this
        self._names = pl_module.register_load_state_dict_pre_hook(match_names)  # type: ignore[no-untyped-call]
        if not self._fits:
            return
        self._monitors = Monitors()
        self._check(trainer)
        # put first, so that the zeros are exact before any other callback saves or exports when training ends
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer)
        self._monitors.check(trainer, self.schedule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters and attach to their optimizer, whose state is restored after this."""
        self._begin()
        if trains_nothing(trainer) and self._loaded is not None:
            raise UserError(
                "with max_steps 0 a model is pruned at once, which goes on with no run: leave ckpt_path out, or give "
                "the run's own max_steps"
            )
        optimizer, strategy = choose_optimizer(trainer.optimizers, self.optimizer_index), trainer.strategy
        others = [c for c in trainer.callbacks if isinstance(c, ElsaCallback) and c is not self]  # type: ignore[attr-defined]
        if any((other.optimizer_index or 0) == (self.optimizer_index or 0) for other in others):
            raise UserError(
                "two ElsaCallbacks constrain the weights of one optimizer: give each its own optimizer_index, or join "
                "them (targets, constraint)"
            )
        if others:
            self._figures = Figures(f"elsa_{self.optimizer_index or 0}")
        if isinstance(strategy, FSDPStrategy):
            check_optimizer_of_fsdp(optimizer)
            mark_slices(strategy.model or pl_module)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        constraint = self.constraint.fitted(pl_module)
        selection = self._choose(trainer, pl_module, trained).within(constraint)
        self._take_hooks_off()
        if self.admm is not None:
            self.admm.detach()
        self._running = False  # a learning-rate finder may train before the run begins
        # registered before ADMM's own hook, which reads paused
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._mind_the_tuner(trainer)))
        several = isinstance(strategy, DDPStrategy) and trainer.world_size > 1
        self.admm = self._attach(optimizer, selection, constraint, dist.group.WORLD if several else None)
        self.admm.paused = True
        before_saving = BeforeSaving(lambda: self._before_saving(trainer))
        if isinstance(strategy, FSDPStrategy):
            self._hooks.append(watch_fsdp(strategy, before_saving))
        else:
            hook: RemovableHandle = pl_module.register_state_dict_pre_hook(before_saving)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        self._saves = Saves(trainer, lambda: not self._is_exact())
        self._hooks.append(self._saves)
        if isinstance(strategy, ModelParallelStrategy):
            expect_what_is_loaded(strategy, pl_module, self.admm, self.optimizer_index or 0)
        self._say_what_is_chosen(constraint, selection)
        if self._writes(trainer):
            log_settings(trainer, pl_module, self.admm, self.learning_rate)

    def _writes(self, trainer: Trainer) -> bool:
        """Return whether this is the first of several such callbacks, which writes settings and journal of the run."""
        return next(c for c in trainer.callbacks if isinstance(c, ElsaCallback)) is self  # type: ignore[attr-defined]

    def _choose(self, trainer: Trainer, pl_module: LightningModule, trained: list[nn.Parameter]) -> Selection:
        several = len(trainer.optimizers) > 1  # a single one must train all selected parameters
        return select(pl_module, self.targets, self.ignore, trained=trained if several else None, quiet=True)

    def _attach(
        self, optimizer: Optimizer, selection: Selection, constraint: Constraint, replicas: dist.ProcessGroup | None
    ) -> ADMM:
        return ADMM(
            optimizer,
            selection.parameters,
            constraint,
            total_steps=1,  # until on_train_start: asking Lightning now would reset stateful data loaders
            schedule=self.schedule,
            prox=self.prox,
            state_dtype=self.state_dtype,
            replicas=replicas,
        )

    def _say_what_is_chosen(self, constraint: Constraint, selection: Selection) -> None:
        rank_zero_info(f"{constraint}: {selection.summary()}")
        if warning := selection.warning():
            rank_zero_warn(warning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of a checkpoint, after Lightning has restored model, optimizer and loops."""
        assert self.admm is not None
        loaded, self._loaded = self._loaded, None
        self._first_step = loaded["first_step"] if loaded else trainer.global_step // len(trainer.optimizers)
        self.admm.total_steps = max(1, (self.total_steps or total_steps(trainer)) - self._first_step)
        self._running, self.admm.paused = True, False
        if began := loaded is not None and loaded["admm"]["step"] > 0:  # at 0 a tuner restored the start
            self.admm.load_state_dict(loaded["admm"])
        if loaded:
            # at the end of an epoch load_state_dict has done this, before the loader drew the order of the next epoch
            if not trainer.is_last_batch:
                restore_random_states(loaded["rng"])
        elif self._first_step > 0:
            if self.admm.loaded:
                raise UserError(
                    "the checkpoint's optimizer holds the masks of another callback or optimizer_index: resume with "
                    "that of the saved run, or start a new run from its weights without ckpt_path"
                )
            rank_zero_warn(
                f"training goes on from step {self._first_step} without a state of ElsaCallback, so pruning begins "
                f"here and has the remaining {self.admm.total_steps} optimizer steps"
            )
        if not began:
            self._mind_the_rate(trainer, pl_module)
        self._monitors.begin(trainer, count=self.admm.frozen, stale=loaded.get("stale", ()) if loaded else ())
        self._begin_journal(trainer)

    def _begin_journal(self, trainer: Trainer) -> None:
        if self._writes(trainer):
            self._journal.begin(trainer)

    def _mind_the_rate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the learning rate, or warn if the optimizer's rate looks wrong for the size of the cut."""
        assert self.admm is not None
        if self.learning_rate is None and not rate.is_adam(self.admm.optimizer):
            return  # for other optimizers the rate does not determine the length of a step
        settle(trainer.strategy.model or pl_module)
        damage = self.admm.damage()
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self.learning_rate == "auto":
            chosen = rate.choose(self.admm.optimizer, schedulers, damage)
            rank_zero_info(f"Elsa: peak learning rate {chosen:.3g}: {damage}")
        elif (said := rate.doubt(self.admm.optimizer, damage, schedulers)) is not None:
            rank_zero_warn(said)

    def _mind_the_tuner(self, trainer: Trainer) -> None:
        """Pause ADMM during the steps of a tuner, which disables callbacks and undoes its steps afterwards."""
        if self.admm is not None:
            self.admm.paused = not self._running or self not in trainer.callbacks  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ during

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that early stopping which acts at an epoch's end, all of whose hooks have logged, finds its metric."""
        self._monitors.look(trainer, epoch_ended=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Resume after a request to stop was not heeded (min_steps, min_epochs), or a tuner restored a checkpoint."""
        assert self.admm is not None
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self.admm.load_state_dict(loaded["admm"])
        if self.admm.suspended:
            settle(trainer.strategy.model or pl_module)
            self.admm.resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a new update; make the zeros exact after the last step and before its checkpoint."""
        assert self.admm is not None
        self._figures.log(trainer, pl_module, self.admm, outputs)
        self._finish_if_last(trainer)
        self._suspend_if_stopping(trainer)
        self._journal.note(trainer, pl_module, outputs)
        if not self._monitors.count and all(admm.frozen for admm in attached(trainer)):
            self._monitors.open(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the zeros exact if the run is about to end, so that its final model is validated; let metrics count."""
        if self._fits:
            self._suspend_if_stopping(trainer)
            if not trainer.sanity_checking:
                self._monitors.before_validation(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Restore the zeros in a fit, in case the module swapped other weights in for validation."""
        if batch_idx == 0 and self._fits and self.admm is not None and not trainer.sanity_checking:
            self._hold(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that early stopping, which is disabled until the mask is fixed, will find its metric."""
        if self._fits and not trainer.sanity_checking:
            self._monitors.look(trainer, epoch_ended=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the zeros exact if the last epoch was cut short by ``on_train_batch_start``."""
        self._finish_if_last(trainer)

    def _finish_if_last(self, trainer: Trainer) -> None:
        """Make the zeros exact at the planned end, resumably if the schedule is not over."""
        assert self.admm is not None
        if is_last_step(trainer):
            self._short = is_early(self.admm)
            self._finish(trainer, resumable=self._short)

    def _finish(self, trainer: Trainer, resumable: bool) -> None:
        assert self.admm is not None
        settle(trainer.strategy.model or trainer.lightning_module)
        self.admm.finish(resumable)

    def _suspend_if_stopping(self, trainer: Trainer) -> None:
        """Make the zeros exact, resumably, if the run is about to stop; the request may still be withdrawn."""
        if self.admm is not None and is_stopping(trainer):
            self._finish(trainer, resumable=True)

    def _before_saving(self, trainer: Trainer) -> None:
        """Make sure that anything saved after a request to stop has exact zeros."""
        assert self.admm is not None
        self._suspend_if_stopping(trainer)
        self._hold(trainer)

    def _is_exact(self) -> bool:
        return self.admm is not None and (self.admm.finished or self.admm.suspended)

    def _hold(self, trainer: Trainer) -> None:
        """Count weights that left the set after they were exactly in it, and restore them."""
        if self.admm is None or not (self.admm.frozen or self.admm.suspended):
            return
        if self.admm.sharded:
            settle(trainer.strategy.model or trainer.lightning_module)
        moved = self.admm.stray()  # counted on this process alone; hold is local too
        if not moved:
            return
        self.admm.hold()
        if not self._moved:
            self._moved = True
            rank_zero_warn(
                f"Elsa: {moved:,} weights that the mask does not keep were moved after their zeros were made exact, "
                f"and are 0 again. Whatever moves weights outside the optimizer's step does that: averaged weights "
                f"that are swapped in, an optimizer that swaps them in on_train_end, a module's own hook after the "
                f"batch. Swap before validation and before training ends, and average from when the mask is fixed"
            )

    # ------------------------------------------------------------------ end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring a model without training (``max_steps=0``) into the set at once, by magnitude."""
        if self.admm is not None and trains_nothing(trainer) and not self.admm.finished:
            self._finish(trainer, resumable=False)
        if self._loaded is not None and had_ended(trainer):
            self._end_again(trainer, pl_module)
        if self._writes(trainer):
            self._journal.end(trainer, pl_module)
        if not (self._running or self._loaded or trains_nothing(trainer) or trainer.global_step):
            raise UserError(
                "no batch of training data was seen, so nothing was pruned: there are none (limit_train_batches=0), or "
                "all together are shorter than a batch that may not be smaller (drop_last)"
            )

    def _end_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what follows the last step of a run that had ended, as an export that failed then.

        Raises:
            UserError: The run had not ended, and has no step left.
        """
        ending: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for state in (c._loaded["admm"] for c in ending if isinstance(c, ElsaCallback) and c._loaded is not None):
            if state["phase"] not in ("finished", "suspended"):
                raise UserError(
                    f"nothing was trained: the checkpoint is of step {trainer.global_step}, and "
                    f"max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs} leave no further one, but its "
                    f"zeros are not exact after {state['step']} of {state['total_steps']} steps. Give the max_steps "
                    f"and max_epochs of the run"
                )
        rank_zero_info("Elsa: the checkpoint is of a run that had ended; its model is measured and saved again")
        for callback in ending:
            if isinstance(callback, ElsaCallback):
                callback.on_train_start(trainer, pl_module)
        for callback in ending:  # no others, which may need what they do at the start
            if isinstance(callback, (ElsaCallback, SaveHuggingFace, Samples, WeightAveraging)):
                callback.on_train_end(trainer, pl_module)
        if is_causal_lm(pl_module):
            pl_module.on_train_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the zeros exact, whatever ended the run, and report how it ended."""
        assert self.admm is not None
        if not self.admm.finished:
            self._finish(trainer, resumable=True)
            assert self._saves is not None
            self._saves.renew()  # they were saved before it was known that the run ends here
            rank_zero_warn(unfinished(self.admm, self._short))
            if trainer.checkpoint_callbacks and not self._saves.is_latest_there():
                rank_zero_warn(
                    "Elsa: no checkpoint of this last step was saved; those there are of earlier steps, at a lower "
                    "sparsity or without exact zeros. trainer.save_checkpoint keeps these weights"
                )
        elif self.admm.step > 0:
            rank_zero_info(f"Elsa {verdict(self.admm.last_update, self.admm.last_stationarity)}")
        else:
            rank_zero_warn(
                "Elsa: no gradient reached the constrained weights in this run, so they were cut by magnitude alone"
            )
        if (told := shares_line(self.admm.shares())) is not None:  # counted by all processes together
            rank_zero_info(f"Elsa: {told}")
        self._monitors.end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the zeros exact, resumably, on Ctrl-C, before other callbacks save a checkpoint of the exception."""
        if self.admm is None:
            return
        self.admm.recover()
        if isinstance(exception, KeyboardInterrupt) and not self.admm.finished:
            if self.admm.sharded:  # a projection needs the other processes, which may be anywhere
                rank_zero_warn("Elsa is unfinished; ckpt_path resumes the run from its last checkpoint.")
            else:
                self._finish(trainer, resumable=True)
                rank_zero_warn(unfinished(self.admm, self._short))
        self._journal.end(trainer, pl_module, exception)
        self._monitors.put_back(trainer)
        self._take_hooks_off()
        self.admm.detach(saves=True)  # Lightning calls no teardown now, and a checkpoint may follow

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the zeros for the last time, after all other hooks, and remove our hooks."""
        if self._names is not None:
            self._names.remove()
        if self.admm is not None and stage == "fit":
            if not self.admm.sharded:  # sharded processes no longer work together here
                self._hold(trainer)
            self.admm.detach()
            self._monitors.put_back(trainer)
            self._take_hooks_off()
            self._journal.close()

    def _take_hooks_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------------ checkpoints

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, a different one for each optimizer index."""
        return super().state_key if self.optimizer_index is None else self._generate_state_key(of=self.optimizer_index)

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars of the run, and the random state that an exact resume needs."""
        if self.admm is None or self._loaded is not None:
            return self._loaded or {}
        return {
            "admm": self.admm.state_dict(),
            "first_step": self._first_step,
            "rng": random_states(),
            "stale": list(self._monitors.stale),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the random state before data is loaded; keep the rest until the optimizer's state is restored."""
        self._loaded = state_dict or None
        if self._loaded and self._fits:
            restore_random_states(self._loaded["rng"])
