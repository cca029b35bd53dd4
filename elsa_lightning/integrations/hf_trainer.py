"""ElsaTrainerCallback: pruning inside transformers.Trainer and its subclasses, such as TRL's trainers."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from elsa_lightning.admm import ADMM
from elsa_lightning.callbacks.ends import is_early
from elsa_lightning.callbacks.health import Health, diverged
from elsa_lightning.errors import UserError
from elsa_lightning.forms import Prox, make_form
from elsa_lightning.layout.lowbit import StateDtype, check_state_dtype
from elsa_lightning.optim.hooks import innermost
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.schedule import PenaltySchedule, Schedule
from elsa_lightning.selection import ALL_LINEAR, select
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.unstructured import one_of
from elsa_lightning.watch import UPDATED, figures, verdict

log = logging.getLogger(__name__)


class ElsaTrainerCallback(TrainerCallback, ExportableState):
    """Prunes the model that a ``transformers.Trainer`` trains, by ADMM (Lee et al., 2026, arXiv:2510.01650).

    Works with subclasses of the Trainer too, such as TRL's::

        Trainer(model, args, train_dataset=data, callbacks=[ElsaTrainerCallback(sparsity=0.9)])

    The schedule counts optimizer steps. The Trainer's checkpoints hold all that ``resume_from_checkpoint`` needs for a
    bit-identical run: tensors in ``optimizer.pt``, scalars in ``trainer_state.json``. The zeros are exact before the
    last evaluation and the last save. Before the mask is fixed, evaluations are of a denser model than the run's
    result, so the best metric, ``load_best_model_at_end`` and ``EarlyStoppingCallback`` count only from there on.

    Args:
        sparsity: Fraction of zeros in all constrained tensors together, 0 ≤ sparsity < 1.
        constraint: The set of sparse weights, if it is not ``Unstructured(sparsity)``. Give one of the two.
        penalty: See :class:`~elsa_lightning.ElsaCallback`, as for all arguments below.
        penalty_schedule: How the penalty reaches that value.
        prox: The form of the x-update.
        interval: Optimizer steps between projections.
        ramp: Fraction of all steps over which the sparsity rises to its target.
        frozen: Fraction of all steps, the last ones, in which the mask is fixed and the zeros are exact.
        state_dtype: The dtype of the number that the method stores for each weight.
        targets: What to constrain.
        ignore: Regular expressions of parameter names that stay dense.

    Raises:
        ValueError: An argument is out of range; or, when training begins, the Trainer shards the model (DeepSpeed,
            FSDP) or trains an adapter (PEFT).
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
    ) -> None:
        self.constraint = one_of(sparsity, constraint)
        self.schedule = Schedule(penalty, penalty_schedule, interval, ramp, frozen)
        make_form(prox).check(self.schedule, self.constraint)
        self.prox, self.state_dtype = prox, check_state_dtype(state_dtype)
        self.targets, self.ignore = list(targets or [ALL_LINEAR]), list(ignore or [])
        self.admm: ADMM | None = None
        self._arguments = {
            "sparsity": sparsity, "penalty": penalty, "penalty_schedule": penalty_schedule, "prox": prox,
            "interval": interval, "ramp": ramp, "frozen": frozen, "state_dtype": state_dtype, "targets": self.targets,
            "ignore": self.ignore,
        }  # fmt: skip
        self._restorable = constraint is None
        self._control = TrainerControl()
        self._hook: RemovableHandle | None = None  # called before a save
        self._begin()

    def _begin(self) -> None:
        """Reset what belongs to one run."""
        self._first_step = 0  # optimizer steps made before pruning began
        self._global_step, self._saved_dense = 0, -1
        self._counts = False  # whether metrics are those of the final sparsity
        self._logged: Any = None
        self._measured: Any = None
        self._figures: dict[str, float] = {}
        self._health = Health()

    # ------------------------------------------------------------------ start

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse an unsuitable Trainer as soon as it is made."""
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise UserError(
                "ElsaTrainerCallback cannot prune what DeepSpeed or the Trainer's FSDP shards: train without deepspeed "
                "and fsdp, or shard with Lightning's ModelParallelStrategy or FSDPStrategy and ElsaCallback"
            )
        if getattr(args, "restore_callback_states_from_checkpoint", False) and not self._restorable:
            raise UserError(
                "restore_callback_states_from_checkpoint makes callbacks anew from JSON, which has no constraint: "
                "leave it False; ElsaTrainerCallback finds its state without it"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, whose state is restored by now, and restore the state of a resumed run."""
        self.on_init_end(args, state, control)  # the callback may have been added later
        self._move_to_front()
        self._detach()
        self._begin()
        self._control = control
        model: nn.Module = kwargs["model"]
        _check_model(model)
        saved = self._saved(state)
        self._first_step = saved["first_step"] if saved else state.global_step
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        total_steps, replicas = max(1, state.max_steps - self._first_step), dist.group.WORLD if several else None
        self.admm, said = self._attach(model, innermost(kwargs["optimizer"]), total_steps, replicas)
        self._check_dtypes(args)
        if saved:
            self.admm.load_state_dict(saved["admm"])
        elif state.global_step > 0:
            self._say_late(state)
        callbacks: Any = state.stateful_callbacks  # the Trainer saves these; a resumed run may lack ours
        callbacks.setdefault(type(self).__name__, self.state())
        self._global_step, self._counts = state.global_step, self.admm.frozen
        self._count_from_here(state)
        self._hook = model.register_state_dict_pre_hook(self._before_saving)  # type: ignore[no-untyped-call]
        for level, line in said if state.is_world_process_zero else ():
            log.log(level, line)

    def _attach(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int, replicas: dist.ProcessGroup | None
    ) -> tuple[ADMM, list[tuple[int, str]]]:
        """Return the ADMM that constrains the weights, and messages for the log."""
        constraint = self.constraint.fitted(model)
        selection = select(model, self.targets, self.ignore, quiet=True).within(constraint)
        admm = ADMM(
            optimizer,
            selection.parameters,
            constraint,
            total_steps=total_steps,
            schedule=self.schedule,
            prox=self.prox,
            state_dtype=self.state_dtype,
            replicas=replicas,
        )
        said = [(logging.INFO, f"{constraint}: {selection.summary()}")]
        warning = selection.warning()
        return admm, said if warning is None else [*said, (logging.WARNING, warning)]

    def _say_late(self, state: TrainerState) -> None:
        assert self.admm is not None
        log.warning(
            "Training goes on from step %d without a state of ElsaTrainerCallback, so pruning begins here and has "
            "the remaining %d optimizer steps.", state.global_step, self.admm.total_steps,
        )  # fmt: skip

    def _saved(self, state: TrainerState) -> dict[str, Any] | None:
        """Return the saved state of a resumed run, or None if there is none."""
        if state.global_step == 0:
            return None
        callbacks: Any = state.stateful_callbacks or {}
        found = callbacks.get(type(self).__name__)
        if isinstance(found, list):
            raise UserError("the Trainer has several ElsaTrainerCallbacks, and one optimizer takes one: remove others")
        saved: dict[str, Any] | None = (found or {}).get("attributes", {}).get("restored")
        return saved

    def _check_dtypes(self, args: TrainingArguments) -> None:
        """Refuse a state dtype that the Trainer would round at resuming, when it casts to the weights' dtype."""
        assert self.admm is not None
        if args.save_strategy == "no" or args.save_only_model or self.state_dtype == "float8_e4m3fn":
            return
        kept = getattr(torch, self.state_dtype)
        for name, tensor in self.admm.tensors.items():
            if torch.promote_types(tensor.p.dtype, kept) != tensor.p.dtype:
                raise UserError(
                    f"{name} is {dtype_name(tensor.p.dtype)}, to which the Trainer would round the {self.state_dtype} "
                    f"state when it resumes: load the model in float32 (with bf16=True in the TrainingArguments), or "
                    f"set state_dtype='float8_e4m3fn' or, for bfloat16 weights, 'bfloat16', or save_only_model=True"
                )

    def _move_to_front(self) -> None:
        """Move this callback before those that write logs; the list is found on the stack, since no API gives it."""
        frame = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            callbacks = frame.f_locals["self"].callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    # ------------------------------------------------------------------ during

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Resume if a request to stop was withdrawn."""
        if self.admm is not None:
            self.admm.resume()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the zeros exact after the last step, before evaluation and saving."""
        assert self.admm is not None
        self._control, self._global_step = control, state.global_step
        self._look_at_update(state)
        if state.global_step >= state.max_steps:
            self.admm.finish(resumable=is_early(self.admm))
        elif control.should_training_stop:
            self.admm.finish(resumable=True)
        self._count_from_here(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the control object, which tells of requests to stop."""
        self._control = control

    on_evaluate = on_epoch_end

    def _count_from_here(self, state: TrainerState) -> None:
        """Drop the best metric so far if it is of a denser model than the run's result."""
        assert self.admm is not None
        if not self._counts:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._counts = self.admm.frozen

    def _look_at_update(self, state: TrainerState) -> None:
        """Keep the figures of a new update for the next log, and warn of signs of trouble."""
        assert self.admm is not None
        update = self.admm.last_update
        if update is None or update is self._logged:
            return
        self._logged = update
        measured, self._measured = self._measured, self.admm.last_stationarity
        found = figures(update, None if self._measured is measured else self._measured)
        self._figures |= {f"elsa/{name}": value for name, value in found.items()}
        if not all(math.isfinite(value) for value in (found[name] for name in UPDATED)):
            raise UserError(diverged(self.admm, "clip gradients (max_grad_norm)"))
        seen = found["primal_residual"], found["mask_flips"], found["sparsity"]
        for warning in self._health.warnings(self.admm, *seen):
            log.warning(warning)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures of the latest update to what the Trainer logs."""
        logs = kwargs.get("logs")
        if logs is not None and self._figures:
            logs.update(self._figures)
            if state.log_history:  # it already has a copy of logs
                state.log_history[-1].update(self._figures)
            self._figures = {}

    def _before_saving(self, *_: Any) -> None:
        """Make sure that anything saved after a request to stop has exact zeros."""
        assert self.admm is not None
        if self._control.should_training_stop:
            self.admm.finish(resumable=True)
        if not (self.admm.frozen or self.admm.suspended):
            self._saved_dense = self._global_step

    # ------------------------------------------------------------------ end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the zeros exact, whatever ended the run, and report how it ended."""
        assert self.admm is not None
        # the best weights are loaded by now; they are on the same mask, but on the grid of the scales of their own step
        values = not (args.load_best_model_at_end and state.best_model_checkpoint and self.constraint.fixes_values)
        if not self.admm.finished and (values or not self.admm.frozen):
            self.admm.finish(resumable=True)
        if moved := self.admm.stray(values):
            self.admm.hold(values)
            log.warning(
                "Elsa: %d weights that the mask does not keep were moved after their zeros were made exact (by a "
                "checkpoint that was loaded, averaged weights, an optimizer that swaps them) and are 0 again. Do "
                "that before the run ends.", moved,
            )  # fmt: skip
        self._detach()
        if not state.is_world_process_zero:
            return
        if self.admm.step == 0:
            log.warning("Elsa: no gradient reached the constrained weights in this run; nothing trained under the set.")
        elif self.admm.finished:
            log.info("Elsa %s", verdict(self.admm.last_update, self.admm.last_stationarity))
        else:
            log.warning(
                "Elsa is unfinished: %d of %d optimizer steps. The zeros are exact at the full sparsity, but the model "
                "had no time to recover; resume_from_checkpoint goes on where the run was.%s",
                self.admm.step, self.admm.total_steps,
                " The checkpoint of this step was written before, without these zeros: trainer.save_model() keeps them."
                if self._saved_dense == state.global_step else "",
            )  # fmt: skip
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            log.warning(
                "No checkpoint was evaluated and saved after the mask was fixed, so load_best_model_at_end had none to "
                "load and the weights are those of the last step: evaluate and save in the last %.0f %% of the steps.",
                100 * self.schedule.frozen,
            )  # fmt: skip

    def _detach(self) -> None:
        if self.admm is not None:
            self.admm.detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state for ``trainer_state.json``: the arguments and the scalars of the run."""
        restored = {"admm": self.admm.state_dict(), "first_step": self._first_step} if self.admm else None
        return {"args": dict(self._arguments), "attributes": {"restored": restored}}


def _check_model(model: nn.Module) -> None:
    """Refuse a model that is sharded, or whose checkpoints would not contain the pruned weights."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model has a PEFT adapter, and the Trainer saves the adapter alone: the pruned weights would be in no "
            "file. Prune the model without it; an adapter can be trained on the pruned model afterwards"
        )
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise UserError(
            "ElsaTrainerCallback cannot prune DTensors (tensor parallelism, FSDP2) in the Trainer: shard with "
            "Lightning's ModelParallelStrategy and ElsaCallback"
        )
