"""What each process of a sharded run holds, and what ADMM makes processes exchange, on more of them than there are.

    python benchmarks/sharding/run.py

Memory: the model is built from its configuration on no device and sharded (FSDP2) as CausalLM does it, for one
process of many that do not exist; bytes are counted from the shapes of its shards. Traffic: every constrained
tensor is stood in for by a small one, sharded the same way; the collectives of real ADMM steps are counted, as on GPUs,
whose sizes do not depend on the tensors'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout.lowbit import StateDtype
from elsa_lightning.layout.sharded import local
from elsa_lightning.lm.pretrained import Pretrained
from elsa_lightning.lm.sharded import build_sharded
from elsa_lightning.plan import elsa_bytes
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select

sys.path.insert(0, str(Path(__file__).parents[1] / "step_overhead"))

from counts import as_on_a_gpu

HERE = Path(__file__).parents[1] / "memory"
ELSA = (4, 8.0, "float32"), (2, 2 + 8 / 256, "float8_e4m3fn")  # bytes of a weight, of its moments, state
STEPS, INTERVAL = 8, 4


def bytes_a_process(model: nn.Module, width: int, moments: float, state_dtype: StateDtype) -> float:
    """Return bytes of weights, gradients, moments and ADMM state of this process."""
    total = sum(local(p).numel() * (2 * width + moments) for p in model.parameters())
    return total + sum(elsa_bytes(local(p).shape, state_dtype) for p in select(model).parameters.values())


class Counted:
    """Counts what is reduced while it is on; every other collective is an error."""

    def __init__(self, processes: int) -> None:
        self.processes, self.real = processes, dist.all_reduce
        self.sizes: list[int] = []
        self.others = CommDebugMode()

    def __enter__(self) -> Counted:
        def counting(t: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self.sizes.append(t.numel() * t.element_size())
            t.mul_(self.processes)  # as if the others held the like

        dist.all_reduce = counting
        self.others.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        dist.all_reduce = self.real
        self.others.__exit__(*error)
        if error[0] is None and self.others.get_total_counts():
            raise RuntimeError(f"ADMM exchanged more than sums: {self.others.get_comm_counts()}")


def traffic(shapes: list[torch.Size], processes: int, mesh: Any) -> tuple[list[int], list[int]]:
    """Return the bytes of each reduction of an ordinary step and of one with a projection that follows others."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, shape in enumerate(shapes):
        whole = torch.randn(*shape[:-2], processes, 16, generator=generator)
        tensors[str(index)] = nn.Parameter(distribute_tensor(whole, mesh, [Shard(len(shape) - 2)], src_data_rank=None))
    optimizer = torch.optim.Adam(tensors.values(), lr=1e-3)
    schedule = Schedule(interval=INTERVAL, ramp=0, frozen=0)
    admm = ADMM(optimizer, tensors, Unstructured(0.5), total_steps=10**6, schedule=schedule)
    admm.form.prior = 0.0  # the first 150 steps' updates also sum the means of F̂
    by_step = []
    gradients = [torch.randn(local(p).shape, generator=generator) for p in tensors.values()]  # so thresholds stay near
    for _ in range(STEPS):
        for p, grad in zip(tensors.values(), gradients, strict=True):
            p.grad = DTensor.from_local(grad, p.device_mesh, p.placements, run_check=False)
        with Counted(processes) as counted, as_on_a_gpu():
            optimizer.step()
        by_step.append(counted.sizes)
    return by_step[INTERVAL], by_step[2 * INTERVAL - 1]


def as_process_of(processes: int, do: Callable[[Any], Any]) -> Any:
    """Call ``do`` with a mesh of so many processes, this one being the first and the only one."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        return do(init_device_mesh("cpu", (processes,)))
    finally:
        dist.destroy_process_group()


def row(config: str, processes: int, mesh: Any) -> str:
    """Return one line of the table."""
    source = Pretrained(config)
    model = build_sharded(lambda: source.build("float32", weights=False), mesh, torch.device("meta"))
    held = [bytes_a_process(model, width, moments, state) for width, moments, state in ELSA]  # type: ignore[arg-type]
    shapes = [p.shape for p in select(model).parameters.values()]
    ordinary, update = traffic(shapes, processes, mesh)
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"| {Path(config).name} | {parameters / 1e9:.1f} | {processes} | {held[0] / 2**30:.1f} | {held[1] / 2**30:.1f} "
        f"| {len(ordinary)} / {sum(ordinary)} | {len(update)} / {sum(update):,} | {2 * parameters / sum(update):,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [str(HERE / name) for name in ("llama-2-7b", "gemma-2-27b", "llama-2-70b")]
    parser.add_argument("--models", nargs="+", default=models, help="folders with a config.json (default: the three)")
    parser.add_argument("--processes", nargs="+", type=int, default=[4, 8, 64], help="(default: %(default)s)")
    arguments = parser.parse_args()
    print(
        "| model | parameters, 10⁹ | processes | Elsa, GiB a process | Elsa-L, GiB a process | reductions / bytes of a "
        "step | of a step with a projection | gathering bfloat16 weights would be × as much |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for config in arguments.models:
        for processes in arguments.processes:
            print(as_process_of(processes, lambda mesh, c=config, n=processes: row(c, n, mesh)), flush=True)


if __name__ == "__main__":
    main()
