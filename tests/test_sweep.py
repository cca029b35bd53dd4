"""elsa sweep: its runs share no files, do not overwrite each other, and resume where they were."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.reports.runs import read_runs
from elsa_lightning.sweep import Job, _check_config, _locked, _share

pytest.importorskip("plotly", reason="plotly is not installed (the extra report)")


def options(model: str, cache: str, folder: Path, steps: int) -> list[str]:
    return [
        "sweep", "--config=configs/elsa.yaml", f"--output={folder}", f"--model.name={model}", "--model.distillation=0",
        "--trainer.accelerator=cpu", f"--trainer.max_steps={steps}", "--data.seq_len=32", "--data.eval_segments=8",
        f"--data.cache_dir={cache}", "--trainer.enable_model_summary=false",
    ]  # fmt: skip


def journals(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("elsa_run.json"), key=lambda file: file.stat().st_mtime)
    return [json.loads(text) for file in files if (text := file.read_text())]


def test_a_run_that_fails_loses_no_other_and_is_made_again(
    tiny_llama: str, token_cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*options(tiny_llama, token_cache, tmp_path, steps=4), "--jobs=2"]
    broken = tmp_path / "sparsity-0.5-seed-0"
    broken.mkdir()
    (broken / "lightning_logs").write_text("in the way")
    with pytest.raises(SystemExit) as end:
        main([*command, "--sparsity=0.5,0.75"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "sparsity 0.5, seed 0: failed" in said.err
    assert "sparsity 0.75, seed 0: finished" in said.out and "1 of 2 runs are finished" in said.out
    (alone,) = read_runs([tmp_path])
    assert alone.sparsity == pytest.approx(0.75, abs=1e-3)
    (broken / "lightning_logs").unlink()
    main([*command, "--sparsity=0.5,0.75"])
    said = capsys.readouterr()
    assert "2 runs, 1 of them finished before" in said.out and "0.75" not in said.out.replace("report", "")
    told = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [one["name"] for one in told] == ["sparsity-0.5-seed-0", "sparsity-0.75-seed-0"]
    assert [one["sparsity"] for one in told] == [pytest.approx(s, abs=1e-3) for s in (0.5, 0.75)]
    with pytest.raises(SystemExit):
        main([*command, "--sparsity=0.5", "--elsa.ramp=0.1"])
    assert "has a sweep with other options" in capsys.readouterr().err


def test_the_same_command_goes_on_after_ctrl_c(tiny_llama: str, token_cache: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elsa_lightning", *options(tiny_llama, token_cache, tmp_path, steps=300)]
    command += ["--sparsity=0.5", "--trainer.callbacks.every_n_train_steps=1000", "--trainer.val_check_interval=300"]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(1200):
        if any(found["notes"] for found in journals(tmp_path)):
            break
        time.sleep(0.1)
    sweep.send_signal(signal.SIGINT)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 130 and "0 of 1 runs are finished; the same command goes on" in said
    (first,) = journals(tmp_path)
    assert first["status"] == "interrupted" and first["step"] < 300
    assert Job("0.5", 0, tmp_path / "sparsity-0.5-seed-0").checkpoint is not None
    again = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "goes on from" in again.stdout and "finished in" in again.stdout
    _, second = journals(tmp_path)
    assert second["first_step"] == first["step"] and second["step"] == 300
    (told,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert told["journal"]["notes"][0]["step"] == 30 and told["status"] == "finished"


def test_what_cannot_be_swept_is_refused_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, told in (
        (["--sparsity=50"], 2, "fractions of zeros in [0, 1)"),
        (["--sparsity=0.5", "--seeds=0"], 2, "a whole number from 1 on"),
        (["--sparsity=0.5", "--seed_everything=3"], 1, "gives --seed_everything to each run itself: use --seeds"),
        (["--sparsity=0.5", "--trainer.default_root_dir", "x"], 1, "use --output"),
        (["--sparsity=0.5", "--trainer.max_stps=3"], 2, "did you mean --trainer.max_steps?"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["sweep", f"--output={tmp_path}", *arguments])
        assert end.value.code == code and told in capsys.readouterr().err
    assert not list(tmp_path.glob("sparsity*"))


def test_two_sweeps_of_a_folder_do_not_meet(tmp_path: Path) -> None:
    with _locked(tmp_path), pytest.raises(UserError, match="still runs"), _locked(tmp_path):
        pass
    with _locked(tmp_path) as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock.fileno(),))
    with pytest.raises(UserError, match="runs that it started"), _locked(tmp_path):  # whose sweep is gone
        pass
    child.kill()
    child.wait()
    with _locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"trainer": {"callbacks": [{"class_path": "elsa_lightning.ElsaCallback"}]}}, "move its arguments to 'elsa:'"),
        ({"elsa": {"constraint": {"class_path": "elsa_lightning.NM"}}}, "has elsa.constraint"),
        (
            {"trainer": {"callbacks": [{"class_path": "X.ModelCheckpoint", "init_args": {"dirpath": "here"}}]}},
            "X.ModelCheckpoint writes to dirpath: here, which all runs of a sweep would share",
        ),
        ({"trainer": {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "here"}}}}, "save_dir: here"),
    ],
)
def test_configurations_whose_runs_would_fail_or_meet_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        _check_config(config)
    _check_config({"trainer": {"callbacks": None, "logger": True}, "elsa": {"sparsity": None}})


def test_the_last_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    job = Job("0.5", 0, tmp_path)
    assert job.checkpoint is None and not job.done
    torch.save({"step": 1}, tmp_path / "a.ckpt")
    torch.save({"step": 2}, tmp_path / "b.ckpt")
    os.utime(tmp_path / "a.ckpt", (1, 1))
    assert job.checkpoint == tmp_path / "b.ckpt"
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-100])  # the machine went
    assert job.checkpoint == tmp_path / "a.ckpt"
    (tmp_path / "elsa_run.json").write_text("")
    assert not job.done
    (tmp_path / "elsa_run.json").write_text('{"status": "finished"}')
    assert job.done


def test_a_run_that_failed_after_its_end_fails_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where an export fails, whatever the run's journal says."""
    told = "import json; open('elsa_run.json', 'w').write(json.dumps({'status': 'finished', 'notes': []})); exit(1)"
    monkeypatch.setattr("elsa_lightning.sweep._check_options", lambda *_: None)
    monkeypatch.setattr(
        Job, "command", lambda self, _: ["sh", "-c", f'cd {self.folder} && {sys.executable} -c "{told}"']
    )
    with pytest.raises(SystemExit) as end:
        main(["sweep", f"--output={tmp_path}", "--sparsity=0.5"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "failed with status 1" in said.err and "0 of 1 runs are finished" in said.out


def test_ctrl_c_before_the_first_run_ends_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elsa_lightning.sweep._check_options", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["sweep", f"--output={tmp_path}", "--sparsity=0.5"])
    assert end.value.code == 130


def test_runs_at_a_time_have_their_own_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert _share(0, 1) == {}
    assert [_share(slot, 3) for slot in range(3)] == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": device} for device in ("4", "7", "4")
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert "CUDA_VISIBLE_DEVICES" not in _share(1, 2)
