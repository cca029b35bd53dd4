"""Which optimizers may step from 0, told by what they do, and what float16 weights die of."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_lightning import ADMM, Unstructured, select
from elsa_lightning.errors import UserError
from elsa_lightning.layout import rows
from elsa_lightning.layout.sharded import part_of
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.optim.rounding import WeightRounding, moves_alike_everywhere
from elsa_lightning.schedule import Schedule
from tests.callbacks.tiny import Net, loader, make_trainer


class ByNorm(torch.optim.SGD):
    """Layer-wise rates (You et al., 2017) in a class that only derives from SGD."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.norm() / p.grad.norm())
        return super().step(closure)


class Plain(Optimizer):
    """Sign descent under a name that nobody knows."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


class SGD(ByNorm):
    """Of a name that would be trusted."""


class Averaging(torch.optim.SGD):
    """Keeps a mean of the weights in its state, whatever they are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p, 0.1)
        return loss


class Unmakeable(torch.optim.SGD):
    """Asks for more than its settings say."""

    def __init__(self, params: Any, secret: object, lr: float) -> None:
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    ("make", "alike"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.0), True),  # at the start of a warm-up
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), True),
        (lambda p: torch.optim.AdamW(p), False),
        (lambda p: torch.optim.AdamW(p, weight_decay=1e-4), False),  # too little to be noticed in a few steps
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), False),
        (lambda p: torch.optim.RMSprop(p), True),
        (lambda p: torch.optim.Adagrad(p), True),
        (lambda p: torch.optim.NAdam(p), True),
        (lambda p: torch.optim.Adafactor(p), False),  # its rate follows the weights
        (lambda p: bitsandbytes.optim.Adam8bit(p), True),
        (lambda p: bitsandbytes.optim.Lion8bit(p), True),
        (lambda p: Plain(p), True),
        (lambda p: ByNorm(p, lr=0.1), False),
        (lambda p: SGD(p, lr=0.1), False),
        (lambda p: Unmakeable(p, object(), lr=0.1), False),
        (lambda p: torch.optim.ASGD(p, lr=0.1), False),  # its average would be of weights that were set to 0
        (lambda p: Averaging(p, lr=0.1), False),
        (lambda p: torch.optim.Adam([{"params": []}, {"params": p}]), True),
    ],
)
def test_an_optimizer_is_known_by_what_it_does(make: Any, alike: bool) -> None:
    state = torch.get_rng_state()
    optimizer = make([nn.Parameter(torch.randn(4, 4))])
    before_it = repr(optimizer.state)
    assert moves_alike_everywhere(optimizer) == alike
    assert repr(optimizer.state) == before_it
    torch.manual_seed(0)
    before = torch.get_rng_state()
    moves_alike_everywhere(optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_bfloat16_weights_of_an_optimizer_that_looks_at_them_stay_finite() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    optimizer = SGD(layer.parameters(), lr=0.01)
    admm = ADMM(optimizer, {"weight": layer.weight}, Unstructured(0.5), total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        data = torch.randn(8, 16, dtype=torch.bfloat16)
        (layer(data) - data.flip(-1)).square().mean().backward()
        optimizer.step()
    admm.finish()
    assert layer.weight.isfinite().all()
    assert int((layer.weight == 0).sum()) == 128


def test_a_weight_decay_that_begins_later_decays_the_weights() -> None:
    """Stepped from 0 they would have nothing to decay."""
    p = nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.5)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=99, schedule=Schedule(interval=50))
    for decay in (0.0, 0.5, 0.0):
        optimizer.param_groups[0]["weight_decay"] = decay
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p[p != 0], torch.full((16,), 0.75, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_bfloat16_weights_alone_are_set_aside_and_float16_ones_beside_them_warned_of(
    dtypes: tuple[torch.dtype, ...],
) -> None:
    ps = [nn.Parameter(torch.ones(4, 8, dtype=dtype)) for dtype in dtypes]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer, rounding, parts = torch.optim.SGD(ps, lr=0.01), WeightRounding(), {p: part_of(p) for p in ps}
    warning = rounding.set_aside(optimizer, parts, lambda p: 0)
    assert warning is not None and "weights are float16" in warning
    assert {p.dtype: float(p.detach().sum()) for p in ps} == {torch.bfloat16: 0, torch.float16: 32}
    optimizer.step()
    rounding.put_back(parts, lambda p: 0)
    half = next(p for p in ps if p.dtype == torch.float16)
    assert torch.equal(half, torch.full_like(half, 0.99))
    assert all(float((p - 0.99).abs().max()) < 0.01 for p in ps)


class Half(Net):
    """float16 weights, one of whose inputs is always 0, so that some have no gradient."""

    def on_fit_start(self) -> None:
        self.half()

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.clone()
        batch[:, 0] = 0
        return super().loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def test_float16_weights_that_die_of_eps_are_told_so(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    from elsa_lightning import ElsaCallback

    model = Half().half()
    with pytest.raises(ValueError, match=r"eps=1e-08 is 0 in float16.*set eps=1e-4") as raised:
        make_trainer(tmp_path, ElsaCallback(0.9), max_steps=40).fit(model, loader(batches=40))
    assert "learning rate" not in str(raised.value)
    assert "set eps=1e-4" in caplog.text  # before the first step, too


@pytest.mark.parametrize("fails", [None, 3])
def test_weights_that_are_stepped_by_pieces_are_those_stepped_whole(
    fails: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are filled up to blocks, a kernel is a matrix, and a step that breaks off in a piece loses no weight."""

    def trained(by_rows: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(Adam8bit, "steps_rows", (lambda *_: True) if by_rows else (lambda *_: False))
        generator = torch.Generator().manual_seed(0)
        shapes = [(40, 256), (33, 300), (3, 20, 256), (8, 32, 4, 4)]
        ps = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
        optimizer = Adam8bit(ps, lr=1e-3)
        ADMM(optimizer, {str(i): p for i, p in enumerate(ps)}, Unstructured(0.5), total_steps=6)
        for _ in range(6):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            optimizer.step()
        return [p.detach() for p in ps]

    monkeypatch.setattr(rows, "PIECE_ON_CPU", 2048)
    if fails is None:
        assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))
        return
    p = nn.Parameter(torch.ones(40, 256, dtype=torch.bfloat16))
    optimizer = Adam8bit([p], lr=1e-3)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=6)
    calls = iter(range(100))
    real = optimizer._step_rows

    def failing(*arguments: Any) -> None:
        if next(calls) == fails:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(optimizer, "_step_rows", failing)
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    admm.recover()
    assert ((p - 1).abs() < 0.01).all() and optimizer.around is None


def test_a_step_of_8_bit_adam_sets_no_copy_of_the_weights_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_ON_CPU", 4096)
    p = nn.Parameter(torch.ones(256, 1024, dtype=torch.bfloat16))
    optimizer = Adam8bit([p], lr=1e-3)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100, schedule=Schedule(interval=50))
    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "clone":
                made.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = torch.ones_like(p)
    with Watching():
        optimizer.step()
    assert made and max(made) <= 4096


def lbfgs(**options: Any) -> tuple[float, float]:
    """Prune with LBFGS; return the loss of the dense start and of the end."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(256, 16)
    optimizer = torch.optim.LBFGS(model.parameters(), **options)
    admm = ADMM(optimizer, select(model), Unstructured(0.8), total_steps=40)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean = (model(x) - x[:, :8].sin()).square().mean()
        mean.backward()
        return mean

    before = float(loss())
    for _ in range(40):
        optimizer.step(loss)
    admm.finish()
    return before, float(loss())


def test_lbfgs_is_told_not_to_take_curvature_across_projections(caplog: pytest.LogCaptureFixture) -> None:
    _, diverged = lbfgs(line_search_fn="strong_wolfe")
    assert "with a line search too: set history_size=1" in caplog.text
    caplog.clear()
    for search in (None, "strong_wolfe"):
        before, after = lbfgs(line_search_fn=search, history_size=1)
        assert after < before / 4 and after < diverged / 2
    assert "history_size" not in caplog.text


def test_an_lbfgs_that_has_diverged_is_told_why() -> None:
    optimizer = torch.optim.LBFGS([p := nn.Parameter(torch.ones(8, 8))])
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=100)
    with pytest.raises(UserError, match=r"20 in a row: LBFGS takes .* its last 100 steps.*history_size=1"):
        for _ in range(20):
            p.grad = torch.full_like(p, torch.nan)
            optimizer.step(lambda: p.sum())
