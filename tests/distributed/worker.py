"""What each process of the distributed tests runs: ``torchrun ... -m tests.distributed.worker FOLDER RUNS.json``.

Every run of the list trains a small module and leaves ``NAME.pt`` with its whole weights, state and figures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback, KeepMask, Quantized, Unstructured
from elsa_lightning.callbacks import Export, SaveHuggingFace, SaveOnTerminate
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options
from elsa_lightning.layout.sharded import clean, part_of
from elsa_lightning.lm.data import ResumableLoader, ResumableSampler
from elsa_lightning.lm.distill import Distillation
from elsa_lightning.sets import Neurons
from tests.callbacks.tiny import OPTIMIZERS, Points

WIDTH, ROWS, BATCH, STEPS = 64, 67, 12, 12  # 67 rows: uneven shards


class Net(LightningModule):
    """Matrices and kernels whose rows no number of processes divides, a stack of matrices, and what is not trained."""

    def __init__(
        self, optimizer: str = "adam", broken: tuple[int, ...] = (), dtype: str = "float64", sparse: bool = False
    ) -> None:
        super().__init__()
        self.name, self.broken, self.kept_in, self.sparse = optimizer, broken, dtype, sparse
        self.layers: Any = None

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(WIDTH, ROWS), nn.Tanh(), nn.Linear(ROWS, WIDTH, bias=False))
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 8)
        self.kernels = nn.Conv2d(2, 35, 5, padding=2, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.to(getattr(torch, self.kept_in))
        if self.sparse:
            make_sparse(self)
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.layers, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.layers(batch)
        x = x + self.kernels(batch.view(-1, 2, 4, 8)).mean(dim=1).flatten(1).repeat(1, 2)
        return x + torch.einsum("bi,eoi->bo", x.tanh(), self.experts) / 8 + self.fixed(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.to(self.fixed.weight.dtype)
        loss = (self(batch) - batch.sin().flip(-1)).square().mean()
        if self.global_step in self.broken and self.global_rank == self.trainer.world_size - 1:
            loss = loss * torch.nan
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = optimizers()[self.name](self.parameters())
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7), "interval": "step"}]

    def train_dataloader(self) -> ResumableLoader:
        data, world = Points(STEPS * BATCH, WIDTH), self.trainer.world_size
        sampler = ResumableSampler(data, num_replicas=world, rank=self.trainer.global_rank, shuffle=False)
        return ResumableLoader(data, batch_size=BATCH // world, sampler=sampler)


@torch.no_grad()
def make_sparse(net: Any) -> None:
    """Prune all but the second of the layers: 2:4, and of the kernels and the stack 80 % anywhere."""
    net.layers[0].weight.view(-1, 4)[:, ::2] = 0
    numbers = torch.Generator().manual_seed(3)
    for p in (net.experts, net.kernels.weight):
        p.masked_fill_(torch.rand(p.shape, generator=numbers) < 0.8, 0)


def optimizers() -> dict[str, Any]:
    from elsa_lightning.optim.adam8bit import Adam8bit

    return {**OPTIMIZERS, "8bit": lambda params: Adam8bit(params, lr=3e-3, min_8bit_size=1024)}


class FSDP1(FSDPStrategy):
    """Lightning's FSDPStrategy, which refuses the CPU unless it is of another type, made to work there.

    Full checkpoints do not: on a CPU torch returns each of a parameter's states in the memory of the one before.
    """

    mixed_precision_config = None  # float64 stays float64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"state_dict_type": "sharded"} | kwargs))

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=self.root_device, **self.kwargs)


def strategy(name: str, **fsdp1: Any) -> Any:
    """Return a strategy by name."""
    if name == "fsdp1":
        return FSDP1(**fsdp1)
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    return ModelParallelStrategy(
        data_parallel_size=world(), tensor_parallel_size=1, save_distributed_checkpoint=name == "fsdp2"
    )


class Fails(Callback):
    """Fails on process 1, before training."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_rank == 1:
            raise RuntimeError("process 1 fails")


class Signal(Callback):
    """Sends a signal to its own process after a step, on one of them."""

    def __init__(self, rank: int, step: int, signum: int) -> None:
        self.rank, self.step, self.signum = rank, step, signum

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.signum)


