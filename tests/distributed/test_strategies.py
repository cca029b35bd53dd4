"""Any number of processes gets the result of one; runs resume to the bit, on other numbers, and after faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.callbacks.journal import JOURNAL
from tests.distributed import worker

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
STATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "float8": {"state_dtype": "float8_e4m3fn"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"adam": {}, "8bit": {"optimizer": "8bit", "dtype": "float32"}}
RUNS = {f"{s}-{o}": STATES[s] | OPTIMIZERS[o] for s, o in product(STATES, OPTIMIZERS)}
MATRIX = [f"{how}-{run}" for how, run in product(STRATEGIES, RUNS)]
OTHERS: dict[str, dict[str, Any]] = {
    "coupled": {"prox": "coupled", "penalty": 0.05},
    "accumulated": {"accumulate": 2, "steps": 6},
    "chosen rate": {"learning_rate": "auto", "ignore": ["fixed", "unused"]},  # from all processes' weights
    "broken": {"broken": [3]},  # the last process's loss is NaN at step 3
}
LOW: dict[str, dict[str, Any]] = {
    "mixed": {"precision": "bf16-mixed", "dtype": "float32"},
    "half": {"precision": "bf16-true", "dtype": "bfloat16", "optimizer": "8bit", "state_dtype": "float8_e4m3fn"},
}
EXACT = 1e-12, 1e-12  # float64 sums in another order
ROUNDED = 1e-4, 1e-6  # float32
IN_8_BITS = ROUNDED, 1e-3
MAIN = "float32-adam"


def run(command: list[str], timeout: int = 600) -> tuple[int, str]:
    """Run a command on one thread a process; return the exit status and what it said."""
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True, timeout=timeout, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def launch(processes: int, folder: Path, *runs: dict[str, Any]) -> tuple[int, str]:
    """Run the worker on so many processes."""
    return run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "tests.distributed.worker", str(folder), json.dumps(runs),
    ])  # fmt: skip


def elsa(config: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """Run two steps of a shipped configuration, which launches processes of its own."""
    return run([
        sys.executable, "-m", "elsa_lightning", "fit", f"--config=configs/{config}.yaml", "--trainer.accelerator=cpu",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.eval_segments=4", "--data.seq_len=32",
        f"--trainer.default_root_dir={folder}", *arguments,
    ], timeout=300)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, text_file: Path, token_cache: str) -> Path:
    """All runs that end well, on one, two and three processes."""
    place = tmp_path_factory.mktemp("strategies")
    for name, options in (RUNS | OTHERS | LOW).items():
        worker.run(place, f"one-{name}", "auto", **options)
    model = {"model": tiny_llama, "text": str(text_file), "cache": token_cache, "distillation": 0.5}
    model["feature_distillation"] = 0.5
    worker.language_model(place, "one-llama", "auto", **model)

    two: list[dict[str, Any]] = []
    for how in STRATEGIES:
        for name, options in (RUNS | OTHERS).items():
            two.append({"name": f"{how}-{name}", "how": how, **options})
        for name, options in RUNS.items():
            two.append({"name": f"{how}-{name}-from-4", "how": how, "resume": f"{how}-{name}/4.ckpt", **options})
        # the frozen phase, which has other state
        two.append({"name": f"{how}-{MAIN}-from-8", "how": how, "resume": f"{how}-{MAIN}/8.ckpt"})
        two.append({"name": f"{how}-llama", "how": how, **model, "gradient_checkpointing": True})
    two += [{"name": f"fsdp2-{name}", "how": "fsdp2", **options} for name, options in LOW.items()]
    two += [
        {"name": "fsdp2-half-from-4", "how": "fsdp2", "resume": "fsdp2-half/4.ckpt", **LOW["half"]},
        {"name": "full", "how": "fsdp2-full"},
        {"name": "full-from-4", "how": "fsdp2-full", "resume": "full/4.ckpt"},
        {"name": f"{MAIN}-1-to-2", "how": "fsdp2", "resume": f"one-{MAIN}/4.ckpt"},
        {"name": "float8-8bit-1-to-2", "how": "fsdp2", "resume": "one-float8-8bit/4.ckpt", **RUNS["float8-8bit"]},
        {"name": f"{MAIN}-ddp-to-fsdp2", "how": "fsdp2", "resume": f"ddp-{MAIN}/8.ckpt"},
    ]
    status, said = launch(2, place, *two)
    assert status == 0, said
    three = [
        {"name": f"{name}-{how}-2-to-3", "how": how, "resume": f"{how}-{name}/4.ckpt", **RUNS[name]}
        for how, name in [*product(["fsdp2"], [MAIN, "float8-adam", "float8-8bit"]), ("fsdp1", MAIN)]
    ]
    status, said = launch(3, place, *three)
    assert status == 0, said
    worker.run(place, f"{MAIN}-2-to-1", "auto", resume="full/4.ckpt")
    return place


def load(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: tuple[float, float], few: float = 0.0) -> None:
    """Fail unless all is close, but for a share of ``few`` entries, whose 8-bit codes were rounded otherwise."""
    rtol, atol = (1e-2, 1e-3) if few else tolerance
    assert a.keys() == b.keys()
    for name, t in a.items():
        if t.is_floating_point() and t.itemsize >= 4:
            torch.testing.assert_close(t, b[name], rtol=rtol, atol=atol, msg=name)
            apart = ~torch.isclose(t, b[name], rtol=tolerance[0], atol=tolerance[1])
            assert apart.double().mean() <= few, name
        elif name.endswith(("state1", "state2")):  # codes of nearly equal numbers
            assert ((t.int() - b[name].int()).abs() > 1).double().mean() <= few, name
        else:
            assert torch.equal(t, b[name]), name


def assert_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Fail unless nearly the same weights are kept: rounding decides about a few."""
    assert sum(int((p == 0).sum()) for p in a.values()) == sum(int((b[name] == 0).sum()) for name in a)
    for name, p in a.items():
        assert abs(int((p == 0).sum()) - int((b[name] == 0).sum())) <= 0.01 * p.numel(), name
        assert ((p != 0) == (b[name] != 0)).double().mean() > 0.9, name


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype and torch.equal(t, b[name]), name


