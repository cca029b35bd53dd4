"""Low-precision state: what is stored, how it is rounded, and that small steps are not lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout.lowbit import BLOCK, StateDtype, decode, encode, pack, round_to_bfloat16, unpack
from elsa_lightning.layout.sharded import whole
from elsa_lightning.schedule import Schedule

LOW: tuple[StateDtype, ...] = ("bfloat16", "float8_e4m3fn")


def noise(values: Tensor, seed: int) -> Tensor:
    return whole(values).noise(values.shape, slice(0, values.shape[0]), seed, values.device)


def stored(values: Tensor, dtype: StateDtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    code, exponents = encode(values, dtype, lambda: noise(values, seed))
    return decode(code, exponents), [t for t in (code, exponents) if t is not None]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_packed_mask_unpacks_to_itself(bits: list[bool]) -> None:
    mask = torch.tensor([bits, bits[::-1]])
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (2, math.ceil(len(bits) / 8))
    assert torch.equal(unpack(packed, len(bits)), mask)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1 + 1 / BLOCK)])
def test_the_bytes_are_as_promised(dtype: StateDtype, bytes_each: float) -> None:
    _, kept = stored(torch.randn(64, 64), dtype)
    assert sum(t.numel() * t.element_size() for t in kept) == bytes_each * 64 * 64


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-6, 1.0, 1e6]), st.sampled_from([(3, 5), (8, 32), (7, 33)]))
def test_rounding_goes_to_a_neighbour(seed: int, scale: float, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values[0, 0] = 0
    for dtype, relative in (("bfloat16", 2**-7), ("float8_e4m3fn", 2**-3)):
        rounded, _ = stored(values, dtype, seed)  # type: ignore[arg-type]
        floor = 0 if dtype == "bfloat16" else float(values.abs().max()) * 2**-15  # the block's subnormal spacing
        assert bool(((rounded - values).abs() <= relative * values.abs() + floor).all())
        assert rounded[0, 0] == 0


@pytest.mark.parametrize("dtype", LOW)
def test_the_mean_of_the_rounding_is_exact(dtype: StateDtype) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([stored(values, dtype, seed)[0] for seed in range(4000)])
    deviation = (draws.mean(dim=0) - values).abs()
    assert bool((deviation <= 5 * draws.std(dim=0) / math.sqrt(4000) + 1e-7).all())
    assert float(draws.std(dim=0).max()) > 0


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_stored_again_does_not_change(dtype: StateDtype) -> None:
    """Even when a larger entry moves the block's scale."""
    once, _ = stored(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), dtype)
    louder = once.clone()
    louder[0, 0] = 3 * once[0].abs().max()
    again, _ = stored(louder, dtype, seed=1)
    assert torch.equal(again[1:], once[1:])
    large = once[0].abs() > 2**-5 * louder[0, 0]
    assert torch.equal(again[0][large][1:], once[0][large][1:])


@pytest.mark.parametrize(("largest", "smallest"), [(448, 2**-9), (240, 2**-9), (224, 2**-10), (208, 2**-10)])
def test_the_largest_and_the_smallest_value_of_a_block_are_stored_exactly(largest: float, smallest: float) -> None:
    """Its scale is the least with which the largest fits."""
    values = torch.tensor([[largest, smallest, -3 * smallest, 0.0] * 8])
    for seed in range(20):
        assert torch.equal(stored(values, "float8_e4m3fn", seed)[0], values)


