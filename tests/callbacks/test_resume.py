"""An interrupted run that is resumed with ckpt_path ends as the uninterrupted one does, to the bit."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from elsa_lightning import ElsaCallback
from tests.callbacks import tiny
from tests.callbacks.tiny import (
    At,
    Crash,
    Net,
    assert_same,
    assert_same_run,
    crash,
    every_step,
    fit,
    interrupt,
    load,
    loader,
    make_trainer,
    zeros,
)

LAST = "20.ckpt"
FREEZE = 10
POINTS = [1, 2, 6, FREEZE - 1, FREEZE, 15, 18, 19]  # 6 and 18 end an epoch, 3 and 9 project


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, every_step(folder))
    return folder


@pytest.mark.parametrize("step", POINTS)
def test_a_crash_after_any_step_costs_nothing(step: int, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fit(tmp_path, every_step(tmp_path), At(step + 1, crash))
    assert not (tmp_path / f"{step + 1}.ckpt").exists()
    fit(tmp_path, every_step(tmp_path), resume=tmp_path / f"{step}.ckpt")
    assert_same_run(tmp_path / LAST, uninterrupted / LAST)


@pytest.mark.parametrize(
    ("optimizer", "precision", "prox", "state_dtype"),
    [
        ("adam", "bf16-true", "linearized", "bfloat16"),
        ("adam", "32-true", "feedback", "float32"),
        ("adam", "bf16-mixed", "coupled", "float8_e4m3fn"),
        ("adam8bit", "32-true", "linearized", "float32"),
        ("adam8bit", "bf16-true", "decoupled", "float32"),
        ("adam8bit", "bf16-true", "linearized", "float8_e4m3fn"),
        ("adam8bit", "bf16-mixed", "linearized", "bfloat16"),
        ("sgd", "32-true", "coupled", "float32"),
        ("sgd", "bf16-true", "linearized", "float8_e4m3fn"),
        ("sgd", "bf16-mixed", "decoupled", "bfloat16"),
    ],
)
def test_every_precision_and_optimizer_resumes_exactly(
    optimizer: str, precision: str, prox: str, state_dtype: str, tmp_path: Path
) -> None:
    elsa = {"prox": prox, "penalty": 0.1, "state_dtype": state_dtype}
    settings = {"net": {"optimizer": optimizer}, "elsa": elsa, "precision": precision}
    fit(tmp_path / "whole", every_step(tmp_path / "whole"), **settings)
    for step in (5, FREEZE, 15):
        fit(tmp_path / str(step), every_step(tmp_path / str(step)), resume=tmp_path / f"whole/{step}.ckpt", **settings)
        assert_same_run(tmp_path / str(step) / LAST, tmp_path / "whole" / LAST)
    first = load(tmp_path / "whole/5.ckpt")["optimizer_states"][0]["state"][0]
    first |= first.pop("__bnb_optimizer_quant_state__", {})
    stored = torch.uint8 if state_dtype == "float8_e4m3fn" else getattr(torch, state_dtype)
    assert first["elsa_split"].dtype == stored  # whatever the model's
    assert first["elsa_mask"].dtype == torch.uint8
    assert (first["state1"].dtype == torch.uint8) if optimizer == "adam8bit" else True


def test_a_killed_process_resumes_exactly(uninterrupted: Path, tmp_path: Path) -> None:
    script = [sys.executable, "-m", "tests.callbacks.tiny", str(tmp_path)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}
    process = subprocess.Popen(script, **quiet)
    try:
        for _ in range(1200):
            if (tmp_path / "hanging").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
    assert not (tmp_path / "12.ckpt").exists()
    subprocess.run([*script, str(tmp_path / "8.ckpt")], check=True, **quiet)
    assert_same_run(tmp_path / LAST, uninterrupted / LAST)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lightning ignores further SIGINTs after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [4, 13])
def test_ctrl_c_leaves_exact_zeros_that_resume_exactly(step: int, uninterrupted: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "interrupted", save_top_k=-1, save_on_exception=True, every_n_epochs=100)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match=f"unfinished: {step} of 20 optimizer steps"):
        fit(tmp_path, saver, At(step, interrupt))
    checkpoint = load(tmp_path / "interrupted.ckpt")
    assert sum(tiny.zeros(checkpoint["state_dict"]).values()) == 7373  # 90 % of 8192
    state = checkpoint["callbacks"]["ElsaCallback"]["admm"]
    assert (state["step"], state["phase"]) == (step, "suspended")

    fit(tmp_path, every_step(tmp_path), resume=tmp_path / "interrupted.ckpt")
    assert_same_run(tmp_path / LAST, uninterrupted / LAST)


@pytest.mark.parametrize("how", ["epochs", "epochs_with_validation", "steps_with_validation"])
def test_plain_shuffled_loaders_resume_exactly_at_the_end_of_an_epoch(how: str, tmp_path: Path) -> None:
    """Lightning draws from the random state for every loader it starts: at epochs and at validations."""

    def run(folder: Path, resume: Path | None = None) -> None:
        seed_everything(1, verbose=False)
        each_epoch = ModelCheckpoint(folder, "{step}", auto_insert_metric_name=False, save_top_k=-1)
        saver = every_step(folder) if how == "steps_with_validation" else each_epoch
        validation = None if how == "epochs" else DataLoader(tiny.Points(4))
        trainer = make_trainer(folder, ElsaCallback(sparsity=0.9, interval=3), saver, max_epochs=4)
        trainer.fit(Net(), DataLoader(tiny.Points(20), batch_size=4, shuffle=True), validation, ckpt_path=resume)

    run(tmp_path / "whole")
    for step in (5, 15):
        run(tmp_path / str(step), resume=tmp_path / f"whole/{step}.ckpt")
        assert_same_run(tmp_path / str(step) / LAST, tmp_path / "whole" / LAST)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_run_of_max_epochs_resumes_in_the_middle_of_an_epoch(step: int, tmp_path: Path) -> None:
    fit(tmp_path / "whole", every_step(tmp_path / "whole"), max_epochs=3)
    fit(tmp_path, every_step(tmp_path), max_epochs=3, resume=tmp_path / f"whole/{step}.ckpt")
    assert_same_run(tmp_path / "18.ckpt", tmp_path / "whole/18.ckpt")


def test_a_checkpoint_of_other_settings_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(constraint: .*0\.9.* there, .*0\.8.* here\)"):
        fit(tmp_path, elsa={"sparsity": 0.8}, resume=uninterrupted / "6.ckpt")
    with pytest.raises(ValueError, match="prox: linearized there, coupled here"):
        fit(tmp_path, elsa={"prox": "coupled"}, resume=uninterrupted / "6.ckpt")
    with pytest.raises(ValueError, match="constrained tensors"):
        fit(tmp_path, elsa={"ignore": ["layers.0"]}, resume=uninterrupted / "6.ckpt")


def test_pruning_may_begin_at_a_dense_checkpoint(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    make_trainer(tmp_path, every_step(tmp_path / "dense"), max_steps=8).fit(Net(), tiny.loader())
    with pytest.warns(UserWarning, match="from step 8 without a state of ElsaCallback.*remaining 12 optimizer steps"):
        _, elsa = fit(tmp_path, every_step(tmp_path / "whole"), resume=tmp_path / "dense/8.ckpt")
    assert elsa.admm is not None
    assert elsa.admm.step == elsa.admm.total_steps == 12

    fit(tmp_path, every_step(tmp_path / "resumed"), resume=tmp_path / "whole/12.ckpt")
    assert_same_run(tmp_path / "resumed" / LAST, tmp_path / "whole" / LAST)


def test_a_finished_run_can_be_extended_with_its_mask(uninterrupted: Path, tmp_path: Path) -> None:
    model, _ = fit(tmp_path, resume=uninterrupted / LAST, max_steps=24)
    before = load(uninterrupted / LAST)["state_dict"]
    for name in tiny.zeros(before):
        after = model.state_dict()[name]
        assert torch.equal(after == 0, before[name] == 0)
        assert not torch.equal(after, before[name])


def test_evaluating_with_the_callback_changes_no_weight(uninterrupted: Path, tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9))
    trainer.validate(model, tiny.loader(), ckpt_path=uninterrupted / "6.ckpt", verbose=False)
    assert_same(dict(model.state_dict()), dict(load(uninterrupted / "6.ckpt")["state_dict"]))


def test_evaluating_a_checkpoint_does_not_make_the_next_fit_a_resumed_one(uninterrupted: Path, tmp_path: Path) -> None:
    callback = ElsaCallback(sparsity=0.9, interval=3)
    trainer = make_trainer(tmp_path, callback, max_steps=20)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer.validate(Net(), loader(2), ckpt_path=str(uninterrupted / "8.ckpt"), verbose=False)
        drawn.append(float(torch.rand(())))
    assert drawn[0] != drawn[1], "the random state is the caller's"
    model = Net()
    trainer.fit(model, loader())
    assert callback.admm is not None and callback.admm.step == 20
    assert sum(zeros(model.state_dict()).values()) == 7373


def test_a_complete_run_that_is_resumed_stays_complete(uninterrupted: Path, tmp_path: Path) -> None:
    callback = ElsaCallback(sparsity=0.9, interval=3)
    trainer = make_trainer(tmp_path, callback, max_steps=20)
    trainer.fit(Net(), loader(), ckpt_path=str(uninterrupted / LAST))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    admm = load(tmp_path / "again.ckpt")["callbacks"]["ElsaCallback"]["admm"]
    assert (admm["step"], admm["phase"]) == (20, "finished")


def test_a_learning_rate_finder_sees_the_loop_without_pruning(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-3

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(sum(int((self.layers[i].weight == 0).sum()) for i in (0, 3)))
            return super().training_step(batch, batch_idx)

    model, finder = Watched(), LearningRateFinder(num_training_steps=10, attr_name="lr")
    make_trainer(tmp_path, finder, ElsaCallback(sparsity=0.9, interval=3), max_steps=20).fit(model, loader())
    assert seen[:10] == [0] * 10 and seen[-1] == 7373