@pytest.mark.parametrize("case", [*MATRIX, *(f"{how}-{name}" for how, name in product(STRATEGIES, OTHERS)), "full"])
def test_two_processes_find_what_one_finds(case: str, folder: Path) -> None:
    how, _, name = case.partition("-")
    one, two = load(folder, f"one-{name or MAIN}"), load(folder, case)
    assert two["step"] == one["step"]
    pruned = [two["weights"][name] for name in ("layers.0.weight", "layers.2.weight", "kernels.weight", "experts")]
    entries = sum(p.numel() for p in pruned)
    assert sum(int((p != 0).sum()) for p in pruned) == entries - round(0.9 * entries)
    if how != "fsdp1":
        allowed = IN_8_BITS if "8bit" in name else (EXACT, 0.0)
        assert_close(one["weights"], two["weights"], *allowed)
        assert_close(one["state"], two["state"], *allowed)
        return
    for part in (one, two):  # FSDP1 gives it a gradient of 0, and the others none, so there it is left out
        del part["weights"]["unused.weight"]
    if "8bit" in name:  # blocks of 256 begin elsewhere
        assert_alike(one["weights"], two["weights"])
    else:  # FSDP1 keeps float32
        assert_close({n: p.float() for n, p in one["weights"].items()}, two["weights"], ROUNDED)


@pytest.mark.parametrize("how", STRATEGIES)
def test_two_processes_note_what_one_notes(how: str, folder: Path) -> None:
    one, two = (json.loads((folder / f"{name}-{MAIN}" / JOURNAL).read_text()) for name in ("one", how))
    assert two["status"] == "finished" and two["processes"] == 2
    assert [note["step"] for note in two["notes"]] == [note["step"] for note in one["notes"]]
    for name, counts in two["tensors"].items():
        if how != "fsdp1" or not name.startswith("unused"):  # whose gradient of 0 moves nothing
            assert counts[:2] == one["tensors"][name][:2], name
    for mine, theirs in zip(one["notes"], two["notes"], strict=True):
        assert (mine["scores"] is None) == (theirs["scores"] is None)
        for of in ("kept", "cut") if mine["scores"] and how != "fsdp1" else ():
            moved = sum(abs(a - b) for a, b in zip(mine["scores"][of], theirs["scores"][of], strict=True))
            assert moved <= 4  # rounding at the edge of a bin


