"""Small sparse models, and runs that leave one."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elsa_lightning import CausalLM, ElsaCallback
from tests.callbacks.tiny import make_trainer

IDS = torch.randint(3, 2000, (2, 12), generator=torch.Generator().manual_seed(4))


def sparse_folder(dense: str, folder: Path, sparsity: float = 0.9, dtype: torch.dtype = torch.float32) -> Path:
    """Write what somebody else's pruning would leave: magnitude, without a word of how."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            cut(module.weight, sparsity)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


@torch.no_grad()
def cut(weight: Tensor, sparsity: float) -> None:
    smallest = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
    weight.view(-1)[smallest] = 0


def run(dense: str, folder: Path, *callbacks: Callback, steps: int = 12, **options: Any) -> CausalLM:
    """Prune with Elsa in a few steps."""
    seed_everything(0, verbose=False)
    module = CausalLM(name=dense)
    ids = torch.randint(3, 2000, (24, 16), generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(folder, ElsaCallback(sparsity=0.75, interval=2), *callbacks, max_steps=steps, **options)
    data = DataLoader(list(ids), batch_size=2)  # type: ignore[arg-type]
    trainer.fit(module, data, DataLoader(list(ids[:2]), batch_size=2))  # type: ignore[arg-type]
    return module


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((t == 0).sum()) for name, t in model.state_dict().items() if t.dim() > 1}
