"""Small tensors that are stacked: bit-identical results, with as many launches as for one tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout import rows
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets import Constraint

SHAPES = [(16, 24), (8, 40), (16, 24), (8, 40), (16, 24), (16, 24), (3, 16, 24), (40, 8), (16, 4, 3, 3), (5, 7), (5, 7)]


def trained(constraint: Constraint, steps: int = 24, late: int = 4, **options: Any) -> list[Tensor]:
    """Return weights, state and figures of a run in which the third tensor gets its first gradient late."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    targets = [torch.randn(shape, generator=generator) for shape in SHAPES]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    named = {str(index): p for index, p in enumerate(parameters)}
    admm = ADMM(optimizer, named, constraint, total_steps=steps, schedule=Schedule(interval=3), **options)
    found = []
    for step in range(steps):
        for index, (p, target) in enumerate(zip(parameters, targets, strict=True)):
            p.grad = None if index == 2 and step < late else p.detach() - target
        optimizer.step()
        for p in parameters:
            found.append(p.detach().clone())
            state = optimizer.state.get(p, {})
            found += [value.clone() for key, value in sorted(state.items()) if key.startswith("elsa")]
        update = admm.last_update
        assert update is not None
        found += [update.primal_residual, update.dual_residual, update.mask_flips, update.sparsity]
    return found


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("prox", ["linearized", "feedback", "decoupled", "coupled"])
@pytest.mark.parametrize(
    "constraint", [Unstructured(0.75), Unstructured(0.75, scope="tensor"), Unstructured(0.75, floor=0.1)]
)
def test_together_they_end_as_each_by_itself(
    constraint: Constraint, prox: Any, state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(constraint, prox=prox, state_dtype=state_dtype)
    monkeypatch.setattr(rows, "SMALL_ON_CPU", 0)
    alone = trained(constraint, prox=prox, state_dtype=state_dtype)
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12 if one.dim() == 0 else 0, atol=0)
