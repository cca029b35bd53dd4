"""Saves and restores the random state of every process, so that resumed runs are bit-identical."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return the random state of every process, uint8 ``(processes, bytes)``."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if not _distributed():
        return {name: state[None] for name, state in states.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    gathered = {}
    for name, state in states.items():
        parts = [torch.empty_like(state, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, state.to(device))
        gathered[name] = torch.stack(parts).cpu()
    return gathered


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Restore random states, if they were saved by as many processes as there are now."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
    if len(states["cpu"]) == world:
        torch.set_rng_state(states["cpu"][rank].cpu().clone())
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"][rank].cpu().clone())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
