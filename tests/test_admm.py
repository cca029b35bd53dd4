"""ADMM against independent two-variable references, closed forms and interrupted runs."""

import copy
import io
import itertools
import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.unstructured import AT_ONCE
from elsa_lightning.tensors import REMOVED, SPLIT

SHAPE = (12, 10)


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """A matrix and an ill-conditioned quadratic loss of it."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    curvature = torch.rand(SHAPE, generator=generator, dtype=torch.float64).mul(4).sub(2).exp().to(dtype)
    p = nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype))
    return p, lambda: (curvature * (p - target).square()).sum() / 2


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Mask of the largest scores by a plain sort."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True, stable=True)[:kept]] = True
    return mask.view(scores.shape)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.5),
}


WALK = {"adam": (1.9 / 0.1) ** 0.5, "sgd": (1.5 / 0.5) ** 0.5}  # √((1 + momentum) / (1 − momentum))


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@pytest.mark.parametrize(
    ("prox", "shape", "penalty"),
    [
        *itertools.product(
            ["coupled", "decoupled", "linearized"], ["constant", "linear", "cosine", "exponential"], [0.8]
        ),
        ("feedback", "constant", 0.8),
        ("linearized", "constant", 80.0),  # which bounds the dual
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_state_gives_the_iterates_of_two_variable_admm(
    name: str, prox: str, shape: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z and u are kept apart here, and the projection is a sort; 60 updates with a moving λ and mask."""
    monkeypatch.setattr("elsa_lightning.sets.unstructured.AT_ONCE", 0.0)  # a longer ramp, and more to move
    steps, interval, sparsity = 120, 2, 0.7
    schedule = Schedule(penalty, shape, interval, ramp=0.6, frozen=0)  # type: ignore[arg-type]
    p, loss = problem()
    optimizer = OPTIMIZERS[name]([p])
    admm = ADMM(optimizer, {"p": p}, Unstructured(sparsity), total_steps=steps, schedule=schedule, prox=prox)  # type: ignore[arg-type]

    x, x_loss = problem()
    base = OPTIMIZERS[name]([x])
    z, u, lam, mask = x.detach().clone(), torch.zeros(SHAPE, dtype=torch.float64), 0.0, None
    slow, memory, sigma = 1.0, 0.0, 0.0
    on_set = prox in ("feedback", "linearized")
    flips = bounded = 0
    for step in range(1, steps + 1):
        train(optimizer, loss, 1)

        base.zero_grad()
        x_loss().backward()
        if prox == "coupled" and mask is not None:
            x.grad.add_(lam * (x.detach() - z + u))
        base.step()
        with torch.no_grad():
            if prox == "decoupled" and mask is not None:
                x.copy_((x + lam * (z - u)) / (1 + lam))  # lr is constant: γ = κ
            if on_set and mask is not None:  # the step from z goes to z on the mask and to the dual off it
                u = u + torch.where(mask, 0.0, x - z) / (lam if prox == "feedback" else slow)
                sigma = rms((x - z)[~mask]) * WALK[name]
                z = torch.where(mask, x, z)
                x.copy_(z)
            if step == 1 or step % interval == 0 or step == steps:
                v = x + u
                ramp = 1 - (1 - min(1.0, step / (0.6 * steps))) ** 3
                entries = v.numel()
                importance = base.state[x].get("exp_avg_sq", torch.ones_like(v))
                if on_set and step <= 152:  # few batches count as 8 less than a product of means
                    product = importance.mean(dim=1)[:, None] * importance.mean(dim=0) / importance.mean()
                    importance = (step * importance + 8 * product) / (step + 8)
                if prox != "coupled":  # in the metric that the optimizer's own steps are in
                    importance = importance.sqrt()
                before = 0.0 if mask is None else rms(u[~mask])
                former, mask = mask, keep_largest(importance * v * v, entries - round(sparsity * ramp * entries))
                flips += 0 if former is None else int((former ^ mask).sum())
                z_before = x if former is None else torch.where(former, z, 0.0)
                z = torch.where(mask, v, 0.0)
                u, gap = v - z, (x - z).norm() / x.norm()
                moved = (z - z_before).norm()
                if on_set:
                    x.copy_(z)
                t = step / steps
                new = {
                    "constant": penalty, "linear": penalty * t, "cosine": penalty * (1 - math.cos(math.pi * t)) / 2,
                    "exponential": penalty * 10 ** (-3 * (1 - t)),
                }[shape]  # fmt: skip
                if prox == "linearized":  # the dual may not grow beyond a κ-th of what is kept
                    w = rms(z[mask])
                    most = max(w / new, memory)
                    bounded += before > most * 1.0001
                    u = u * (math.floor(most / before * 4096) / 4096 if before > most * 1.0001 else 1.0)
                    memory = rms(u[~mask])
                    slow = float(torch.tensor(16 * sigma * max(steps, 1000) ** 0.5 / w).bfloat16()) if sigma else slow
                else:
                    u = u * (1.0 if prox == "feedback" and lam == 0 else lam / new)
                lam = new
                assert admm.last_update is not None
                assert float(admm.last_update.dual_residual) == pytest.approx(float(lam * moved), rel=1e-6, abs=1e-12)
                assert float(admm.last_update.primal_residual) == pytest.approx(float(gap), rel=1e-6, abs=1e-12)
        torch.testing.assert_close(p, x, rtol=1e-10, atol=1e-12)
    assert flips > 80, "the masks must have moved for this to mean anything"
    assert bounded > 10 or penalty < 1, bounded
    torch.testing.assert_close(optimizer.state[p][SPLIT], -u if on_set else z - u, rtol=1e-9, atol=1e-11)
    assert torch.equal(admm.masks()["p"], mask)


