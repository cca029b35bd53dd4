"""Scores that break naive selections, in sets of whole units: equal, zero, tiny, huge; none and nearly all removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elsa_lightning import ADMM, ByPattern, Experts, Heads, Layers, Neurons, Unstructured, Width, shrink
from elsa_lightning.layout.kernels import is_transposed
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.base import WholePoints
from tests.sets.test_adversarial import WEIGHTS
from tests.sets.test_structured import logits, make

UNITS: dict[str, tuple[str, Constraint]] = {
    "no neurons": ("qwen3", Neurons(0.0)), "all neurons but one": ("gpt2", Neurons(0.999)),
    "half of the neurons": ("llama", Neurons(0.5)), "no heads": ("qwen3", Heads(0.0)),
    "all heads but one": ("qwen3", Heads(0.99)), "no layers": ("gpt2", Layers(0.0)),
    "all layers but one": ("gpt2", Layers(0.99)), "half of the experts": ("mixtral", Experts(0.5)),
    "to a size": ("qwen3", Width(14_000)), "to a file": ("qwen3", Width(keep_bytes=62_000)),
    "both": ("mistral", ByPattern({"attn": Heads(0.5), "mlp": Unstructured(0.9)})),
}  # fmt: skip
GRADIENTS: dict[str, Any] = {
    "none": torch.zeros_like, "equal": torch.ones_like, "tiny": lambda p: torch.full_like(p, 1e-42),
}  # fmt: skip


def train(kind: str, constraint: Constraint, weights: Any, gradient: Any) -> tuple[Any, ADMM]:
    model = make(kind)
    fitted = constraint.fitted(model)
    chosen = select(model, quiet=True).within(fitted).parameters
    with torch.no_grad():
        for p in chosen.values():
            p.copy_(weights(p))
    optimizer = torch.optim.Adam(chosen.values(), lr=1e-3)
    admm = ADMM(optimizer, chosen, fitted, total_steps=6, schedule=Schedule(interval=1))
    for step in range(6):
        for p in chosen.values():
            p.grad = gradient(step, p)
        optimizer.step()
    admm.finish()
    return model, admm


def assert_in(admm: ADMM) -> None:
    """Fail unless what is not zero is within what the set keeps of it."""
    tensors = [(t.p.detach(), None) for t in admm.tensors.values()]
    turned = [is_transposed(t.p) for t in admm.tensors.values()]
    points = WholePoints(tensors, list(admm.tensors), turned)
    for (x, _), mask in zip(tensors, admm.constraint.support(points), strict=True):
        assert x.isfinite().all() and not x.reshape(mask.shape)[~mask].any()
    assert admm.stray() == 0


@pytest.mark.parametrize("name", UNITS)
def test_units_that_rank_alike_are_zero_or_tiny_end_in_the_set(name: str) -> None:
    for kind, weights in WEIGHTS.items():
        for gradient in GRADIENTS.values():
            model, admm = train(*UNITS[name], weights, lambda _, p, of=gradient: of(p))
            assert_in(admm)
        if name not in ("both", "half of the experts") and kind in ("equal", "one"):
            torch.testing.assert_close(logits(shrink(model)), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", UNITS)
def test_gradients_that_are_no_numbers_cost_their_step_alone(name: str, bad: float) -> None:
    def broken(step: int, p: torch.Tensor) -> torch.Tensor:
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        return grad if step not in (0, 3) else grad.index_fill(0, torch.tensor(0), bad)

    _, admm = train(*UNITS[name], torch.clone, broken)
    assert admm.step == 4
    assert_in(admm)


def test_nothing_removed_leaves_the_model_as_it_was() -> None:
    for kind, constraint in (("qwen3", Neurons(0.0)), ("qwen3", Heads(0.0)), ("gpt2", Layers(0.0))):
        model, _ = train(kind, constraint, torch.clone, lambda _, p: torch.zeros_like(p))
        assert torch.equal(logits(model), logits(make(kind)))
        assert shrink(model).num_parameters() == model.num_parameters()
