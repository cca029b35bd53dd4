"""ADMM where optimizers, runs and parameters are not as expected."""

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from elsa_lightning import ADMM, NM, KeptZeros, Quantized, Schedule, Unstructured, select
from elsa_lightning.errors import UserError
from elsa_lightning.forms import make_form
from elsa_lightning.oneshot import project
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.sets import Block, Member, Tie, Tied
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


def test_a_step_that_raises_costs_that_step_only_where_two_prune() -> None:
    """bfloat16 weights are set aside during a step, and by one of them."""

    class Fails(torch.optim.Adam):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    p, other = matrix(torch.bfloat16), matrix(torch.bfloat16, seed=1)
    optimizer = Fails([p, other], lr=0.01)
    first = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=11)
    second = ADMM(optimizer, {"other": other}, Unstructured(0.9), total_steps=11)
    for _ in range(2):
        step(optimizer, p, other)
    before = p.detach().clone(), other.detach().clone()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(optimizer, p, other)
    first.recover()
    second.recover()
    assert torch.equal(p, before[0]) and torch.equal(other, before[1])
    optimizer.fails = False
    for _ in range(9):
        step(optimizer, p, other)
    assert first.step == second.step == 11
    assert kept(p) == 160 and kept(other) == 32


@pytest.mark.parametrize("prox", ["linearized", "decoupled", "coupled"])
def test_to_maximize_is_to_minimize_the_negative(prox: Any) -> None:
    runs = []
    for maximize in (False, True):
        p = matrix()
        optimizer = torch.optim.Adam([p], lr=0.02, maximize=maximize)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=60, prox=prox)
        for _ in range(60):
            optimizer.zero_grad()
            ((p - 1).square().sum() * (-1 if maximize else 1)).backward()
            optimizer.step()
        admm.finish()
        assert admm.last_stationarity is not None
        runs.append((p.detach(), float(admm.last_stationarity.distance), float(admm.last_stationarity.outranking)))
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float8_e4m3fn"])
def test_float64_weights_on_a_grid_take_a_state_of_few_bits(state_dtype: Any) -> None:
    ends = []
    for dtype in (torch.float32, torch.float64):
        p = matrix(dtype)
        optimizer = torch.optim.Adam([p], lr=0.02)
        admm = ADMM(optimizer, {"p": p}, Quantized(4, 20, inside=NM(2, 4)), total_steps=40, state_dtype=state_dtype)
        for _ in range(40):
            step(optimizer, p)
        admm.finish()
        ends.append(float((p - 1).square().mean()))
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


SETS = [
    Unstructured(0.5),
    Unstructured(0.5, scope="row"),
    Unstructured(0.5, scope="tensor"),
    NM(2, 4),
    Block(0.5, 4, 4),
]


@pytest.mark.parametrize("constraint", [*SETS, Quantized(4, 20, inside=NM(2, 4)), Quantized(4, 20)])
def test_weights_stored_by_columns_are_those_stored_by_rows(constraint: Any) -> None:
    by_rows, by_columns = matrix(), nn.Parameter(matrix().detach().t().contiguous().t())
    assert by_columns.stride() == (1, 16)
    for p in (by_rows, by_columns):
        optimizer = torch.optim.Adam([p], lr=0.02)
        admm = ADMM(optimizer, {"p": p}, constraint, total_steps=30)
        for _ in range(30):
            step(optimizer, p)
        admm.finish()
    torch.testing.assert_close(by_columns.contiguous(), by_rows)


def test_a_run_is_not_resumed_with_the_tensors_in_another_order() -> None:
    """What a form measured of each is kept by its place."""
    a, b = matrix(), matrix(seed=1)

    def admm_of(optimizer: torch.optim.Optimizer, **parameters: nn.Parameter) -> ADMM:
        return ADMM(optimizer, parameters, Unstructured(0.5), total_steps=20)

    optimizer = torch.optim.Adam([a, b], lr=0.02)
    admm = admm_of(optimizer, a=a, b=b)
    for _ in range(5):
        step(optimizer, a, b)
    saved = optimizer.state_dict(), admm.state_dict()
    again = torch.optim.Adam([a, b], lr=0.02)
    swapped = admm_of(again, b=b, a=a)
    again.load_state_dict(saved[0])
    with pytest.raises(UserError, match=r"in another order, from a\(16, 20\) on"):
        swapped.load_state_dict(saved[1])


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


