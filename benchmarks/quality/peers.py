"""The smallest faithful implementations of the methods that Elsa is compared with.

One-shot (no training): magnitude; Wanda (Sun et al., 2023, arXiv:2306.11695); SparseGPT (Frantar & Alistarh,
2023, arXiv:2301.00774). Trained: fine-tuning under a fixed mask, gradual pruning (Zhu & Gupta, 2017,
arXiv:1710.01878) by scores of Adam's second moment, and a smaller dense model from random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from elsa_lightning import CausalLM, Unstructured
from elsa_lightning.fisher import share_of
from elsa_lightning.forms.on_set import OnSet
from elsa_lightning.layout.kernels import is_transposed
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select
from elsa_lightning.sets.base import Constraint, WholePoints


def largest(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of all but the smallest scores, ``round(sparsity · n)`` of them; of equal ones the first go."""
    flat, pruned = scores.flatten(), round(sparsity * scores.numel())
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    last = flat.kthvalue(pruned).values
    below, equal = flat < last, flat == last
    return ~(below | (equal & (equal.cumsum(0) <= pruned - below.sum()))).view(scores.shape)


@torch.no_grad()
def magnitude(model: nn.Module, sparsity: float, calibration: Sequence[Tensor]) -> None:
    """Zero the smallest weights of each tensor."""
    for p in select(model).parameters.values():
        p.mul_(largest(p.abs(), sparsity))


def wanda(model: nn.Module, sparsity: float, calibration: Sequence[Tensor]) -> None:
    """Zero in each output row the weights with the smallest |w| times the norm of its input."""

    def prune(weight: Tensor, gram: Tensor) -> Tensor:
        score = weight.abs() * gram.diagonal().sqrt()
        pruned = score.argsort(dim=1, stable=True)[:, : round(sparsity * weight.shape[1])]
        return weight.scatter(1, pruned, 0.0)

    _layer_by_layer(model, calibration, prune)


def sparsegpt(model: nn.Module, sparsity: float, calibration: Sequence[Tensor]) -> None:
    """Zero weights column by column and let the columns that follow make up for it."""

    def prune(weight: Tensor, gram: Tensor, width: int = 128, damping: float = 0.01) -> Tensor:
        weight, hessian = weight.double().clone(), gram.double()
        dead = hessian.diagonal() == 0
        hessian = hessian + torch.diag(dead.double())
        weight[:, dead] = 0
        hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
        inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        for start in range(0, weight.shape[1], width):
            stop = min(start + width, weight.shape[1])
            score = weight[:, start:stop].square() / inverse.diagonal()[start:stop].square()
            kept = largest(score, sparsity)
            errors = torch.zeros_like(score)
            for column in range(start, stop):
                removed = weight[:, column].masked_fill(kept[:, column - start], 0)
                error = removed / inverse[column, column]
                weight[:, column:stop] -= error[:, None] * inverse[column, column:stop]
                weight[~kept[:, column - start], column] = 0
                errors[:, column - start] = error
            weight[:, stop:] -= errors @ inverse[start:stop, stop:]
        return weight

    _layer_by_layer(model, calibration, prune)