class Spoils(Callback):
    """Before training ends, removes a file that is there, or puts one where a folder is to be made."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps and trainer.is_global_zero:
            (self.file.unlink if self.file.exists() else self.file.touch)()


def exports(
    folder: Path, name: str, how: str, model: str, text: str, cache: str, to: list[str], spoilt: str | None = None,
    sparsity: float | None = None, neurons: float | None = None,
) -> None:  # fmt: skip
    """Prune a small language model and export it; write the error of each process, if it ends with one."""
    seed_everything(1, verbose=False)
    data = CalibrationData(text, tokenizer=model, seq_len=32, batch_size=4 // world(), eval_segments=7, cache_dir=cache)
    kinds: Any = to
    elsa = ElsaCallback(sparsity=sparsity) if neurons is None else ElsaCallback(constraint=Neurons(neurons))
    export = Export(kinds, str(folder / name), options=Options(8, 16), measure=True)
    trainer = Trainer(
        accelerator="cpu", devices=world(), strategy=strategy(how), logger=False, max_steps=6, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[export, elsa, *([Spoils(spoilt)] if spoilt else [])],
    )  # fmt: skip
    try:
        trainer.fit(CausalLM(model), data)
    except (UserError, OSError) as error:
        (folder / f"{name}-{trainer.global_rank}.txt").write_text(str(error))


def language_model(folder: Path, name: str, how: str, model: str, text: str, cache: str, **options: Any) -> None:
    """Prune a small language model, write it as a Hugging Face folder and its perplexities."""
    seed_everything(1, verbose=False)
    Distillation.logits_at_once = 20 * 2048  # chunks
    data = CalibrationData(text, tokenizer=model, seq_len=32, batch_size=4 // world(), eval_segments=7, cache_dir=cache)
    module = CausalLM(model, **options)
    trainer = Trainer(
        accelerator="cpu", devices=world(), strategy=strategy(how), logger=False, max_steps=6, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        gradient_clip_val=1.0, callbacks=[SaveHuggingFace(str(folder / name)), ElsaCallback(sparsity=0.8)],
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.is_global_zero:
        torch.save([module.dense_perplexity, module.final_perplexity], folder / f"{name}.pt")


def leave() -> None:
    """End this process without the interpreter's own end: on a busy machine one in twenty of these is an abort.

    Threads of torch outlive the interpreter, even when the process group is destroyed, and end in std::terminate.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none goes while another still reads from it
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def run(
    folder: Path, name: str, how: str, resume: str | None = None, optimizer: str = "adam", steps: int = STEPS,
    broken: tuple[int, ...] = (), signal: tuple[int, int, int] | None = None, **elsa: Any,
) -> Net:  # fmt: skip
    """Train, and write what the run ends with."""
    seed_everything(1, verbose=False)
    precision, dtype, accumulate = (
        elsa.pop("precision", "32-true"),
        elsa.pop("dtype", "float64"),
        elsa.pop("accumulate", 1),
    )
    options: dict[str, Any] = {
        "sparsity": 0.9,
        "interval": 2,
        "targets": ["all-linear", "experts"],
        "ignore": ["fixed"],
    }
    keep, clip = elsa.pop("keep", False), elsa.pop("clip", 1.0)
    if (bits := elsa.pop("bits", None)) is not None:
        elsa |= {"sparsity": None, "constraint": Quantized(bits, None, Unstructured(0.9))}
    if how.startswith("fsdp1"):  # which gives it gradients, of 0, so that it would take part in the budget
        options["ignore"].append("unused")
    callback = KeepMask() if keep else ElsaCallback(**(options | elsa))
    saver = ModelCheckpoint(
        folder / name, "{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1
    )
    trainer = Trainer(
        accelerator="cpu", devices=world(), strategy=strategy(how, auto_wrap_policy={nn.Sequential}), logger=False,
        precision=precision,
        max_steps=steps, gradient_clip_val=clip, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate, default_root_dir=folder, use_distributed_sampler=False,
        callbacks=[callback, SaveOnTerminate(str(folder)), *([Signal(*signal)] if signal else []), saver],
    )  # fmt: skip
    net = Net(optimizer, tuple(broken), dtype, sparse=keep)
    trainer.fit(net, ckpt_path=None if resume is None else str(folder / resume))
    admm = callback.admm
    assert admm is not None
    update = admm.last_update  # none in a run that only has its frozen phase to go
    weights = {clean(name): whole(p.detach()) for name, p in net.named_parameters()}
    state = {
        f"{clean(name)}.{key}": whole(value)
        for name, p in net.named_parameters()
        for key, value in admm.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor) and key != "step"
    }
    if how.startswith("fsdp1"):
        shapes = {clean(name): part_of(p).shape for name, p in net.named_parameters()}
        weights = {name: t.view(shapes.get(name, t.shape)) for name, t in joined(weights).items()}
        state = joined(state)
    outcome = {
        "weights": weights,
        "state": state,
        "figures": None if update is None else [float(update.primal_residual), float(update.mask_flips)],
        "step": admm.step,
    }
    if trainer.is_global_zero:
        torch.save(outcome, folder / f"{name}.pt")
    return net


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def joined(slices: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the processes have of each tensor, one after the other."""
    gathered: list[Any] = [None] * world()
    torch.distributed.all_gather_object(gathered, slices)
    names = sorted(set().union(*gathered))
    return {name: torch.cat([mine[name] for mine in gathered if name in mine]) for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for each in runs:
        (exports if "to" in each else language_model if "model" in each else run)(target, **each)
    leave()
