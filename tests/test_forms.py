"""What the forms of the x-update have in common, and what only some have: fixed points, long runs, own forms."""

import copy
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.forms import Step
from elsa_lightning.forms.on_set import OnSet
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.unstructured import AT_ONCE
from elsa_lightning.watch import verdict

ALWAYS_OPEN = {"ramp": 0.0, "frozen": 0.0}


def quadratic(sparsity: float, seed: int) -> tuple[nn.Parameter, Callable[[], Tensor], Tensor]:
    """½ ‖x − t‖², and its best sparse point: the largest |t|, to which the parameter is set."""
    t = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = round((1 - sparsity) * t.numel())
    best = t * (t.abs() >= t.abs().flatten().topk(kept).values[-1])
    p = nn.Parameter(best.clone())
    return p, lambda: (p - t).square().sum() / 2, best


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def run(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("prox", ["linearized", "decoupled", "coupled", "published"])
def test_from_the_best_sparse_point_no_form_walks_away(prox: Any, momentum: float, sparsity: float) -> None:
    p, loss, best = quadratic(sparsity, seed=int(10 * sparsity))
    optimizer = torch.optim.SGD([p], lr=0.05 * (1 - momentum), momentum=momentum)
    penalty = {"coupled": 4.0, "published": 4.0}.get(prox)  # above the curvature, as the theorem asks
    schedule = Schedule(penalty, interval=4, **ALWAYS_OPEN)
    admm = ADMM(optimizer, {"p": p}, Unstructured(sparsity), total_steps=1500, schedule=schedule, prox=prox)
    run(optimizer, loss, 1500)
    assert admm.last_update is not None and float(admm.last_update.mask_flips) == 0
    admm.finish()
    torch.testing.assert_close(p.detach(), best, atol=1e-6, rtol=0)


def test_from_the_best_sparse_point_feedback_walks_away() -> None:
    """The dual of an entry with a steady gradient grows until it is kept: why this is no longer the default."""
    p, loss, best = quadratic(0.9, seed=9)
    optimizer = torch.optim.SGD([p], lr=0.05)
    ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=1500, schedule=Schedule(interval=4, **ALWAYS_OPEN),
         prox="feedback")  # fmt: skip
    before = float(loss())
    run(optimizer, loss, 1500)
    assert float(loss()) > 1.2 * before and not torch.equal(p != 0, best != 0)


