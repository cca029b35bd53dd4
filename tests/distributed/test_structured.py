"""Units that lie in several tensors, with the model sharded over two processes (FSDP2): as on one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from elsa_lightning import ADMM, ByPattern, Experts, Heads, Neurons, shrink
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from tests.sets.test_structured import IDS, logits, make

CASES: dict[str, tuple[str, Constraint]] = {
    "widths": ("qwen3", ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)})),
    "transposed": ("gpt2", Neurons(0.5)),
    "experts": ("mixtral", Experts(0.5)),
}


def train(case: str, sharded: bool) -> tuple[Any, dict[str, Tensor]]:
    """Train in the same way however many there are; return the model and its whole state."""
    kind, constraint = CASES[case]
    model = make(kind, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {})).train()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.transformer.h if kind == "gpt2" else model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fitted = constraint.fitted(model)
    chosen = select(model, quiet=True).within(fitted).parameters
    admm = ADMM(optimizer, chosen, fitted, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    admm.finish()
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return model.eval(), state


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case in CASES:
        model, state = train(case, sharded=True)
        masked = logits(model)
        if rank == 0:
            torch.save((masked, state), folder / f"{case}.pt")
            shrink(model, state).save_pretrained(folder / case)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by two processes."""
    place = tmp_path_factory.mktemp("sharded")
    mp.spawn(worker, (place,), nprocs=2)
    return place


@pytest.mark.parametrize("case", CASES)
def test_sharded_units_are_those_of_one_process(case: str, folder: Path) -> None:
    _, one = train(case, sharded=False)
    masked, two = torch.load(folder / f"{case}.pt", weights_only=True)
    for name, t in one.items():
        assert torch.equal(t == 0, two[name] == 0), name
        torch.testing.assert_close(two[name], t, rtol=1e-3, atol=1e-4, msg=name)
    small = AutoModelForCausalLM.from_pretrained(folder / case).eval()
    assert small.num_parameters() < sum(t.numel() for t in one.values())
    torch.testing.assert_close(logits(small), masked, rtol=1e-3, atol=1e-3)
