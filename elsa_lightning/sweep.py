"""``elsa sweep``: runs fit at several sparsities and seeds, each in its own process and folder, and writes a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from elsa_lightning.commands import CommandParser
from elsa_lightning.errors import UserError

_PLAN, _DONE, _LOG, _LOCK = "sweep.json", "done.json", "log.txt", ".lock"
_OURS = {  # options of fit that the sweep sets itself
    "--elsa.sparsity": "--sparsity", "--seed_everything": "--seeds", "--trainer.default_root_dir": "--output",
    "--ckpt_path": "nothing: runs that were interrupted go on by themselves", "--print_config": "elsa fit",
}  # fmt: skip
_EXAMPLES = """\
Every other option is given to elsa fit (elsa fit --help). Runs that are finished are skipped and runs that were
interrupted go on from their last checkpoint, so the same command again continues a sweep: after Ctrl-C, a crash, or
with more sparsities or seeds.

examples:
  elsa sweep --config configs/elsa.yaml --sparsity 0.5,0.7,0.9
  elsa sweep --config configs/elsa.yaml --sparsity 0.5,0.7,0.9 --seeds 3 --output runs/curve
  elsa sweep --config configs/elsa.yaml --sparsity 0.8,0.9 --jobs 2 --trainer.max_steps 500
