"""Processes that train different models in one job, or only some of them, without Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from elsa_lightning import ADMM, Unstructured, select
from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import mark_slices, settle
from elsa_lightning.layout.sharded import part_of
from elsa_lightning.schedule import Schedule
from elsa_lightning.tensors import MASK
from tests.distributed.worker import leave

STEPS = 12


def sharded(mesh: DeviceMesh, seed: int) -> nn.Parameter:
    whole = torch.randn(13, 16, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))


def pairs() -> DeviceMesh:
    """Processes 0 and 1, and 2 and 3; all of them make both groups."""
    return DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("copy", "shard"))


def train(p: nn.Parameter, broken: int | None = None, replicas: dist.ProcessGroup | None = None) -> ADMM:
    optimizer = torch.optim.Adam([p], lr=0.01)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=STEPS, schedule=Schedule(interval=2),
                replicas=replicas)  # fmt: skip
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        if step == broken and p.grad is not None:
            p.grad.fill_(torch.nan)
        optimizer.step()
    admm.finish()
    return admm


def two_meshes(rank: int) -> None:
    """Processes 0 and 1 train one model, 2 and 3 another with other weights."""
    p = sharded(pairs()["shard"], seed=rank // 2)
    train(p)
    assert isinstance(p, DTensor)
    assert int((p.full_tensor() != 0).sum()) == 104, "half of each model's own entries"


def only_some(rank: int) -> None:
    """Processes 1 and 2 train; the others wait at a barrier and take part in nothing."""
    mesh = DeviceMesh("cpu", [1, 2])
    if rank in (1, 2):
        p = sharded(mesh, seed=3)
        train(p)
        assert isinstance(p, DTensor)
        assert int((p.full_tensor() != 0).sum()) == 104


def a_mesh_in_a_mesh(rank: int) -> None:
    """A weight over all four, experts over two of them: what both copies hold is counted once."""
    outer = pairs()
    wide = DeviceMesh("cpu", [0, 1, 2, 3])
    a = sharded(wide, seed=4)
    b = nn.Parameter(
        DTensor.from_local(
            torch.randn(8, 16, generator=torch.Generator().manual_seed(rank % 2)), outer["shard"], [Shard(0)]
        )
    )
    optimizer = torch.optim.Adam([a, b], lr=0.01)
    admm = ADMM(optimizer, {"a": a, "b": b}, Unstructured(0.75, scope="model"), total_steps=STEPS,
                schedule=Schedule(interval=2))  # fmt: skip
    for _ in range(STEPS):
        optimizer.zero_grad()
        for p in (a, b):
            p.grad = 2 * (p.detach() - 1)
        optimizer.step()
    admm.finish()
    kept = sum(int((p.full_tensor() != 0).sum()) for p in (a, b))  # type: ignore[attr-defined]
    assert kept == (13 * 16 + 16 * 16) // 4


def a_copy_beside_shards(rank: int) -> None:
    """A weight that all four hold, in one optimizer with one that pairs share out: each pair counts it once."""
    whole = torch.randn(13, 16, generator=torch.Generator().manual_seed(6))
    a = nn.Parameter(distribute_tensor(whole, DeviceMesh("cpu", [0, 1, 2, 3])))
    b = sharded(pairs()["shard"], seed=7)
    optimizer = torch.optim.Adam([a, b], lr=0.01)
    admm = ADMM(optimizer, {"a": a, "b": b}, Unstructured(0.5), total_steps=STEPS, schedule=Schedule(interval=2))
    for _ in range(STEPS):
        for p in (a, b):
            p.grad = 2 * (p.detach() - 1)
        optimizer.step()
    admm.finish()
    assert sum(int((p.full_tensor() != 0).sum()) for p in (a, b)) == 208  # type: ignore[attr-defined]


def broken_on_one(rank: int) -> None:
    """Gradients that are not finite on one of four copies: all skip the step, and stay alike."""
    p = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    admm = train(p, broken=5 if rank == 3 else None, replicas=dist.group.WORLD)
    assert admm.step == STEPS - 1
    mine = p.detach().clone()
    dist.broadcast(mine, src=0)
    assert torch.equal(mine, p.detach())


def unlike_gradients(rank: int) -> None:
    """One of four copies has no gradient of a weight, or of any: they would not stay copies, and all of them say so."""
    for missing in (1, 2):
        layers = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
        optimizer = torch.optim.Adam(layers)
        admm = ADMM(optimizer, {f"{i}": p for i, p in enumerate(layers)}, Unstructured(0.5), total_steps=STEPS,
                    replicas=dist.group.WORLD)  # fmt: skip
        for p in layers:
            p.grad = torch.ones(8, 8)
        optimizer.step()
        for p in layers[:missing] if rank == 3 else ():
            p.grad = None
        mine = 2 - missing if rank == 3 else 2
        with pytest.raises(UserError, match=f"after optimizer step 1 this process has gradients of {mine} "):
            optimizer.step()
        assert admm.step == 1


def late_under_fsdp1(rank: int) -> None:
    """A unit gets its first gradient when the mask is fixed, and one process holds nothing of its weight."""
    torch.manual_seed(0)
    units = [FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=True)
             for _ in range(2)]  # fmt: skip
    model = nn.ModuleList(units)
    mark_slices(model)
    weights = {f"{i}": p for i, unit in enumerate(units) for p in unit.parameters() if len(part_of(p).shape) == 2}
    assert (weights["1"].numel() == 0) == (rank == 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    admm = ADMM(optimizer, weights, Unstructured(0.5), total_steps=STEPS, schedule=Schedule(interval=2))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = units[0](torch.ones(2, 4)).square().sum()
        if admm.phase == "frozen" and step > 9:
            loss = loss + (units[1](torch.ones(2, 4)) - 1).square().sum()
        loss.backward()
        settle(model)
        optimizer.step()
    for p in weights.values():
        kept = (p != 0).sum()
        dist.all_reduce(kept)
        assert int(kept) == 6
        assert p.numel() == 0 or MASK in optimizer.state[p]


def slices_without_marks(rank: int) -> None:
    """Flat slices do not tell the shapes of weights: what does is named, whoever comes first."""

    def wrapped(apart: bool = True) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 2))
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=apart)

    model = wrapped()
    weight = next(model.parameters())
    optimizer = torch.optim.Adam([weight])
    for first in (lambda: select(model), lambda: ADMM(optimizer, {"w": weight}, Unstructured(0.5), total_steps=9)):
        with pytest.raises(UserError, match=r"mark_slices\(model\) .* before select\(\) and ADMM"):
            first()
    mark_slices(model)
    assert select(model).parameters.keys() == {"0.weight", "1.weight"}
    for first in (select, mark_slices):
        with pytest.raises(UserError, match="use_orig_params=True"):
            first(wrapped(apart=False))


def rows_that_shards_cut(rank: int) -> None:
    """A set that decides about whole rows needs these whole, and no multiple of anything helps."""
    for columns in (32, 36):
        whole = torch.randn(5, columns, generator=torch.Generator().manual_seed(9))
        p = nn.Parameter(distribute_tensor(whole, pairs()["shard"], [Shard(1)]))
        with pytest.raises(UserError, match=f"^p has {columns} entries of a row cut into 2 pieces, and the set decides "
                           "about all of them together: shard it along another dimension$"):  # fmt: skip
            ADMM(torch.optim.Adam([p]), {"p": p}, Unstructured(0.5, scope="row"), total_steps=9)
    q = nn.Parameter(distribute_tensor(torch.randn(1, 16), pairs()["shard"], [Shard(0)]))
    ADMM(torch.optim.Adam([q]), {"q": q}, Unstructured(0.5), total_steps=9)


@dataclass(frozen=True)
class Blocks(Unstructured):
    """Entries that a set keeps together must not be cut by shards."""

    grain: tuple[int, int] = (4, 1)


def a_grain_that_shards_cut(rank: int) -> None:
    """13 rows over four processes are 4, 4, 4 and 1; over two they are 7 and 6."""
    optimizer = torch.optim.Adam([p := sharded(DeviceMesh("cpu", [0, 1, 2, 3]), seed=5)])
    ADMM(optimizer, {"p": p}, Blocks(0.5), total_steps=9)
    optimizer = torch.optim.Adam([q := sharded(pairs()["shard"], seed=5)])
    with pytest.raises(ValueError, match="q has 13 rows cut into 2 pieces, and 4 rows are kept together"):
        ADMM(optimizer, {"q": q}, Blocks(0.5), total_steps=9)


def twice_sharded(rows: int) -> tuple[nn.Linear, Tensor]:
    """A layer that tensor parallelism cuts and FSDP2 cuts again, and its whole weight, which has many ties."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    layer = nn.Linear(16, rows, bias=False)
    whole = torch.randn(rows, 16, generator=torch.Generator().manual_seed(8)).mul_(4).round_() / 4
    layer.weight = nn.Parameter(whole.clone())
    parallelize_module(layer, mesh["tp"], ColwiseParallel())
    fully_shard(layer, mesh=mesh["dp"])
    return layer, whole


