"""The perplexity metric under extreme logits and every precision."""

import math

import pytest
import torch

from elsa_lightning.lm.perplexity import TokenPerplexity


def reference(logits: torch.Tensor, ids: torch.Tensor, ignore: int = -100) -> float:
    chosen = logits.double().log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return math.exp(-chosen[ids != ignore].mean().item())


def test_is_the_exponential_of_the_mean_loss_over_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator) * 3
    ids = torch.randint(11, (5, 7), generator=generator)
    ids[0, :4] = -100
    metric = TokenPerplexity()
    metric.update(logits[:2], ids[:2])
    metric.update(logits[2:], ids[2:])
    assert float(metric.compute()) == pytest.approx(reference(logits, ids), rel=1e-6)
    metric.reset()
    metric.update(logits[:1], ids[:1])
    assert float(metric.compute()) == pytest.approx(reference(logits[:1], ids[:1]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """A softmax before the logarithm is infinite from a gap of about 100 in float32, of 17 in float16."""
    logits = torch.zeros(1, 2, 4, dtype=dtype)
    logits[..., 0] = 300.0
    right, wrong = TokenPerplexity(), TokenPerplexity()
    right.update(logits, torch.tensor([[0, 0]]))
    wrong.update(logits, torch.tensor([[0, 1]]))
    assert float(right.compute()) == pytest.approx(1.0)
    assert float(wrong.compute()) == pytest.approx(math.exp(150))


@pytest.mark.parametrize("convert", ["bfloat16", "half", "float"])
def test_the_sums_keep_their_precision_in_a_converted_module(convert: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), TokenPerplexity())
    getattr(module, convert)()
    metric = module[1]
    assert isinstance(metric, TokenPerplexity)
    logits, ids = torch.zeros(1, 100, 3), torch.zeros(1, 100, dtype=torch.long)
    for _ in range(50):  # bfloat16 stops counting at 256
        metric.update(logits, ids)
    assert metric.count.dtype == torch.float64 and int(metric.count) == 5000
    assert float(metric.compute()) == pytest.approx(3.0)
    metric.reset()
    assert metric.count.dtype == torch.float64
