"""The plan's bytes against the live tensors of a run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from elsa_lightning import ADMM, CausalLM, Experts, Heads, Neurons, Unstructured
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.plan import plan
from elsa_lightning.selection import select

SIZES: dict[str, Any] = {
    "tiny": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    "small": LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4
    ),
    "opt": OPTConfig(
        vocab_size=300, hidden_size=384, ffn_dim=1536, num_hidden_layers=1, num_attention_heads=4,
        word_embed_proj_dim=384, max_position_embeddings=64,
    ),
}  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "Adam8bit": lambda params: bitsandbytes.optim.Adam8bit(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
}


def nbytes(tensors: Any) -> int:
    unique = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors if torch.is_tensor(t)}
    return sum(unique.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("optimizer", "dtype", "state_dtype", "per_weight"),
    [
        ("Adam", torch.float32, "float32", 12.13),
        ("Adam8bit", torch.bfloat16, "float8_e4m3fn", 3.3),
        ("SGD", torch.bfloat16, "bfloat16", 4.13),
    ],
)
def test_the_plan_is_what_a_run_holds(
    size: str, optimizer: str, dtype: torch.dtype, state_dtype: Any, per_weight: float
) -> None:
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(SIZES[size])
    planned = plan(meta, OPTIMIZERS[optimizer], dtype=dtype, state_dtype=state_dtype)

    model = AutoModelForCausalLM.from_config(SIZES[size]).to(dtype)
    live = OPTIMIZERS[optimizer](model.parameters())
    chosen = select(model).parameters
    ADMM(live, chosen, Unstructured(0.9), total_steps=10, state_dtype=state_dtype)
    ids = torch.randint(1, 60, (2, 16))
    for _ in range(2):
        live.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        live.step()
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.constrained == sum(p.numel() for p in chosen.values())
    weights, gradients, moments, elsa = planned.exact.values()
    assert weights == nbytes(model.parameters())
    assert gradients == nbytes(p.grad for p in model.parameters())
    states = [(key, t) for p in live.state.values() for key, t in p.items() if "qmap" not in key]
    assert elsa == nbytes(t for key, t in states if key.startswith("elsa"))
    assert moments == pytest.approx(nbytes(t for key, t in states if not key.startswith("elsa")), rel=0.02)
    largest = max(chosen.values(), key=nn.Parameter.numel)
    if largest.numel() > 1e5:
        held = nbytes(t for key, t in live.state[largest].items() if "qmap" not in key)
        assert held / largest.numel() <= per_weight


def test_the_plan_of_convolutions_is_what_a_run_holds() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    for make in (OPTIMIZERS["Adam"], lambda params: Adam8bit(params, lr=1e-3)):
        planned = plan(model, make, state_dtype="float8_e4m3fn")
        live, chosen = make(model.parameters()), select(model).parameters
        ADMM(live, chosen, Unstructured(0.9), total_steps=10, state_dtype="float8_e4m3fn")
        for _ in range(2):
            live.zero_grad()
            model(torch.randn(1, 16, 5, 5)).square().mean().backward()
            live.step()
        assert planned.constrained == sum(p.numel() for p in chosen.values())
        states = [(key, t) for p in live.state.values() for key, t in p.items() if "qmap" not in key]
        *_, moments, elsa = planned.exact.values()
        assert elsa == nbytes(t for key, t in states if key.startswith("elsa"))
        assert moments == pytest.approx(nbytes(t for key, t in states if not key.startswith("elsa")), rel=0.02)


class Unknown(nn.Module):
    """Weights of a kind that is not known, beside a small Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.layer = nn.Parameter(torch.zeros(64, 64)), nn.Linear(8, 8)


def test_the_plan_says_that_little_of_a_model_is_constrained() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is a part of the plan, which the caller prints
        planned = plan(Unknown(), OPTIMIZERS["Adam"])
        assert planned.warning is not None and "LOW COVERAGE" in planned.warning and "'mixing$'" in planned.warning
        assert plan(Unknown(), OPTIMIZERS["Adam"], ignore=["mixing"]).warning is None
        assert plan(Unknown(), OPTIMIZERS["Adam"], state_dtype=None).warning is None


def test_the_command_prints_that_warning_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    SIZES["tiny"].save_pretrained(tmp_path)
    command = ["plan", "--config", "configs/elsa.yaml", f"--model.name={tmp_path}", "--data.seq_len=32"]
    main([*command, '--elsa.targets=["up_proj"]'])
    out = capsys.readouterr().out
    assert out.count("LOW COVERAGE") == 1 and "down_proj" in out
    main(command)
    assert "LOW COVERAGE" not in capsys.readouterr().out


