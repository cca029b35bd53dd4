"""The second moment that each optimizer keeps."""

import bitsandbytes
import pytest
import torch
from torch import nn

from elsa_lightning.optimizers import second_moment


def stepped(kind: type, **options: object) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([p], lr=1e-3, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_torch_keeps_the_running_mean_of_the_squared_gradient(kind: type) -> None:
    p, optimizer = stepped(kind)
    generator = torch.Generator().manual_seed(1)
    expected = torch.zeros_like(p)
    for _ in range(3):
        expected = 0.999 * expected + 0.001 * torch.randn(p.shape, generator=generator).square()
    torch.testing.assert_close(second_moment(optimizer, p), expected)


def test_eight_bits_are_dequantised() -> None:
    exact = second_moment(*reversed(stepped(torch.optim.Adam)))
    p, optimizer = stepped(bitsandbytes.optim.Adam8bit)
    assert optimizer.state[p]["state2"].dtype == torch.uint8
    ours = second_moment(optimizer, p)
    assert exact is not None and ours is not None and ours.shape == p.shape
    assert float((ours - exact).norm() / exact.norm()) < 0.05


def test_small_tensors_of_an_8_bit_optimizer_are_plain() -> None:
    p, optimizer = stepped(bitsandbytes.optim.Adam8bit, min_8bit_size=10**6)
    exact = second_moment(*reversed(stepped(torch.optim.Adam)))
    torch.testing.assert_close(second_moment(optimizer, p), exact)


def test_there_is_none_without_one_or_before_the_first_step() -> None:
    assert second_moment(*reversed(stepped(torch.optim.SGD))) is None
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([p])
    assert second_moment(optimizer, p) is None
    assert not optimizer.state, "looking must not create state"
