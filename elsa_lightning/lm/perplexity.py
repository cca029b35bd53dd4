"""A perplexity metric that is exact for extreme logits and under every precision plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.text import Perplexity


class TokenPerplexity(Perplexity):
    """exp of the mean next-token negative log-likelihood, in nats.

    torchmetrics takes a softmax and then its logarithm, which is infinite once two logits differ by about
    100, and its sums follow the module's dtype. Here the loss is a float32 cross-entropy and the sums are
    float64 (float32 on devices without it), whatever precision the model runs in.

    Args:
        ignore_index: Targets with this value do not count.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    total_log_probs: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = -100, **kwargs: Any) -> None:
        super().__init__(ignore_index=ignore_index, **kwargs)
        for state in ("total_log_probs", "count"):
            self.add_state(state, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Logits ``(batch, length, vocabulary)``, any floating dtype.
            target: Token ids ``(batch, length)``; position ``i`` is the token that ``preds[:, i]`` predicts,
                so the caller shifts: ``update(logits[:, :-1], ids[:, 1:])``.
        """
        ignore = -100 if self.ignore_index is None else self.ignore_index
        for logits, ids in zip(preds, target, strict=True):  # one sequence at a time: float32 logits are large
            loss = F.cross_entropy(logits.float(), ids, ignore_index=ignore, reduction="sum")
            self.total_log_probs += loss.to(self.total_log_probs.dtype)
            self.count += (ids != ignore).sum().to(self.count.dtype)

    def compute(self) -> Tensor:
        """Return the perplexity, a float64 scalar; infinite if it overflows."""
        return torch.exp(self.total_log_probs / self.count)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> TokenPerplexity:
        """Follow the module to its device, but not to its dtype."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            return tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)

        self.total_log_probs, self.count = move(self.total_log_probs), move(self.count)
        self._defaults = {name: move(v) for name, v in self._defaults.items() if isinstance(v, Tensor)}
        self._device = self.count.device
        return self
