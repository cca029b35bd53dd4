"""What one process finds, any number of them find; runs resume to the bit, on other numbers, and after faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed import worker

VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {},
    "coupled": {"prox": "coupled", "penalty": 0.05},
    "bfloat16": {"state_dtype": "bfloat16"},
    "float8": {"state_dtype": "float8_e4m3fn"},
    "8bit": {"optimizer": "8bit", "dtype": "float32", "state_dtype": "float8_e4m3fn"},
    "accumulated": {"accumulate": 2, "steps": 6},
    "broken": {"broken": [3]},  # the last process's loss is NaN at step 3
}
EXACT = 1e-12, 1e-12  # float64 sums in another order
ROUNDED = 1e-4, 1e-6  # float32


def launch(processes: int, folder: Path, *runs: dict[str, Any]) -> tuple[int, str]:
    """Run the worker on so many processes; return the exit status and what they said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "tests.distributed.worker", str(folder), json.dumps(runs),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2], text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, text_file: Path, token_cache: str) -> Path:
    """All runs that end well, on one, two and three processes."""
    place = tmp_path_factory.mktemp("strategies")
    for name, options in VARIANTS.items():
        worker.run(place, f"{name}-1", "auto", **options)
    model = {"model": tiny_llama, "text": str(text_file), "cache": token_cache}
    worker.language_model(place, "llama-1", "auto", **model, distillation=0.5)
    two: list[dict[str, Any]] = [{"name": f"{name}-2", "how": "fsdp2", **o} for name, o in VARIANTS.items()]
    two += [
        {"name": "ddp-2", "how": "ddp"},
        {"name": "full-2", "how": "fsdp2-full"},
        {"name": "hard-2-from-4", "how": "fsdp2", "resume": "hard-2/4.ckpt"},
        {"name": "hard-2-from-8", "how": "fsdp2", "resume": "hard-2/8.ckpt"},
        {"name": "full-2-from-4", "how": "fsdp2-full", "resume": "full-2/4.ckpt"},
        {"name": "float8-2-from-4", "how": "fsdp2", "resume": "float8-2/4.ckpt", **VARIANTS["float8"]},
        {"name": "8bit-2-from-4", "how": "fsdp2", "resume": "8bit-2/4.ckpt", **VARIANTS["8bit"]},
        {"name": "hard-2-from-one", "how": "fsdp2", "resume": "hard-1/4.ckpt"},
        {"name": "8bit-2-from-one", "how": "fsdp2", "resume": "8bit-1/4.ckpt", **VARIANTS["8bit"]},
        {"name": "hard-2-from-ddp", "how": "fsdp2", "resume": "ddp-2/8.ckpt"},
        {"name": "llama-2", "how": "fsdp2", **model, "distillation": 0.5},
    ]
    two += [{"name": f"{name}-fsdp1", "how": "fsdp1", **o} for name, o in VARIANTS.items()]
    two += [
        {"name": f"{name}-fsdp1-from-4", "how": "fsdp1", "resume": f"{name}-fsdp1/4.ckpt", **VARIANTS[name]}
        for name in ("hard", "bfloat16", "float8", "8bit")
    ]
    two += [
        {"name": "hard-fsdp1-from-8", "how": "fsdp1", "resume": "hard-fsdp1/8.ckpt"},
        {"name": "llama-fsdp1", "how": "fsdp1-llama", **model, "distillation": 0.5},
    ]
    status, said = launch(2, place, *two)
    assert status == 0, said
    status, said = launch(
        3,
        place,
        {"name": "hard-3-from-two", "how": "fsdp2", "resume": "hard-2/4.ckpt"},
        {"name": "float8-3-from-two", "how": "fsdp2", "resume": "float8-2/4.ckpt", **VARIANTS["float8"]},
        {"name": "8bit-3-from-two", "how": "fsdp2", "resume": "8bit-2/4.ckpt", **VARIANTS["8bit"]},
        {"name": "hard-3-fsdp1", "how": "fsdp1", "resume": "hard-fsdp1/4.ckpt"},
        {"name": "float8-3-fsdp1", "how": "fsdp1", "resume": "float8-fsdp1/4.ckpt", **VARIANTS["float8"]},
    )
    assert status == 0, said
    worker.run(place, "hard-1-from-full", "auto", resume="full-2/4.ckpt")
    return place


