"""Units that lie in several tensors give the same results on two processes, sharded or not, as on one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from elsa_lightning import (
    ADMM,
    ByPattern,
    CalibrationData,
    CausalLM,
    ElsaCallback,
    Experts,
    Heads,
    Neurons,
    shrink,
)  # fmt: skip
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from tests.distributed import worker
from tests.sets.test_structured import IDS, logits, make

WIDTHS = ByPattern({"attn": Heads(0.5), "mlp": Neurons(0.5)})
CASES: dict[str, tuple[str, Constraint]] = {
    "widths": ("qwen3", WIDTHS),
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


def language_model(folder: Path, how: str, model: str, text: str, cache: str) -> None:
    """Prune a small language model with a strategy of Lightning, and write the smaller one."""
    seed_everything(1, verbose=False)
    processes = worker.world()
    data = CalibrationData(
        text, tokenizer=model, seq_len=32, batch_size=4 // processes, eval_segments=4, cache_dir=cache
    )
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy=worker.strategy(how), logger=False, max_steps=6,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, callbacks=[SaveHuggingFace(str(folder / how)), ElsaCallback(constraint=WIDTHS)],
    )  # fmt: skip
    trainer.fit(CausalLM(model), data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, text_file: Path, token_cache: str) -> Path:
    """All cases, trained by two processes."""
    place = tmp_path_factory.mktemp("sharded")
    given = tiny_llama, str(text_file), token_cache
    language_model(place, "auto", *given)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__]
    subprocess.run([*command, str(place), *given], cwd=Path(__file__).parents[2], check=True, timeout=600)
    return place


@pytest.mark.parametrize("how", ["ddp", "fsdp1", "fsdp2"])
def test_every_strategy_writes_the_model_of_one_process(how: str, folder: Path) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("auto", how))
    assert (two.config.intermediate_size, two.config.num_key_value_heads) == (24, 1)
    for name, p in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), p, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_sharded_units_are_those_of_one_process(case: str, folder: Path) -> None:
    _, one = train(case, sharded=False)
    masked, two = torch.load(folder / f"{case}.pt", weights_only=True)
    for name, t in one.items():
        assert torch.equal(t == 0, two[name] == 0), name
        if not name.endswith("c_attn.bias"):  # keys' part has no gradient but rounding; Adam makes whole steps of it
            torch.testing.assert_close(two[name], t, rtol=1e-3, atol=1e-4, msg=name)
    small = AutoModelForCausalLM.from_pretrained(folder / case).eval()
    assert small.num_parameters() < sum(t.numel() for t in one.values())
    torch.testing.assert_close(logits(small), masked, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        language_model(target, strategy, *sys.argv[2:])
    for case in CASES:
        trained, whole = train(case, sharded=True)
        masked = logits(trained)
        if dist.get_rank() == 0:
            torch.save((masked, whole), target / f"{case}.pt")
            shrink(trained, whole).save_pretrained(target / case)
        dist.barrier()
    worker.leave()