"""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        sparsity: The sparsity, as given.
        seed: The run's seed.
        folder: The run's folder.
    """

    sparsity: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether the run finished, by the sweep's mark or, if the sweep was killed before that, the run's journal."""
        return (self.folder / _DONE).is_file() or any(_status(file) == "finished" for file in self.journals)

    @property
    def journals(self) -> list[Path]:
        """Journals of the run, and of runs that it resumed, the latest last."""
        return sorted(self.folder.rglob("elsa_run*.json"), key=lambda file: file.stat().st_mtime)

    @property
    def checkpoint(self) -> Path | None:
        """The latest complete checkpoint of the run, or None."""
        found = [p for p in self.folder.rglob("*.ckpt") if p.is_dir() or zipfile.is_zipfile(p)]
        return max(found, key=lambda p: p.stat().st_mtime, default=None)

    def command(self, options: Sequence[str]) -> list[str]:
        """Return the command that starts the run, or resumes it."""
        resumed = [] if self.checkpoint is None else ["--ckpt_path", str(self.checkpoint)]
        return [
            *_fit(options), "--elsa.sparsity", self.sparsity, "--seed_everything", str(self.seed),
            "--trainer.default_root_dir", str(self.folder), *resumed,
        ]  # fmt: skip


def parser() -> CommandParser:
    """Return the parser, without slow imports."""
    made = CommandParser(
        "elsa sweep",
        others=True,
        description="Fit at several sparsities and seeds, and report them together: perplexity against sparsity.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--sparsity", required=True, type=_sparsities, metavar="S,S,…", help="fractions of zeros, such as 0.5,0.7,0.9")
    add("--seeds", type=_count, default=1, metavar="N", help="runs at each of them, with seeds 0 to N − 1")
    add("--jobs", type=_count, default=1, metavar="N", help="runs at a time; several GPUs are dealt out among them")
    add("--output", default="runs/sweep", metavar="FOLDER", help="of the runs and the report (default: %(default)s)")
    return made


def main(arguments: Sequence[str]) -> None:
    """Run a sweep, or resume one.

    Args:
        arguments: The arguments after ``sweep``.

    Raises:
        SystemExit: A run failed (1), or the sweep was interrupted (130, or 143 by SIGTERM).
        UserError: The folder has a sweep with other options, or one that is still running.
    """
    try:
        _sweep(arguments)
    except KeyboardInterrupt:  # before the runs begin, or a second one, which ends them at once
        raise SystemExit(128 + signal.SIGINT) from None


def _sweep(arguments: Sequence[str]) -> None:
    given, options = parser().parse_known_args(arguments)
    for option in options:
        if (name := option.partition("=")[0]) in _OURS:
            raise UserError(f"elsa sweep gives {name} to each run itself: use {_OURS[name]}")
    from elsa_lightning.reports.command import report
    from elsa_lightning.reports.page import check_output, check_packages

    folder = Path(given.output).expanduser()
    check_packages()
    check_output(folder / "report.html")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {given.output!r} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(sparsity, seed, folder / f"sparsity-{sparsity}-seed-{seed}")
        for sparsity in given.sparsity
        for seed in range(given.seeds)
    ]
    with _locked(folder) as lock:
        _check_options(folder, options)
        stop, failed = _run_all(jobs, options, given.jobs, lock)
    if begun := [job.journals[-1] for job in jobs if job.journals]:
        report(begun, folder / "report.html")
    else:
        print("no run left anything to report: runs do that have a logger or checkpoints")
    left = [job for job in jobs if job in failed or not job.done]
    if stop or left:
        again = shlex.join(["elsa", "sweep", *arguments])
        done = len(jobs) - len(left)
        print(f"{done} of {len(jobs)} runs are finished; the same command goes on with the others:\n  {again}")
        raise SystemExit(128 + stop if stop else 1)


def _status(journal: Path) -> str | None:
    try:
        return str(json.loads(journal.read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):  # cut off when the machine stopped
        return None


def _fit(options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "elsa_lightning", "fit", *options]


def _sparsities(given: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    try:
        fits = all(0 <= float(word) < 1 for word in words)
    except ValueError:
        fits = False
    if not words or not fits:
        raise argparse.ArgumentTypeError(f"fractions of zeros in [0, 1) with commas between, got {given!r}")
    return list({repr(float(word)).removesuffix(".0"): None for word in words})


def _count(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, got {given!r}")
    return int(given)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str] | None]:
    """Lock a folder for this sweep and its runs, which keep the lock if the sweep is killed.

    Raises:
        UserError: The folder is locked by another sweep.
    """
    try:
        import fcntl
    except ImportError:  # no locking without flock
        yield None
        return
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"a sweep in {str(folder)!r} still runs, or runs that it started do: wait for them, end them, or give "
                f"another --output"
            ) from None
        yield lock


def _check_options(folder: Path, options: Sequence[str]) -> None:
    """Check before any run that fit accepts the options, and that existing runs had the same."""
    asked = subprocess.run([*_fit(options), "--print_config"], capture_output=True, text=True, check=False)
    if asked.returncode:
        lines = asked.stderr.strip().splitlines()
        sys.stderr.write((lines[-1] if lines else "elsa: error: fit does not take these options") + "\n")
        raise SystemExit(asked.returncode)
    _check_config(yaml.safe_load(asked.stdout))
    plan, file = {"options": list(options), "config": asked.stdout}, folder / _PLAN
    if file.is_file() and (former := json.loads(file.read_text(encoding="utf-8")))["config"] != plan["config"]:
        raise UserError(
            f"{str(folder)!r} has a sweep with other options ({shlex.join(former['options'])}, or another content of "
            f"its configuration), and runs of both would not compare: give another --output"
        )
    _write(file, plan)


def _check_config(config: dict[str, Any]) -> None:
    """Raise UserError if a configuration conflicts with the sweep's options, or all runs would write to one place."""
    trainer = config.get("trainer") or {}
    listed = [c for of in ("callbacks", "logger") for c in _listed(trainer.get(of))]
    if any(str(c.get("class_path", "")).endswith("ElsaCallback") for c in listed):
        raise UserError("elsa sweep sets elsa.sparsity, and the configuration has an ElsaCallback under "
                        "trainer.callbacks: move its arguments to 'elsa:'")  # fmt: skip
    if (config.get("elsa") or {}).get("constraint"):
        raise UserError("elsa sweep sets elsa.sparsity, and the configuration has elsa.constraint: leave that out, or "
                        "run elsa fit once for each set and compare with elsa report")  # fmt: skip
    for component in listed:
        for name in ("dirpath", "save_dir"):
            if (place := (component.get("init_args") or {}).get(name)) is not None:
                raise UserError(
                    f"{component['class_path']} writes to {name}: {place}, which all runs of a sweep would share: "
                    f"leave it out, and each writes to its own folder"
                )