def fsdp2_beside_tensor_parallelism(rank: int) -> None:
    """Pieces that lie in another order than the processes keep what the whole keeps, ties included."""
    for rows in (24, 13):
        layer, whole = twice_sharded(rows)
        train(layer.weight)
        train(one := nn.Parameter(whole))
        assert torch.equal(layer.weight.full_tensor(), one)  # type: ignore[operator]


def a_grain_that_two_cuts_cut(rank: int) -> None:
    """24 rows are 12 and 12, and then 6 each; 6 rows are 3 and 3, and then 2, 1, 2 and 1."""
    layer, _ = twice_sharded(24)
    optimizer = torch.optim.Adam([layer.weight])
    with pytest.raises(ValueError, match="p has 24 rows cut into 4 pieces, and 4 rows are kept together"):
        ADMM(optimizer, {"p": layer.weight}, Blocks(0.5), total_steps=9)
    q = nn.Parameter(distribute_tensor(torch.ones(6, 16), pairs(), [Shard(0), Shard(0)]))
    with pytest.raises(ValueError, match="q has 6 rows cut into 4 pieces, and 2 rows are kept together"):
        ADMM(torch.optim.Adam([q]), {"q": q}, Blocks(0.5, grain=(2, 1)), total_steps=9)


SITUATIONS = (
    two_meshes, only_some, a_mesh_in_a_mesh, a_copy_beside_shards, broken_on_one, unlike_gradients, late_under_fsdp1,
    slices_without_marks, rows_that_shards_cut,
    a_grain_that_shards_cut, fsdp2_beside_tensor_parallelism, a_grain_that_two_cuts_cut,
)  # fmt: skip


def test_groups_of_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", __name__],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2], text=True, timeout=240, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for situation in SITUATIONS:
        situation(dist.get_rank())
        dist.barrier()
    leave()
