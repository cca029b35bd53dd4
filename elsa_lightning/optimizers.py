"""Reading the second moment that an optimizer already keeps."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer


def second_moment(optimizer: Optimizer, p: nn.Parameter) -> Tensor | None:
    """Return the diagonal empirical Fisher estimate F̂ of a parameter, of its shape, or None.

    torch's Adam family keeps it as ``exp_avg_sq``, bitsandbytes as ``state2``, in 8 bits for large tensors.
    The bias correction is a constant per tensor and changes no ranking within it.
    """
    state = optimizer.state.get(p, {})
    moment = state.get("exp_avg_sq", state.get("state2"))
    if not isinstance(moment, Tensor) or moment.shape != p.shape:
        return None
    if moment.is_floating_point():
        return moment
    from bitsandbytes.functional import dequantize_blockwise

    dequantized: Tensor = dequantize_blockwise(moment, absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
    return dequantized.view(p.shape)
