"""Plans the memory of a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elsa_lightning.distillation import LOGITS_AT_ONCE
from elsa_lightning.layout.kernels import matrix_shape
from elsa_lightning.layout.lowbit import BLOCK, StateDtype
from elsa_lightning.layout.rows import PIECE, SMALL, STACK
from elsa_lightning.optim.moments import dtype_name
from elsa_lightning.optim.rounding import steps_rows
from elsa_lightning.selection import ALL_LINEAR, select
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.threshold import HELD

_LARGE = 1 << 16  # entries from which an optimizer's state is assumed to grow in proportion
_PROJECTION = 42  # bytes for each entry of a piece: v, z, former values, scores, their bits, bins, masks
_KEPT = 8  # bytes for each entry of a matrix whose scores are held on one GPU: score and magnitude
_HELD = 20  # the same at the end, with their bits, the mask and the result of topk
_STACKED = 12  # bytes for each entry of a stack of small tensors: copies of weights, split and moment
_ROUNDING = 28  # bytes for each entry of a piece: random numbers, the float32 sum and its bits, former values
_ROOTS = {"exp_avg_sq", "square_avg", "sum", "exp_inf"}  # torch's optimizers compute the roots of these all at once
_ACTIVATIONS_ERROR = 0.4


@dataclass(frozen=True)
class Plan:
    """The memory of a run on one device, unsharded, in bytes.

    Attributes:
        parameters: Elements of all parameters, shared ones counted once.
        constrained: Elements of the constrained parameters.
        exact: Exactly known bytes by name: weights, gradients, optimizer state, Elsa's state.
        largest_block: Bytes of weights and gradients of the largest block, which sharding gathers.
        transient: Estimated temporary bytes of steps and projections.
        copies: Temporary bytes that the optimizer uses for all weights at once during its step.
        casts: Bytes of weights that autocast keeps in bfloat16.
        activations: Estimated bytes of activations and logits.
        warning: A warning that less of the model is constrained than one may think, or None.
    """

    parameters: int
    constrained: int
    exact: dict[str, int]
    largest_block: int
    transient: int
    copies: int
    casts: int
    activations: int
    warning: str | None = None

    def total(self, shards: int = 1) -> int:
        """Return the bytes on each of ``shards`` devices, with everything but activations sharded.

        Activations are freed before the optimizer steps, so only the larger of both phases counts.
        """
        gathered = self.largest_block if shards > 1 else 0
        passes = self.casts // shards + self.activations
        return sum(self.exact.values()) // shards + gathered + max(self.stepping // shards, passes)

    @property
    def stepping(self) -> int:
        """Return the temporary bytes of optimizer step and projection, which do not coincide."""
        return max(self.transient, self.copies)

    def table(self, devices: int = 1, memory: float | None = None) -> str:
        """Return the plan as a table.

        Args:
            devices: Number of devices for the sharded column.
            memory: GiB of a device, to tell whether the run fits; None for unknown.
        """
        sharded = devices > 1
        head = f"{'':34}{'bytes/param':>12}{'one or DDP':>14}" + (f"{f'FSDP, {devices}':>14}" if sharded else "")
        lines = [
            f"{self.parameters:,} parameters, {self.constrained:,} constrained "
            f"({self.constrained / max(1, self.parameters):.1%})",
            head,
        ]
        says = ", less if fused: true" if self.copies > self.transient else " and projecting, about"
        estimates = {
            f"while stepping{says}": self.stepping,
            f"or activations, ± {_ACTIVATIONS_ERROR:.0%}": self.activations + self.casts,
        }
        for name, size in {**self.exact, **estimates}.items():
            each = self.casts // devices + self.activations if name.startswith("or ") else size // devices
            lines.append(_row(name, size / max(1, self.parameters), [size, each] if sharded else [size]))
        if sharded:
            lines.append(_row("one block, gathered", 0, [0, self.largest_block]))
        totals = [self.total(), self.total(devices)] if sharded else [self.total()]
        lines.append(_row("on each device", self.total() / max(1, self.parameters), totals))
        if memory is not None:
            fits = ["yes" if total <= memory * 2**30 else "NO" for total in totals]
            lines.append(f"{f'fits into {memory:g} GiB':46}" + "".join(f"{answer:>14}" for answer in fits))
        return "\n".join(lines)


def _row(name: str, each: float, sizes: Iterable[int]) -> str:
    return f"{name:36}{each:>10.2f}" + "".join(f"{size / 2**30:>10.2f} GiB" for size in sizes)


def plan(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    targets: Sequence[str] = (ALL_LINEAR,),
    ignore: Sequence[str] = (),
    constraint: Constraint | None = None,
    state_dtype: StateDtype | None = "float32",
    teacher: bool | nn.Module = False,
    tokens: int = 0,
    checkpointing: bool = False,
    device: str = "cuda",
) -> Plan:
    """Plan the memory of pruning a model.

    Args:
        model: The model, maybe on the meta device; activations are estimated only for Hugging Face models.
        make_optimizer: Returns an optimizer for a list of parameters; it is tried on small ones to measure its state.
        dtype: The dtype of weights and gradients.
        autocast: Whether computations run in bfloat16 on weights of ``dtype``.
        targets: As in :func:`elsa_lightning.selection.select`.
        ignore: Likewise.
        constraint: The set, which may constrain fewer parameters; None plans for all that are selected.
        state_dtype: The dtype of Elsa's state; None plans without Elsa.
        teacher: True if a bfloat16 copy of the dense model is kept for distillation, or another model as teacher.
        tokens: Tokens in a batch on a device.
        checkpointing: Whether activations are recomputed.
        device: The device type of the run; on a CPU torch's optimizers step one tensor after the other.
    """
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    selection = select(model, targets, ignore, quiet=True) if state_dtype is not None else None
    if selection is not None and constraint is not None:
        selection = selection.within(constraint.fitted(model))
    chosen = selection.parameters.values() if selection is not None else ()
    width = dtype.itemsize

    @cache
    def measured(*shape: int) -> int:
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = make_optimizer([p])
        p.grad = torch.zeros_like(p)
        optimizer.step()
        state: dict[str, Any] = optimizer.state[p]
        return sum(
            t.numel() * t.element_size() for key, t in state.items() if torch.is_tensor(t) and "qmap" not in key
        )  # bitsandbytes shares its code books

    def moments(shape: torch.Size) -> int:
        """Return the bytes measured, for a large tensor extrapolated from two with fewer rows."""
        row = shape[1:] and shape[-1:]
        rows = shape.numel() // max(1, row.numel())
        some = -(-_LARGE // max(1, row.numel()))
        if rows <= 2 * some:
            return measured(rows, *row)
        each = (measured(2 * some, *row) - measured(some, *row)) / some
        return measured(some, *row) + round(each * (rows - some))

    exact = {
        f"weights ({dtype_name(dtype)})": total * width,
        "gradients": total * width,
        "optimizer state": sum(moments(matrix_shape(p, p.shape)) for p in parameters),
    }
    if state_dtype is not None:
        exact[f"Elsa's state ({state_dtype}, mask)"] = sum(
            elsa_bytes(matrix_shape(p, p.shape), state_dtype) for p in chosen
        )
    if isinstance(teacher, nn.Module):
        exact["teacher (bfloat16)"] = 2 * sum(p.numel() for p in teacher.parameters())
    elif teacher:
        exact["dense model (bfloat16)"] = 2 * total
    sizes = [p.numel() for p in chosen]
    stacked = min(STACK, sum(size for size in sizes if size <= SMALL))  # small tensors are stacked
    at_once = min(max([stacked, *sizes], default=0), PIECE)
    held = max((size for size in sizes if size <= HELD), default=0) if device != "cpu" else 0
    masks = 2 * sum(-(-size // 8) for size in sizes)  # of one budget for all tensors, before and after its floor
    projecting = max(_PROJECTION * at_once + _KEPT * max(0, held - PIECE), _HELD * held) + _STACKED * stacked + masks
    by_rows = steps_rows(make_optimizer([nn.Parameter(torch.zeros(1, dtype=dtype))]))
    copied = sum(p.numel() for p in parameters if by_rows is None or not by_rows(p))  # during the optimizer step
    copies = _copies(make_optimizer, dtype) * total if device != "cpu" else 0
    rounding = 2 * copied + _ROUNDING * min(max(p.numel() for p in parameters), PIECE)
    return Plan(
        parameters=total,
        constrained=sum(p.numel() for p in chosen),
        exact=exact,
        largest_block=_largest_block(model) * 2 * width,
        transient=max(rounding * (dtype == torch.bfloat16), projecting),
        copies=copies + 2 * copied * (copies > 0 and dtype == torch.bfloat16),
        casts=2 * total * autocast,
        activations=_activations(model, tokens, 2 if autocast else width, checkpointing, bool(teacher)),
        warning=None if selection is None else selection.warning(),
    )


def _copies(make_optimizer: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype) -> int:
    """Return the temporary bytes per parameter that one of torch's optimizers uses for all parameters at once on a GPU.

    There it steps all tensors together by default, with intermediate results as large as all of them: the roots of
    second moments, and gradients with weight decay. ``fused=True`` has none.
    """
    p = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    optimizer = make_optimizer([p])
    options = {**optimizer.defaults, **optimizer.param_groups[0]}
    if not type(optimizer).__module__.startswith("torch.optim") or options.get("foreach", False) is False:
        return 0  # no foreach implementation, or switched off
    if options.get("fused"):
        return 0
    p.grad = torch.zeros_like(p)
    optimizer.step()
    decays = bool(options.get("weight_decay")) and not options.get("decoupled_weight_decay")
    return dtype.itemsize * (bool(_ROOTS & optimizer.state[p].keys()) + decays)


def elsa_bytes(shape: torch.Size, state_dtype: StateDtype) -> int:
    """Return the bytes of Elsa's state of one tensor before the frozen phase: the split, its scales, the mask."""
    rows, n = shape[:-1].numel(), shape[-1]
    split = {"float32": 4 * n, "bfloat16": 2 * n, "float8_e4m3fn": n + -(-n // BLOCK)}
    return rows * (split[state_dtype] + -(-n // 8))


def _largest_block(model: nn.Module) -> int:
    blocks = [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)


def _activations(model: nn.Module, tokens: int, width: int, checkpointing: bool, teacher: bool) -> int:
    """Estimate the activations for the backward pass: a block keeps about 10 widths and 4 inner widths a token."""
    config: Any = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    if config is None or not tokens:
        return 0
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    block = tokens * width * (10 * hidden + 4 * inner)
    blocks = layers * tokens * width * hidden + block if checkpointing else layers * block
    logits = tokens * config.vocab_size
    if teacher:  # distillation computes logits for some positions at a time
        logits = min(logits, LOGITS_AT_ONCE)
    return int(blocks + logits * (width + 8 + 8 * teacher))  # with float32 softmax and its gradient
