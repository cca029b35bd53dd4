"""The method on a device against the method on a CPU; without a GPU the CPU stands in, with other rounding.

Where two devices differ is in the last bits of what they add up. On the CPU that is made with gradients that are off by
a millionth, so that the tolerances are shown to allow for it.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from elsa_lightning import ADMM, NM, Quantized, Unstructured
from elsa_lightning.forms import Prox
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.layout.sharded import local, whole
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.threshold import Scores, largest

SHAPE, STEPS = (48, 96), 12  # rows that are no multiple of a block of Adam8bit
SCHEDULE = Schedule(interval=3, ramp=0.5, frozen=0.25)
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "adam8bit": lambda p: Adam8bit(p, lr=0.02),
}


def gradients(device: str, off: float = 0.0) -> Iterator[Tensor]:
    """The gradients of a run; on the CPU all are ``off`` by that much."""
    generator = torch.Generator().manual_seed(1)
    steady = torch.randn(SHAPE, generator=generator)
    for _ in range(STEPS):
        gradient = steady + torch.randn(SHAPE, generator=generator)
        if device == "cpu":
            gradient *= 1 + off * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
        yield gradient.to(device)


def trained(
    device: str, make: Make, *, prox: Prox = "linearized", state_dtype: StateDtype = "float32",
    constraint: Constraint | None = None, dtype: torch.dtype = torch.float32, off: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return mask and split of the last update, and the finished weights, on the CPU."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / 4
    p = nn.Parameter(start.to(device, dtype))
    optimizer = make([p])
    admm = ADMM(optimizer, {"p": p}, constraint or Unstructured(0.75), total_steps=STEPS, schedule=SCHEDULE, prox=prox,
                state_dtype=state_dtype)  # fmt: skip
    mask = split = torch.empty(0)
    for gradient in gradients(device, off):
        p.grad = gradient.to(dtype)
        if not admm.frozen and admm.step:
            (tensor,) = admm.tensors.values()
            (piece,) = tensor.pieces()
            mask, split = admm.masks()["p"].cpu(), tensor.split(piece.rows).float().cpu().clone()
        optimizer.step()
    assert admm.frozen
    admm.finish()
    assert p.device.type == device
    return mask, split, p.detach().float().cpu()


def off_by(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_alike(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], exact: bool) -> None:
    """Allow for other rounding of float32, or for twice as much as 8-bit Adam is off Adam itself."""
    (mask, split, x), (mask_, split_, x_) = found, wanted
    sides, near, states = (0.001, 1e-3, 0.1) if exact else (0.02, 0.015, 0.4)
    assert x.count_nonzero() == x_.count_nonzero()
    assert float((mask != mask_).float().mean()) <= sides
    assert float(((x != 0) != (x_ != 0)).float().mean()) <= sides
    both = (x != 0) & (x_ != 0)
    assert off_by(x[both], x_[both]) <= near
    assert off_by(split, split_) <= states  # where an entry that changes sides is a large one


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("state_dtype", get_args(StateDtype))
@pytest.mark.parametrize("prox", get_args(Prox))
def test_every_form_is_that_of_the_cpu(device: str, prox: Prox, state_dtype: StateDtype, optimizer: str) -> None:
    options: dict[str, Any] = {"prox": prox, "state_dtype": state_dtype}
    found = trained(device, OPTIMIZERS[optimizer], off=1e-6, **options)
    assert_alike(found, trained("cpu", OPTIMIZERS[optimizer], **options), exact=optimizer != "adam8bit")


def test_another_form_is_not_alike() -> None:
    """The tolerances tell forms apart."""
    one, other = (trained("cpu", OPTIMIZERS["adam"], prox=prox) for prox in ("linearized", "feedback"))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        assert_alike(one, other, exact=False)


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
@pytest.mark.parametrize("prox", get_args(Prox))
def test_bfloat16_weights_are_rounded_as_on_the_cpu(device: str, prox: Prox, optimizer: str) -> None:
    options: dict[str, Any] = {"prox": prox, "state_dtype": "float8_e4m3fn", "dtype": torch.bfloat16}
    found = trained(device, OPTIMIZERS[optimizer], off=1e-6, **options)
    assert_alike(found, trained("cpu", OPTIMIZERS[optimizer], **options), exact=False)


@pytest.mark.parametrize("constraint", [NM(2, 4), Unstructured(0.75, "model"), Quantized(4, 32, Unstructured(0.5))])
def test_sets_are_those_of_the_cpu(device: str, constraint: Constraint) -> None:
    options: dict[str, Any] = {"constraint": constraint}
    found = trained(device, OPTIMIZERS["adam"], off=1e-6, **options)
    wanted = trained("cpu", OPTIMIZERS["adam"], **options)
    assert_alike(found, wanted, exact=not constraint.fixes_values)


def test_random_numbers_are_the_same_on_any_device(device: str) -> None:
    """So rounding is, to the bit."""
    places = torch.zeros(70, 130, device=device)
    for rows in (slice(0, 70), slice(3, 9)):
        shape = torch.Size((rows.stop - rows.start, 130))
        on_device, on_cpu = (
            whole(t).noise(t.shape, rows, 12345, t.device) for t in (places, torch.zeros(places.shape))
        )  # fmt: skip
        assert on_device.device.type == device and torch.equal(on_device.cpu().expand(shape), on_cpu.expand(shape))


@pytest.mark.parametrize(("rows", "n"), [(1, 100_000), (300, 257)])
def test_the_largest_are_those_of_the_cpu(device: str, rows: int, n: int) -> None:
    """Ties too, whose order is that of their places, and with guesses that are near."""
    score = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).abs().half().float()  # so that some tie
    kept = torch.randint(n, (rows,), generator=torch.Generator().manual_seed(1))
    guesses: dict[str, dict[Any, Tensor]] = {place: {} for place in (device, "cpu")}
    for factor in (1.0, 1.001):
        masks = []
        for place in (device, "cpu"):
            pieces = [Scores(s, s, 0) for s in [(factor * score).to(place)]]
            found = largest(lambda _, pieces=pieces: pieces, torch.arange(rows, device=place), kept.to(place),
                            guesses=guesses[place])  # fmt: skip
            masks.append(torch.cat(list(found)).cpu())
        assert torch.equal(*masks) and torch.equal(masks[0].sum(dim=1), kept)


# --------------------------------------------------------------------------- training loops


def network(device: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(device)


def fit(
    model: nn.Module, device: str, make: Make, scaler: Any = None, broken: int | None = None, half: bool = False
) -> None:
    """Train to reproduce the input, maybe in float16; at one step the loss may be infinite."""
    optimizer = make(model.parameters())
    admm = ADMM(optimizer, select(model).parameters, Unstructured(0.8, "tensor"), total_steps=STEPS, schedule=SCHEDULE)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS + (broken is not None)):
        x = torch.randn(16, 64, generator=generator).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            loss = (model(x) - x).square().mean() * (torch.inf if step == broken else 1)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert admm.step == STEPS
    admm.finish()


@torch.no_grad()
def error(model: nn.Module, device: str) -> float:
    x = torch.eye(64, device=device)
    return float((model(x) - x).square().mean())


def weights(model: nn.Module) -> list[Tensor]:
    return [local(p).detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["adam", "adamw-fused"])
def test_a_gradient_scaler_changes_nothing(device: str, optimizer: str) -> None:
    """A factor of 2ⁿ is exact, and a step that overflows is no step of ours either."""
    plain, scaled, late = (network(device) for _ in range(3))
    fit(plain, device, OPTIMIZERS[optimizer])
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    fit(scaled, device, OPTIMIZERS[optimizer], scaler)
    assert all(torch.equal(one, other) for one, other in zip(weights(scaled), weights(plain), strict=True))
    fit(late, device, OPTIMIZERS[optimizer], scaler, broken=4)
    assert scaler.get_scale() == 2.0**9
    assert all(bool(w.isfinite().all()) for w in weights(late))
    assert int((late[0].weight != 0).sum()) == int((plain[0].weight != 0).sum())  # type: ignore[operator, arg-type]


def test_float16_autocast_trains(device: str) -> None:
    model, single = network(device), network(device)
    before = error(model, device)
    fit(single, device, OPTIMIZERS["adam"])
    fit(model, device, OPTIMIZERS["adam"], torch.amp.GradScaler(device, init_scale=2.0**10), half=True)
    assert error(model, device) < before
    for one, other in zip(weights(model), weights(single), strict=True):
        assert one.count_nonzero() == other.count_nonzero() and off_by(one, other) < 0.2


def test_a_compiled_model_is_pruned_alike(device: str) -> None:
    plain, compiled = network(device), network(device)
    fit(plain, device, OPTIMIZERS["adam"])
    fit(torch.compile(compiled, backend="eager" if device == "cpu" else "inductor"), device, OPTIMIZERS["adam"])  # type: ignore[arg-type]
    for one, other in zip(weights(compiled), weights(plain), strict=True):
        assert one.count_nonzero() == other.count_nonzero() and off_by(one, other) < 0.05


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fsdp2_on_one_device_is_the_model_unsharded(device: str, optimizer: str, tmp_path: Path) -> None:
    plain, sharded = network(device), network(device)
    fit(plain, device, OPTIMIZERS[optimizer])
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh(device, (1,)))
        fit(sharded, device, OPTIMIZERS[optimizer])
        found = weights(sharded)
    finally:
        dist.destroy_process_group()
    for one, other in zip(found, weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_8_bit_adam_is_that_of_bitsandbytes(device: str) -> None:
    """To the bit, where rows are a multiple of its blocks."""
    from bitsandbytes.optim import Adam8bit as Theirs

    found = []
    for make in (Adam8bit, Theirs):
        p = nn.Parameter(torch.randn(32, 512, generator=torch.Generator().manual_seed(0)).to(device))
        optimizer = make([p], lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            p.grad = torch.randn(32, 512, generator=generator).to(device)
            optimizer.step()
        assert optimizer.state[p]["state1"].dtype == torch.uint8
        found.append(p.detach().cpu())
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_an_ordinary_step_waits_for_a_gpu_once(fused: bool) -> None:
    p = nn.Parameter(torch.randn(64, 64, device="cuda"))
    optimizer = torch.optim.Adam([p], lr=0.01, fused=fused)
    ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=1000, schedule=Schedule(interval=100))
    p.grad = torch.ones_like(p)
    for _ in range(4):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