@torch.no_grad()
def _layer_by_layer(model: nn.Module, calibration: Sequence[Tensor], prune: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Prune block after block, each on the inputs that the pruned blocks before it give.

    Args:
        model: A :class:`elsa_lightning.CausalLM`.
        calibration: Batches of token ids.
        prune: From a weight ``(out, in)`` and the Gram matrix of its inputs to the new weight.
    """
    constrained = {id(p) for p in select(model).parameters.values()}
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    for block in blocks:
        layers: list[Any] = [layer for layer in block.modules() if id(getattr(layer, "weight", None)) in constrained]
        grams: dict[int, Tensor] = {}

        def watch(layer: nn.Module, inputs: tuple[Tensor, ...], grams: dict[int, Tensor] = grams) -> None:
            x = inputs[0].flatten(0, -2).float()
            grams[id(layer)] = grams.get(id(layer), 0) + x.T @ x

        handles = [layer.register_forward_pre_hook(watch) for layer in layers]
        for batch in calibration:
            model(batch)
        for handle in handles:
            handle.remove()
        for layer in layers:
            transposed = not isinstance(layer, nn.Linear)  # Conv1D has (in, out)
            weight = layer.weight.T if transposed else layer.weight
            new = prune(weight.float(), grams[id(layer)])
            layer.weight.copy_(new.T if transposed else new)


@torch.no_grad()
def take_zeros(of: nn.Module, module: nn.Module) -> None:
    """Zero the weights of a model that are zero in another of its shape."""
    for p, other in zip(select(module).parameters.values(), select(of).parameters.values(), strict=True):
        p.masked_fill_(other == 0, 0)


class MaskedFineTuning(Callback):
    """Trains a pruned model with its zeros fixed."""

    masks: Iterable[tuple[nn.Parameter, Tensor]] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the mask from the zeros."""
        self.masks = [(p, p != 0) for p in select(pl_module).parameters.values()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Put the zeros back."""
        for p, mask in self.masks:
            p.mul_(mask)


class GradualPruning(Callback):
    """Hard zeros at Elsa's own projections, ramp and frozen phase, without penalty or dual.

    Args:
        sparsity: Fraction of zeros.
        scope: ``tensor``: in each tensor. ``model``: in all together, with Elsa's own set.
        start: Sparsity that the ramp begins with; Elsa's is 0.7.
        power: Of F̂ in the score F̂^power · w²: ½ as in Elsa, 1 for the Fisher score.
    """

    def __init__(
        self, sparsity: float, scope: Literal["tensor", "model"] = "tensor", start: float = 0.0, power: float = 0.5
    ) -> None:
        self.sparsity, self.scope, self.start, self.power = sparsity, scope, min(start, sparsity), power
        self.schedule = Schedule()
        self.masks: list[Tensor] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune when a projection is due; put the zeros back."""
        parameters, step, total = select(pl_module).parameters.values(), trainer.global_step, trainer.max_steps
        if self.schedule.projects_at(step, total):
            now = self.start + (self.sparsity - self.start) * self.schedule.tightness_at(step, total)
            state = trainer.optimizers[0].state
            costs = [held(state[p]["exp_avg_sq"], step) ** self.power for p in parameters]
            if self.scope == "tensor":
                self.masks = [largest(p.square() * cost, now) for p, cost in zip(parameters, costs, strict=True)]
            else:
                points = WholePoints([(p.detach(), cost) for p, cost in zip(parameters, costs, strict=True)])
                masks = Unstructured(now).support(points)
                self.masks = [mask.view(p.shape) for p, mask in zip(parameters, masks, strict=True)]
        for p, mask in zip(parameters, self.masks, strict=True):
            p.mul_(mask)


def held(moment: Tensor, step: int) -> Tensor:
    """Return F̂ held towards the product of its row and column means, as Elsa's; see elsa_lightning/fisher.py."""
    rows, share = moment.flatten(0, -2), share_of(OnSet.prior, step)
    product = torch.outer(rows.mean(dim=1), rows.mean(dim=0)) / rows.mean() if rows.any() else torch.ones_like(rows)
    return moment.lerp(product.view_as(moment), share)


class GradualSet(Callback):
    """Gradual pruning to any set: as Elsa projects, at the same steps and by the same score, without penalty or dual.

    Args:
        constraint: The set; of one that fixes values the support alone, since rounding at every step loses the steps.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.schedule = Schedule()
        self.masks: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the weights."""
        constraint = self.constraint.fitted(pl_module)
        self.parameters = select(pl_module, quiet=True).within(constraint).parameters
        self.constraint = constraint.sized({name: p.shape for name, p in self.parameters.items()})

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune when a projection is due; put the zeros back."""
        step, total, weights = trainer.global_step, trainer.max_steps, list(self.parameters.values())
        if self.schedule.projects_at(step, total):
            now = self.constraint.relaxed(self.schedule.tightness_at(step, total))
            state = trainer.optimizers[0].state
            tensors = [(p.detach(), held(state[p]["exp_avg_sq"], step).sqrt()) for p in weights]
            points = WholePoints(tensors, list(self.parameters), [is_transposed(p) for p in weights])
            self.masks = [mask.view(p.shape) for mask, p in zip(now.support(points), weights, strict=True)]
        for p, mask in zip(weights, self.masks, strict=True):
            p.mul_(mask)


class SmallDense(CausalLM):
    """A narrower model of the same family and depth, from random weights; the dense model is its teacher.

    It has as many parameters as a pruned model has weights that are not zero: embeddings, which are not pruned, count
    in both.

    Args:
        name: The dense model.
        sparsity: Of the pruned model.
        options: As in :class:`elsa_lightning.CausalLM`.
    """

    def __init__(self, name: str, sparsity: float, **options: Any) -> None:
        super().__init__(name, **options)
        self.sparsity = sparsity

    def configure_model(self) -> None:
        """Make the model, of the width and then the inner width that come nearest from below."""
        if self.model is None:
            dense = self.on_meta()
            zeros = sum(round(self.sparsity * p.numel()) for p in select(dense).parameters.values())
            self.model = _built(narrower(dense.config, parameters(dense) - zeros))
            self.model.train()


def parameters(model: nn.Module) -> int:
    """Return how many parameters a model has, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def narrower(config: Any, budget: int) -> Any:
    """Return the configuration of the largest model of at most so many parameters: by width, then by inner width."""
    inner = "intermediate_size" if hasattr(config, "intermediate_size") else "n_inner"
    ratio = (getattr(config, inner) or 4 * config.hidden_size) / config.hidden_size
    grain = 2 * config.num_attention_heads  # rotations turn pairs

    def of(width: int, inside: int) -> Any:
        found = copy.deepcopy(config)
        found.hidden_size = width
        setattr(found, inner, inside)
        if getattr(found, "head_dim", None):
            found.head_dim = width // config.num_attention_heads
        return found

    def fits(found: Any) -> bool:
        with torch.device("meta"):
            return parameters(_built(found)) <= budget

    width = max(w for w in range(grain, config.hidden_size + 1, grain) if fits(of(w, max(1, round(ratio * w)))))
    inside = max(1, round(ratio * width))
    while fits(of(width, inside + 1)):
        inside += 1
    return of(width, inside)


def _built(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)
