"""In what dtype, with which adapter and where SaveHuggingFace saves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from transformers import AutoModelForCausalLM

from elsa_lightning import CausalLM, ElsaCallback, Unstructured
from elsa_lightning.adapters import merge_and_keep_zeros
from elsa_lightning.callbacks import SaveHuggingFace
from tests.callbacks.test_export import ARCHITECTURES, folders, sparse_tensors, tokens  # noqa: F401
from tests.callbacks.tiny import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning", "ignore:Elsa:UserWarning")


def fit(module: LightningModule, folder: Path, *callbacks: Any, targets: list[str] | None = None) -> None:
    seed_everything(0, verbose=False)
    elsa = ElsaCallback(constraint=Unstructured(0.75, scope="tensor"), targets=targets)
    make_trainer(folder, elsa, *callbacks, max_steps=6).fit(module, tokens())


def in_dtype(folder: str, dtype: torch.dtype, target: Path) -> str:
    """Save a copy of a model in another dtype."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(target)
    return str(target)


def of_file(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_model_keeps_the_dtype_it_was_given_in(
    name: str, given: torch.dtype, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    module = CausalLM(in_dtype(folders[name], given, tmp_path / "given"))
    with caplog.at_level("INFO"):
        fit(module, tmp_path, SaveHuggingFace(str(tmp_path / "hf")))
    assert {t.dtype for t in of_file(tmp_path / "hf").values()} == {given}
    assert of_file(tmp_path / "hf").keys() == of_file(tmp_path / "given").keys()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert reloaded.dtype == given and f"weights in {str(given).removeprefix('torch.')}" in caplog.text
    assert module.model is not None and module.model.dtype == torch.float32
    for key, trained in module.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], trained.to(given)), key
    blocks = [sparse_tensors(dict(model.state_dict())) for model in (module.model, reloaded)]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2 * ARCHITECTURES[name][1]


