"""The second moment that each optimizer keeps."""

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import create_dynamic_map
from torch import nn

from elsa_lightning import ADMM, Unstructured
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


@pytest.mark.parametrize("shape", [(32, 144), (32, 16, 3, 3)])
def test_our_8_bit_adam_rounds_the_float32_moments_of_kernels_as_of_matrices(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    exact, rounded = Adam8bit([p], min_8bit_size=10**6), Adam8bit([p])
    for gradient in gradients(shape):
        p.grad = gradient
        exact.step()
    rounded.load_state_dict(exact.state_dict())
    before, after = (second_moment(optimizer, p) for optimizer in (exact, rounded))
    assert before is not None and after is not None and rounded.state[p]["state2"].dtype == torch.uint8
    assert float((after.flatten() - before.flatten()).norm() / before.norm()) < 0.05


def test_our_8_bit_adam_decays_the_weights_and_not_the_gradient() -> None:
    p = nn.Parameter(torch.full((2,), 2.0))
    p.grad = torch.zeros_like(p)
    Adam8bit([p], lr=0.1, weight_decay=0.01).step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 2 * (1 - 0.1 * 0.01)))


@pytest.mark.parametrize("columns", [512, 300])
def test_our_8_bit_adam_gives_weights_that_lie_by_columns_to_the_kernel_by_rows(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's kernel is given addresses without strides."""
    real, given = functional.optimizer_update_8bit_blockwise, []

    def watched(name: str, grad: torch.Tensor, weights: torch.Tensor, *others: Any) -> None:
        given.extend((grad.is_contiguous(), weights.is_contiguous()))
        real(name, grad, weights, *others)

    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", watched)
    start, found = torch.randn(16, columns, generator=torch.Generator().manual_seed(0)), []
    for by_columns in (False, True):
        p = nn.Parameter(start.t().contiguous().t() if by_columns else start.clone())
        optimizer = Adam8bit([p], lr=1e-2, weight_decay=0.1)
        for gradient in gradients((16, columns)):
            p.grad = gradient
            optimizer.step()
        assert p.is_contiguous() != by_columns
        found.append(p.detach())
    assert all(given) and torch.equal(*found) and not torch.equal(found[0], start)


def gradients(shape: tuple[int, ...], steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def of_rmsprop(shape: tuple[int, ...]) -> torch.Tensor:
    mean = torch.zeros(shape)
    for g in gradients(shape):
        mean = 0.99 * mean + 0.01 * g.square()
    return mean


def of_adadelta(shape: tuple[int, ...]) -> torch.Tensor:
    mean = torch.zeros(shape)
    for g in gradients(shape):
        mean = 0.9 * mean + 0.1 * g.square()
    return mean


def of_adamax(shape: tuple[int, ...]) -> torch.Tensor:
    largest = torch.zeros(shape)
    for g in gradients(shape):
        largest = torch.maximum(0.999 * largest, g.abs())
    return largest.square()


def of_adagrad(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([g.square() for g in gradients(shape)]).sum(0)


CLOSED_FORMS = {
    torch.optim.RMSprop: of_rmsprop,
    torch.optim.Adadelta: of_adadelta,
    torch.optim.Adamax: of_adamax,
    torch.optim.Adagrad: of_adagrad,
    bitsandbytes.optim.Adagrad: of_adagrad,
    bitsandbytes.optim.RMSprop: of_rmsprop,
}


@pytest.mark.parametrize("kind", CLOSED_FORMS, ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}")
def test_squared_gradients_are_found_whatever_an_optimizer_calls_them(kind: type) -> None:
    p, optimizer = stepped(kind)
    torch.testing.assert_close(second_moment(optimizer, p), CLOSED_FORMS[kind]((128, 64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [bitsandbytes.optim.Adagrad8bit, bitsandbytes.optim.RMSprop8bit])
def test_one_state_in_8_bits_is_dequantised(kind: type) -> None:
    p, optimizer = stepped(kind)
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    exact = (of_adagrad if "Adagrad" in kind.__name__ else of_rmsprop)((128, 64))
    ours = second_moment(optimizer, p)
    assert ours is not None and float((ours - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("kind", [bitsandbytes.optim.Lion, bitsandbytes.optim.SGD])
def test_a_momentum_is_not_taken_for_a_second_moment(kind: type) -> None:
    p, optimizer = stepped(kind, **({"momentum": 0.9} if kind is bitsandbytes.optim.SGD else {}))
    assert "state1" in optimizer.state[p] and second_moment(optimizer, p) is None


def adafactors() -> list[type]:
    from transformers.optimization import Adafactor

    return [torch.optim.Adafactor, Adafactor]


def adafactor(kind: type, shape: tuple[int, ...], steps: int = 3) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    options = {} if kind is torch.optim.Adafactor else {"relative_step": False, "scale_parameter": False}
    optimizer = kind([p], lr=1e-3, **options)
    for g in gradients(shape, steps):
        p.grad = g
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("shape", [(12, 8), (3, 12, 8)])
@pytest.mark.parametrize("kind", adafactors(), ids=lambda kind: kind.__module__.split(".")[0])
def test_factored_moments_are_the_product_of_their_means(kind: type, shape: tuple[int, ...]) -> None:
    p, optimizer = adafactor(kind, shape, steps=1)  # of one step both are that step's own
    square = gradients(shape, 1)[0].square()
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    expected = rows * columns / rows.mean(-2, keepdim=True)
    moment = second_moment(optimizer, p)
    assert moment is not None
    ratio = moment / expected
    assert float(ratio.std() / ratio.mean()) < 1e-4  # but for one factor a tensor
    some = second_moment(optimizer, p, slice(5, 11))
    assert some is not None and torch.equal(some, moment.reshape(-1, shape[-1])[5:11])


@pytest.mark.parametrize("kind", adafactors(), ids=lambda kind: kind.__module__.split(".")[0])
def test_vectors_of_an_adafactor_have_all_of_their_moment(kind: type) -> None:
    p, optimizer = adafactor(kind, (40,))
    moment = second_moment(optimizer, p)
    assert moment is not None and moment.shape == p.shape and bool((moment > 0).all())


def test_sums_that_an_optimizer_makes_beforehand_say_nothing_yet() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    assert second_moment(torch.optim.Adagrad([p], initial_accumulator_value=0.1), p) is None


@pytest.mark.parametrize(("kind", "error"), [("AdamW8bit", 0.05), ("AdamWFp8", 0.05), ("AdamW4bit", 0.3)])
def test_numbers_of_torchao_are_dequantised(kind: str, error: float) -> None:
    torchao_optim = pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        p, optimizer = stepped(getattr(torchao_optim, kind))
    exact = second_moment(*reversed(stepped(torch.optim.AdamW)))
    whole = second_moment(optimizer, p)
    assert whole is not None and exact is not None and type(whole) is torch.Tensor
    assert float((whole - exact).norm() / exact.norm()) < error
    assert torch.equal(whole, optimizer.state[p]["exp_avg_sq"].dequantize())
    for rows in (slice(0, 128), slice(3, 4), slice(5, 99)):
        some = second_moment(optimizer, p, rows)
        assert some is not None and torch.equal(some, whole[rows])


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adamax", "Adafactor", "torchao"])
@pytest.mark.parametrize("prox", ["linearized", "published"])
def test_a_run_prunes_with_any_of_them_and_blames_no_missing_moment(
    kind: str, prox: Any, caplog: pytest.LogCaptureFixture
) -> None:
    p = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
    if kind == "torchao":
        optimizer = pytest.importorskip("torchao.optim").AdamW8bit([p], lr=1e-2)
    else:
        optimizer = getattr(torch.optim, kind)([p], lr=1e-2)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=12, prox=prox)
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    with torch.compiler.set_stance("force_eager"):
        for _ in range(12):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
    admm.finish()
    assert int((p != 0).sum()) == round(0.1 * p.numel())
    assert "second moment" not in caplog.text


def test_amsgrad_divides_by_the_largest_so_far() -> None:
    p, optimizer = stepped(torch.optim.Adam, amsgrad=True)
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    state = optimizer.state[p]
    assert (state["exp_avg_sq"] < 0.95 * state["max_exp_avg_sq"]).all()
    assert torch.equal(second_moment(optimizer, p), state["max_exp_avg_sq"])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adamax])
def test_a_moment_is_beside_its_weight_where_the_memory_format_changed_after_it(kind: type) -> None:
    torch.manual_seed(0)
    layer, before = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    before.load_state_dict(layer.state_dict())
    moments = []
    for module, changes in ((layer, True), (before, False)):
        optimizer = kind(module.parameters(), lr=1e-3)
        module.weight.grad = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        if changes:
            module.to(memory_format=torch.channels_last)
            assert not module.weight.is_contiguous()
        moments.append(second_moment(optimizer, module.weight))
    last = moments[0].view(8, 3, 3, 8).movedim(-1, 1)
    assert torch.equal(last, moments[1].view(8, 8, 3, 3))
