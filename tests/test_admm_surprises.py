"""ADMM where optimizers, runs and parameters are not as expected."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.schedule import Schedule
from elsa_lightning.tensors import KEYS, MASK, SPLIT


def matrix(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 20, generator=torch.Generator().manual_seed(seed)).to(dtype))


def step(optimizer: torch.optim.Optimizer, *parameters: nn.Parameter, target: float = 1.0) -> None:
    optimizer.zero_grad()
    sum(((p - target).square().sum() for p in parameters), torch.zeros(())).backward()
    optimizer.step()


def kept(p: Tensor) -> int:
    return int((p != 0).sum())


class FailsOnce(torch.optim.Adam):
    """Runs out of memory in its third step, after the gradients are final."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_raises_costs_that_step_only(dtype: torch.dtype) -> None:
    p = matrix(dtype)
    optimizer = FailsOnce([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=11, schedule=Schedule(interval=2))
    for _ in range(2):
        step(optimizer, p)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        step(optimizer, p)
    admm.recover()
    assert torch.equal(p, before)
    optimizer.steps = 1
    step(optimizer, p)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(optimizer, p)
    for _ in range(8):  # without recover: the next step sees that the last one never ended
        step(optimizer, p)
    assert admm.step == 11
    assert kept(p) == 160


def test_a_shortened_run_ends_with_the_full_sparsity() -> None:
    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=100)
    for _ in range(20):
        step(optimizer, p)
    admm.total_steps = 30  # whose frozen phase began at 18
    step(optimizer, p)
    assert admm.frozen and kept(p) == 32


def test_weights_of_any_shape_are_rounded_beside_the_constrained_ones() -> None:
    p, scale = matrix(torch.bfloat16), nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([p, scale], lr=1e-3)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=30)
    for _ in range(30):
        step(optimizer, p, scale, target=3.0)
    assert 1 < float(scale) < 1.1


def test_rounding_does_not_wait_for_the_constrained_weights() -> None:
    """Their gradient stays away, and the random numbers must still change from step to step."""
    p, other = matrix(torch.bfloat16), nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p, other], lr=1e-4)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=600)
    for _ in range(500):
        other.grad = -torch.ones_like(other)
        optimizer.step()
    moved = other.float() - 1
    assert float(moved.mean()) == pytest.approx(0.05, rel=0.05)
    assert float(moved.std()) < 0.03


def test_a_group_that_is_added_later_is_rounded_too() -> None:
    p, late = matrix(torch.bfloat16), matrix(torch.bfloat16, seed=1)
    optimizer = torch.optim.Adam([p], lr=0.01)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    step(optimizer, p)
    optimizer.add_param_group({"params": [late]})
    before = late.detach().clone()
    for _ in range(9):
        step(optimizer, p, late)
    assert kept(p) == 160 and not torch.equal(late, before)


@pytest.mark.parametrize("kind", ["Adam", "Adam8bit"])
def test_a_tensor_that_gets_its_first_gradient_after_the_end_stays_sparse(kind: str) -> None:
    import bitsandbytes

    p, never = matrix(), matrix(seed=1)
    optimizer = getattr(torch.optim if kind == "Adam" else bitsandbytes.optim, kind)([p, never], lr=0.01)
    admm = ADMM(optimizer, {"p": p, "never": never}, Unstructured(0.5), total_steps=5)
    for _ in range(5):
        step(optimizer, p)
    admm.finish()
    assert kept(never) == 160
    for _ in range(3):
        step(optimizer, p, never)
    assert kept(never) == kept(p) == 160


def test_a_second_run_of_one_optimizer_begins_anew() -> None:
    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.01)
    for sparsity in (0.5, 0.9):
        admm = ADMM(optimizer, {"p": p}, Unstructured(sparsity), total_steps=20)
        for _ in range(20):
            step(optimizer, p)
        admm.finish()
        admm.detach()
        assert kept(p) == 320 - round(320 * sparsity)


def test_an_end_can_follow_an_early_end() -> None:
    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100)
    step(optimizer, p)
    admm.finish(resumable=True)
    admm.finish()
    assert admm.finished and not admm.suspended and kept(p) == 160
    assert set(KEYS) & optimizer.state[p].keys() == {MASK}


def test_while_paused_the_optimizer_is_as_it_was() -> None:
    p, x = matrix(), matrix()
    optimizer, base = torch.optim.Adam([p], lr=0.01), torch.optim.Adam([x], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=2)
    admm.paused = True
    for _ in range(3):
        step(optimizer, p)
        step(base, x)
    assert torch.equal(p, x) and admm.step == 0 and SPLIT not in optimizer.state[p]


def test_weights_that_are_all_zero_have_no_residual() -> None:
    p = nn.Parameter(torch.zeros(16, 20))
    optimizer = torch.optim.Adam([p], lr=0.0)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    step(optimizer, p)
    assert admm.last_update is not None and float(admm.last_update.primal_residual) == 0


def test_a_cyclic_learning_rate_does_not_multiply_the_pull() -> None:
    """It begins at a thousandth of its peak and calls that the initial one: κ lr/lr_initial would be 2000."""
    p = matrix()
    optimizer = torch.optim.SGD([p], lr=1e-5)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100, prox="decoupled")
    cycle = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-5, 1e-2, step_size_up=4, cycle_momentum=False)
    for _ in range(4):
        step(optimizer, p)
        cycle.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)  # the peak: γ = κ = 2
    x, split = p.detach().clone(), admm.tensors["p"].split(slice(0, 16)).clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), (x + 2 * split) / 3)


@pytest.mark.parametrize("stack", [torch.randn(4, 8, 16).transpose(1, 2), torch.randn(4, 8, 16)[:, :, ::2]])
def test_a_stack_that_is_not_contiguous_is_refused(stack: Tensor) -> None:
    p = nn.Parameter(stack)
    with pytest.raises(ValueError, match="make it contiguous"):
        ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=5)


def test_a_transposed_matrix_is_pruned_like_any_other() -> None:
    whole, p = matrix(), nn.Parameter(torch.randn(20, 16).t())
    with torch.no_grad():
        p.copy_(whole)
    for q in (whole, p):
        optimizer = torch.optim.Adam([q], lr=0.01)
        ADMM(optimizer, {"p": q}, Unstructured(0.5), total_steps=10)
        for _ in range(10):
            step(optimizer, q)
    assert torch.equal(p, whole) and kept(p) == 160


def test_kernels_whose_rows_are_nowhere_in_memory_are_refused() -> None:
    p = nn.Parameter(torch.randn(8, 4, 3, 3).transpose(2, 3))
    with pytest.raises(ValueError, match="its rows are not below each other in memory"):
        ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=5)


def test_codes_of_8_bits_are_not_taken_for_the_weights_that_a_moment_of_another_tensor_looks_like() -> None:
    """The first moment of both goes the weights' way; it is in float32 where a tensor is small."""
    generator = torch.Generator().manual_seed(0)
    large, small = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 256), (8, 16)))
    optimizer = Adam8bit([large, small], lr=1e-3)
    ADMM(optimizer, {"large": large, "small": small}, Unstructured(0.5), total_steps=8)
    for _ in range(8):
        for p in (large, small):
            p.grad = p.detach().clone()
        optimizer.step()
    lost = optimizer.state[large]["state1"] == 0  # the code of the most negative number, which a block may have
    assert lost.float().mean() < 0.1
