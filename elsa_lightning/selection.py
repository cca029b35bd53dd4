"""Selects the parameters to constrain, and tells how much of the model they cover."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from elsa_lightning.anatomy import Anatomy, examine, shape_of
from elsa_lightning.coverage import advice
from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import check_marked, mark_slices, settle
from elsa_lightning.layout.sharded import local, parts_of, processes_of
from elsa_lightning.sets.base import Constraint

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Selection:
    """The constrained parameters of a model, and the parameters left out.

    Attributes:
        parameters: Constrained parameters by name.
        total: Elements of all parameters, shared ones counted once.
        dense: Elements of intentionally dense parameters, by reason.
        left_out: Elements by name of matrices that could be constrained, and stay dense without the user's intent.
        frozen: Elements by name of matrices that are not trained (``requires_grad`` False), and so stay dense.
        computed: Elements by name of parameters from which a parametrization computes a weight.
        heads: Dense weights that were recognised as an output layer's, by their ``name`` or ``shape``.
        guessed: Elements of those recognised by their shape.
        targets: The targets that were given.
        names: Names of all parameters.
    """

    parameters: dict[str, nn.Parameter]
    total: int
    dense: dict[str, int]
    left_out: dict[str, int]
    frozen: dict[str, int] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    guessed: int = 0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    names: Collection[str] = ()

    @property
    def constrained(self) -> int:
        """Elements of the constrained parameters."""
        return sum(_size(p) for p in self.parameters.values())

    def within(self, constraint: Constraint) -> Selection:
        """Return the part of the selection in which a set can have zeros; the rest needs no constraint.

        Raises:
            UserError: There is no such parameter.
        """
        inside = {name: p for name, p in self.parameters.items() if constraint.covers(name)}
        if not inside:
            raise UserError(f"{constraint} constrains none of the weights that targets select: {list(self.targets)}")
        outside = sum(_size(p) for name, p in self.parameters.items() if name not in inside)
        return replace(self, parameters=inside, dense={**self.dense, "outside of the set": outside})

    def summary(self) -> str:
        """Return one line for the log: how much is constrained, and what is intentionally dense."""
        share = self.constrained / max(self.total, 1)
        dense = ", ".join(f"{reason} {size:,}" for reason, size in self.dense.items() if size)
        heads = ", ".join(f"{name} (by its {told})" for name, told in self.heads.items())
        more = ", ".join(f"'{re.escape(name)}$'" for name in self.heads)
        return (
            f"{len(self.parameters)} tensors constrained: {self.constrained:,} of {self.total:,} parameters "
            f"({share:.1%})"
            + (f"; dense: {dense}" if dense else "")
            + (f"; taken for the output layer: {heads}; to prune it too add {more} to targets" if heads else "")
        )

    def warning(self, tolerated: float = 0.1) -> str | None:
        """Return a warning if less of the model is covered than the user may think, else None.

        Args:
            tolerated: Share of the matrices that may be left out silently.
        """
        return "\n".join(advice(self, tolerated)) or None


def select(
    model: nn.Module,
    targets: Sequence[str] = (ALL_LINEAR,),
    ignore: Sequence[str] = (),
    *,
    trained: Iterable[nn.Parameter] | None = None,
    frozen: bool = False,
    quiet: bool = False,
) -> Selection:
    """Choose the parameters to constrain; ``docs/what_is_pruned.md`` lists them.

    Args:
        model: Any module.
        targets: What to constrain. ``"all-linear"`` means every weight that multiplies (linear layers, convolutions,
            attention, recurrent layers, experts) except embeddings, output layers, adapters and depthwise convolutions;
            anything else is a regular expression searched for in the parameter names.
        ignore: Regular expressions of parameter names to leave dense; they override ``targets``.
        trained: The parameters of the optimizer whose weights are pruned, if the model has several optimizers; those of
            others are left alone. None takes all.
        frozen: Choose frozen parameters (``requires_grad`` False) too, whatever trains them later.
        quiet: Do not warn of low coverage, because the caller does.

    Raises:
        ValueError: A pattern is no regular expression or matches nothing or no matrix, or nothing is left to constrain.
    """
    found = examine(model)
    names = found.parameters
    matched: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            matched |= found.linear
        else:
            named = _search("targets", target, names)
            matched |= named if named <= found.adapters else named - found.adapters  # adapters only alone
    ignored: set[str] = set().union(*(_search("ignore", pattern, names) for pattern in ignore))
    matched -= ignored | {name for name in matched if _is_empty(names[name])}
    ours = None if trained is None else {id(p) for p in trained}
    waiting = {n for n, p in names.items() if frozen and not p.requires_grad and can_train(p)}
    others = set() if ours is None else {n for n, p in names.items() if id(p) not in ours and n not in waiting}
    chosen = {
        n: p for n, p in names.items() if n in matched and (p.requires_grad or n in waiting) and n not in others
    }  # fmt: skip
    if not chosen:
        raise UserError(_nothing(targets, ignore, found, others))
    for name in chosen:
        _check(name, found)
    dense, groups = _dense(found, chosen, ignored, others)
    heads = {name: told for name, told in found.taken.items() if name not in ignored | others | chosen.keys()}
    selection = Selection(
        parameters=chosen,
        total=sum(_size(p) for p in names.values()),
        dense=dense,
        left_out=groups["left out"],
        frozen=groups["frozen"],
        computed=groups["computed"],
        heads=heads,
        guessed=sum(_size(names[name]) for name, told in heads.items() if told == "shape"),
        targets=tuple(targets),
        names=names.keys(),
    )
    if not quiet and (warning := selection.warning()):
        warnings.warn(warning, stacklevel=2)
    return selection


def _dense(
    found: Anatomy, chosen: Mapping[str, nn.Parameter], ignored: set[str], others: set[str]
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return elements of intentionally dense parameters by reason, and of other dense matrices by kind and name."""
    reasons = {
        "ignored": ignored,
        "other optimizers'": others,
        "embeddings and output layers": found.embeddings | found.heads,
        "adapters": found.adapters,
        "depthwise kernels": found.depthwise,
    }
    size = {name: _size(p) for name, p in found.parameters.items()}
    dense = dict.fromkeys(reasons, 0)
    groups: dict[str, dict[str, int]] = {"left out": {}, "frozen": {}, "computed": {}}
    matrices = set(found.matrices())
    for name, p in found.parameters.items():
        reason = next((reason for reason, members in reasons.items() if name in members), None)
        if name in chosen:
            continue
        if reason is not None:
            dense[reason] += size[name]
        elif name in matrices:
            kind = "computed" if name in found.computed else "left out" if p.requires_grad else "frozen"
            groups[kind][name] = size[name]
    return dense, groups


