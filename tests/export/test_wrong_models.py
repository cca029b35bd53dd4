"""Exports that would differ from the trained model, or replace something else, are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from elsa_lightning import NM, ByPattern, CausalLM, ElsaCallback, Experts, Neurons, Quantized, Width, project
from elsa_lightning.callbacks import Export
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export
from elsa_lightning.export.folders import check_replaceable
from elsa_lightning.export.reload import perplexity
from elsa_lightning.patterns import groups_of
from tests.callbacks.tiny import every_step, make_trainer
from tests.export.models import IDS, run, sparse_folder

pytestmark = pytest.mark.filterwarnings("ignore:Elsa:UserWarning", "ignore:From a checkpoint:UserWarning")


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def mixture(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixture")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


def trained(model: str, folder: Path, constraint: Any, *callbacks: Any, steps: int = 12) -> CausalLM:
    module = CausalLM(name=model)
    ids = torch.randint(3, 2000, (24, 16), generator=torch.Generator().manual_seed(0))
    elsa = ElsaCallback(constraint=constraint, interval=2)
    trainer = make_trainer(folder, elsa, *callbacks, max_steps=steps)
    trainer.fit(module, DataLoader(list(ids), batch_size=2), DataLoader(list(ids[:2]), batch_size=2))  # type: ignore[arg-type]
    return module


def test_a_mixture_whose_experts_were_removed_is_exported_smaller_or_not_at_all(mixture: str, tmp_path: Path) -> None:
    module = trained(mixture, tmp_path, Experts(0.5), every_step(tmp_path / "checkpoints"))
    last = tmp_path / "checkpoints/12.ckpt"
    with pytest.raises(UserError, match="export --to shrunk first, and that folder --to hf"):
        export(last, "hf", tmp_path / "hf", say=quiet, fresh=False)
    export(last, "shrunk", tmp_path / "shrunk", say=quiet)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")
    assert small.config.num_local_experts == 2
    torch.testing.assert_close(small(IDS).logits, module.model(IDS).logits, rtol=1e-4, atol=1e-5)
    export(tmp_path / "shrunk", "hf", tmp_path / "hf", say=quiet, fresh=False)
    with pytest.raises(UserError, match="take shrunk, and export that folder to hf afterwards"):
        trained(mixture, tmp_path / "again", Experts(0.5), Export(["hf"], str(tmp_path / "out")))


@pytest.mark.parametrize("constraint", [Neurons(0.5), Width(keep=60_000), ByPattern({"mlp": Neurons(0.5)})])
def test_a_checkpoint_of_the_middle_of_a_structured_run_is_projected(
    constraint: Any, tiny_llama: str, tmp_path: Path
) -> None:
    if isinstance(constraint, Width):
        whole = AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
        constraint = Width(keep=0.9 * whole)
    trained(tiny_llama, tmp_path, constraint, every_step(tmp_path / "checkpoints"), steps=20)
    export(tmp_path / "checkpoints/6.ckpt", "shrunk", tmp_path / "out", say=quiet, fresh=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert small.config.intermediate_size < dense.config.intermediate_size


def test_stacks_of_experts_are_not_quantized(mixture: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a stack of experts, which compressed-tensors cannot load.*--to hf$"):
        export(mixture, "quantized", tmp_path / "out", say=quiet)


def test_stacks_of_experts_stay_dense_as_sparse_rows_and_that_is_said(mixture: str, tmp_path: Path) -> None:
    said: list[str] = []
    export(sparse_folder(mixture, tmp_path / "in"), "cpu-sparse", tmp_path / "out", say=said.append, fresh=False)
    (told,) = [line for line in said if "stay dense" in line]
    assert told.startswith("4 stacks of experts stay dense") and "model.layers.0.mlp.experts.gate_up_proj" in told
    assert json.loads((tmp_path / "out/elsa.json").read_text())["export"]["stacks of experts, left dense"] == 4


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_experts_that_are_stored_by_inputs_are_pruned_along_their_inputs(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    project(model, NM(2, 4))
    stacks = [p for name, p in model.named_parameters() if p.dim() == 3 and "proj" in name]
    assert len(stacks) == 2
    for p in stacks:
        assert int((p == 0).sum()) == p.numel() // 2
        assert groups_of(p.transpose(1, 2) != 0)["2:4"].violating == 0 < groups_of(p != 0)["2:4"].violating


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(tiny_llama: str, tmp_path: Path) -> None:
    cut = shutil.copytree(tiny_llama, tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, cut / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        export(cut, "hf", tmp_path / "out", say=quiet)
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded"):
        export(broken, "hf", tmp_path / "out", say=quiet)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has a config\.json that cannot be read"):
        export(broken, "hf", tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("theirs", ["llama-3-8b.Q4_K_M.gguf", "my_lora.safetensors", "embeddings.model"])
def test_other_peoples_models_in_a_folder_are_not_replaced(theirs: str, tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    folder.mkdir()
    (folder / theirs).touch()
    with pytest.raises(UserError, match=f"holds '{theirs}'"):
        check_replaceable(folder, "--output")


def test_places_that_cannot_be_exchanged_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        check_replaceable(Path(), "--output")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link to a place that is not there"):
        check_replaceable(tmp_path / "link", "--output")
    with pytest.raises(UserError, match="is a mount point"):
        check_replaceable(Path("/proc"), "--output")


@pytest.mark.parametrize(
    ("constraint", "bits", "group"),
    [
        (Quantized(3, 32, inside=NM(2, 4)), 4, 32),
        (Quantized(2, 16), 4, 16),
        (Quantized(8, 64), 8, 64),
        (ByPattern({"attn": NM(2, 4), "mlp": Quantized(4, 32)}), 4, 32),
        (ByPattern({"attn": Quantized(4, 16), "mlp": Quantized(4, 32)}), 4, 128),
        (NM(2, 4), 4, 128),
    ],
)
def test_the_grid_of_an_export_holds_that_of_the_set(constraint: Any, bits: int, group: int) -> None:
    options = Options().on_grid(constraint)
    assert (options.bits, options.group_size) == (bits, group)


def test_measuring_in_bfloat16_leaves_the_frequencies_of_rotary_embeddings_alone(tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rounded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    value = perplexity(copy.deepcopy(model), IDS, IDS, "bf16-true")
    assert value == perplexity(rounded, IDS, IDS, "bf16-true")
    perplexity(model, IDS, IDS, "bf16-true")
    assert {b.dtype for name, b in model.named_buffers() if name.endswith("inv_freq")} == {torch.float32}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tiny_llama: str, tmp_path: Path) -> None:
    source, link = sparse_folder(tiny_llama, tmp_path / "model"), tmp_path / "latest"
    (tmp_path / "elsewhere/real").mkdir(parents=True)
    (tmp_path / "elsewhere/real/config.json").write_text("{}")
    link.symlink_to(tmp_path / "elsewhere/real")
    export(source, "hf", link, say=quiet, fresh=False)
    assert link.is_symlink() and (tmp_path / "elsewhere/real/model.safetensors").is_file()


def test_a_tokenizer_that_is_none_or_broken_costs_no_model(tiny_llama: str, tmp_path: Path) -> None:
    said: list[str] = []
    folder = sparse_folder(tiny_llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    export(folder, "hf", tmp_path / "broken", say=said.append, fresh=False)
    for file in folder.glob("*token*"):
        file.unlink()
    export(folder, "hf", tmp_path / "none", say=said.append, fresh=False)
    assert sum("has no tokenizer to save beside the model" in line for line in said) == 2
    assert not list((tmp_path / "none").glob("tokenizer*"))


def test_what_llama_cpp_wants_of_a_tokenizer_comes_along(tiny_llama: str, tmp_path: Path) -> None:
    folder = sparse_folder(tiny_llama, tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    export(folder, "hf", tmp_path / "out", say=quiet, fresh=False)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"


def test_a_card_without_finite_numbers_is_json_all_the_same(tiny_llama: str, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path, every_step(tmp_path / "checkpoints"), steps=2)
    from elsa_lightning.export.record import Record

    text = Record(perplexity={"dense": 20.0, "exported": float("inf")}).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["perplexity"] == {"dense": 20.0, "exported": None}