def test_a_second_run_on_some_tensors_leaves_the_zeros_of_the_others() -> None:
    p, other = matrix(), matrix(seed=1)
    optimizer = torch.optim.Adam([p, other], lr=0.01)
    first = ADMM(optimizer, {"p": p, "other": other}, Unstructured(0.5, "tensor"), total_steps=20)
    for _ in range(20):
        step(optimizer, p, other)
    first.finish()
    second = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=20)
    for _ in range(20):
        step(optimizer, p, other, target=-1.0)
    second.finish()
    assert kept(p) == 64 and kept(other) == 160
    assert list(first.masks()) == ["other"] and list(second.masks()) == ["p"]


def test_a_tensor_that_another_run_takes_is_no_longer_waited_for() -> None:
    """The first run was to cut it when it gets its first gradient, and would cut what the second one trains."""
    p, late = matrix(), matrix(seed=1)
    optimizer = torch.optim.SGD([p, late], lr=0.01)
    first = ADMM(optimizer, {"p": p, "late": late}, Unstructured(0.5), total_steps=10)
    for _ in range(10):
        step(optimizer, p)
    first.finish()
    with torch.no_grad():
        late.copy_(matrix(seed=1))
    second = ADMM(optimizer, {"late": late}, Unstructured(0.2), total_steps=10)
    for _ in range(10):
        step(optimizer, p, late)
    second.finish()
    assert kept(p) == 160 and kept(late) == 256


def test_the_end_cuts_only_what_has_no_mask_yet() -> None:
    """One budget is for all, and a tensor that got no gradient would take weights from the trained one at the end."""
    p, never = matrix(), nn.Parameter(10 * matrix(seed=1).detach())
    optimizer = torch.optim.Adam([p, never], lr=0.01)
    admm = ADMM(optimizer, {"p": p, "never": never}, Unstructured(0.5, scope="model"), total_steps=20)
    for _ in range(20):
        step(optimizer, p)
    before = p.detach().clone()
    admm.finish()
    assert torch.equal(p, before) and kept(p) == kept(never) == 160


ANY, NM14, GRID, BOTH = Unstructured(0.9), NM(1, 4), Quantized(4, 20), Quantized(4, 20, inside=NM(1, 4))


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize(
    ("prox", "constraint"),
    [
        *((prox, s) for prox in ("linearized", "coupled") for s in (ANY, NM14)),
        ("linearized", GRID),
        ("linearized", BOTH),
    ],
)
def test_the_end_is_exact_with_an_optimizer_that_keeps_no_state(constraint: Any, prox: Any, steps: int) -> None:
    """Its state has nothing but what is ours, and an early end projects onto another set than the last update did."""
    p = matrix()
    optimizer = torch.optim.SGD([p], lr=0.05)
    schedule = Schedule(frozen=0.0 if prox == "coupled" else 0.4, interval=5)
    admm = ADMM(optimizer, {"p": p}, constraint, total_steps=40, prox=prox, schedule=schedule)
    for _ in range(steps):
        step(optimizer, p)
    before = p.detach().clone()
    admm.finish()
    if constraint == Unstructured(0.9):
        assert kept(p) == 32
    if isinstance(constraint, NM) or getattr(constraint, "inside", None) is not None:
        assert int((p.view(-1, 4) != 0).sum(dim=1).max()) == 1
    if constraint.fixes_values and steps < 40:  # 8-bit scales with 4-bit levels would shrink all of it
        assert float((p - before)[p != 0].norm() / before[p != 0].norm()) < 0.1
    after = p.detach().clone()
    assert admm.stray() == 0 and torch.equal(admm.masks()["p"] & (p != 0), p != 0)
    admm.hold()
    assert torch.equal(p, after)