def test_what_was_cut_returns_when_the_loss_keeps_asking_for_it() -> None:
    """Magnitudes mislead at first: the entries that matter start small, and only the dual can bring them back."""
    target = torch.cat([torch.full((10,), 3.0), torch.zeros(10)]).view(4, 5).double()
    p = nn.Parameter(torch.cat([torch.full((10,), 0.01), torch.ones(10)]).view(4, 5).double())
    optimizer = torch.optim.SGD([p], lr=0.05)
    admm = ADMM(
        optimizer, {"p": p}, Unstructured(0.5), total_steps=400,
        schedule=Schedule(penalty=1.0, interval=1, ramp=0, frozen=0.5),
    )  # fmt: skip
    optimizer.zero_grad()
    (p - target).square().sum().backward()
    optimizer.step()
    assert int(admm.masks()["p"].flatten()[:10].sum()) == 0
    train(optimizer, lambda: (p - target).square().sum(), 399)
    torch.testing.assert_close(p.detach(), target, atol=1e-6, rtol=0)


def test_reaches_the_best_support_and_a_stationary_point() -> None:
    """The best k-sparse point of ½ ‖x − t‖² keeps the largest |t|; ADMM finds it from a random start as λ rises."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    p = nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64))
    optimizer, lam, steps = torch.optim.SGD([p], lr=0.2), 4.0, 6000
    schedule = Schedule(lam, "linear", interval=5, ramp=0, frozen=0)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=steps, schedule=schedule, prox="coupled")
    train(optimizer, lambda: (p - target).square().sum() / 2, steps)
    best = keep_largest(target.abs(), SHAPE[0] * SHAPE[1] - round(0.8 * SHAPE[0] * SHAPE[1]))
    assert torch.equal(admm.masks()["p"], best)
    assert admm.last_update is not None
    assert admm.last_update.primal_residual < 1e-6 and admm.last_update.dual_residual < 1e-6
    admm.finish()
    torch.testing.assert_close(p.detach(), torch.where(best, target, 0.0), atol=1e-6, rtol=0)
    gradient = p.detach() - target
    stationary = p.detach() - gradient / lam
    projected = torch.where(keep_largest(stationary.abs(), int(best.sum())), stationary, 0.0)
    torch.testing.assert_close(p.detach(), projected, atol=1e-6, rtol=0)


def test_finds_a_stationary_point_of_a_coupled_quadratic() -> None:
    """x ∈ Π_S(x − ∇f(x)/λ) where the Hessian is not diagonal."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    b = torch.randn(40, generator=generator, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    lam = 2 * float(torch.linalg.eigvalsh(a.T @ a / 40).max())
    optimizer = torch.optim.SGD([p], lr=0.1)
    schedule = Schedule(lam, "constant", interval=10, ramp=0, frozen=0)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20_000, schedule=schedule, prox="coupled")
    train(optimizer, lambda: (a @ p.flatten() - b).square().mean() / 2, 20_000)
    admm.finish()
    x = p.detach().flatten()
    forward = x - a.T @ (a @ x - b) / 40 / lam
    torch.testing.assert_close(x, torch.where(keep_largest(forward.abs(), 6), forward, 0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("prox", ["coupled", "decoupled", "feedback", "linearized"])
def test_without_penalty_and_sparsity_it_is_the_base_optimizer(prox: str, kind: type, options: dict[str, bool]) -> None:
    (p, loss), (x, x_loss) = problem(dtype=torch.float32), problem(dtype=torch.float32)
    ours, base = kind([p], lr=0.01, **options), kind([x], lr=0.01, **options)
    admm = ADMM(
        ours,
        {"p": p},
        Unstructured(0.0),
        total_steps=30,
        schedule=Schedule(float(prox == "feedback"), interval=3),
        prox=prox,
    )  # type: ignore[arg-type]
    train(ours, loss, 30)
    train(base, x_loss, 30)
    admm.finish()
    assert torch.equal(p, x)


def with_closure(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], positional: bool) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    if positional:
        optimizer.step(closure)
    else:
        optimizer.step(closure=closure)


class Inner(torch.optim.Adam):
    """Its step calls its parent's, whose hooks fire as well once the parent class was used."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("prox", ["coupled", "feedback", "linearized"])
def test_every_way_to_call_step_is_the_same(prox: str) -> None:
    results = []
    for way in ("plain", "keyword", "positional", "nested", "nested closure"):
        p, loss = problem()
        optimizer = (Inner if way.startswith("nested") else torch.optim.Adam)([p], lr=0.05)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=40, schedule=Schedule(interval=4), prox=prox)  # type: ignore[arg-type]
        for _ in range(40):
            if way in ("plain", "nested"):
                train(optimizer, loss, 1)
            else:
                with_closure(optimizer, loss, way == "positional")
        assert admm.step == 40
        results.append(p.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_clipping_never_sees_the_proximal_gradient() -> None:
    """The norm is taken inside the closure, as Lightning does; the penalty is far larger than the gradient."""
    p, loss = problem()
    optimizer = torch.optim.SGD([p], lr=1e-4)
    ADMM(
        optimizer, {"p": p}, Unstructured(0.9), total_steps=100,
        schedule=Schedule(1e3, "constant", 1, ramp=0, frozen=0), prox="coupled",
    )  # fmt: skip
    for _ in range(10):
        seen = []

        def closure(seen: list[tuple[float, float]] = seen) -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            seen.append((float(torch.autograd.grad(loss(), p)[0].norm()), float(nn.utils.clip_grad_norm_([p], 1e-3))))
            return value

        before = p.detach().clone()
        optimizer.step(closure)
        (true, clipped) = seen[0]
        assert true == pytest.approx(clipped, rel=1e-9)
    assert (p.detach() - before).norm() > 1e-3 * 1e-4 * 10, "the proximal gradient itself is not clipped"


def test_accumulated_gradients_give_the_large_batch() -> None:
    data = torch.randn(40, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(accumulate: int) -> Tensor:
        p, _ = problem()
        optimizer = torch.optim.Adam([p], lr=0.05)
        ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=40, schedule=Schedule(0.3, interval=4), prox="coupled")
        for batch in data:
            optimizer.zero_grad()
            for part in batch.chunk(accumulate):
                ((part @ p.T - 1).square().mean() / accumulate).backward()
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(run(1), run(4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prox", ["coupled", "feedback", "linearized"])
def test_grad_scaler_changes_nothing_and_an_overflow_does_not_count(prox: str, fused: bool) -> None:
    def run(scaled: bool) -> tuple[Tensor, int]:
        p, loss = problem(dtype=torch.float32)
        optimizer = torch.optim.Adam([p], lr=0.05, fused=fused)
        admm = ADMM(
            optimizer, {"p": p}, Unstructured(0.5), total_steps=30, schedule=Schedule(0.3, interval=3), prox=prox
        )  # type: ignore[arg-type]
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=256.0, growth_interval=1000)
        for step in range(31):
            optimizer.zero_grad()
            overflow = step == 7
            if overflow and not scaled:
                continue
            scaler.scale(loss() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        return p.detach(), admm.step

    (plain, plain_steps), (scaled, scaled_steps) = run(False), run(True)
    assert plain_steps == scaled_steps == 30
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)


def test_a_step_without_gradients_does_not_count() -> None:
    p, loss = problem()
    optimizer = torch.optim.Adam([p], lr=0.05)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    optimizer.zero_grad()
    optimizer.step()
    assert admm.step == 0 and not optimizer.state.get(p)
    train(optimizer, loss, 2)
    assert admm.step == 2


def test_an_exception_in_the_closure_leaves_a_working_optimizer() -> None:
    p, loss = problem()
    optimizer = torch.optim.Adam([p], lr=0.05)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)

    def failing() -> Tensor:
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MemoryError):
            optimizer.step(failing)
        train(optimizer, loss, 1)
    assert admm.step == 2


@pytest.mark.parametrize("late", [None, 5, 25])
def test_a_parameter_that_gets_gradients_late_or_never_ends_sparse(late: int | None) -> None:
    p, loss = problem()
    q = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    optimizer = torch.optim.Adam([p, q], lr=0.05)
    admm = ADMM(optimizer, {"p": p, "q": q}, Unstructured(0.5, "tensor"), total_steps=30, schedule=Schedule(interval=2))
    for step in range(30):
        optimizer.zero_grad()
        used = late is not None and step >= late
        (loss() + (q.square().sum() if used else 0)).backward()
        optimizer.step()
    admm.finish()
    assert int((q != 0).sum()) == 18 and int((p != 0).sum()) == 60


def test_the_sparsity_follows_the_ramp_and_the_figures_are_right() -> None:
    p, loss = problem()
    optimizer = torch.optim.Adam([p], lr=0.05)
    schedule = Schedule(0.5, "linear", 4, ramp=0.5, frozen=0.25)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.85), total_steps=80, schedule=schedule, prox="decoupled")
    seen, former = [], None
    for step in range(1, 81):
        train(optimizer, loss, 1)
        if step > 60:
            assert torch.equal(p == 0, ~admm.masks()["p"]), "zeros are exact after every frozen step"
            assert torch.equal(admm.masks()["p"], former), "and the mask is fixed"
            assert SPLIT not in optimizer.state[p]
        update = admm.last_update
        if update is None or update.step != step:
            continue
        seen.append(step)
        mask = admm.masks()["p"]
        ramp = 1 - (1 - min(1.0, step / 40)) ** 3
        assert int(mask.sum()) == p.numel() - round((AT_ONCE + (0.85 - AT_ONCE) * ramp) * p.numel())
        assert float(update.sparsity) == pytest.approx(1 - mask.sum().item() / p.numel())
        if former is not None:
            assert float(update.mask_flips) == pytest.approx((mask ^ former).double().mean().item())
        if step < 60:  # the freeze clears what the residual was measured on
            z = optimizer.state[p][SPLIT].masked_fill(~mask, 0)
            assert float(update.primal_residual) == pytest.approx(((p - z).norm() / p.norm()).item(), rel=1e-6)
        former = mask.clone()
    assert seen == [1, *range(4, 61, 4)]


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, "float32"), (torch.float32, "float8_e4m3fn"),
        (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float8_e4m3fn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["adam", "sgd", "adam8bit"])
@pytest.mark.parametrize("stop", [1, 13, 30, 45, 60, "suspended"])
def test_a_saved_run_goes_on_bit_for_bit(
    stop: int | str, kind: str, dtype: torch.dtype, state_dtype: StateDtype
) -> None:
    """Before, at and in the frozen phase, after the end, and after an early end with exact zeros."""
    import bitsandbytes

    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "adam": lambda params: torch.optim.Adam(params, lr=0.01),
        "sgd": lambda params: torch.optim.SGD(params, lr=0.003, momentum=0.9),
        "adam8bit": lambda params: bitsandbytes.optim.Adam8bit(params, lr=0.01, min_8bit_size=64),
    }

    def build() -> tuple[nn.Parameter, Callable[[], Tensor], torch.optim.Optimizer, ADMM]:
        p, loss = problem(dtype=dtype)
        optimizer = makers[kind]([p])
        schedule = Schedule(0.5, interval=3)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=60, schedule=schedule, state_dtype=state_dtype)
        return p, loss, optimizer, admm

    total, at = 70, 10 if stop == "suspended" else int(stop)
    p, loss, optimizer, admm = build()
    train(optimizer, loss, at)
    if stop == "suspended":
        before = p.detach().clone()
        admm.finish(resumable=True)
        assert int((p == 0).sum()) == round(0.8 * p.numel())
        assert not torch.equal(p, before)
    elif at == 60:
        admm.finish()
    buffer = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict(), "admm": admm.state_dict()}, buffer)
    if stop == "suspended":
        admm.resume()
        assert torch.equal(p, before)
    dtypes = {key: value.dtype for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
    train(optimizer, loss, total - at)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    q, q_loss, resumed, resumed_admm = build()
    with torch.no_grad():
        q.copy_(saved["p"])
    resumed.load_state_dict(saved["optimizer"])
    resumed_admm.load_state_dict(saved["admm"])
    assert dtypes == {key: value.dtype for key, value in resumed.state[q].items() if isinstance(value, Tensor)}
    train(resumed, q_loss, total - at)
    assert torch.equal(p, q)
    for key, value in optimizer.state[p].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, resumed.state[q][key]), key


def test_magnitude_is_used_and_said_once_where_there_is_no_second_moment(caplog: pytest.LogCaptureFixture) -> None:
    p, loss = problem()
    optimizer = torch.optim.SGD([p], lr=1e-3)
    schedule = Schedule(interval=1, ramp=0, frozen=0)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=20, schedule=schedule)
    with caplog.at_level(logging.WARNING):
        train(optimizer, loss, 10)
    assert len([record for record in caplog.records if "SGD keeps no second moment" in record.message]) == 1
    assert torch.equal(admm.masks()["p"], keep_largest(p.detach().abs(), 60))


def test_finish_leaves_exact_counts_without_any_step() -> None:
    p, _ = problem()
    admm = ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.9), total_steps=5)
    admm.finish()
    assert int((p != 0).sum()) == 12
    assert not torch.signbit(p[p == 0]).any(), "zeros are +0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be 1 or more"),
        ({"prox": "implicit"}, "prox must be one of .*got 'implicit'"),
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": {"stray": nn.Parameter(torch.ones(2, 2))}}, "stray is constrained but Adam does not train it"),
        ({"parameters": {"bias": nn.Parameter(torch.ones(2))}}, r"bias has shape \(2,\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    p, _ = problem()
    options = {"parameters": {"p": p}, "total_steps": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        ADMM(torch.optim.Adam([p]), constraint=Unstructured(0.5), **options)  # type: ignore[arg-type]


def test_a_checkpoint_of_other_settings_is_refused() -> None:
    p, loss = problem()
    optimizer = torch.optim.Adam([p])
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=5)
    train(optimizer, loss, 2)
    q, _ = problem()
    fresh = torch.optim.Adam([q])
    other = ADMM(fresh, {"p": q}, Unstructured(0.9), total_steps=5)
    with pytest.raises(ValueError, match=r"constraint: Unstructured\(sparsity=0.5, .*\) there, .*0.9, .*here"):
        other.load_state_dict(admm.state_dict())
    other.detach()
    slower = ADMM(fresh, {"p": q}, Unstructured(0.5), total_steps=5, schedule=Schedule(ramp=0.1, frozen=0.1))
    with pytest.raises(ValueError, match=r"ramp: .* there, 0.1 here, frozen: .* there, 0.1 here"):
        slower.load_state_dict(admm.state_dict())
    slower.detach()
    same = ADMM(fresh, {"p": q}, Unstructured(0.5), total_steps=5)
    with pytest.raises(ValueError, match="the optimizer's state has no masks"):
        same.load_state_dict(admm.state_dict())


def test_a_suspended_run_is_not_resumed_without_the_values_that_it_removed() -> None:
    p, loss = problem()
    optimizer = torch.optim.Adam([p])
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=9, prox="coupled")
    train(optimizer, loss, 3)
    dense = p.detach().clone()
    admm.finish(resumable=True)
    for lost in (False, True):
        q = torch.nn.Parameter(p.detach().clone())
        again, saved = torch.optim.Adam([q]), copy.deepcopy(optimizer.state_dict())
        resumed = ADMM(again, {"p": q}, Unstructured(0.5), total_steps=9, prox="coupled")
        if lost:  # torch.distributed.checkpoint fills what exists and drops the rest
            del saved["state"][0][REMOVED]
        again.load_state_dict(saved)
        if lost:
            with pytest.raises(UserError, match=r"suspended run, .* were not loaded: .* needs admm.expect\(\)"):
                resumed.load_state_dict(admm.state_dict())
        else:
            resumed.load_state_dict(admm.state_dict())
            assert torch.equal(q, dense)


def test_detached_it_leaves_the_optimizer_alone() -> None:
    (p, loss), (x, x_loss) = problem(), problem()
    optimizer, base = torch.optim.Adam([p], lr=0.05), torch.optim.Adam([x], lr=0.05)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=9).detach()
    for (one, f), _ in itertools.product([(optimizer, loss), (base, x_loss)], range(5)):
        train(one, f, 1)
    assert torch.equal(p, x) and SPLIT not in optimizer.state[p]