def test_no_number_is_rounded_to_one() -> None:
    """The bits of some NaN are so high that the noise takes them beyond the last, to 0."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32)
    for seed in (0, 0xFFFF):
        assert round_to_bfloat16(bits.view(torch.float32), torch.full_like(bits, seed)).isnan().all()


@pytest.mark.parametrize("dtype", LOW)
def test_small_steps_are_lost_to_nearest_rounding_and_not_to_ours(dtype: StateDtype) -> None:
    """A thousand steps of a hundredth of a unit of the last place."""
    torch_dtype = getattr(torch, dtype)
    step = 2.0**-7 / 100 if dtype == "bfloat16" else 2.0**-3 / 100
    nearest, ours = torch.ones(64, 32), torch.ones(64, 32)
    for seed in range(1000):
        nearest = (nearest + step).to(torch_dtype).float()
        ours, _ = stored(ours + step, dtype, seed)
    assert torch.equal(nearest, torch.ones(64, 32)), "to nearest, nothing has moved"
    assert float(ours.mean()) == pytest.approx(1 + 1000 * step, rel=0.05)


@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_dual_brings_back_what_was_cut(dtype: StateDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small learning rate the dual of a wrongly cut entry grows by little at a time; to nearest it stalls."""

    def kept(nearest: bool) -> int:
        target = torch.cat([torch.full((16,), 3.0), torch.zeros(16)]).view(4, 8)
        p = nn.Parameter(torch.cat([torch.full((16,), 0.1), torch.ones(16)]).view(4, 8))
        optimizer = torch.optim.SGD([p], lr=1e-5 if dtype == "bfloat16" else 2e-4)
        schedule = Schedule(penalty=1.0, interval=10, ramp=0, frozen=0)
        steps = 20_000 if dtype == "bfloat16" else 2000
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=steps, schedule=schedule, state_dtype=dtype)
        if nearest:
            import elsa_lightning.tensors as module

            def to_nearest(values: Tensor, *_: object) -> tuple[Tensor, Tensor | None]:
                rounded = values.to(getattr(torch, dtype))
                if dtype == "bfloat16":
                    return rounded, None
                return rounded.view(torch.uint8), torch.zeros(len(values), 1, dtype=torch.int8)

            monkeypatch.setattr(module, "encode", to_nearest)
        for _ in range(steps):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
        monkeypatch.undo()
        return int(admm.masks()["p"].flatten()[:16].sum())

    assert kept(nearest=True) == 0
    assert kept(nearest=False) >= 14


def test_bfloat16_weights_take_steps_that_nearest_rounding_would_lose() -> None:
    def trained(admm: bool) -> Tensor:
        p = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([p], lr=2.0**-12)
        if admm:
            ADMM(optimizer, {"p": p}, Unstructured(0.0), total_steps=10**6)
        for _ in range(512):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float()

    assert torch.equal(trained(False), torch.ones(32, 32))
    assert float(trained(True).mean()) == pytest.approx(1 - 512 * 2**-12, abs=0.002)


@pytest.mark.parametrize(
    ("dtype", "decay", "lost"),
    [
        (torch.bfloat16, 0.0, False),
        (torch.bfloat16, 0.1, True),
        (torch.float16, 0.0, True),
        (torch.float32, 0.1, False),
    ],
)
def test_steps_that_will_be_lost_are_told_once(
    dtype: torch.dtype, decay: float, lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = torch.optim.AdamW([p], weight_decay=decay)
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert sum("The weights are" in record.message for record in caplog.records) == lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_second_moment_that_cannot_fade_is_told(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = torch.optim.Adam([p])
    ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert sum("old gradients never fade" in r.message for r in caplog.records) == (dtype == torch.bfloat16)


def test_weights_survive_an_interrupt_inside_the_optimizers_step() -> None:
    class Interrupted(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise KeyboardInterrupt

    p = nn.Parameter(torch.full((4, 4), 2.0, dtype=torch.bfloat16))
    optimizer = Interrupted([p], lr=0.1)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10)
    admm.step = 1
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    admm.finish(resumable=True)
    assert int((p == 2).sum()) == 8 and int((p == 0).sum()) == 8


def test_bfloat16_rounding_keeps_what_it_can_represent() -> None:
    values = torch.randn(100).bfloat16().float()
    values = torch.cat([values, torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    assert torch.equal(round_to_bfloat16(values, noise(values[None], 0)[0]).float(), values)


def test_an_unknown_state_dtype_is_refused() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"state_dtype must be one of .*'float8_e4m3fn'.*got 'int8'"):
        ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5), total_steps=5, state_dtype="int8")  # type: ignore[arg-type]