@pytest.mark.parametrize("prox", ["linearized", "decoupled", "coupled"])
@pytest.mark.parametrize("steps", [8, 30, 60])
def test_zeros_are_held_while_suspended_whatever_the_cut_removed(prox: Any, steps: int) -> None:
    """Weights on the set are 0 off the mask before they are cut, so that the cut itself removes next to nothing."""
    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=80, prox=prox, schedule=Schedule(ramp=0.2))
    for _ in range(steps):
        step(optimizer, p)
    before = p.detach().clone()
    admm.finish(resumable=True)
    assert kept(p) == 64
    cut = p == 0
    with torch.no_grad():
        p[cut] += 0.01
    assert admm.stray() == 256
    admm.hold()
    assert kept(p) == 64 and not p[cut].any()
    admm.resume()
    assert torch.equal(p, before)


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
    """It begins at a thousandth of its peak and calls that the initial one: κ lr/lr_initial would be 2000.

    On its way down the peak is what was the largest so far.
    """
    p = matrix()
    optimizer = torch.optim.SGD([p], lr=1e-5)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100, prox="decoupled")
    cycle = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-5, 1e-2, step_size_up=4, cycle_momentum=False)
    for _ in range(4):
        step(optimizer, p)
        cycle.step()
    for gamma in (2.0, 0.75 * 2):  # the peak: γ = κ = 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(gamma / 2 * 1e-2, rel=1e-3)
        x, split = p.detach().clone(), admm.tensors["p"].split(slice(0, 16)).clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(p.detach(), (x + gamma * split) / (1 + gamma), rtol=1e-3, atol=1e-4)
        cycle.step()


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
    """The first moments of both tensors point in the weights' direction; that of the small one is in float32."""
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


class Interrupted(torch.optim.Adam):
    """Is interrupted when it is told to be, half-way through the weights."""

    interrupts = False

    def step(self, closure: Any = None) -> Any:
        if self.interrupts:
            self.interrupts = False
            self.param_groups[0]["params"][0].detach().add_(1)
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("scheduled", ["not", "before", "after"])
def test_bfloat16_weights_are_themselves_as_soon_as_a_step_has_raised(scheduled: str) -> None:
    p = matrix(torch.bfloat16)
    optimizer = Interrupted([p], lr=0.01)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) if scheduled == "before" else None
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=9, schedule=Schedule(interval=2))
    if scheduled == "after":
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(2):
        step(optimizer, p)
    before, optimizer.interrupts = p.detach().clone(), True
    with pytest.raises(KeyboardInterrupt):
        step(optimizer, p)
    assert torch.equal(p, before)
    for _ in range(7):
        step(optimizer, p)
    assert admm.step == 9 and kept(p) == 160
    if scheduler is not None:
        with warnings.catch_warnings(action="error"):  # it would miss the mark that it gave the step
            scheduler.step()
    admm.detach()
    assert ("step" in vars(optimizer)) == (scheduled != "not")
    step(optimizer, p)
    assert kept(p) == 320


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("first", [3, 14, 30])
def test_a_late_first_gradient_does_not_cost_the_sparsity_of_optimizers_without_state(kind: Any, first: int) -> None:
    p, late = matrix(), matrix(seed=1)
    optimizer = kind([p, late], lr=0.001)
    admm = ADMM(optimizer, {"p": p, "late": late}, Unstructured(0.5, "tensor"), total_steps=20)
    for number in range(20):
        step(optimizer, p, *([late] if number >= first else []))
    assert kept(p) == 160 and kept(late) == (160 if first < 20 else 320)
    admm.finish()
    for _ in range(3):
        step(optimizer, p, late)
        assert kept(p) == kept(late) == 160


def test_a_resumed_run_still_waits_for_a_late_first_gradient() -> None:
    ps = [matrix(), matrix(seed=1)]
    optimizer = torch.optim.Adam(ps, lr=0.001)
    admm = ADMM(optimizer, {"p": ps[0], "late": ps[1]}, Unstructured(0.5), total_steps=20)
    for _ in range(15):
        step(optimizer, ps[0])
    qs = copy.deepcopy(ps)
    again = torch.optim.Adam(qs, lr=0.001)
    resumed = ADMM(again, {"p": qs[0], "late": qs[1]}, Unstructured(0.5), total_steps=20)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(admm.state_dict())
    step(again, *qs)
    assert resumed.phase == "frozen" and kept(qs[0]) == kept(qs[1]) == 160


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_zeros_made_before_the_first_step_stay(kind: Any) -> None:
    p = matrix()
    optimizer = kind([p], lr=0.001)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=1)
    admm.finish()
    for _ in range(3):
        step(optimizer, p)
        assert kept(p) == 160