def regression(prox: Any, steps: int, **schedule: Any) -> float:
    """Excess loss of noisy linear regression on correlated inputs, batches of 8, at 90 %."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(100, 100, generator=generator) / 10 + torch.eye(100)
    truth = torch.randn(100, 4, generator=generator) * (torch.rand(100, 4, generator=generator) < 0.3)
    p = nn.Parameter(truth.T + 0.1 * torch.randn(4, 100, generator=generator))
    optimizer = torch.optim.Adam([p], lr=0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=steps, prox=prox, schedule=Schedule(**schedule))
    for _ in range(steps):
        x = torch.randn(8, 100, generator=generator) @ mix
        y = x @ truth + torch.randn(8, 4, generator=generator)
        run(optimizer, lambda x=x, y=y: (x @ p.T - y).square().mean(), 1)
        decay.step()
    admm.finish()
    error = (p.detach().T - truth).T @ mix.T
    return float(error.square().sum() / 4)


def test_more_steps_do_not_make_noisy_regression_worse() -> None:
    losses = [regression("linearized", steps) for steps in (100, 400, 2000)]
    assert losses[1] < losses[0] * 1.02 and losses[2] < losses[1] * 1.02, losses
    assert losses[2] < regression("feedback", 2000)


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_a_rising_penalty_does_no_harm_to_the_default(shape: Any) -> None:
    assert regression("linearized", 300, shape=shape) < 1.2 * regression("linearized", 300)


@pytest.mark.parametrize("options", [{"shape": "cosine"}, {"penalty": 0.0}])
def test_feedback_refuses_what_it_would_divide_by(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match="must be above 0 and constant"):
        ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=9, schedule=Schedule(**options),
             prox="feedback")  # fmt: skip


@pytest.mark.parametrize(
    ("prox", "penalty"),
    [("linearized", 4.0), ("decoupled", 2.0), ("feedback", 2.0), ("coupled", 0.01), ("published", 0.01)],
)
def test_each_form_has_a_penalty_of_its_own(prox: Any, penalty: float) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    assert (
        ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=9, prox=prox).schedule.penalty == penalty
    )


def test_the_published_form_projects_by_magnitude_first() -> None:
    masks = []
    for prox in ("published", "coupled"):
        p = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.Adam([p], lr=1e-3, betas=(0.9, 0.95))
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=64,
                    schedule=Schedule(interval=2, ramp=0, frozen=0), prox=prox)  # type: ignore[arg-type]  # fmt: skip
        weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)).exp()
        run(optimizer, lambda p=p, weight=weight: (weight * p.square()).sum(), 1)
        masks.append(admm.masks()["p"])
        largest = p.detach().abs() >= p.detach().abs().flatten().topk(32).values[-1]
        assert torch.equal(masks[-1], largest) == (prox == "published")
    assert not torch.equal(*masks)


def stationarity_run(steps: int) -> ADMM:
    p, loss, _ = quadratic(0.5, seed=3)
    with torch.no_grad():
        p.copy_(torch.randn(20, 20, generator=torch.Generator().manual_seed(5)))
    optimizer = torch.optim.SGD([p], lr=0.05)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=steps, prox="coupled",
                schedule=Schedule(4.0, interval=10, **ALWAYS_OPEN))  # fmt: skip
    run(optimizer, loss, steps)
    return admm


def test_stationarity_is_the_distance_to_the_projected_step() -> None:
    """Held against a sort, at the gradient that the step itself was made with."""
    p, loss, _ = quadratic(0.5, seed=3)
    with torch.no_grad():
        p.copy_(torch.randn(20, 20, generator=torch.Generator().manual_seed(5)))
    optimizer = torch.optim.SGD([p], lr=0.05)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20, prox="coupled",
                schedule=Schedule(4.0, interval=10, **ALWAYS_OPEN))  # fmt: skip
    run(optimizer, loss, 19)
    x, mask = p.detach().clone(), admm.masks()["p"]
    (gradient,) = torch.autograd.grad(loss(), p)
    y = x - gradient / 4.0
    support = y.abs() >= y.abs().flatten().topk(200).values[-1]
    run(optimizer, loss, 1)
    measured = admm.last_stationarity
    assert measured is not None and measured.step == 20
    assert float(measured.distance) == pytest.approx(float((x - y * support).norm() / x.norm()), rel=1e-5)
    assert float(measured.outranking) == pytest.approx(int((support & ~mask).sum()) / 200)


@pytest.mark.parametrize("maximize", [False, True])
def test_stationarity_under_adam_is_in_the_metric_of_its_steps_at_their_largest(maximize: bool) -> None:
    p, loss, _ = quadratic(0.5, seed=3)
    with torch.no_grad():
        p.copy_(torch.randn(20, 20, generator=torch.Generator().manual_seed(5)))
    groups = [{"params": [p], "initial_lr": 1.0}]  # as in a warm-up
    optimizer = torch.optim.Adam(groups, lr=0.01, betas=(0.9, 0.95), maximize=maximize)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=40, prox="decoupled",
                schedule=Schedule(2.0, interval=10, ramp=1.0, frozen=0.0))  # fmt: skip
    run(optimizer, lambda: -loss() if maximize else loss(), 19)
    x, mask, moment = p.detach().clone(), admm.masks()["p"], optimizer.state[p]["exp_avg_sq"].clone()
    (gradient,) = torch.autograd.grad(loss(), p)
    y = x - 1.0 / 2.0 * gradient / (moment / (1 - 0.95**19)).sqrt()
    kept = 400 - round(400 * (AT_ONCE + (0.9 - AT_ONCE) * (1 - (1 - 19 / 40) ** 3)))  # on the way to 40
    cost = moment.sqrt() * y.square()
    support = cost >= cost.flatten().topk(kept).values[-1]
    run(optimizer, lambda: -loss() if maximize else loss(), 1)
    measured = admm.last_stationarity
    assert measured is not None and measured.step == 20
    assert float(measured.distance) == pytest.approx(float((x - y * support).norm() / x.norm()), rel=1e-4)
    assert float(measured.outranking) == pytest.approx(int((support & ~mask).sum()) / int(mask.sum()))


def test_where_nothing_pulls_at_the_zeros_the_gradient_of_the_rest_is_not_overlooked() -> None:
    """Without a gradient off the mask λ is κ ‖∇f‖/‖x‖, so that the distance is 1/κ; it would be 0, as if converged."""
    start = torch.cat([torch.linspace(1, 2, 200), torch.full((200,), 0.1)]).view(20, 20)
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([p], lr=1e-6)
    schedule = Schedule(5.0, interval=2, **ALWAYS_OPEN)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=4, schedule=schedule)
    for _ in range(4):
        p.grad = torch.where(start < 0.5, 0.0, torch.linspace(-1, 1, 400).view(20, 20))
        optimizer.step()
    assert admm.last_stationarity is not None
    assert float(admm.last_stationarity.distance) == pytest.approx(1 / 5, rel=1e-4)


def test_a_longer_run_is_nearer_to_a_stationary_point_and_says_so() -> None:
    short, long = stationarity_run(40), stationarity_run(3000)
    assert short.last_stationarity is not None and long.last_stationarity is not None
    assert float(long.last_stationarity.distance) < 1e-3 < float(short.last_stationarity.distance)
    assert verdict(long.last_update, long.last_stationarity).startswith("converged")
    assert verdict(short.last_update, short.last_stationarity).startswith("not converged")
    assert "nothing is known" in verdict(None, None)
    assert long.last_update is not None
    assert "made its mask, so nothing is known" in verdict(replace(long.last_update, step=1), None)


def test_a_form_of_ones_own_needs_nothing_else() -> None:
    class Forgetful(OnSet):
        """Gradual pruning: what is cut is forgotten."""

        name, penalty = "forgetful", 1.0

        def after_step(self, step: Step) -> None:
            for tensor in step.tensors.values():
                for rows, *_ in tensor.pieces():
                    tensor.x(rows).mul_(tensor.mask(rows))

        def factors(self, sums: Any, rescale: float, penalty: float, span: int) -> Tensor:
            return torch.zeros_like(sums.z)

    p, loss, _ = quadratic(0.5, seed=3)
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=60, prox=Forgetful(), schedule=Schedule(interval=2))
    masks = []
    for _ in range(60):
        run(optimizer, loss, 1)
        masks.append(admm.masks()["p"])
    assert int((p != 0).sum()) == 200
    assert all(bool((now <= before).all()) for before, now in itertools.pairwise(masks)), "nothing returns"


@pytest.mark.parametrize("prox", ["linearized", "decoupled"])
def test_a_resumed_run_remembers_the_largest_learning_rate(prox: Any) -> None:
    """Which nothing else knows where rates are set by hand."""

    def build() -> tuple[nn.Parameter, Callable[[], Tensor], torch.optim.Optimizer, ADMM]:
        p, loss, _ = quadratic(0.5, seed=3)
        optimizer = torch.optim.Adam([p], lr=0.02)
        schedule = Schedule(interval=3, **ALWAYS_OPEN)
        return p, loss, optimizer, ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=40, prox=prox,
                                        schedule=schedule)  # fmt: skip

    def falling(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 40)
            run(optimizer, loss, 1)

    p, loss, optimizer, admm = build()
    falling(optimizer, loss, range(20))
    q, again, other, resumed = build()
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(admm.state_dict())
    falling(optimizer, loss, range(20, 40))
    falling(other, again, range(20, 40))
    assert torch.equal(p, q)


@pytest.mark.parametrize("prox", ["linearized", "decoupled", "coupled", "feedback"])
def test_a_longer_run_opens_a_mask_that_was_fixed(prox: Any, caplog: pytest.LogCaptureFixture) -> None:
    def build(total: int) -> tuple[nn.Parameter, Callable[[], Tensor], torch.optim.Optimizer, ADMM]:
        p, loss, _ = quadratic(0.5, seed=3)
        with torch.no_grad():
            p.copy_(torch.randn(20, 20, generator=torch.Generator().manual_seed(5)))
        optimizer = torch.optim.Adam([p], lr=0.02)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=total, prox=prox, schedule=Schedule(interval=2))
        return p, loss, optimizer, admm

    p, loss, optimizer, admm = build(40)
    run(optimizer, loss, 30)
    assert admm.phase == "frozen"
    q, again, other, longer = build(400)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    with caplog.at_level(logging.WARNING):
        longer.load_state_dict(admm.state_dict())
    assert "40 steps, this one has 400" in caplog.text and "open again until step 240" in caplog.text
    assert longer.phase == "admm"
    assert torch.equal(longer.form.dual_sum(longer.tensors["p"], slice(0, 20)), q), "x + u, with a dual of 0"
    before = longer.masks()["p"]
    run(other, again, 370)
    assert longer.phase == "frozen" and int((q != 0).sum()) == 200
    assert not torch.equal(longer.masks()["p"], before), "the mask has moved"


@pytest.mark.parametrize(("steps", "frozen"), [(99, 0.0), (4000, 0.75), (16_000, 0.75)])
def test_noise_is_measured_at_the_largest_rate_of_each_group_and_counts_over_the_admm_phase(
    steps: int, frozen: float
) -> None:
    """A group at a quarter of its rate, as in a warm-up, moves the dual by a quarter; its ρ is that of the others."""
    start = torch.cat([torch.linspace(1, 2, 200), torch.linspace(0.1, 0.2, 200)]).view(20, 20)
    gradient = torch.where(start < 0.5, torch.randn(20, 20, generator=torch.Generator().manual_seed(0)), 0.0)
    ps = [nn.Parameter(start.clone()) for _ in range(2)]
    quarter = {"params": [ps[1]], "lr": 2**-11, "initial_lr": 2**-9}
    optimizer = torch.optim.SGD([{"params": [ps[0]], "lr": 2**-9}, quarter])
    admm = ADMM(optimizer, {"a": ps[0], "b": ps[1]}, Unstructured(0.5), total_steps=steps,
                schedule=Schedule(interval=2, ramp=0.0, frozen=frozen))  # fmt: skip
    duals = []
    for _ in range(3):  # the second step is measured, the third is divided by what it said
        for p in ps:
            p.grad = gradient.clone()
        optimizer.step()
        duals.append([admm.form.dual(tensor, slice(0, 20)) for tensor in admm.tensors.values()])
    moved = [after - before for before, after in zip(*duals[1:], strict=True)]
    torch.testing.assert_close(moved[0], 4 * moved[1], rtol=1e-3, atol=1e-7)
    rho = 16 * rms(2**-9 * gradient[start < 0.5]) * max(1000, steps * (1 - frozen)) ** 0.5 / rms(start[start > 0.5])
    torch.testing.assert_close(moved[0], -(2**-9) * gradient / rho, rtol=1e-2, atol=1e-7)
