"""elsa sparsity: what is counted of a file is what is in the model, and what is not read is said."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)
from transformers import OPTForCausalLM as OPT

from elsa_lightning import inspection, sparsity
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.export import Options, export
from elsa_lightning.tensor_files import Source, Stored, open_source

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama with grouped heads: 2:4, anywhere, dead rows and columns, empty heads and neurons."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        weight = llama.get_parameter
        weight(LAYER + "self_attn.q_proj.weight").view(-1, 4)[:, 1:3] = 0
        weight(LAYER + "self_attn.k_proj.weight").view(-1, 4)[:, :3] = 0
        weight(LAYER + "self_attn.o_proj.weight")[:, 8:16] = 0  # the second head
        weight(LAYER + "self_attn.v_proj.weight")[8:16] = 0  # what the third and fourth look at
        weight(LAYER + "mlp.up_proj.weight")[:5] = 0
        weight(LAYER + "mlp.gate_proj.weight")[3:7] = 0
        weight(LAYER + "mlp.down_proj.weight")[:, 6:10] = 0
        up = weight("model.layers.1.mlp.up_proj.weight")
        up.masked_fill_(torch.rand_like(up) < 0.5, 0)
    return llama


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    model.save_pretrained(place / "one")
    model.save_pretrained(place / "sharded", max_shard_size="20KB")
    torch.save(model.state_dict(), place / "weights.pt")
    return place


def by_name(found: inspection.Sparsity) -> dict[str, inspection.TensorZeros]:
    return {t.name: t for t in found.tensors}


def test_counts_are_those_of_the_weights(model: Any) -> None:
    found = by_name(sparsity(model))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert (found[name].zeros, found[name].size) == (int((p == 0).sum()), p.numel()), name
        if p.dim() == 2:
            assert (found[name].rows, found[name].columns) == tuple(p.shape)
            assert found[name].dead_rows == int((~p.bool().any(dim=1)).sum())
            assert found[name].dead_columns == int((~p.bool().any(dim=0)).sum())
            for n, m in ((1, 4), (2, 8), (2, 4), (4, 8)):
                groups = (p != 0).view(-1, m).sum(dim=1)
                assert found[name].groups[f"{n}:{m}"] == inspection.Groups(len(groups), int((groups > n).sum())), name


def test_patterns_kinds_heads_and_neurons(model: Any) -> None:
    found = sparsity(model)
    tensors = by_name(found)
    assert tensors[LAYER + "self_attn.q_proj.weight"].pattern == "2:4"
    assert tensors[LAYER + "self_attn.k_proj.weight"].pattern == "1:4"
    assert tensors[LAYER + "mlp.up_proj.weight"].pattern is None
    assert found.patterns()["2:4"]["satisfied"] == 2
    kinds = {kind: len(of) for kind, of in found.kinds().items()}
    assert kinds == {"embeddings": 1, "attention": 8, "mlp": 6, "norms and biases": 5, "output": 1}
    units = {(unit.layer, unit.what): (unit.empty, unit.total) for unit in found.units}
    assert units == {
        (LAYER + "self_attn.o_proj.weight", "heads"): (3, 4),
        (LAYER + "mlp.down_proj.weight", "neurons"): (10, 48),
        ("model.layers.1.self_attn.o_proj.weight", "heads"): (0, 4),
        ("model.layers.1.mlp.down_proj.weight", "neurons"): (0, 48),
    }


@pytest.mark.parametrize("saved", ["one", "one/model.safetensors", "sharded", "sharded/model.safetensors.index.json"])
def test_a_saved_model_is_what_it_was(saved: str, model: Any, folder: Path) -> None:
    live, read = sparsity(model), sparsity(folder / saved)
    assert by_name(live) == by_name(read) and not read.unread
    assert {unit.layer: unit for unit in live.units} == {unit.layer: unit for unit in read.units}
    assert (live.zeros, live.size) == (read.zeros, read.size)


def test_a_file_without_configuration_has_all_but_heads(model: Any, folder: Path) -> None:
    live, read = sparsity(model), sparsity(folder / "weights.pt")
    assert by_name(live) == by_name(read)
    assert {unit.what for unit in read.units} == {"neurons"}


@pytest.mark.parametrize("saved", ["sharded", "weights.pt"])
def test_nothing_is_read_whole(saved: str, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(path: Any) -> Source:
        source = open_source(path)

        def tensors() -> Iterator[Stored]:
            for stored in source.tensors():

                def rows(start: int, stop: int, stored: Stored = stored) -> torch.Tensor:
                    part = stored.rows(start, stop)
                    seen.append(part.numel())
                    return part

                yield replace(stored, rows=rows)

        return replace(source, tensors=tensors)

    expected = by_name(sparsity(model))
    monkeypatch.setattr(inspection, "open_source", watched)
    monkeypatch.setattr(inspection, "_AT_ONCE", 512)
    assert by_name(sparsity(folder / saved)) == expected
    assert max(seen) == 512 and sum(seen) == sum(p.numel() for p in model.parameters())


def test_weights_that_are_stored_turned_are_counted_by_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with torch.no_grad():
        first, second = (gpt.transformer.h[0].mlp.get_submodule(name).weight for name in ("c_fc", "c_proj"))
        first[:, :6] = 0  # six neurons
        second[2:9] = 0
        second.view(16, 4, 16)[9:, 1:3] = 0
    gpt.save_pretrained(tmp_path)
    for at_once in (1 << 24, 300):
        monkeypatch.setattr(inspection, "_AT_ONCE", at_once)
        for found in (sparsity(gpt), sparsity(tmp_path)):
            tensors = {t.name.removeprefix("transformer."): t for t in found.tensors}
            made, taken = tensors["h.0.mlp.c_fc.weight"], tensors["h.0.mlp.c_proj.weight"]
            assert (made.rows, made.dead_rows, made.dead_columns) == (64, 6, 0)
            assert (taken.rows, taken.dead_rows, taken.columns, taken.dead_columns) == (16, 0, 64, 7 + 2 * 7)
            expected = ((second.T != 0).reshape(16, -1, 4).sum(dim=-1) > 2).sum()
            assert taken.groups["2:4"] == inspection.Groups(16 * 16, int(expected))
            assert [(u.what, u.empty, u.total) for u in found.units if u.what == "neurons"] == [
                ("neurons", len({*range(6), *range(2, 9)} | {4 * k + j for k in range(9, 16) for j in (1, 2)}), 64)
            ]


def small_gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with torch.no_grad():
        block = gpt.transformer.h[0]
        block.mlp.c_fc.weight[:, :6] = 0  # six neurons
        block.attn.c_proj.weight[:, 3] = 0  # of a square matrix, whose bias does not tell
    return gpt


@pytest.mark.parametrize("name", ["gpt.pt", "gpt.ckpt", "gpt.safetensors"])
def test_a_turned_file_without_configuration_is_known_by_its_biases(name: str, tmp_path: Path) -> None:
    gpt, file = small_gpt(), tmp_path / name
    state = {key: t for key, t in gpt.state_dict().items() if key != "lm_head.weight"}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if file.suffix == ".ckpt" else state, file)
    read, live = sparsity(file), sparsity(gpt)
    assert by_name(read) == by_name(live)
    assert [unit for unit in live.units if unit.what == "neurons"] == list(read.units)


def test_layers_of_the_same_names_that_are_not_turned_are_left_as_they_are(tmp_path: Path) -> None:
    """As of GPTBigCode; and a matrix whose bias is of no use tells nothing of neurons."""
    state = {"h.0.mlp.c_fc.weight": torch.ones(64, 16), "h.0.mlp.c_fc.bias": torch.ones(64),
             "h.0.mlp.c_proj.weight": torch.ones(16, 64), "h.0.mlp.c_proj.bias": torch.ones(16)}  # fmt: skip
    save_file(state, tmp_path / "big.safetensors")
    found = sparsity(tmp_path / "big.safetensors")
    assert by_name(found)["h.0.mlp.c_fc.weight"].rows == 64 and len(found.units) == 1
    save_file({**state, "h.0.mlp.c_fc.bias": torch.ones(5)}, tmp_path / "odd.safetensors")
    assert not sparsity(tmp_path / "odd.safetensors").units


@pytest.mark.parametrize(("kind", "saved"), [("gpt_oss", "folder"), ("gpt_oss", "bare.pt"), ("llama4", "folder")])
def test_stacks_of_experts_that_are_turned_are_counted_by_outputs(kind: str, saved: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
            "max_position_embeddings": 16}  # fmt: skip
    if kind == "gpt_oss":
        mixture: Any = GptOssForCausalLM(GptOssConfig(**size))
    else:
        mixture = Llama4ForCausalLM(Llama4TextConfig(**size, intermediate_size_mlp=24, interleave_moe_layer_step=1))
    stacks = {name: p for name, p in mixture.named_parameters() if p.dim() == 3}
    with torch.no_grad():
        for p in mixture.parameters():
            p.normal_()
        for p in stacks.values():
            p.transpose(1, 2)[..., 1::4] = 0  # 2:4 along the inputs, which come first
            p.transpose(1, 2)[..., 2::4] = 0
            p[1, :, 3] = 0  # an output
    if saved == "folder":
        mixture.save_pretrained(tmp_path / saved)
    else:
        torch.save(mixture.state_dict(), tmp_path / saved)
    live, read = by_name(sparsity(mixture)), by_name(sparsity(tmp_path / saved))
    assert read == live and len(stacks) == 2
    for name in stacks:
        rows = stacks[name].shape[0] * stacks[name].shape[2]
        assert (read[name].pattern, read[name].rows, read[name].dead_rows) == ("2:4", rows, 1)
    for name, tensor in read.items():
        assert name.endswith("bias") <= (tensor.kind == "norms and biases" and tensor.rows == 0), name


def test_other_names_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opt = OPT(OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2,
                        max_position_embeddings=8, word_embed_proj_dim=16))  # fmt: skip
    layer = opt.model.decoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight[:4] = 0
        layer.fc1.bias[:2] = 1.0  # which makes a constant of two of them
        layer.self_attn.out_proj.weight[:, :8] = 0
    assert [(u.what, u.empty, u.total) for u in sparsity(opt).units] == [("heads", 1, 2), ("neurons", 2, 24)]
    bert = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=24, max_position_embeddings=8))  # fmt: skip
    with torch.no_grad():
        bert.encoder.layer[0].attention.self.value.weight[8:] = 0
        bert.encoder.layer[0].output.dense.weight[:, 5:7] = 0
    bert.save_pretrained(tmp_path)
    assert {(u.what, u.empty, u.total) for u in sparsity(tmp_path).units} == {("heads", 1, 2), ("neurons", 2, 24)}


def test_experts_and_kernels() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.ones(3, 8, 16))
            self.conv = nn.Conv1d(4, 6, 2, bias=False)

    model = Experts()
    with torch.no_grad():
        model.experts[1, :2] = 0
        model.experts[2, :, 5] = 0
        model.conv.weight[0] = 0
    experts, conv = (by_name(sparsity(model))[name] for name in ("experts", "conv.weight"))
    assert (experts.rows, experts.dead_rows, experts.columns, experts.dead_columns) == (24, 2, 48, 1)
    assert (conv.rows, conv.dead_rows, conv.columns, conv.dead_columns) == (6, 1, 8, 0)


def test_quantized_formats_are_not_read_and_said(tmp_path: Path) -> None:
    eight = torch.tensor([[0.0, -0.0, 1.0, -2.0]]).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight_packed": torch.zeros(4, 4, dtype=torch.int32), "a.weight_scale": torch.ones(4, 1),
        "b.weight": torch.eye(4, dtype=torch.bfloat16), "c.weight": eight, "d.weight": torch.zeros(0, 4),
        "scalar": torch.tensor(0.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "q.safetensors")
    found = sparsity(tmp_path / "q.safetensors")
    assert {t.name: t.zeros for t in found.tensors} == {"b.weight": 12, "c.weight": 2, "d.weight": 0, "scalar": 1}
    assert found.unread.keys() == {"a.weight_packed", "a.weight_scale"}
    assert "NOT READ, 1 tensors: I32, codes of a quantized format" in str(found)
    assert "NOT READ, 1 tensors: scales of a quantized format: a.weight_scale" in str(found)


def test_exports_are_counted_as_the_matrices_they_stand_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for to, options in (("cpu-sparse", Options(break_even=0.3)), ("quantized", Options(8, 16))):
        export(folder / "one", to, tmp_path / to, options=options, fresh=False, say=lambda line: None)
    dense = sparsity(folder / "one")
    for at_once in (1 << 24, 256):  # whole matrices, and some rows at a time
        monkeypatch.setattr(inspection, "_AT_ONCE", at_once)
        rows = sparsity(tmp_path / "cpu-sparse")
        assert by_name(rows) == by_name(dense) and not rows.unread
    assert set(rows.units) == set(dense.units)
    codes = sparsity(tmp_path / "quantized")
    assert not codes.unread and by_name(codes).keys() == by_name(dense).keys()
    for name, tensor in by_name(codes).items():
        packed = tensor.dtype == "int8"
        assert packed == ("_proj" in name)
        old = by_name(dense)[name]
        assert tensor.zeros >= old.zeros if packed else tensor == old  # small weights round to 0
        assert tensor.pattern == old.pattern and tensor.dead_rows == old.dead_rows, name


def test_a_run_is_counted_by_its_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/hf").symlink_to(folder / "one")
    assert by_name(sparsity(tmp_path / "run")) == by_name(sparsity(folder / "one"))


def test_a_run_without_a_model_is_counted_by_its_last_checkpoint(model: Any, tmp_path: Path) -> None:
    place = tmp_path / "lightning_logs/version_0/checkpoints"
    place.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, place / "last.ckpt")
    for run in (place.parent, tmp_path):
        found = sparsity(run)
        assert found.source == str(place / "last.ckpt") and by_name(found) == by_name(sparsity(model))
    later = place / "terminated-step=7.ckpt"  # SaveOnTerminate's, made after the last regular one
    torch.save({"state_dict": {name: 0 * t for name, t in model.state_dict().items()}}, later)
    for checkpoint, seconds in ((place / "last.ckpt", 1), (later, 2)):
        os.utime(checkpoint, (seconds, seconds))
    assert sparsity(tmp_path).source == str(later)
    later.unlink()
    (tmp_path / "lightning_logs/version_1/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^'.*holds several runs, give one: .*version_0, .*version_1"):
        sparsity(tmp_path)
    (place / "last.ckpt").unlink()
    (place / "last.ckpt").mkdir()
    for file in (".metadata", "meta.pt"):
        (place / "last.ckpt" / file).touch()
    for given in (place.parent, place / "last.ckpt"):
        with pytest.raises(UserError, match=rf"last.ckpt' is a checkpoint in several files.*--from '{given}' --to hf"):
            sparsity(given)


@pytest.mark.parametrize("at_once", [1 << 24, 256])
def test_gguf_files_are_counted(at_once: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="reads GGUF files")
    monkeypatch.setattr(inspection, "_AT_ONCE", at_once)
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    theirs = {names.get_name(name, (".weight",)): p.detach() for name, p in model.named_parameters()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, p in theirs.items():
        eight = "attn_q.weight" in name
        data = gguf.quants.quantize(p.numpy(), kind) if eight else p.numpy()
        writer.add_tensor(name, data, raw_dtype=kind if eight else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, live = sparsity(tmp_path), by_name(sparsity(model))
    assert len(by_name(found)) == len(live)
    for (name, p), old in zip(theirs.items(), live.values(), strict=True):
        new = by_name(found)[name]
        assert (new.kind, new.shape, new.dead_rows, new.dead_columns) == (
            old.kind,
            p.shape,
            old.dead_rows,
            old.dead_columns,
        )
        assert new.dtype == ("q8_0" if "attn_q.weight" in name else "f32") and new.pattern == old.pattern
        assert new.zeros >= old.zeros if new.dtype == "q8_0" else new.zeros == old.zeros
    assert {(unit.layer, unit.empty, unit.total) for unit in found.units} == {
        ("blk.0.ffn_down.weight", 10, 48), ("blk.1.ffn_down.weight", 0, 48)
    }  # fmt: skip


def test_the_command_prints_the_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sparsity", str(folder / "one")])
    table = capsys.readouterr().out
    assert table == f"{sparsity(folder / 'one')}\n"
    (line,) = (line.split() for line in table.splitlines() if line.startswith(LAYER + "self_attn.q_proj"))
    assert line[1:] == ["32×32", "float32", "50.00%", "2:4", "0/32", "16/32"]
    assert "empty heads: 3 of 8" in table and "empty neurons: 10 of 96" in table
    main(["sparsity", "--json", str(folder / "sharded")])
    read = json.loads(capsys.readouterr().out)
    assert read == json.loads(json.dumps(sparsity(folder / "sharded").to_dict()))
    assert read["zeros"] == sum(t["zeros"] for t in read["tensors"]) > 0


def test_what_cannot_be_read_ends_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["sparsity", *arguments])
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "does not exist" in said(str(tmp_path / "nothing"))
    assert "has no .safetensors and no pytorch_model.bin, but nothing" in said(str(tmp_path))
    (tmp_path / "model.onnx").touch()
    assert "is not read: give .safetensors" in said(str(tmp_path / "model.onnx"))
    (tmp_path / "model.gguf").touch()
    expected = "no whole GGUF file" if find_spec("gguf") else "is read with the package gguf: pip install gguf"
    assert expected in said(str(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").unlink()
    whole = (folder / "one/model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is no whole safetensors file" in said(str(tmp_path / "cut.safetensors"))
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    assert "cannot be read without running its code" in said(str(tmp_path / "pickle.pt"))
    for file in (folder / "sharded").iterdir():
        if not file.name.startswith("model-00002"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "names model-00002" in said(str(tmp_path))


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "sparsity where its zeros are"), (["sparsity", "--help"], "--json")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert words in " ".join(capsys.readouterr().out.split())