def _check(name: str, found: Anatomy) -> None:
    """Raise ValueError if a parameter selected by targets cannot be constrained."""
    if name in found.computed:
        raise UserError(
            f"targets select {name!r}, from which a parametrization (such as weight_norm) computes "
            f"{found.computed[name]!r}: zeros there are none in the weight, or break it. Remove the parametrization "
            f"(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm), or leave it out"
        )
    if name in found.vectors:
        check_marked(name, found.parameters[name])
        raise UserError(
            f"targets select {name!r}, which is no matrix (shape {tuple(shape_of(found.parameters[name]))}); "
            f"norms and biases stay dense: make the pattern more specific, for example 'proj.*weight'"
        )


def _nothing(targets: Sequence[str], ignore: Sequence[str], found: Anatomy, others: set[str]) -> str:
    message = (
        f"nothing to constrain: targets={list(targets)} and ignore={list(ignore)} select none of the model's "
        f"{len(found.parameters)} parameters that are trained; '{ALL_LINEAR}' needs linear, convolutional, attention "
        f"or recurrent layers, other models need name patterns, and frozen parameters (requires_grad False) need to be "
        f"trained"
    )
    if others:
        message += f"; {len(others)} of them are not among the optimizer's"
    if found.adapters:
        message += "; adapters (LoRA) are not pruned, and the layers they are added to are trained once unfrozen"
    if found.taken:
        message += f"; {', '.join(found.taken)} is taken for the output layer, which a pattern of its name would select"
    if found.computed:
        message += f"; {next(iter(found.computed.values()))} is computed by a parametrization, which must be removed"
    return message


def _size(p: nn.Parameter) -> int:
    return shape_of(p).numel()


def _is_empty(p: nn.Parameter) -> bool:
    shape = shape_of(p)
    return len(shape) > 1 and not shape.numel()  # an empty flat slice (FSDP1) that is not marked has one dimension


def can_train(p: nn.Parameter) -> bool:
    """Return whether a frozen parameter has numbers that an optimizer can move later; packed ones have none."""
    return p.dtype.is_floating_point and p.dtype.itemsize > 1 and not p.is_meta


def _search(argument: str, pattern: str, names: Collection[str]) -> set[str]:
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"{argument}: {pattern!r} is no regular expression: {error}") from None
    if not found:
        example = ", ".join(list(names)[:3])
        raise UserError(f"{argument}: {pattern!r} matches no parameter of the model; names look like {example}")
    return found


def count_zeros(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> tuple[int, int]:
    """Return (zeros, elements) of weights, over all processes.

    Args:
        model: The model.
        parameters: The parameters to count; None takes those that ``all-linear`` means.
    """
    settle(model)
    mark_slices(model)
    return count_zeros_of(select(model, quiet=True).parameters.values() if parameters is None else parameters)


def count_zeros_of(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return what :func:`count_zeros` does, of parameters whose flat slices (FSDP1) are marked."""
    parameters = list(parameters)
    processes = processes_of(parameters)
    parts = parts_of(parameters, processes)
    zeros = sum(int((local(p) == 0).sum()) for p, part in parts.items() if part.counts)
    if processes.groups:
        zeros = int(processes.add(torch.tensor(zeros, device=next(iter(parts)).device)))
    return zeros, sum(part.shape.numel() for part in parts.values())
