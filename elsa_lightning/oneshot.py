"""``project()``: brings a model into a set at once, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from elsa_lightning import exact
from elsa_lightning import update as updates
from elsa_lightning.constrained import ConstrainedTensors
from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import mark_slices, settle
from elsa_lightning.layout.sharded import local
from elsa_lightning.selection import ALL_LINEAR, count_zeros, select
from elsa_lightning.sets.base import Constraint, check_set
from elsa_lightning.tensors import ConstrainedTensor


@torch.no_grad()
def project(
    model: nn.Module,
    constraint: Constraint,
    targets: Sequence[str] = (ALL_LINEAR,),
    ignore: Sequence[str] = (),
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Bring the weights of a model to their nearest point in a set, in place: x ← Π_S(x).

    Selection and sets are those of training, which preserves the model better; use this as a baseline or for a quick
    look.

    Args:
        model: Any module; it may be sharded as in training.
        constraint: The set.
        targets: What to constrain, as in :func:`elsa_lightning.selection.select`.
        ignore: Likewise.
        importance: The cost of a squared change of each weight, F in Σ F (z − x)², such as a mean of squared gradients;
            by name of the parameter, with its shape and sharding. None projects by magnitude.

    Returns:
        The fraction of zeros of each constrained tensor, by name.

    Raises:
        UserError: The tensors cannot be in the set, or the importance does not fit.
    """
    check_set(constraint, "constraint")
    settle(model)
    mark_slices(model)
    constraint = constraint.fitted(model)
    parameters = select(model, targets, ignore).within(constraint).parameters
    if importance is not None:
        _check(parameters, importance)
    tensors = ConstrainedTensors(torch.optim.SGD(parameters.values(), lr=0.0), parameters, constraint, "float32")
    weights = {} if importance is None else {t: _laid_out(importance[name], t.p) for name, t in tensors.items()}

    def cost(tensor: ConstrainedTensor, rows: slice) -> Tensor:
        return tensor.layout.take(weights[tensor], rows)

    points = updates.LivePoints(
        list(tensors.values()), lambda tensor, rows: tensor.x(rows), cost if weights else None, tensors.processes
    )
    packed = updates.decide(tensors.constraint, points)
    for place, (tensor, bits) in enumerate(zip(tensors.values(), packed, strict=True)):
        exact.cut(tensors.constraint, tensor, place, bits, points.importance, keeps=False, resumable=False)
    tensors.remove()
    shares = {}
    for name, p in parameters.items():
        zeros, entries = count_zeros(model, [p])
        shares[name] = zeros / max(1, entries)
    return shares


def _laid_out(weight: Tensor, p: nn.Parameter) -> Tensor:
    return weight.detach() if weight.stride() == p.stride() else torch.empty_like(p, dtype=weight.dtype).copy_(weight)


def _check(parameters: Mapping[str, nn.Parameter], importance: Mapping[str, Tensor]) -> None:
    """Raise UserError unless every parameter has a valid importance."""
    for name, p in parameters.items():
        if name not in importance:
            raise UserError(f"importance has nothing for {name!r}: give a tensor for every constrained parameter")
        weight = importance[name]
        if weight.shape != p.shape or type(weight.data) is not type(p.data):
            raise UserError(
                f"importance of {name!r} has shape {tuple(weight.shape)} and kind {type(weight.data).__name__}, the "
                f"parameter {tuple(p.shape)} and {type(p.data).__name__}: they must be alike"
            )
        entries = local(weight)
        if not bool((entries.isfinite() & (entries >= 0)).all()):
            raise UserError(f"importance of {name!r} has entries that are negative or not finite")