@pytest.mark.parametrize("name", LOW)
def test_low_precision_keeps_the_same_weights_but_for_rounding(name: str, folder: Path) -> None:
    assert_alike(load(folder, f"one-{name}")["weights"], load(folder, f"fsdp2-{name}")["weights"])


@pytest.mark.parametrize(
    "case",
    [
        *(f"{c}-from-4" for c in MATRIX),
        *(f"{how}-{MAIN}-from-8" for how in STRATEGIES),
        "full-from-4",
        "fsdp2-half-from-4",
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(case: str, folder: Path) -> None:
    whole, resumed = load(folder, case.split("-from")[0]), load(folder, case)
    assert_same(whole["weights"], resumed["weights"])
    assert_same(whole["state"], resumed["state"])


@pytest.mark.parametrize(
    "case",
    [f"{MAIN}-1-to-2", "float8-8bit-1-to-2", f"{MAIN}-fsdp2-2-to-3", "float8-adam-fsdp2-2-to-3",
     "float8-8bit-fsdp2-2-to-3", f"{MAIN}-2-to-1", f"{MAIN}-ddp-to-fsdp2"],
)  # fmt: skip
def test_a_run_goes_on_with_another_number_of_processes_or_strategy(case: str, folder: Path) -> None:
    name = "-".join(case.split("-")[:2])
    one, resumed = load(folder, f"one-{name}"), load(folder, case)
    allowed = IN_8_BITS if "8bit" in name else (EXACT, 0.0)
    assert_close(one["weights"], resumed["weights"], *allowed)
    assert_close(one["state"], resumed["state"], *allowed)


def test_fsdp1_goes_on_with_another_number_of_processes(folder: Path) -> None:
    two, three = load(folder, f"fsdp1-{MAIN}"), load(folder, f"{MAIN}-fsdp1-2-to-3")
    assert_close(two["weights"], three["weights"], ROUNDED)


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_language_model_is_loaded_distilled_measured_and_exported(how: str, folder: Path) -> None:
    torch.testing.assert_close(load(folder, "one-llama"), load(folder, f"{how}-llama"), rtol=1e-4, atol=0)
    one, two = (AutoModelForCausalLM.from_pretrained(folder / f"{name}-llama") for name in ("one", how))
    assert two.lm_head.weight is two.model.embed_tokens.weight
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    pruned = [q for name, q in two.named_parameters() if "_proj" in name]
    assert sum(int((q == 0).sum()) for q in pruned) == round(0.8 * sum(q.numel() for q in pruned))


def test_a_killed_process_ends_all_and_costs_what_came_after_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    for how in STRATEGIES:  # before process 1 has a part in the checkpoint of step 6
        status, _ = launch(2, tmp_path, {"name": f"{how}-killed", "how": how, "signal": [1, 6, int(signal.SIGKILL)]})
        assert status != 0
        assert not (tmp_path / f"{how}-killed/6.ckpt/meta.pt").exists()
    goes_on = [{"name": f"{how}-on", "how": how, "resume": f"{how}-killed/5.ckpt"} for how in STRATEGIES]
    status, said = launch(2, tmp_path, *goes_on)
    assert status == 0, said
    for how in STRATEGIES:
        assert_same(load(folder, f"{how}-{MAIN}")["weights"], load(tmp_path, f"{how}-on")["weights"])


def test_sigterm_on_one_process_saves_on_all_and_resumes(folder: Path, tmp_path: Path) -> None:
    status, said = launch(2, tmp_path, {"name": "ended", "how": "fsdp2", "signal": [1, 3, int(signal.SIGTERM)]})
    assert status != 0 and "terminated after optimizer step 4; resume with ckpt_path=" in said
    status, said = launch(2, tmp_path, {"name": "on", "how": "fsdp2", "resume": "terminated-step=4.ckpt"})
    assert status == 0, said
    assert_same(load(folder, f"fsdp2-{MAIN}")["weights"], load(tmp_path, "on")["weights"])


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_refused(how: str, folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    half.mkdir()
    (half / ".metadata").write_bytes((folder / f"{how}-{MAIN}/4.ckpt/.metadata").read_bytes())
    status, said = launch(2, tmp_path, {"name": "x", "how": how, "resume": "half.ckpt"})
    assert status != 0 and "half.ckpt' is no whole checkpoint" in said and "resume from an earlier one" in said


def test_fsdp1_refuses_the_checkpoint_of_a_run_that_it_cannot_read(folder: Path) -> None:
    status, said = launch(2, folder, {"name": "x", "how": "fsdp1", "resume": f"ddp-{MAIN}/4.ckpt"})
    assert status != 0 and "FSDPStrategy cannot resume" in said and "ModelParallelStrategy" in said


@pytest.mark.parametrize("config", STRATEGIES)
def test_a_shipped_configuration_runs_on_two_processes_of_its_own(config: str, tmp_path: Path) -> None:
    on_cpu = {
        "fsdp1": ['--trainer.strategy={"class_path": "tests.distributed.worker.FSDP1"}']
    }  # Lightning's own asks for GPUs
    status, said = elsa(config.replace("fsdp1", "fsdp"), tmp_path, *on_cpu.get(config, []))
    assert status == 0, said
    assert "validation, 4 segments of 32 tokens" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lightning_logs/version_0/hf")
    pruned = [p for p in model.model.layers.parameters() if p.dim() > 1]
    assert sum(int((p == 0).sum()) for p in pruned) == round(0.9 * sum(p.numel() for p in pruned))


def test_a_process_that_fails_early_ends_all_with_its_error(tmp_path: Path) -> None:
    status, said = elsa("ddp", tmp_path, "--trainer.callbacks+=tests.distributed.worker.Fails")
    assert status != 0 and "process 1 fails" in said


def test_a_mesh_that_the_devices_do_not_fill_is_refused(tmp_path: Path) -> None:
    status, said = elsa("fsdp2", tmp_path, "--trainer.strategy.data_parallel_size=3")
    assert status != 0 and "data_parallel_size=3" in said and "world size" in said


class Two(LightningModule):
    """Two layers, each with its own optimizer, under FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not any(hasattr(layer, "unshard") for layer in self.layers):
            for layer in self.layers:
                fully_shard(layer, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward((self.layers[1](self.layers[0](batch).tanh()) - batch).square().mean())
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in self.layers]


@pytest.mark.parametrize(("pruned", "distributed"), [([0], True), ([0], False), ([0, 1], True)])
def test_every_optimizer_of_a_run_is_resumed(pruned: list[int], distributed: bool, tmp_path: Path) -> None:
    def fitted(steps: int, ckpt_path: Path | None) -> Trainer:
        callbacks: list[Any] = [
            ElsaCallback(sparsity=0.5, optimizer_index=i, total_steps=4, targets=[f"layers.{i}.weight"]) for i in pruned
        ]
        strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=distributed)
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_steps=steps, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        data: Any = torch.randn(16, 8)
        trainer.fit(Two(), torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=ckpt_path)
        return trainer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fitted(8, None).save_checkpoint(tmp_path / "four.ckpt")  # Lightning counts the steps of both
        resumed = fitted(12, tmp_path / "four.ckpt")
        states = [state for optimizer in resumed.optimizers for state in optimizer.state.values()]
        assert [int(state["step"]) for state in states] == [6] * 4
    finally:
        dist.destroy_process_group()


def test_a_language_model_in_shards_goes_on_to_the_bit(
    tiny_llama: str, text_file: Path, token_cache: str, tmp_path: Path
) -> None:
    """Its distributed checkpoint has the optimizer's state apart from the rest, and is no checkpoint of weights."""

    def fitted(ckpt_path: Path | None) -> dict[str, Tensor]:
        data = CalibrationData(
            str(text_file), tokenizer=tiny_llama, seq_len=16, batch_size=2, eval_segments=2, cache_dir=token_cache
        )
        saver = ModelCheckpoint(tmp_path, "{step}", auto_insert_metric_name=False, every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=ModelParallelStrategy(1, 1), max_steps=4, logger=False,
            callbacks=[ElsaCallback(sparsity=0.8), saver], limit_val_batches=0, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = CausalLM(tiny_llama)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        assert trainer.global_step == 4
        return {name: worker.whole(p.detach()) for name, p in module.named_parameters()}

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_same(fitted(None), fitted(tmp_path / "2.ckpt"))
    finally:
        dist.destroy_process_group()