def load(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: tuple[float, float]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        if t.is_floating_point() and t.itemsize >= 4:
            torch.testing.assert_close(t, b[name], rtol=tolerance[0], atol=tolerance[1], msg=name)
        elif name.endswith(("state1", "state2")):  # codes of nearly equal numbers
            assert int((t.int() - b[name].int()).abs().max()) <= 1, name
        else:
            assert torch.equal(t, b[name]), name


@pytest.mark.parametrize("variant", [*VARIANTS, "ddp", "full"])
def test_two_processes_find_what_one_finds(variant: str, folder: Path) -> None:
    one = load(folder, f"{variant}-1" if variant in VARIANTS else "hard-1")
    two = load(folder, f"{variant}-2")
    tolerance = ROUNDED if variant == "8bit" else EXACT
    assert_close(one["weights"], two["weights"], tolerance)
    assert_close(one["state"], two["state"], tolerance)
    kept = {name: int((p != 0).sum()) for name, p in two["weights"].items()}
    assert kept["layers.0.weight"] == 67 * 64 - round(0.9 * 67 * 64)
    assert [int((matrix != 0).sum()) for matrix in two["weights"]["experts"]] == [64 * 64 - round(0.9 * 64 * 64)] * 3
    assert two["step"] == VARIANTS.get(variant, {}).get("steps", worker.STEPS) - (variant == "broken")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_of_fsdp1_find_what_one_finds(variant: str, folder: Path) -> None:
    one, two = load(folder, f"{variant}-1"), load(folder, f"{variant}-fsdp1")
    assert two["step"] == one["step"]
    for name, p in two["weights"].items():
        assert name == "unused.weight" or int((p == 0).sum()) == int((one["weights"][name] == 0).sum()), name
        if variant == "8bit":  # blocks of 256 begin elsewhere, and rounding decides about a few weights
            assert ((p != 0) == (one["weights"][name] != 0)).double().mean() > 0.9, name
        elif name != "unused.weight":  # FSDP1 gives it a gradient of 0, and the others none
            torch.testing.assert_close(p.double(), one["weights"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "run",
    ["hard-2-from-4", "hard-2-from-8", "full-2-from-4", "float8-2-from-4", "8bit-2-from-4", "hard-fsdp1-from-4",
     "hard-fsdp1-from-8", "bfloat16-fsdp1-from-4", "float8-fsdp1-from-4", "8bit-fsdp1-from-4"],
)  # fmt: skip
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(run: str, folder: Path) -> None:
    whole, resumed = load(folder, run.split("-from")[0]), load(folder, run)
    for part in ("weights", "state"):
        assert whole[part].keys() == resumed[part].keys()
        for name, t in whole[part].items():
            assert t.dtype == resumed[part][name].dtype and torch.equal(t, resumed[part][name]), name


@pytest.mark.parametrize(
    "run",
    ["hard-2-from-one", "8bit-2-from-one", "hard-2-from-ddp", "hard-3-from-two", "float8-3-from-two",
     "8bit-3-from-two", "hard-1-from-full"],
)  # fmt: skip
def test_a_run_goes_on_with_another_number_of_processes_or_strategy(run: str, folder: Path) -> None:
    variant = run.split("-")[0]
    one, resumed = load(folder, f"{variant}-1"), load(folder, run)
    assert_close(one["weights"], resumed["weights"], ROUNDED if variant == "8bit" else EXACT)
    assert_close(one["state"], resumed["state"], ROUNDED if variant == "8bit" else EXACT)


@pytest.mark.parametrize("variant", ["hard", "float8"])
def test_fsdp1_goes_on_with_another_number_of_processes(variant: str, folder: Path) -> None:
    two, three = load(folder, f"{variant}-fsdp1"), load(folder, f"{variant}-3-fsdp1")
    for name, p in two["weights"].items():
        torch.testing.assert_close(p, three["weights"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("run", ["llama-2", "llama-fsdp1"])
def test_a_language_model_is_loaded_distilled_measured_and_exported_in_shards(run: str, folder: Path) -> None:
    torch.testing.assert_close(load(folder, "llama-1"), load(folder, run), rtol=1e-4, atol=0)
    one, two = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("llama-1", run))
    assert two.lm_head.weight is two.model.embed_tokens.weight
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
        if "_proj" in name:
            assert int((q == 0).sum()) == round(0.8 * q.numel())


def test_a_killed_process_ends_all_and_costs_what_came_after_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    status, _ = launch(2, tmp_path, {"name": "killed", "how": "fsdp2", "signal": [1, 6, int(signal.SIGKILL)]})
    assert status != 0
    assert not (tmp_path / "killed/6.ckpt/meta.pt").exists()
    status, said = launch(2, tmp_path, {"name": "half", "how": "fsdp2", "resume": "killed/5.ckpt"})
    assert status == 0, said
    whole, resumed = load(folder, "hard-2"), load(tmp_path, "half")
    assert all(torch.equal(t, resumed["weights"][name]) for name, t in whole["weights"].items())


def test_sigterm_on_one_process_saves_on_all_and_resumes(folder: Path, tmp_path: Path) -> None:
    status, said = launch(2, tmp_path, {"name": "ended", "how": "fsdp2", "signal": [1, 3, int(signal.SIGTERM)]})
    assert status != 0 and "terminated after optimizer step 4; resume with ckpt_path=" in said
    status, said = launch(2, tmp_path, {"name": "on", "how": "fsdp2", "resume": "terminated-step=4.ckpt"})
    assert status == 0, said
    whole, resumed = load(folder, "hard-2"), load(tmp_path, "on")
    assert all(torch.equal(t, resumed["weights"][name]) for name, t in whole["weights"].items())


def test_a_checkpoint_that_was_not_written_to_its_end_is_refused(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    half.mkdir()
    (half / ".metadata").write_bytes((folder / "hard-2/4.ckpt/.metadata").read_bytes())
    status, said = launch(2, tmp_path, {"name": "x", "how": "fsdp2", "resume": "half.ckpt"})
    assert status != 0 and "half.ckpt' is no whole checkpoint" in said and "resume from an earlier one" in said


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_shipped_configuration_runs_on_two_processes_of_its_own(config: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable, "-m", "elsa_lightning", "fit", f"--config=configs/{config}.yaml", "--trainer.accelerator=cpu",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.eval_segments=4", "--data.seq_len=32",
        f"--trainer.default_root_dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=root, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "validation, 4 segments of 32 tokens" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lightning_logs/version_0/hf")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert int((weight == 0).sum()) == round(0.9 * weight.numel())
