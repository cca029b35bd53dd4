"""What a step may ask of a device: no float64 where there is none, little memory, one look at its results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout import rows, sharded
from elsa_lightning.layout.lowbit import BLOCK, StateDtype
from elsa_lightning.optim.moments import second_moment
from elsa_lightning.plan import plan
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.threshold import Scores, largest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "step_overhead"))

from counts import Counts, count, counted_by, table_row

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "step_overhead"


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    optimizer.zero_grad()
    (p - 1).square().sum().backward()
    optimizer.step()


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.dtype == torch.float64:
                raise TypeError(f"{func} makes float64, which this device does not have")
        return out


@pytest.mark.parametrize("prox", ["linearized", "decoupled", "coupled"])
@pytest.mark.parametrize("state_dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_device_without_float64_counts_exactly(
    prox: Any, state_dtype: StateDtype, scope: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "_WITHOUT_FLOAT64", {device})
    p = nn.Parameter(torch.randn(64, 65, generator=torch.Generator().manual_seed(0)).to(device))
    optimizer = torch.optim.SGD([p], lr=0.01, momentum=0.9)
    with NoFloat64():
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.9, scope), total_steps=20, prox=prox, state_dtype=state_dtype,
                    schedule=Schedule(interval=2))  # fmt: skip
        for _ in range(20):
            step(optimizer, p)
        names, counts = admm.occupancy()
        admm.finish()
    assert int((p != 0).sum()) == 416 and names == ["p"] and counts[0, :2].tolist() == [416, 4160]
    assert admm.last_update is not None and float(admm.last_update.sparsity) == pytest.approx(0.9, abs=1e-6)


def peak(work: Callable[[], None]) -> int:
    """Return the most bytes that were held at once beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_more_than_planned(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix many pieces large, with foreach off, whose temporaries are the optimizer's own."""
    monkeypatch.setattr("elsa_lightning.plan.PIECE", rows.PIECE_ON_CPU)
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).to(dtype)
    p = model[0].weight
    optimizer = torch.optim.SGD([p], lr=0.01, foreach=False)
    ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=40, schedule=Schedule(interval=1))
    for _ in range(2):
        step(optimizer, p)
    planned = plan(model, lambda params: torch.optim.SGD(params, lr=0.01), dtype=dtype, device="cpu")
    p.grad = torch.ones_like(p)
    measured = peak(optimizer.step)
    assert 0.2 * planned.transient < measured <= planned.transient, (measured, planned.transient)


def test_thousands_of_experts_take_little_memory() -> None:
    experts, n = 10_000, 32
    score = torch.rand(experts, n, generator=torch.Generator().manual_seed(0))
    pools = torch.arange(experts)
    masks: list[Tensor] = []

    def work() -> None:
        masks.extend(largest(lambda _: [Scores(score, score, 0)], pools, torch.full((experts,), 3)))

    assert peak(work) < 300 * 2**20
    best = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(3, dim=1).indices, True)
    assert torch.equal(masks[0], best)


def test_an_ordinary_step_looks_at_the_device_once() -> None:
    p = nn.Parameter(torch.randn(32, 32))
    optimizer = torch.optim.SGD([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=1000, schedule=Schedule(interval=100))
    for _ in range(5):
        step(optimizer, p)
    p.grad = torch.ones_like(p)
    with counted_by(admm, counts := Counts()):
        optimizer.step()
    assert counts.looks == 1


@pytest.mark.parametrize(
    ("state", "weights", "phase", "most"),
    [  # reading the gradients for what is not finite, the weights read and zeroed, the state read and written, a bit
        ("float32", torch.float32, "step", 4 + 8 + 8 + 1 / 8),
        ("bfloat16", torch.float32, "step", 4 + 8 + 4 + 1 / 8),
        ("float8_e4m3fn", torch.float32, "step", 4 + 8 + 2 + 2 / BLOCK + 1 / 8),
        ("float32", torch.float32, "frozen", 4 + 8 + 1 / 8),
    ],
)
def test_a_step_touches_weights_and_state_once(state: str, weights: torch.dtype, phase: str, most: float) -> None:
    """Its temporary tensors are as large as a piece, not as the tensor."""
    counts = count("linearized", state, weights=weights, shape=(1024, 1024))[phase]
    assert counts.kept <= 1.002 * most * 1024 * 1024
    assert counts.fresh <= 4 * rows.PIECE_ON_CPU
    assert counts.looks == 1


@pytest.mark.parametrize(
    ("state", "phase"), [("float32", "step"), ("bfloat16", "step"), ("float8_e4m3fn", "update"), ("float32", "frozen")]
)
def test_the_counts_that_are_shipped_are_those_of_the_code(state: str, phase: str) -> None:
    rows_ = json.loads((BENCHMARK / "counts.json").read_text(encoding="utf-8"))["counts"]
    (shipped,) = (
        row for row in rows_ if (row["form"], row["state"], row["phase"]) == ("linearized", state, phase)
    )  # fmt: skip
    assert shipped == table_row("linearized", state, phase), "python benchmarks/step_overhead/run.py --rounds 0"


def test_the_counts_that_are_told_are_those_that_are_shipped() -> None:
    counts = json.loads((BENCHMARK / "counts.json").read_text(encoding="utf-8"))["counts"]
    text = (BENCHMARK.parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    told = {
        cells[0]: [cell for cell in cells[1:] if cell]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    for label, form, phase, what, digits in [
        ("`linearized`, a step", "linearized", "step", "bytes", 1),
        ("`linearized`, the update, moved by its operations", "linearized", "update", "moved", 0),
        ("the same in the first 150 steps", "linearized", "update, early", "moved", 0),
        ("over several processes", "linearized", "update, sharded", "moved", 0),
        ("`decoupled`, a step", "decoupled", "step", "bytes", 1),
        ("frozen phase", "linearized", "frozen", "bytes", 1),
    ]:
        shipped = [
            f"{row[what]:.{digits}f}, {row['kernels_a_piece']}"
            for row in counts
            if row["form"] == form and row["phase"] == phase
        ]
        assert told[label] == shipped, label


@pytest.mark.parametrize(("phase", "early"), [("step", False), ("update", True), ("update", False), ("frozen", False)])
def test_more_small_tensors_take_hardly_more_launches(phase: str, early: bool) -> None:
    """Each adds only the launch of the check for gradients that are not finite."""
    few, many = (
        count("linearized", "float8_e4m3fn", shape=(16, 32), tensors=n, early=early)[phase].kernels for n in (4, 24)
    )
    assert many - few <= 20


def test_moments_in_another_basis_are_not_taken_for_the_weights_own() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.Adam([p])
    step(optimizer, p)
    assert second_moment(optimizer, p) is not None
    optimizer.state[p]["Q"] = [torch.eye(4), torch.eye(4)]  # as SOAP keeps them
    assert second_moment(optimizer, p) is None
