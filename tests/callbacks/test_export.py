"""What SaveHuggingFace leaves behind, for the architectures that people prune."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from elsa_lightning import CausalLM, ElsaCallback, Unstructured
from elsa_lightning.callbacks import SaveHuggingFace
from tests.callbacks.tiny import At, Crash, Net, crash, loader, make_trainer

VOCABULARY = 96
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16}
ROTARY = SMALL | {
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

# model type: its configuration, the tensors a block constrains, whether the head is the embedding
ARCHITECTURES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "llama": (ROTARY | {"tie_word_embeddings": False}, 7, False),
    "opt": (SMALL | {"ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
                     "max_position_embeddings": 32}, 6, True),
    "gpt2": ({"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1,
              "eos_token_id": 2}, 4, True),
    "gemma": (ROTARY, 7, True),
    "qwen3": (ROTARY | {"tie_word_embeddings": True}, 7, True),
    "qwen3_moe": (ROTARY | EXPERTS | {"tie_word_embeddings": False}, 6, False),
    "mixtral": (ROTARY | EXPERTS | {"tie_word_embeddings": False}, 6, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of randomly initialised models, one of each architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}
    for name, (settings, _, _) in ARCHITECTURES.items():
        torch.manual_seed(0)
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).save_pretrained(made[name])
    return made


def tokens(batches: int = 12) -> DataLoader[torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batches * 2, 16), generator=torch.Generator().manual_seed(0))
    return DataLoader(list(ids), batch_size=2)  # type: ignore[arg-type]


def prune(model: LightningModule, folder: Path, *callbacks: Any) -> None:
    seed_everything(0, verbose=False)
    callbacks = (SaveHuggingFace(str(folder / "hf")), *callbacks)
    elsa = ElsaCallback(constraint=Unstructured(0.75, scope="tensor"))
    make_trainer(folder, *callbacks, elsa, max_steps=12).fit(model, tokens())


def sparse_tensors(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the fraction of zeros of each weight that has many."""
    fractions = {name: float((p == 0).float().mean()) for name, p in state.items() if p.dim() > 1}
    return {name: fraction for name, fraction in fractions.items() if fraction > 0.5}


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_reloads_with_the_trained_zeros(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, tensors, tied = ARCHITECTURES[name]
    module = CausalLM(name=folders[name])
    prune(module, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")

    assert module.model is not None
    trained, loaded = module.model.state_dict(), reloaded.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[key], loaded[key]) for key in trained)

    sparse = sparse_tensors(loaded)
    assert len(sparse) == 2 * tensors
    pruned = [loaded[key] for key in sparse]
    assert sum(float((p == 0).sum()) for p in pruned) / sum(p.numel() for p in pruned) == pytest.approx(0.75, abs=1e-3)

    embeddings, head = reloaded.get_input_embeddings().weight, reloaded.get_output_embeddings().weight
    assert (embeddings is head) == tied
    original = AutoModelForCausalLM.from_pretrained(folders[name]).get_output_embeddings().weight
    assert int((head == 0).sum()) <= int((original == 0).sum())  # a new model's row of padding


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning", "ignore:Elsa is unfinished:UserWarning")
def test_a_run_that_stops_early_is_saved_with_its_zeros(folders: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    callbacks = (
        SaveHuggingFace(str(tmp_path / "hf")),
        ElsaCallback(constraint=Unstructured(0.75, scope="tensor")),
        EarlyStopping("train/loss", stopping_threshold=1e9),  # after the first epoch, when all others were told of it
    )
    make_trainer(tmp_path, *callbacks, max_epochs=3).fit(CausalLM(name=folders["llama"]), tokens())
    assert len(sparse_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict())) == 14


def test_the_tokenizer_goes_along(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prune(CausalLM(name=tiny_llama), tmp_path)
    text = "def f(x): return x"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text) == AutoTokenizer.from_pretrained(tiny_llama)(text)


def test_a_model_without_a_tokenizer_is_saved_all_the_same(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no tokenizer to save"):
        prune(CausalLM(name=folders["llama"]), tmp_path)
    assert (tmp_path / "hf/model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
def test_a_crashed_run_saves_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        prune(CausalLM(name=folders["llama"]), tmp_path, At(5, crash))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
def test_a_failure_while_writing_leaves_the_former_folder(folders: dict[str, str], tmp_path: Path) -> None:
    class FullDisk(CausalLM):
        def on_fit_start(self) -> None:
            model, whole = self.model, self.model.save_pretrained  # type: ignore[union-attr]

            def save_pretrained(folder: Path) -> None:
                whole(folder)
                (folder / "model.safetensors").write_bytes(b"half")
                raise OSError("No space left on device")

            model.save_pretrained = save_pretrained  # type: ignore[union-attr, method-assign, assignment]

    with pytest.raises(OSError, match="No space left"):
        prune(FullDisk(name=folders["llama"]), tmp_path)
    assert list(tmp_path.iterdir()) == []

    prune(CausalLM(name=folders["llama"]), tmp_path)
    before = (tmp_path / "hf/model.safetensors").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        prune(FullDisk(name=folders["llama"]), tmp_path)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
def test_a_second_run_replaces_the_model(folders: dict[str, str], tmp_path: Path) -> None:
    prune(CausalLM(name=folders["llama"]), tmp_path)
    prune(CausalLM(name=folders["opt"]), tmp_path)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "opt"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_holds_something_else_is_refused_before_training(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/thesis.tex").touch()
    module = CausalLM(name=folders["llama"])
    with pytest.raises(ValueError, match=r"hf' exists and holds 'thesis.tex', which is no part of a saved model"):
        prune(module, tmp_path)
    assert module.model is None  # not even loaded
    assert (tmp_path / "hf/thesis.tex").exists()


def test_a_project_with_a_config_of_its_own_and_the_source_model_are_refused(
    folders: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "main.py"):
        (tmp_path / "hf" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds 'main.py', which is no part"):
        prune(CausalLM(name=folders["llama"]), tmp_path)
    with pytest.raises(ValueError, match="is the folder of the model that is pruned"):
        saver = SaveHuggingFace(folders["llama"])
        saver.setup(make_trainer(tmp_path, max_steps=1), CausalLM(name=folders["llama"]), "fit")


def test_a_module_without_a_hugging_face_model_is_refused(tmp_path: Path) -> None:
    class Plain(Net):
        model = nn.Identity()

    for module, name in ((Net(), "Net"), (Plain(), "Plain")):
        with pytest.raises(ValueError, match=f"'model' has save_pretrained; {name} has none"):
            make_trainer(tmp_path, SaveHuggingFace(str(tmp_path / "hf")), max_steps=1).fit(module, loader())


@pytest.mark.filterwarnings("ignore:SaveHuggingFace:UserWarning")
def test_the_folder_is_beside_the_logs_unless_told(folders: dict[str, str], tmp_path: Path) -> None:
    make_trainer(tmp_path, SaveHuggingFace(), max_steps=1).fit(CausalLM(name=folders["llama"]), tokens())
    assert (tmp_path / "hf/config.json").exists()