def test_another_dtype_can_be_asked_for_and_none_is_wider_than_training(
    folders: dict[str, str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    given = in_dtype(folders["llama"], torch.bfloat16, tmp_path / "given")
    fit(CausalLM(given), tmp_path, SaveHuggingFace(str(tmp_path / "wide"), dtype="float32"))
    assert {t.dtype for t in of_file(tmp_path / "wide").values()} == {torch.float32}
    fit(CausalLM(folders["llama"], dtype="bfloat16"), tmp_path, SaveHuggingFace(str(tmp_path / "low")))
    assert {t.dtype for t in of_file(tmp_path / "low").values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int4'"):
        SaveHuggingFace(dtype="int4")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_stay_as_they_are(folders: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    class Large(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.model.model.norm.weight[0] = 1e6

    given = in_dtype(folders["llama"], torch.float16, tmp_path / "given")
    with pytest.warns(UserWarning, match=r"model\.norm\.weight does not fit into float16, so training's dtype stays"):
        fit(CausalLM(given), tmp_path, Large(), SaveHuggingFace(str(tmp_path / "hf")))
    assert float(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").model.norm.weight[0]) == 1e6


def test_a_second_fit_of_the_same_model_saves_the_same_dtype(folders: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    class Theirs(LightningModule):
        def __init__(self, folder: str) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(batch, labels=batch).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    module = Theirs(folders["llama"])
    for _ in range(2):
        fit(module, tmp_path, SaveHuggingFace(str(tmp_path / "hf")))
        assert {t.dtype for t in of_file(tmp_path / "hf").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------- adapters


class WithAdapter(CausalLM):
    """A constrained base with an adapter on it, both trained."""

    integrated = False

    def configure_model(self) -> None:
        import peft

        if self.model is None:
            super().configure_model()
            config = peft.LoraConfig(
                target_modules=["up_proj", "q_proj"],
                modules_to_save=["down_proj"],
                init_lora_weights=False,
                r=4,
                task_type="CAUSAL_LM",
            )
            if self.integrated:
                self.model.add_adapter(config)  # type: ignore[union-attr]
            else:
                self.model = peft.get_peft_model(self.model, config)  # type: ignore[assignment, arg-type]
            for name, p in self.named_parameters():
                if "original_module" not in name:
                    p.requires_grad_(True)


BASE = [r"base_layer\.weight$", r"(k|v|o|gate)_proj\.weight$", r"modules_to_save.*weight$"]


@pytest.mark.parametrize("integrated", [False, True], ids=["PeftModel", "add_adapter"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_base_with_an_adapter_is_saved_with_its_zeros_and_the_adapter_beside_it(
    given: torch.dtype, integrated: bool, folders: dict[str, str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    peft = pytest.importorskip("peft")
    module = WithAdapter(in_dtype(folders["llama"], given, tmp_path / "given"))
    module.integrated = integrated
    fit(module, tmp_path, SaveHuggingFace(str(tmp_path / "hf")), targets=BASE)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert len(sparse_tensors(dict(base.state_dict()))) == 14 and base.dtype == given
    assert of_file(tmp_path / "hf").keys() == of_file(tmp_path / "given").keys()

    batch = tokens().dataset[0][None]
    assert module.model is not None
    module.model.eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "hf/adapter")
    ours, theirs = module.model.to(given)(batch).logits, loaded.to(given)(batch).logits
    torch.testing.assert_close(ours, theirs, atol=1e-2 if given == torch.bfloat16 else 1e-6, rtol=1e-4)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "hf/adapter")  # its base by its own word
    torch.testing.assert_close(found.to(given)(batch).logits, theirs)


def test_a_folder_with_an_adapter_is_replaced_by_the_next_run(folders: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("peft")
    for module in (WithAdapter(folders["llama"]), WithAdapter(folders["llama"]), CausalLM(folders["llama"])):
        fit(module, tmp_path, SaveHuggingFace(str(tmp_path / "hf")), targets=None if type(module) is CausalLM else BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and not (tmp_path / "hf/adapter").exists()


def test_merging_keeps_the_zeros(folders: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    fit(CausalLM(folders["llama"]), tmp_path, SaveHuggingFace(str(tmp_path / "hf")))

    def with_adapter() -> Any:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        config = peft.LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False)
        return peft.get_peft_model(base, config)

    pruned = sparse_tensors(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()))
    filled = with_adapter().merge_and_unload()
    assert len(sparse_tensors(dict(filled.state_dict()))) == 10, "else PEFT keeps them by itself"
    merged = merge_and_keep_zeros(with_adapter())
    assert sparse_tensors(dict(merged.state_dict())) == pruned
    for name, p in merged.named_parameters():
        if p.dim() == 2 and name in pruned:
            assert torch.equal(p[p != 0], filled.get_parameter(name)[p != 0])
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    assert sparse_tensors(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict())) == pruned

    late = with_adapter()
    late.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged already, and filled its zeros: unmerge_adapter\(\) first"):
        merge_and_keep_zeros(late)
    with pytest.raises(ValueError, match="takes a PeftModel whose adapter can be merged"):
        merge_and_keep_zeros(merged)


# ------------------------------------------------------------------------------------------------- other runs' folders


class WrittenMeanwhile(Callback):
    """While it trains another run writes the folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "hf"
        if folder.exists():
            folder.rename(folder.with_name("former"))
        folder.mkdir()
        (folder / "config.json").write_text("theirs")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_what_another_run_wrote_meanwhile_is_never_replaced(
    named: bool, there: bool, folders: dict[str, str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    if there:
        fit(CausalLM(folders["llama"]), tmp_path, SaveHuggingFace())
    with pytest.warns(UserWarning, match=r"hf is another run's and is left alone; this model is in .*hf_1"):
        saver = SaveHuggingFace(str(tmp_path / "hf") if named else None)
        fit(CausalLM(folders["llama"]), tmp_path, WrittenMeanwhile(), saver)
    assert (tmp_path / "hf/config.json").read_text() == "theirs"
    assert len(sparse_tensors(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf_1").state_dict()))) == 14


def test_without_a_folders_name_an_earlier_runs_model_stays(folders: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    for name in ("llama", "gpt2", "gpt2"):
        fit(CausalLM(folders[name]), tmp_path, SaveHuggingFace())
    kinds = {path.name: json.loads((path / "config.json").read_text())["model_type"] for path in tmp_path.iterdir()}
    assert kinds == {"hf": "llama", "hf_1": "gpt2", "hf_2": "gpt2"}