def test_two_cannot_constrain_a_parameter_at_once() -> None:
    p, other = matrix(), matrix(seed=1)
    optimizer = torch.optim.Adam([p, other], lr=0.01)
    first = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=10)
    ADMM(optimizer, {"other": other}, Unstructured(0.5), total_steps=10)
    for _ in range(3):
        step(optimizer, p, other)
    with pytest.raises(UserError, match=r"p is constrained already.*detach"):
        ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    first.detach()
    second = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=10)
    for _ in range(10):
        step(optimizer, p, other)
    second.finish()
    assert kept(p) == 64 and kept(other) == 160
    alone = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=40)  # the second has finished
    for _ in range(40):
        step(optimizer, p, other, target=-1.0)
    assert alone.step == 40 and second.step == 10 and kept(p) == 160


def test_stepping_while_suspended_goes_on_with_the_weights_from_before(caplog: pytest.LogCaptureFixture) -> None:
    ends = []
    for suspends in (False, True):
        p = matrix()
        optimizer = torch.optim.Adam([p], lr=0.01)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20, prox="decoupled")
        for number in range(20):
            optimizer.zero_grad()
            p.grad = torch.randn(16, 20, generator=torch.Generator().manual_seed(number))
            if suspends and number in (5, 9):
                admm.finish(resumable=True)
                assert kept(p) == 160
            optimizer.step()
        ends.append(p.detach().clone())
        assert set(optimizer.state[p]) & set(KEYS) == {MASK}
    assert torch.equal(*ends)
    assert caplog.text.count("Call admm.resume() before the forward pass") == 1


@pytest.mark.parametrize("number", [5, 15])
def test_masks_that_vanish_from_the_state_are_an_error(number: int) -> None:
    for lost in (1, 2):
        ps = [matrix(), matrix(seed=1)]
        optimizer = torch.optim.Adam(ps, lr=0.01)
        ADMM(optimizer, {"p": ps[0], "q": ps[1]}, Unstructured(0.5), total_steps=20)
        for _ in range(number):
            step(optimizer, *ps)
        for p in ps[:lost]:
            optimizer.state[p].clear()
        with pytest.raises(UserError, match=r"masks have vanished from the state of Adam"):
            step(optimizer, *ps)


def test_zeros_that_are_kept_are_not_lost_with_the_state_either() -> None:
    p = matrix()
    with torch.no_grad():
        p[:8] = 0
    optimizer = torch.optim.Adam([p], lr=0.01)
    KeptZeros(optimizer, {"p": p})
    step(optimizer, p)
    optimizer.state.clear()
    with pytest.raises(UserError, match="masks have vanished"):
        step(optimizer, p)


