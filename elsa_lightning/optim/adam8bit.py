"""bitsandbytes' 8-bit Adam on parameters of any layout."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes.optim
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.kernels import matrix_shape, rows_of
from elsa_lightning.layout.sharded import check_grain, laid_out_like, local, part_of
from elsa_lightning.optim.moments import BNB_BLOCK
from elsa_lightning.optim.rounding import Around

_STATE = ("state1", "state2", "absmax1", "absmax2")


class Adam8bit(bitsandbytes.optim.Adam8bit):  # type: ignore[misc, name-defined]
    """bitsandbytes' Adam8bit, with state that shards and reshards as the weights do.

    The kernels are bitsandbytes' own. Blocks of 256 entries run along rows, never across: the stored state of a row
    depends on that row alone, so checkpoints can be loaded with any number of processes unchanged. Rows are padded to
    a multiple of 256. Matrices with at least ``min_8bit_size`` entries, counted over all processes, get 8-bit state,
    all other parameters float32.

    On the flat slices of FSDP1, blocks begin with the slice, and state is saved as float32 numbers, which loading
    rounds to the same 8 bits. There, matrices are recognised only after
    :func:`elsa_lightning.layout.fsdp1.mark_slices`, which :class:`~elsa_lightning.ElsaCallback` calls.

    Args:
        params: Parameters or groups, as for any optimizer; DTensors too.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Each step first multiplies the weights by ``1 - lr * weight_decay``, as AdamW does.
        min_8bit_size: Entries of the smallest matrix with 8-bit state.
    """

    around: Around | None = None  # while ADMM rounds bfloat16 weights

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, tuple(betas), eps, weight_decay, min_8bit_size=min_8bit_size)
        self.register_state_dict_post_hook(_saved)

    def _in_8_bits(self, p: nn.Parameter) -> bool:
        shape = part_of(p).shape
        return len(shape) > 1 and shape.numel() >= int(self.args.min_8bit_size)

    def steps_rows(self, p: nn.Parameter) -> bool:
        """Return whether a parameter can be stepped some rows at a time."""
        return self._in_8_bits(p) and part_of(p).start is None

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Create the moments."""
        state = self.state[p]
        state["step"] = 0
        if not self._in_8_bits(p):
            state["state1"], state["state2"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
            return
        check_grain("a parameter of Adam8bit", p, 1, 1, BNB_BLOCK)
        self._make_room(p)

    def _make_room(self, p: nn.Parameter) -> None:
        state, x = self.state[p], rows_of(p, local(p))
        blocks, all_blocks = (-(-shape[-1] // BNB_BLOCK) for shape in (x.shape, matrix_shape(p, p.shape)))

        def room(each: int, dtype: torch.dtype) -> Tensor:
            empty = torch.zeros((*x.shape[:-1], each * blocks), dtype=dtype, device=x.device)
            return laid_out_like(p, empty, each * all_blocks)

        for index in "12":
            flat = part_of(p).start is not None  # not padded
            state[f"state{index}"] = torch.zeros_like(x, dtype=torch.uint8) if flat else room(BNB_BLOCK, torch.uint8)
            state[f"absmax{index}"] = room(1, torch.float32)
        self._add_code_books(p)

    def _add_code_books(self, p: nn.Parameter) -> None:
        state = self.state[p]
        for index, name in (("1", "dynamic"), ("2", "udynamic")):
            self.name2qmap[name] = self.name2qmap[name].to(p.device)
            state[f"qmap{index}"] = self.name2qmap[name]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Step one parameter's local entries."""
        state = self.state[p]
        state["step"] += 1
        x, grad = local(p), local(cast(Tensor, p.grad))
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        if x.numel() == 0:
            return
        beta1, beta2 = group["betas"]
        first, second = local(state["state1"]), local(state["state2"])
        if first.dtype == torch.float32:
            functional.optimizer_update_32bit(
                "adam", grad, x, first, beta1, group["eps"], state["step"], group["lr"], second, beta2, 0.0,
                0.0, group["weight_decay"], 1.0, None, max_unorm=0.0, skip_zeros=False,
            )  # fmt: skip
            return
        if self.around is None or not (self.steps_rows(p) and self.around.takes(p)):
            self._step_rows(group, p, grad, slice(None))
            return
        for rows in self.around.pieces(p):
            with self.around.step(p, rows):
                self._step_rows(group, p, grad, rows)

    def _step_rows(self, group: dict[str, Any], p: nn.Parameter, grad: Tensor, rows: slice) -> None:
        """Step some rows of the local entries, with the same result as a step of all."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        x, grad, first, second, *scales = (
            t if t.dim() == 1 else t.view(-1, t.shape[-1])[rows]
            for t in (rows_of(p, local(p)), rows_of(p, grad), *(local(state[key]) for key in _STATE))
        )
        filler = first.shape[-1] - x.shape[-1]
        apart = filler or not x.is_contiguous()  # the kernel takes entries in the order of memory, whatever the strides
        weights, grad = (nn.functional.pad(t, (0, filler)).contiguous() if apart else t for t in (x, grad))
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, weights, first, second, beta1, beta2, 0.0, 0.0, group["eps"], state["step"], group["lr"],
            state["qmap1"], state["qmap2"], scales[0].view(-1), scales[1].view(-1), group["weight_decay"],
        )  # fmt: skip
        if apart:
            x.copy_(weights[..., : x.shape[-1]])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the moments as stored, without the code books, which are the same for all."""
        state_dict: dict[str, Any] = Optimizer.state_dict(self)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Restore the state, dtypes included."""
        super().load_state_dict(state_dict, move_to_device)
        for p, state in self.state.items():
            if "state1" in state and "absmax1" not in state and self._in_8_bits(p):
                self._round(p)
            if "absmax1" in state:
                self._add_code_books(p)

    def _round(self, p: nn.Parameter) -> None:
        """Round float32 moments, as of FSDP1, to the nearest code; bitsandbytes' CPU kernel does not do so near 0."""
        state = self.state[p]
        moments = {index: rows_of(p, local(state[f"state{index}"])).to(p.device) for index in "12"}
        self._make_room(p)
        for index, moment in moments.items():
            codes, scales = local(state[f"state{index}"]), local(state[f"absmax{index}"])
            table: Tensor = state[f"qmap{index}"]
            rows = nn.functional.pad(moment.float(), (0, codes.shape[-1] - moment.shape[-1])).flatten()
            blocks = nn.functional.pad(rows, (0, scales.numel() * BNB_BLOCK - rows.numel())).view(-1, BNB_BLOCK)
            largest = blocks.abs().amax(dim=1)
            relative = blocks / largest.where(largest > 0, 1)[:, None]
            nearest = torch.bucketize(relative, (table[1:] + table[:-1]) / 2).flatten()[: codes.numel()]
            codes.copy_(nearest.view(codes.shape))
            scales.copy_(largest.view(scales.shape))


def _saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the code books, and with flat slices as float32."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    states = {}
    for index, p in zip(indices, parameters, strict=True):
        if index not in state_dict["state"]:
            continue
        state = state_dict["state"][index]
        states[index] = {key: value for key, value in state.items() if not key.startswith("qmap")}
        if part_of(p).start is None or "absmax1" not in state:
            continue
        for key in "12":
            codes, scales = state[f"state{key}"], states[index].pop(f"absmax{key}")
            scale = scales.repeat_interleave(BNB_BLOCK)[: codes.numel()]
            moment = scale * state[f"qmap{key}"][codes.int()]
            if key == "1":  # the lowest code is -0.993, but the entry that set the scale must set it again
                moment = torch.where(codes == 0, -scale, moment)
            states[index][f"state{key}"] = moment
    return {**state_dict, "state": states}
