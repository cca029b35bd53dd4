"""The second moment that each optimizer keeps."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import nn

from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.optim.moments import second_moment


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


@pytest.mark.parametrize("kind", [torch.optim.Adam, bitsandbytes.optim.Adam8bit, Adam8bit])
def test_rows_of_a_second_moment_are_rows_of_all_of_it(kind: type) -> None:
    p, optimizer = stepped(kind)
    whole = second_moment(optimizer, p)
    assert whole is not None
    for rows in (slice(0, 128), slice(3, 4), slice(5, 99)):
        some = second_moment(optimizer, p, rows)
        assert some is not None and torch.equal(some, whole[rows])


def test_our_8_bit_adam_is_that_of_bitsandbytes_where_rows_are_whole_blocks() -> None:
    def trained(kind: type) -> torch.Tensor:
        p = nn.Parameter(torch.randn(16, 512, generator=torch.Generator().manual_seed(0)))
        optimizer = kind([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return p.detach()

    assert torch.equal(trained(Adam8bit), trained(bitsandbytes.optim.Adam8bit))


def test_our_8_bit_adam_stays_near_adam_where_rows_are_not() -> None:
    (p, optimizer), (exact, _) = stepped(Adam8bit), stepped(torch.optim.Adam)
    assert optimizer.state[p]["state1"].shape == (128, 256) and optimizer.state[p]["absmax1"].shape == (128, 1)
    start = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert float((p - exact).norm() / (exact - start).norm()) < 0.05


def test_our_8_bit_adam_takes_moments_as_float32_and_finds_their_codes_again() -> None:
    """So FSDP1 saves them."""
    (p, optimizer), (_, other) = stepped(Adam8bit), stepped(Adam8bit)
    dense = optimizer.state_dict()
    state = dense["state"][0] = dict(dense["state"][0])
    state["step"] += 1
    for index, signed in (("1", True), ("2", False)):
        table, scale = create_dynamic_map(signed), state.pop(f"absmax{index}")
        codes = state[f"state{index}"]
        moment = table[codes.long()] * scale
        state[f"state{index}"] = torch.where((codes == 0) & signed, -scale, moment)[:, : p.shape[1]]
    other.load_state_dict(dense)
    before, after = optimizer.state[p], next(iter(other.state.values()))
    assert after["step"] == before["step"] + 1
    for key in ("state1", "state2", "absmax1", "absmax2"):
        mine, theirs = before[key], after[key]
        assert torch.equal(mine[:, : p.shape[1]], theirs[:, : p.shape[1]]), key
