"""LoRA on a sparse base: merged under the mask, and what that costs is said."""

import logging
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsa_lightning.adapters import merge_and_keep_zeros

peft = pytest.importorskip("peft")


def make() -> Any:
    """Return a model with a trained adapter on a base of 75 % zeros, and the base's mask."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        base[0].weight.masked_fill_(torch.rand(32, 16) < 0.75, 0)
    mask = base[0].weight.detach().clone() != 0
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(std=0.3)
    return model, mask


def loss(model: nn.Module) -> float:
    return float(F.mse_loss(model(torch.ones(3, 16)), torch.ones(3, 4)).detach())


def test_merging_keeps_the_zeros_and_says_the_loss_by_it(caplog: pytest.LogCaptureFixture) -> None:
    model, mask = make()
    layer = model.get_base_model()[0]
    delta = layer.get_delta_weight("default").detach().clone()
    expected, with_adapter = (layer.weight + delta).detach() * mask, loss(model)
    share = float((delta[~mask] ** 2).sum() / (delta**2).sum())
    with caplog.at_level(logging.WARNING):
        merged: Any = merge_and_keep_zeros(model, loss)
    assert torch.allclose(merged[0].weight, expected, atol=1e-6) and not merged[0].weight[~mask].any()
    numbers = re.search(
        r"mask: ([\d.]+)% .*loss ([\d.]+) with the adapter, ([\d.]+) merged \(([+-][\d.]+)\)", caplog.text
    )
    assert numbers is not None, caplog.text
    said = [float(number) for number in numbers.groups()]
    assert said[0] == pytest.approx(100 * share, abs=0.06) and 50 < said[0] < 100
    assert said[1:3] == pytest.approx([with_adapter, loss(merged)], abs=1e-4) and said[1] != said[2]
    assert said[3] == pytest.approx(loss(merged) - with_adapter, abs=1e-4)


def test_an_adapter_that_adds_nothing_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = make()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    merge_and_keep_zeros(model)
    assert "0.0% of what the adapter adds" in caplog.text and "loss" not in caplog.text