def test_sharding_divides_all_but_activations_and_one_block() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SIZES["small"])
    planned = plan(model, OPTIMIZERS["Adam"], tokens=1000)
    states = sum(planned.exact.values())
    assert planned.total() == states + max(planned.transient, planned.copies, planned.activations)
    assert planned.total(4) == states // 4 + planned.largest_block + max(planned.stepping // 4, planned.activations)
    assert planned.activations > planned.copies == 4 * planned.parameters  # the roots of Adam's second moments
    less = plan(model, OPTIMIZERS["Adam"], tokens=1000, checkpointing=True)
    assert 0 < less.activations < planned.activations
    more = plan(model, OPTIMIZERS["Adam"], teacher=True)
    assert sum(more.exact.values()) - sum(planned.exact.values()) == 2 * planned.parameters
    larger = plan(model, OPTIMIZERS["Adam"], teacher=nn.Linear(1000, 1000, bias=False))
    assert sum(larger.exact.values()) - sum(planned.exact.values()) == 2_000_000


def test_many_small_tensors_are_worked_on_as_one() -> None:
    with torch.device("meta"):
        many, one = nn.ModuleList(nn.Linear(256, 256) for _ in range(32)), nn.ModuleList([nn.Linear(1024, 2048)])
    several, single = (plan(model, OPTIMIZERS["Adam"]) for model in (many, one))
    assert several.constrained == single.constrained
    assert single.transient < several.transient <= 1.5 * single.transient  # they are copied, too


def test_a_set_of_units_takes_state_for_their_output_weights_alone() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SIZES["small"])
    planned = plan(model, OPTIMIZERS["Adam"], constraint=Neurons(0.5))
    assert planned.constrained == 2 * 256 * 768
    with pytest.raises(UserError, match=r"possible fractions are 0, 0\.5, 0\.75"):
        plan(model, OPTIMIZERS["Adam"], constraint=Heads(0.25))


def test_a_mixture_is_planned_without_weights() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert plan(model, OPTIMIZERS["Adam"], constraint=Experts(0.5)).constrained == 2 * 4 * 32 * 48


def test_the_command_loads_no_weights_and_says_whether_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    big = [
        "--model.name=benchmarks/memory/gemma-2-27b",
        "--data.seq_len=2048",
        "--data.batch_size=1",
        "--model.gradient_checkpointing=true",
    ]
    main(["plan", "--config", "configs/elsa_l.yaml", *big, "--devices=8", "--gpu-memory=80"])
    out = capsys.readouterr().out
    assert "27,227,128,320 parameters, 26,046,627,840 constrained" in out
    assert out.splitlines()[-1].split()[-2:] == ["NO", "yes"]
    with pytest.raises(SystemExit):
        main(["plan", "--config", "configs/elsa.yaml", "--devices=0"])
    assert "elsa: error: devices must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["elsa", "elsa_l"])
@pytest.mark.parametrize(("name", "model"), [("LLaMA-2-7B", "llama-2-7b"), ("Gemma-2-27B", "gemma-2-27b")])
def test_the_table_of_the_documentation_is_what_the_command_says(
    name: str, model: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("docs/memory.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^elsa (plan .*)$", page, re.M)
    arguments = command.replace("elsa_l.yaml", f"{config}.yaml").replace("gemma-2-27b", model).split()
    main(arguments)
    rows = [re.findall(r"([\d.]+) GiB", line) for line in capsys.readouterr().out.splitlines()]
    *parts, gathered, totals = [[float(cell) for cell in row] for row in rows if len(row) == 2]
    expected = [*(part[0] for part in parts), *totals]
    assert gathered[0] == 0 and len(expected) == 9
    (table,) = re.findall(rf"^\| {name} \|.*\n\| \|.*$", page, re.M)
    (line,) = [line for line in table.splitlines() if f"`{config}.yaml`" in line]
    shown = [float(cell) for cell in line.split("`")[-1].strip(" |").split("|")]
    assert shown == pytest.approx(expected, abs=0.0501)


def test_a_module_plans_itself_without_memory() -> None:
    assert all(p.is_meta for p in CausalLM("benchmarks/memory/llama-2-7b").on_meta().parameters())


def test_fit_prints_the_plan_and_goes_on_without_one(
    tiny_llama: str, token_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = [
        "fit", "--config", "configs/elsa.yaml", f"--model.name={tiny_llama}", "--data.seq_len=32",
        "--data.eval_segments=4", f"--data.cache_dir={token_cache}", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2",
    ]  # fmt: skip
    main(command)
    assert any("GiB on each device" in record.message for record in caplog.records)

    def fails(*_: object) -> None:
        raise RuntimeError("no meta device for this one")

    monkeypatch.setattr(CausalLM, "on_meta", fails)
    with pytest.warns(UserWarning, match="could not be planned: RuntimeError: no meta device"):
        main(command)