class Clears(torch.optim.Adam):
    """Takes its gradients away when it has used them."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


def test_an_optimizer_may_clear_its_gradients() -> None:
    p, plain = matrix(), matrix()
    optimizers = [Clears([p], lr=0.01), torch.optim.Adam([plain], lr=0.01)]
    runs = [
        ADMM(optimizer, {"p": q}, Unstructured(0.5), total_steps=10)
        for optimizer, q in zip(optimizers, (p, plain), strict=True)
    ]
    for _ in range(10):
        step(optimizers[0], p)
        step(optimizers[1], plain)
    assert [admm.step for admm in runs] == [10, 10]
    assert torch.equal(p, plain) and kept(p) == 160


def test_a_run_without_a_counted_step_says_so(caplog: pytest.LogCaptureFixture) -> None:
    p = matrix()
    ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=1).finish()
    assert not caplog.text
    p = matrix()
    ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=10).finish()
    assert "none of the 10 optimizer steps was counted" in caplog.text


class Rateless(torch.optim.Optimizer):
    """Knows no learning rate."""

    def __init__(self, parameters: Any, **rate: Any) -> None:
        super().__init__(parameters, rate)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.01)


@pytest.mark.parametrize("prox", ["linearized", "decoupled", "published"])
@pytest.mark.parametrize("rate", [{}, {"lr": None}])
def test_an_optimizer_may_have_no_learning_rate(rate: dict[str, None], prox: Any) -> None:
    p = matrix()
    optimizer = Rateless([p], **rate)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10, prox=prox)
    for _ in range(10):
        step(optimizer, p)
    assert admm.step == 10 and kept(p) == 160


def test_groups_may_be_empty_and_parameters_complex() -> None:
    p, phase = matrix(torch.bfloat16), nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    optimizer = torch.optim.Adam([{"params": []}, {"params": [p]}, {"params": [phase]}], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    for _ in range(10):
        optimizer.zero_grad()
        ((p.float() - 1).square().sum() + phase.abs().square().sum()).backward()
        optimizer.step()
    assert admm.step == 10 and kept(p) == 160
    optimizer.zero_grad()
    phase.abs().mul(torch.inf).sum().backward()
    optimizer.step()
    assert phase.isfinite().all()


class Takes(torch.optim.SGD):
    """Has a step that is given a loss."""

    def step(self, loss: Tensor) -> None:  # type: ignore[override]
        self.seen = float(loss)
        super().step()


def test_what_a_step_is_given_need_not_be_a_closure() -> None:
    p = matrix()
    optimizer = Takes([p], lr=0.01)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=1)
    loss = (p - 1).square().sum()
    loss.backward()
    optimizer.step(loss.detach())
    assert optimizer.seen == float(loss) and kept(p) == 160


def test_parameters_may_be_a_selection_or_pairs_and_each_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters())
    for given in (select(model), ((name, p) for name, p in model.named_parameters() if p.dim() > 1)):
        admm = ADMM(optimizer, given, Unstructured(0.5, "tensor"), total_steps=2)
        admm.finish()
        assert kept(model[0].weight) == 64
    with pytest.raises(UserError, match="p and q are one parameter"):
        ADMM(optimizer, {"p": model[0].weight, "q": model[0].weight}, Unstructured(0.5), total_steps=2)
    empty = nn.Parameter(torch.zeros(0, 4))
    with pytest.raises(UserError, match=r"empty of shape \(0, 4\) has no entries"):
        ADMM(torch.optim.Adam([empty]), {"empty": empty}, Unstructured(0.5), total_steps=2)


def test_a_form_of_ones_own_serves_several_runs() -> None:
    form, ends = make_form("linearized"), []
    for _ in range(2):
        p = matrix()
        optimizer = torch.optim.Adam([p], lr=0.01)
        ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20, prox=form)
        for number in range(20):
            optimizer.zero_grad()
            p.grad = torch.randn(16, 20, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_settings_may_be_numbers_of_numpy() -> None:
    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(np.float64(0.5)), total_steps=np.int64(4))
    step(optimizer, p)
    kept_state = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "admm": admm.state_dict()}, kept_state)
    kept_state.seek(0)
    saved = torch.load(kept_state, weights_only=True)
    q = matrix()
    other = torch.optim.Adam([q], lr=0.01)
    resumed = ADMM(other, {"p": q}, Unstructured(0.5), total_steps=4)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["admm"])
    assert resumed.step == 1


def test_sparse_gradients_of_a_constrained_weight_are_refused_by_name() -> None:
    table = nn.Embedding(16, 8, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    ADMM(optimizer, {"table": table.weight}, Unstructured(0.5), total_steps=4, prox="published")
    with pytest.raises(UserError, match="table has sparse gradients"):
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.arange(4)).square().sum().backward()
            optimizer.step()


class Rows(Tied):
    """Half of the rows, of two matrices together."""

    def ties(self, shapes: Any) -> list[Tie]:
        rows = shapes["p"][0]
        return [Tie(rows, rows // 2, (Member("p", axis=0), Member("late", axis=0)))]


@pytest.mark.parametrize("first", [0, 3, 14, 30])
@pytest.mark.parametrize("prox", ["linearized", "decoupled"])
def test_units_wait_for_the_first_gradient_of_all_their_tensors(
    first: int, prox: Any, caplog: pytest.LogCaptureFixture
) -> None:
    p, late = matrix(), matrix(seed=1)
    optimizer = torch.optim.Adam([p, late], lr=0.001)
    admm = ADMM(optimizer, {"p": p, "late": late}, Rows(), total_steps=20, prox=prox)
    for number in range(20):
        step(optimizer, p, *([late] if number >= first and number % 2 else []))
    assert ("had no gradient so far" in caplog.text) == (first > 12)
    admm.finish()
    rows = p.detach().any(dim=1)
    assert int(rows.sum()) == 8 and torch.equal(rows, late.detach().any(dim=1))
    for _ in range(3):
        step(optimizer, p, late)
    assert torch.equal(p.detach().any(dim=1), late.detach().any(dim=1)) and int(p.detach().any(dim=1).sum()) == 8


def test_a_compiled_step_is_not_compiled_anew_at_each_step_of_ours() -> None:
    p, plain = matrix(), matrix()
    optimizer, eager = torch.optim.Adam([p], lr=0.01), torch.optim.Adam([plain], lr=0.01)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    ADMM(eager, {"p": plain}, Unstructured(0.5), total_steps=10)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(10):
        for one, q, make in ((optimizer, p, compiled), (eager, plain, eager.step)):
            one.zero_grad()
            (q - 1).square().sum().backward()
            make()
    torch.testing.assert_close(p, plain)
    assert kept(p) == 160
    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert frames < 10  # some 300 where the hooks are traced


@pytest.mark.parametrize(
    ("entries", "skipped"),
    [
        ([1.0, torch.nan], True),
        ([torch.inf, -torch.inf], True),
        ([3e38, torch.inf], True),
        ([3e38, 3e38], False),  # whose sum is not finite
        ([-3e38, -3e38], False),
    ],
)
def test_only_entries_that_are_not_finite_skip_a_step(entries: list[float], skipped: bool) -> None:
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.SGD([p], lr=1e-38)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100, schedule=Schedule(interval=50))
    p.grad = torch.zeros(8, 8)
    p.grad[0, :2] = torch.tensor(entries)
    optimizer.step()
    assert (float(p[0, 0]) == 1.0) is skipped


def test_a_run_goes_on_in_copies_but_not_in_one_of_its_own() -> None:
    """Hooks of an optimizer are not copied with it, so a copy would prune nothing."""

    def admm_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> ADMM:
        return ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20, schedule=Schedule(interval=2))

    p = matrix()
    optimizer = torch.optim.Adam([p], lr=0.02)
    admm = admm_of(optimizer, p)
    for _ in range(5):
        step(optimizer, p)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="cannot be copied"):
            copying(admm)
    p2, optimizer2 = copy.deepcopy((p, optimizer))
    admm2 = admm_of(optimizer2, p2)
    admm2.load_state_dict(admm.state_dict())
    for _ in range(15):
        step(optimizer, p)
        step(optimizer2, p2)
    admm.finish()
    admm2.finish()
    assert torch.equal(p, p2) and kept(p) == p.numel() // 2


def assigned(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def normed(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    weight_norm(model[0])


def new_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0] = nn.Linear(8, 16)


def exchanged(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    assigned(model, optimizer)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def swapped(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.randn(16, 8)))


def same_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    spectral_norm(model[0])


def wider(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.double()


def train_changed(change: Any, at: int, keep: bool = False) -> nn.Sequential:
    """Train, and change the model before a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if keep:
        project(model, Unstructured(0.9))
        admm: ADMM = KeptZeros(optimizer, select(model).parameters)
    else:
        admm = ADMM(optimizer, select(model).parameters, Unstructured(0.9, "tensor"), total_steps=12)
    for step in range(12):
        if step == at:
            change(model, optimizer)
        optimizer.zero_grad()
        if step != 3:  # a batch that is skipped replaces nothing
            batch = torch.randn(4, 8, dtype=model[2].weight.dtype)
            (model(batch) - batch.sin()).square().mean().backward()
        optimizer.step()
    admm.finish()
    return model


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("at", [0, 5, 10])
@pytest.mark.parametrize("change", [assigned, normed, new_layer, exchanged])
def test_parameters_that_are_replaced_are_noticed_at_the_next_step(change: Any, at: int, keep: bool) -> None:
    with pytest.raises(UserError, match=r"^(replaced in the model|taken out of SGD) after ADMM was attached: 0"):
        train_changed(change, at, keep)


@pytest.mark.parametrize("at", [0, 5, 10])
@pytest.mark.parametrize("change", [swapped, same_parameter, wider])
def test_parameters_that_stay_are_pruned_whatever_was_done_to_them(change: Any, at: int) -> None:
    model = train_changed(change, at)
    for weight in (model[0].weight, model[2].weight):
        assert int((weight != 0).sum()) == 13
