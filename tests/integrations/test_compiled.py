"""torch.compile changes no name: patterns, checkpoints and exported models are the same with and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from elsa_lightning import ADMM, CausalLM, ElsaCallback, Unstructured
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.layout.sharded import clean
from elsa_lightning.selection import select
from tests.callbacks.test_export import sparse_tensors, tokens
from tests.callbacks.tiny import Net, assert_same, every_step, load, loader, make_trainer, zeros


class Quiet(Net):
    """Logs nothing, which torch.compile cannot trace, and does not look into its layers."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.layers(batch) - batch.sin()).square().mean()  # type: ignore[no-any-return]

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class CompiledNet(Quiet):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers = torch.compile(self.layers, backend="eager")  # type: ignore[assignment]


class PartlyCompiledNet(Quiet):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers[3] = torch.compile(self.layers[3], backend="eager")


KINDS = {"plain": Quiet, "compiled": CompiledNet, "partly": PartlyCompiledNet}


def fit(kind: str, folder: Path, **options: Any) -> tuple[Net, ElsaCallback]:
    seed_everything(1, verbose=False)
    model, callback = KINDS[kind](dropout=0.0), ElsaCallback(0.9, interval=3, targets=[r"layers\.[03]\.weight$"])
    make_trainer(folder, callback, every_step(folder), max_steps=12).fit(model, loader(), **options)
    return model, callback


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {clean(name): t for name, t in state.items()}


def test_names_are_those_of_the_module_that_was_compiled() -> None:
    for kind in KINDS.values():
        assert set(select(kind()).parameters) == {"layers.0.weight", "layers.3.weight"}
    assert clean("model._orig_mod._fsdp_wrapped_module.a._orig_mod.weight") == "model.a.weight"
    assert clean("my_orig_mod.weight") == "my_orig_mod.weight"


@pytest.mark.parametrize(("saved", "resumed"), [("plain", "compiled"), ("compiled", "plain"), ("partly", "compiled")])
def test_a_run_goes_on_to_the_bit_with_or_without_compiling(saved: str, resumed: str, tmp_path: Path) -> None:
    whole, _ = fit(saved, tmp_path / "whole")
    again, callback = fit(resumed, tmp_path / "again", ckpt_path=tmp_path / "whole/7.ckpt", weights_only=True)
    assert callback.admm is not None and callback.admm.finished
    assert_same(plain(again.state_dict()), plain(whole.state_dict()))
    assert sum(zeros(again.state_dict()).values()) == round(0.9 * 2 * 64 * 64)
    one, other = load(tmp_path / "whole/12.ckpt"), load(tmp_path / "again/12.ckpt")
    assert_same(one["optimizer_states"], other["optimizer_states"])
    assert not again._load_state_dict_pre_hooks, "hooks are off when the run is over"


def test_a_checkpoint_is_tested_by_the_other_kind(tmp_path: Path) -> None:
    fit("compiled", tmp_path)
    model = Quiet()
    trainer = make_trainer(tmp_path, ElsaCallback(0.9))
    trainer.test(model, loader(), ckpt_path=tmp_path / "12.ckpt", weights_only=True, verbose=False)
    assert_same(dict(model.state_dict()), plain(load(tmp_path / "12.ckpt")["state_dict"]))


def test_a_module_that_is_compiled_as_a_whole_is_pruned(tmp_path: Path) -> None:
    model = Quiet()
    callback = ElsaCallback(0.9)
    make_trainer(tmp_path, callback, max_steps=4).fit(torch.compile(model, backend="eager"), loader())  # type: ignore[arg-type]
    assert callback.admm is not None and set(callback.admm.masks()) == {"layers.0.weight", "layers.3.weight"}
    assert sum(zeros(model.state_dict()).values()) == round(0.9 * 2 * 64 * 64)


def test_a_plain_loop_resumes_by_any_names() -> None:
    def start(model: nn.Module) -> ADMM:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        return ADMM(optimizer, matrices, Unstructured(0.9), total_steps=10)

    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(64, 8)), nn.Sequential(nn.Linear(64, 8))
    one, other = start(torch.compile(first, backend="eager")), start(second)  # type: ignore[arg-type]
    first(torch.randn(2, 64)).square().sum().backward()
    one.optimizer.step()
    second.load_state_dict(first.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.step == 1


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
def test_a_compiled_language_model_is_saved_and_loaded_by_its_own_names(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    class Compiled(CausalLM):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment, arg-type]

    elsa = ElsaCallback(constraint=Unstructured(0.75, scope="tensor"))
    module, trainer = Compiled(tiny_llama), make_trainer(
        tmp_path, elsa, SaveHuggingFace(str(tmp_path / "hf")), max_steps=3
    )  # fmt: skip
    trainer.fit(module, tokens())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert len(sparse_tensors(reloaded.state_dict())) == 14
    again = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert_same(dict(again.state_dict()), plain(dict(module.state_dict())))
