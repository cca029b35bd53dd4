"""Kernels in one pass over the weights give what the operations give, to the bit.

They run on a GPU, and with TRITON_INTERPRET=1 on a CPU where Triton is installed.
"""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout import fused
from elsa_lightning.layout.fused import Line
from elsa_lightning.layout.lowbit import StateDtype, decode, encode, pack, round_to_bfloat16
from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import Part, whole
from elsa_lightning.schedule import Schedule

SHAPES = [(1, 32), (3, 7), (64, 96), (70, 130), (1, 4096)]  # with rows that are no whole groups, nor bytes of mask


@pytest.fixture(autouse=True)
def _kernels_run(device: str) -> None:
    if not fused.usable(torch.device(device)):
        pytest.skip("Triton does not run on this device")


def same(one: Tensor, other: Tensor) -> bool:
    """Tell signs of zeros and NaN apart, too."""
    return one.dtype == other.dtype and torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


@pytest.mark.parametrize("state", get_args(StateDtype))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_operations(device: str, dtype: torch.dtype, state: StateDtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lines, wanted = [], []
    for number, shape in enumerate(SHAPES):
        x = (torch.randn(shape, generator=generator) / 100).to(dtype)
        x[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
        mask = torch.rand(shape, generator=generator) < 0.2
        wide = 10.0 ** torch.randint(-6, 3, (shape[0], 1), generator=generator)
        split = torch.where(mask, 0, torch.randn(shape, generator=generator) * wide)
        split[shape[0] // 2] = 0
        layout = Rows(Part(torch.Size((2000, 4096)), (number * 9, 0)), x)  # a shard of a larger matrix
        everything = slice(0, shape[0])
        stored, scale = encode(split, state, lambda: layout.noise(everything, 7))  # noqa: B023
        slow = torch.tensor([3.3], dtype=torch.float64)
        places = layout.places(everything, 12345)
        assert places is not None
        copies = [t if t is None else t.clone().to(device) for t in (x, pack(mask), stored, scale, slow)]
        lines.append(Line(*copies, places))  # type: ignore[arg-type]
        v = decode(stored, scale).clone().addcdiv_(torch.where(mask, 0, x).float(), slow.float(), value=-1)
        wanted.append((torch.where(mask, x, 0), *encode(v, state, lambda: layout.noise(everything, 12345))))  # noqa: B023
    fused.step_off_mask(lines)
    for line, (x, stored, scale) in zip(lines, wanted, strict=True):
        assert same(line.x, x) and line.split is not None and same(line.split, stored)
        assert scale is None or (line.scale is not None and same(line.scale, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_off_the_mask_are_exact_and_the_rest_is_as_it_was(device: str, dtype: torch.dtype) -> None:
    lines, wanted = [], []
    for shape in SHAPES:
        x, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.3
        x[0, 1] = torch.nan
        wanted.append(torch.where(mask, x, 0))
        lines.append(Line(x.to(device), pack(mask).to(device)))
    fused.zero_off(lines)
    assert all(same(line.x, x) for line, x in zip(lines, wanted, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_rounded_as_by_operations(device: str, shape: tuple[int, int]) -> None:
    former, step = torch.randn(shape).bfloat16(), (torch.randn(shape) / 1e4).bfloat16()
    former[0, :3] = torch.tensor([torch.inf, torch.nan, -0.0])
    layout, rows = Rows(whole(former), former), slice(shape[0] // 2, shape[0])
    places = layout.places(rows, 3)
    assert places is not None
    now = step[rows].clone().to(device)
    fused.add_rounded(now, former[rows].to(device), places)
    wanted = round_to_bfloat16(former[rows].float() + step[rows], layout.noise(rows, 3))
    assert torch.equal(now.cpu().nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("state", get_args(StateDtype))
def test_a_run_is_that_of_operations(device: str, state: StateDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: steps with and without an update, and on the fixed mask."""

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((48, 96), (48, 96), (33, 40))
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        named = {str(place): p for place, p in enumerate(parameters)}
        admm = ADMM(optimizer, named, Unstructured(0.75), total_steps=16, state_dtype=state,
                    schedule=Schedule(interval=3, ramp=0.5, frozen=0.25))  # fmt: skip
        for _ in range(16):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        admm.finish()
        return [p.detach() for p in parameters]

    by_kernels = run()
    calls: list[Any] = []
    monkeypatch.setattr(fused, "usable", lambda device: calls.append(device))
    by_operations = run()
    assert calls and all(torch.equal(one, other) for one, other in zip(by_kernels, by_operations, strict=True))
