"""Whoever loads the optimizer's state first, in whatever wrapper: a run goes on to the bit, or says why it cannot."""

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from elsa_lightning import ADMM, Unstructured, select
from elsa_lightning.optim.hooks import innermost
from elsa_lightning.tensors import MASK
from tests.callbacks.tiny import assert_same

STEPS = 24


def weights(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype))


def make_optimizer(kind: type, p: nn.Parameter) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind([p], lr=1e-2)
    return optimizer


def attach(optimizer: Any, p: nn.Parameter, **options: Any) -> ADMM:
    return ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=STEPS, **options)


def train(optimizer: Any, p: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last):
        target = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()


def interrupted(kind: type, dtype: torch.dtype, at: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a run saves after some steps, and the weights with which it ends if it goes on."""
    p = weights(dtype)
    optimizer = make_optimizer(kind, p)
    admm = attach(optimizer, p, **options)
    train(optimizer, p, 0, at)
    saved = {"p": p.detach().clone(), "optimizer": copy.deepcopy(optimizer.state_dict()), "admm": admm.state_dict()}
    train(optimizer, p, at, STEPS)
    admm.finish()
    return saved, {"p": p.detach().clone(), "state": dict(optimizer.state[p])}


@pytest.mark.parametrize("at", [7, 20], ids=["mask-moves", "mask-fixed"])
@pytest.mark.parametrize(
    ("kind", "dtype", "state_dtype"),
    [
        (torch.optim.Adam, torch.float32, "float32"),
        (torch.optim.Adam, torch.float32, "bfloat16"),
        (torch.optim.Adam, torch.float32, "float8_e4m3fn"),
        (torch.optim.Adam, torch.bfloat16, "bfloat16"),
        (torch.optim.Adam, torch.bfloat16, "float8_e4m3fn"),
        (torch.optim.Adam, torch.float64, "float32"),
        (bitsandbytes.optim.Adam8bit, torch.float32, "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("load_first", [True, False])
def test_a_run_goes_on_to_the_bit_whether_state_or_admm_comes_first(
    load_first: bool, kind: type, dtype: torch.dtype, state_dtype: Any, at: int
) -> None:
    saved, end = interrupted(kind, dtype, at, state_dtype=state_dtype)
    p = weights(dtype)
    with torch.no_grad():
        p.copy_(saved["p"])
    optimizer = make_optimizer(kind, p)
    if load_first:
        optimizer.load_state_dict(saved["optimizer"])
    admm = attach(optimizer, p, state_dtype=state_dtype)
    if not load_first:
        optimizer.load_state_dict(saved["optimizer"])
    admm.load_state_dict(saved["admm"])
    train(optimizer, p, at, STEPS)
    admm.finish()
    assert int((p == 0).sum()) == round(0.9 * p.numel())
    assert_same({"p": p.detach(), "state": dict(optimizer.state[p])}, end)


def test_what_is_loaded_is_neither_changed_nor_shared() -> None:
    """So that it can be loaded again, and the run that it came from goes on."""
    p, q = weights(), weights()
    optimizer, other = make_optimizer(torch.optim.Adam, p), make_optimizer(torch.optim.Adam, q)
    admm, resumed = attach(optimizer, p), attach(other, q)
    train(optimizer, p, 0, 7)
    saved = optimizer.state_dict()
    ours = {key: value.clone() for key, value in saved["state"][0].items() if key.startswith("elsa_")}
    other.load_state_dict(saved)
    resumed.load_state_dict(admm.state_dict())
    train(other, q, 7, STEPS)
    assert MASK in ours
    assert_same({key: saved["state"][0][key] for key in ours}, ours)


@pytest.mark.parametrize("kind", [torch.optim.Adam, bitsandbytes.optim.Adam8bit])
def test_a_split_that_loading_rounded_is_refused(kind: type) -> None:
    saved, end = interrupted(kind, torch.bfloat16, 7)
    p = nn.Parameter(saved["p"].clone())
    optimizer = make_optimizer(kind, p)
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    admm = attach(optimizer, p)
    with pytest.raises(ValueError, match=r"rounded elsa_split of p to bfloat16(?s:.)*attach ADMM first"):
        admm.load_state_dict(saved["admm"])
    optimizer.load_state_dict(saved["optimizer"])
    admm.load_state_dict(saved["admm"])
    train(optimizer, p, 7, STEPS)
    admm.finish()
    assert torch.equal(p, end["p"])


@pytest.mark.parametrize("kind", [torch.optim.Adam, bitsandbytes.optim.Adam8bit])
@pytest.mark.parametrize("load_first", [True, False])
def test_masks_without_the_scalars_are_an_error_that_says_what_to_save(load_first: bool, kind: type) -> None:
    saved, _ = interrupted(kind, torch.float32, 7)
    p = weights()
    optimizer = make_optimizer(kind, p)
    if load_first:
        optimizer.load_state_dict(saved["optimizer"])
    admm = attach(optimizer, p)
    if not load_first:
        optimizer.load_state_dict(saved["optimizer"])
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"save admm.state_dict\(\) beside optimizer.state_dict\(\)"):
            train(optimizer, p, 7, 8)
    with pytest.raises(ValueError, match="holds the masks of a run"):
        admm.finish()
    assert torch.equal(p, before)


def test_masks_that_are_loaded_between_two_runs_are_not_taken_for_the_former_runs() -> None:
    saved, _ = interrupted(torch.optim.Adam, torch.float32, 7)
    p = weights()
    optimizer = make_optimizer(torch.optim.Adam, p)
    admm = attach(optimizer, p)
    train(optimizer, p, 0, STEPS)
    admm.finish()
    admm.detach()
    optimizer.load_state_dict(saved["optimizer"])
    attach(optimizer, p)
    with pytest.raises(ValueError, match="holds the masks of a run"):
        train(optimizer, p, 0, 1)


def test_state_of_an_unpruned_run_may_be_loaded() -> None:
    p = weights()
    optimizer = make_optimizer(torch.optim.Adam, p)
    train(optimizer, p, 0, 3)
    dense = copy.deepcopy(optimizer.state_dict())
    admm = attach(optimizer, p)
    optimizer.load_state_dict(dense)
    train(optimizer, p, 0, STEPS)
    admm.finish()
    assert int((p == 0).sum()) == round(0.9 * p.numel()) and MASK in optimizer.state[p]


def test_lightning_fabrics_optimizer_is_unwrapped() -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(64, 64, bias=False)
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    wrapped, optimizer = fabric.setup(model, inner)
    assert innermost(optimizer) is inner
    admm = attach(optimizer, model.weight)
    for batch in torch.randn(STEPS, 8, 64):
        optimizer.zero_grad()
        fabric.backward(wrapped(batch).square().mean())
        optimizer.step()
    assert admm.step == STEPS and int((model.weight == 0).sum()) == round(0.9 * 64 * 64)


def test_accelerates_optimizer_is_unwrapped_and_counts_real_steps_alone() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = nn.Linear(64, 64, bias=False)
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, inner)
    assert innermost(optimizer) is inner
    admm = attach(optimizer, model.weight)
    for batch in torch.randn(3 * STEPS, 8, 64):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert admm.step == STEPS and int((model.weight == 0).sum()) == round(0.9 * 64 * 64)


def test_what_is_no_optimizer_is_refused() -> None:
    p = weights()
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, or one that wraps it, got list"):
        attach([p], p)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 16, 1, bias=False),
        lambda: nn.Conv2d(4, 16, 1, bias=False),
        lambda: nn.Conv1d(8, 16, 3, bias=False),
        lambda: nn.Conv2d(2, 16, 3, bias=False),
        lambda: nn.Conv2d(3, 16, 3, bias=False),
        lambda: nn.Linear(1, 16, bias=False),
        lambda: nn.Linear(8, 16, bias=False),
    ],
)
@pytest.mark.parametrize("at", [7, 20], ids=["mask-moves", "mask-fixed"])
def test_small_layers_are_resumed_from_state_that_was_loaded_first(layer: Any, at: int) -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = layer()
        return module, torch.optim.Adam(module.parameters(), lr=0.01)

    def attached(module: nn.Module, optimizer: torch.optim.Optimizer) -> ADMM:
        return ADMM(optimizer, select(module).parameters, Unstructured(0.5), total_steps=STEPS)

    module, optimizer = begun()
    admm = attached(module, optimizer)
    train(optimizer, module.weight, 0, at)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), admm.state_dict()))
    train(optimizer, module.weight, at, STEPS)
    admm.finish()
    again, other = begun()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed = attached(again, other)
    resumed.load_state_dict(saved[2])
    train(other, again.weight, at, STEPS)
    resumed.finish()
    assert torch.equal(module.weight, again.weight)
    assert int((again.weight == 0).sum()) == again.weight.numel() // 2
