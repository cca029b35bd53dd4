"""Structured set of a mixture of experts: whole experts are zero, and the routers pass them over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.families import STACKS, Known, find
from elsa_lightning.sets.structured import Share
from elsa_lightning.sets.tied import Member, Tie


@dataclass(frozen=True)
class Experts(Share):
    """A share of each layer's experts adds nothing: their output matrices are zero, and the router passes them over.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such z: it keeps the output matrices with the largest Σ Fᵢ vᵢ²,
    unchanged. Ties go to the lower number. All other weights of these experts are not constrained, and are removed by
    ``shrink`` with the experts.

    From :meth:`fitted` on, the routers of the model give an expert whose output matrix is zero the logit −∞, so that
    its probability goes to the others, as in the smaller model without it; no gradient brings the expert back. If the
    model is saved without shrinking, routers of plain transformers still choose it, and waste probability on it.

    Args:
        fraction: Share of the experts that is removed, 0 ≤ fraction < 1, to the nearest number; at least as many
            survive as each token uses.

    Raises:
        UserError: The fraction is out of range.
    """

    units = "experts"

    def of(self, known: Known) -> list[Tie]:
        """Return one tie a layer with experts."""
        family, config = known.family, known.config
        if family.experts is None:
            raise UserError(f"{config.model_type!r} is no mixture of experts: Neurons or Heads are its units")
        total, chosen = config.num_experts, config.num_experts_per_tok
        kept = self.kept(total)
        if kept < chosen:
            raise UserError(
                f"{self} leaves {kept} of {total} experts, and each token takes {chosen} (num_experts_per_tok): at "
                f"most a fraction of {1 - chosen / total:.4g}"
            )
        ties = []
        for index in filter(known.experts, range(known.blocks)):
            ties.append(Tie(total, kept, (Member(f"{known.block(index)}{family.experts}.{STACKS[1]}", 2),)))
        return ties

    def fitted(self, model: nn.Module) -> Self:
        """Return the set with the ties of the model's tensors, and make its routers pass over zero experts."""
        new = super().fitted(model)
        pass_over(model)
        return new


def pass_over(model: nn.Module) -> list[nn.Module]:
    """Make a model's routers choose only among non-zero experts; return the modules that hold the experts."""
    known = find(model)
    pairs = list(filter(None, map(known.experts, range(known.blocks))))
    for router, experts in pairs:
        if not any(isinstance(hook, _PassOver) for hook in router._forward_hooks.values()):
            router.register_forward_hook(_PassOver(experts))
    return [experts for _, experts in pairs]


def zero_experts(experts: nn.Module) -> Tensor:
    """Return a mask of the zero experts of a stack, ``(experts,)``."""
    return ~experts.down_proj.any(dim=(1, 2))  # type: ignore[operator]


class _PassOver:
    """A forward hook of a router that makes it choose only among non-zero experts.

    Args:
        experts: The module that holds the experts' stacks.
    """

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts

    def __call__(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, scores, _ = output
        zero = zero_experts(self.experts)
        logits = logits.masked_fill(zero & ~zero.all(), -math.inf)
        scores_, indices = logits.softmax(dim=-1, dtype=torch.float32).topk(router.top_k, dim=-1)
        if getattr(router, "norm_topk_prob", True):
            scores_ = scores_ / scores_.sum(dim=-1, keepdim=True)
        return logits, scores_.to(scores.dtype), indices