def _listed(given: Any) -> list[dict[str, Any]]:
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, dict)]


def _run_all(jobs: Sequence[Job], options: Sequence[str], at_once: int, lock: IO[str] | None) -> tuple[int, list[Job]]:
    """Run the jobs that are not done, ``at_once`` in parallel.

    Returns:
        The signal that ended them, or 0, and the jobs whose processes failed, whatever their journals say.
    """
    waiting, running, stop, asked = [job for job in jobs if not job.done], dict[int, tuple[Job, Any, float]](), 0, [0]
    failed: list[Job] = []
    skipped = len(jobs) - len(waiting)
    print(f"{len(jobs)} runs" + (f", {skipped} of them finished before" if skipped else ""), flush=True)
    with _signals(asked), _none_left(running):
        while running or (waiting and not stop):
            while waiting and not stop and len(running) < at_once:
                slot = next(n for n in range(at_once) if n not in running)
                job = waiting.pop(0)
                running[slot] = (job, _start(job, options, slot, at_once, lock), time.monotonic())
            time.sleep(0.1)
            if asked[0] and not stop:
                stop = asked[0]
                print("ending the runs, which save a checkpoint first where they can", flush=True)
                for _, process, _ in running.values():
                    process.send_signal(stop)
            for slot, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    _conclude(job, process.returncode, time.monotonic() - began, stop)
                    failed += [job] if process.returncode else []
    return stop, failed


def _start(job: Job, options: Sequence[str], slot: int, at_once: int, lock: IO[str] | None) -> subprocess.Popen[bytes]:
    """Start a run in its own session, so that Ctrl-C reaches it only through the sweep."""
    job.folder.mkdir(parents=True, exist_ok=True)
    resumed = job.checkpoint
    print(
        f"sparsity {job.sparsity}, seed {job.seed}: " + (f"goes on from {resumed}" if resumed else "begins")
        + f"; {job.folder / _LOG}",
        flush=True,
    )  # fmt: skip
    with (job.folder / _LOG).open("ab") as log:
        return subprocess.Popen(
            job.command(options), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, **_share(slot, at_once)},
            pass_fds=() if lock is None else (lock.fileno(),),
        )  # fmt: skip


def _share(slot: int, at_once: int) -> dict[str, str]:
    """Return environment variables that divide threads, and GPUs if there are several, among parallel runs."""
    if at_once == 1:
        return {}
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        import torch

        seen = ",".join(map(str, range(torch.cuda.device_count())))
    if len(devices := [device for device in seen.split(",") if device]) > 1:
        found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return found


def _conclude(job: Job, code: int, seconds: float, stop: int) -> None:
    """Print how a run ended, and mark it as done if it finished."""
    told = f"sparsity {job.sparsity}, seed {job.seed}: "
    if code == 0:
        _write(job.folder / _DONE, {"seconds": round(seconds, 1)})
        print(f"{told}finished in {seconds:.0f} s", flush=True)
    elif stop:
        print(f"{told}interrupted", flush=True)
    else:
        lines = (job.folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = re.sub(r"^elsa: error: ", "", lines[-1].strip()) if lines else "it said nothing"
        print(f"{told}failed with status {code}: {last}; see {job.folder / _LOG}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _none_left(running: dict[int, tuple[Job, Any, float]]) -> Iterator[None]:
    """Kill runs that are still running when the block is left, as after a second Ctrl-C."""
    try:
        yield
    finally:
        for _, process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _signals(asked: list[int]) -> Iterator[None]:
    """Treat the first Ctrl-C or SIGTERM as a request to stop, and the second as an immediate end."""

    def ask(signum: int, frame: Any) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = signum

    former = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _write(file: Path, told: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
