"""Every set on three processes of which one has no row of any tensor: as on one process, and resumed to the bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from elsa_lightning import (
    ADMM,
    NM,
    Block,
    ByPattern,
    Experts,
    Heads,
    Layers,
    Neurons,
    Quantized,
    Unstructured,
    Width,
)  # fmt: skip
from elsa_lightning.layout.sharded import local
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from tests.distributed.worker import leave

FIGURES = "figures"
PROCESSES, STEPS, SAVED = 3, 10, (3, 8)  # while the mask moves, and when it is fixed
IDS = torch.randint(3, 24, (4, 8), generator=torch.Generator().manual_seed(0))
X = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """Matrices, a stack of them and kernels: four rows on three processes are two, two and none; two one, one, none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 4), nn.Linear(4, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 4, 8) / 3)
        self.kernels = nn.Conv2d(2, 4, 2, bias=False)

    def forward(self) -> Tensor:
        y = self.down(self.up(X).tanh()) + torch.einsum("bi,eoi->bo", X, self.experts)
        y = y + self.kernels(X.view(-1, 2, 2, 2)).flatten(1)
        return (y - X[:, :4].sin()).square().mean()


class Language(nn.Module):
    """A decoder whose matrices all have four rows or two."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "vocab_size": 24, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2, "head_dim": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
        }  # fmt: skip
        if kind == "mixtral":
            settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        config = AutoConfig.for_model(kind, **settings)
        self.model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # in float64 too
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p) * 0.2)

    def forward(self) -> Tensor:
        return self.model(input_ids=IDS, labels=IDS, use_cache=False).loss  # type: ignore[no-any-return]


def llama() -> nn.Module:
    return Language("llama")


CASES: dict[str, tuple[Callable[[], nn.Module], Constraint, dict[str, Any]]] = {
    "tensor": (Plain, Unstructured(0.5, scope="tensor"), {}),
    "row": (Plain, Unstructured(0.5, scope="row"), {}),
    "model": (Plain, Unstructured(0.5, scope="model"), {}),
    "bounded": (Plain, Unstructured(0.5, scope="model", floor=0.2, ceiling=0.8), {}),
    "float8": (Plain, Unstructured(0.5), {"state_dtype": "float8_e4m3fn"}),
    "warm-up": (Plain, Unstructured(0.5), {"first_rate": 0.0}),
    "coupled": (Plain, Unstructured(0.5), {"prox": "coupled"}),
    "nm": (Plain, NM(2, 4), {}),
    "block": (Plain, Block(0.5, rows=1, columns=2), {}),
    "grid": (Plain, Quantized(4, 4), {}),
    "grid of rows": (Plain, Quantized(4), {}),
    "grid inside": (Plain, Quantized(4, 4, NM(2, 4)), {}),
    "patterns": (Plain, ByPattern({"up|down": NM(2, 4), "experts": Unstructured(0.5)}), {}),
    "neurons": (llama, Neurons(0.5), {}),
    "heads": (llama, Heads(0.5), {}),
    "layers": (llama, Layers(0.5), {}),
    "width": (llama, Width(keep=360), {}),
    "both": (llama, ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)}), {}),
    "experts": (lambda: Language("mixtral"), Experts(0.5), {}),
}


def train(case: str, sharded: bool, folder: Path, resume: int | None = None) -> dict[str, Tensor]:
    """Train in the same way however many there are; return all weights and the state of each.

    Args:
        case: Which.
        sharded: Over all processes.
        folder: For checkpoints, of sharded runs.
        resume: Step whose checkpoint to go on from.
    """
    build, constraint, options = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
        parts = [local(p).numel() for p in model.parameters() if p.shape[0] <= 4]
        assert (dist.get_rank() == PROCESSES - 1) == (not any(parts)), "this test is of an empty part"
    constraint = constraint.fitted(model)
    chosen = select(model, ["all-linear", "experts"] if build is Plain else ["all-linear"], quiet=True)
    rates = [options.get("first_rate", 0.01), *[0.01] * STEPS]
    options = {key: value for key, value in options.items() if key != "first_rate"}
    optimizer = torch.optim.Adam(model.parameters(), lr=rates[0])
    chosen = chosen.within(constraint).parameters
    admm = ADMM(optimizer, chosen, constraint, total_steps=STEPS, schedule=Schedule(interval=2), **options)
    damage = admm.damage()
    if resume is not None:
        load(model, optimizer, admm, folder / f"{case}-{resume}")
    for step in range(resume or 0, STEPS):
        optimizer.zero_grad()
        model().backward()
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        if sharded and resume is None and step + 1 in SAVED:
            save(model, optimizer, admm, folder / f"{case}-{step + 1}")
    admm.finish()
    figures = [damage.rms, damage.share, *admm.shares().values()]
    if resume is None:
        assert admm.last_update is not None and admm.last_stationarity is not None
        figures += [float(admm.last_update.primal_residual), float(admm.last_update.mask_flips)]
        figures += [float(value) for value in vars(admm.last_stationarity).values()]
    state = {f"{name}.{key}": t for name, p in model.named_parameters() for key, t in optimizer.state[p].items()}
    found = {**dict(model.named_parameters()), **{key: t for key, t in state.items() if not key.endswith(".step")}}
    whole = {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for key, t in found.items()}
    return {**whole, FIGURES: torch.tensor(figures, dtype=torch.float64)}


def save(model: nn.Module, optimizer: torch.optim.Optimizer, admm: ADMM, folder: Path) -> None:
    """Write a checkpoint, each process its part."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        keys = {name: list(optimizer.state[p]) for name, p in model.named_parameters()}
        torch.save({"admm": admm.state_dict(), "keys": keys}, folder / "rest.pt")
    dist.barrier()


def load(model: nn.Module, optimizer: torch.optim.Optimizer, admm: ADMM, folder: Path) -> None:
    """Read a checkpoint into what was made anew."""
    rest = torch.load(folder / "rest.pt", weights_only=True)
    admm.expect({p: rest["keys"][name] for name, p in model.named_parameters()})
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    admm.load_state_dict(rest["admm"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by three processes."""
    place = tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    subprocess.run([*command, "-m", __name__, str(place)], cwd=Path(__file__).parents[2], check=True, timeout=600)
    return place


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_rows_finds_what_one_process_finds(case: str, folder: Path) -> None:
    one = train(case, False, folder)
    three = torch.load(folder / f"{case}.pt", weights_only=True)
    assert one.keys() == three.keys()
    assert any((t == 0).any() for name, t in one.items() if "elsa" not in name and "exp_avg" not in name)
    torch.testing.assert_close(three.pop(FIGURES), one.pop(FIGURES), rtol=1e-6, atol=0)  # of float32
    for name, t in one.items():
        if t.is_floating_point() and t.itemsize >= 4:
            torch.testing.assert_close(three[name], t, rtol=1e-9, atol=1e-12, msg=name)
        else:
            assert torch.equal(three[name], t), name


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_to_the_bit(case: str, step: int, folder: Path) -> None:
    whole, resumed = (torch.load(folder / f"{case}{of}.pt", weights_only=True) for of in ("", f"-from-{step}"))
    assert whole.keys() == resumed.keys()
    for name, t in whole.items():
        assert name == FIGURES or torch.equal(t, resumed[name]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    for case in sys.argv[2:] or CASES:
        for step in (None, *SAVED):
            state = train(case, True, target, step)
            if dist.get_rank() == 0:
                torch.save(state, target / (f"{case}.pt" if step is None else f"{case}-from-{step}.pt"))
    leave()
