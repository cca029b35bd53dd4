"""Scores that break naive selections, in every set: equal, zero, tiny; one row, one column; gradients that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, NM, Block, ByPattern, Quantized, Unstructured
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets import Constraint

SETS: dict[str, Constraint] = {
    "tensor": Unstructured(0.5, "tensor"), "row": Unstructured(0.5, "row"), "model": Unstructured(0.5, floor=0.1),
    "depth": Unstructured(0.5, "tensor", depth=0.2),
    "nothing": Unstructured(0.0), "nearly all": Unstructured(0.999), "2:4": NM(2, 4), "4:4": NM(4, 4), "1:4": NM(1, 4),
    "blocks": Block(0.5, 2, 4), "no blocks": Block(0.0), "one block": Block(0.99, 64, 64),
    "grid": Quantized(4, 4), "grid 2:4": Quantized(3, None, NM(2, 4)), "ternary": Quantized(2, 4, Unstructured(0.5)),
    "patterns": ByPattern({"a": NM(2, 4), "b": Quantized(4)}),
}  # fmt: skip
SHAPES = {"square": (8, 8), "one row": (1, 8), "one column of groups": (8, 4), "stack": (2, 4, 8)}
WEIGHTS = {
    "equal": torch.ones_like, "zero": torch.zeros_like, "denormal": lambda x: torch.full_like(x, 1e-42),
    "huge": lambda x: torch.full_like(x, 1e15) * torch.randn_like(x).sign(),
    "one": lambda x: torch.zeros_like(x).flatten().index_fill(0, torch.tensor(0), 1.0).view(x.shape),
}  # fmt: skip


def run(
    constraint: Constraint, shape: tuple[int, ...], make: Any, lr: float, grads: Any, **options: Any
) -> tuple[dict[str, nn.Parameter], ADMM]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(make(torch.empty(shape))) for name in ("a", "b")}
    optimizer = torch.optim.Adam(parameters.values(), lr=lr)
    admm = ADMM(optimizer, parameters, constraint, total_steps=8, schedule=Schedule(interval=2), **options)
    for step in range(8):
        for name, p in parameters.items():
            p.grad = grads(step, name, p)
        optimizer.step()
    admm.finish()
    return parameters, admm


def assert_in(constraint: Constraint, parameters: dict[str, nn.Parameter], admm: ADMM) -> None:
    sizes = [p.numel() for p in parameters.values()]
    for name, p in parameters.items():
        x = p.detach()
        assert x.isfinite().all()
        each = constraint.sets[name] if isinstance(constraint, ByPattern) else constraint
        inside = each.inside if isinstance(each, Quantized) else each
        if isinstance(inside, NM):
            assert int((x.reshape(-1, inside.m) != 0).sum(1).max()) <= inside.n
        elif isinstance(inside, Unstructured) and inside.scope != "model":
            for matrix in x.flatten(0, -3) if x.dim() > 2 else x[None]:
                for part in matrix if inside.scope == "row" else matrix[None]:
                    assert int((part != 0).sum()) <= inside.kept(part.numel())
        elif isinstance(inside, Unstructured):
            matrices = sum(math.prod(q.shape[:-2]) for q in parameters.values())  # each keeps an entry
            assert sum(int((q != 0).sum()) for q in parameters.values()) <= max(matrices, inside.kept(sum(sizes)))
    assert admm.stray() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETS)
def test_weights_that_rank_alike_are_zero_or_tiny_end_in_the_set(name: str, shape: str) -> None:
    for kind, make in WEIGHTS.items():
        for lr, grads in ((0.0, lambda _, __, p: torch.zeros_like(p)), (0.01, lambda _, __, p: torch.ones_like(p))):
            parameters, admm = run(SETS[name], SHAPES[shape], make, lr, grads)
            assert all(p.isfinite().all() for p in parameters.values()), (kind, lr)
            assert_in(SETS[name], parameters, admm)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", SETS)
def test_gradients_that_are_no_numbers_cost_their_step_alone(name: str, bad: float) -> None:
    def noise(step: int, p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=torch.Generator().manual_seed(step))

    def broken(step: int, _: str, p: Tensor) -> Tensor:
        grad = noise(step, p)
        if step in (0, 3, 7):
            grad[..., -1, 0] = bad
        return grad

    parameters, admm = run(SETS[name], (8, 8), torch.randn_like, 0.01, broken)
    assert admm.step == 5
    assert_in(SETS[name], parameters, admm)


@pytest.mark.parametrize("first", [6, 7, 99])
@pytest.mark.parametrize("name", SETS)
def test_a_gradient_that_comes_when_the_mask_is_fixed_or_never_is_no_way_out(name: str, first: int) -> None:
    def grads(step: int, of: str, p: Tensor) -> Tensor | None:
        return None if of == "b" and step < first else torch.ones_like(p)

    parameters, admm = run(SETS[name], (8, 8), torch.randn_like, 0.01, grads)
    assert_in(SETS[name], parameters, admm)


COLUMNS: dict[str, Constraint] = {
    "tensor": Unstructured(0.5, "tensor"), "row": Unstructured(0.5, "row"), "model": Unstructured(0.5, "model"),
    "a number": Unstructured(keep=2), "bytes": Unstructured(keep_bytes=8), "1:1": NM(1, 1), "blocks": Block(0.5, 3, 2),
    "grid": Quantized(3), "grid of pairs": Quantized(4, 1, Unstructured(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 1), (1, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", COLUMNS)
def test_one_column_or_one_entry_is_a_matrix_like_any_other(name: str, shape: tuple[int, ...]) -> None:
    constraint = COLUMNS[name]
    for make in WEIGHTS.values():
        for lr, grads in ((0.0, lambda _, __, p: torch.zeros_like(p)), (0.01, lambda _, __, p: torch.randn_like(p))):
            parameters, admm = run(constraint, shape, make, lr, grads)
            assert all(p.isfinite().all() for p in parameters.values())
            assert_in(admm.constraint, parameters, admm)
            assert 1 <= sum(int(mask.sum()) for _, mask in admm.each_mask()) <= 2 * math.prod(shape)
