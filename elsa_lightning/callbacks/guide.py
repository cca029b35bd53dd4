"""What the command line prints before a run starts, and the closing advice when it is over."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from elsa_lightning.callbacks.elsa import ElsaCallback
from elsa_lightning.callbacks.export import SaveHuggingFace
from elsa_lightning.callbacks.keep_mask import KeepMask
from elsa_lightning.callbacks.terminate import SaveOnTerminate
from elsa_lightning.callbacks.versions import SaveConfigOnce
from elsa_lightning.sets import Unstructured
from elsa_lightning.watch import STILL, settled


class Guide(Callback):
    """Prints five lines before a run: what it prunes, how long, with what memory, output folder, and how to stop.

    Args:
        model: Name of the model that is trained.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.sizes: tuple[int, int] | None = None  # numbers of constrained and of all weights, once planned
        self.memory: float | None = None  # GiB on each device, likewise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the lines; every process calls this, because the first one broadcasts the folder."""
        logs = trainer.log_dir
        lines = {
            "Prunes": self._what(trainer),
            "Takes": _how_long(trainer),
            "Memory": "not known beforehand"
            if self.memory is None
            else f"about {self.memory:.2g} GiB on each device (elsa plan lists what it goes to)",
            "Writes": _where(trainer, logs),
            "Stopping": _how_to_stop(trainer, logs),
        }
        rank_zero_info("\n" + "\n".join(f"{name:10}{text}" for name, text in lines.items()) + "\n")

    def _what(self, trainer: Trainer) -> str:
        elsa = _find(trainer, ElsaCallback)
        if elsa is None:
            return f"nothing: {self.model} is trained as it is"
        if isinstance(elsa, KeepMask):
            return f"{self.model} no further; the zeros that it has are kept"
        aim, set_ = str(elsa.constraint), elsa.constraint
        if isinstance(set_, Unstructured) and set_.sparsity is not None:
            aim = f"{100 * set_.sparsity:.4g} % zeros" + (f" in each {set_.scope}" if set_.scope != "model" else "")
        if self.sizes is None:
            return f"{self.model} to {aim}"
        return f"{self.model} to {aim} in {self.sizes[0]:,} of its {self.sizes[1]:,} weights"


def _find(trainer: Trainer, kind: type[Any]) -> Any:
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


def _how_long(trainer: Trainer) -> str:
    """Return the length of a run, without asking the data loaders, which would lose their position."""
    steps = trainer.max_steps
    elsa: Any = _find(trainer, ElsaCallback)
    data: Any = getattr(trainer, "datamodule", None)
    if steps == -1:
        return f"{trainer.max_epochs} epochs" if trainer.max_epochs not in (None, -1) else "as long as max_time says"
    text = f"{steps:,} steps"
    if hasattr(data, "batch_size") and hasattr(data, "seq_len"):
        at_once = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        text += f" of {at_once} × {data.seq_len} tokens, {steps * at_once * data.seq_len:,} in all"
    if elsa is not None and not isinstance(elsa, KeepMask) and steps > 0:
        text += f"; the mask is fixed after step {elsa.schedule.freeze_step(steps):,}"
    return text


def _where(trainer: Trainer, logs: str | None) -> str:
    model, checkpoints = _find(trainer, SaveHuggingFace), _find(trainer, ModelCheckpoint)
    what = ["the sparse model (hf)"] if model is not None and model.dirpath is None else []
    what += ["checkpoints"] if checkpoints is not None else []
    place = logs or trainer.default_root_dir
    told = f"{place}: {', '.join(what)}" if what else str(place)
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        told += f"; curves: tensorboard --logdir {trainer.default_root_dir}"
    return told + (f"; the sparse model: {model.dirpath}" if model is not None and model.dirpath else "")


def _how_to_stop(trainer: Trainer, logs: str | None) -> str:
    saver, config = _find(trainer, SaveOnTerminate), _find(trainer, SaveConfigOnce)
    if saver is None:
        return "Ctrl-C ends the run with exact zeros and saves nothing more; with the callback SaveOnTerminate it saves"
    again = f"{program()} fit --config {Path(logs) / config.config_filename}" if config and logs else "the same command"
    return f"Ctrl-C saves a checkpoint; to go on: {again} --ckpt_path CHECKPOINT"


def program() -> str:
    """Return the command with which this program can be started again."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m elsa_lightning"
    return str(started) if started.name == "elsa" and shutil.which("elsa") is None else "elsa"


def closing(trainer: Trainer, logs: str, again: str, another: str | None) -> str | None:
    """Return the result of a run and suggestions for the model that it wrote, or None if it wrote none.

    Args:
        trainer: The run's Trainer.
        logs: The run's folder.
        again: Options that repeat the run.
        another: Option that sets the sparsity, if the run had one.
    """
    saver, elsa = _find(trainer, SaveHuggingFace), _find(trainer, ElsaCallback)
    if saver is None or saver.place is None:
        return None
    folder, run = saver.place, program()
    lines, longer = _verdict(elsa, trainer.global_step)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    how = f"with {saver.shrunk} parameters" if saver.shrunk else "where zeros take as much room as other weights"
    lines.append(f"Saved: {folder}, {size / 1e6:.1f} MB, {how}")
    hints = [
        ("its perplexity on the test text", f"{run} test {again} --model.name {folder}"),
        ("all of it on a page", f"{run} report {logs}"),
        ("beside the dense model, on WikiText-2 and standard tasks, which it downloads", f"{run} evaluate {logs}"),
        ("your model and your text", f"{run} fit {again} --model.name MODEL --data.name TEXT"),
        ("in Python", f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"),
    ]  # fmt: skip
    if saver.shrunk is None:  # a smaller model has no zeros to gain from
        command = f"{run} export --from {logs} --to cpu-sparse --output exports/cpu"
        hints.insert(3, ("a form of it that is faster on CPUs; others: elsa export --help", command))
    if another:
        hints.insert(3, ("another sparsity", f"{run} fit {again} {another} 0.95"))
    if longer:
        hints.insert(0, ("longer, for it had not converged", f"{run} fit {again} --trainer.max_steps {longer}"))
    return "\n".join([*lines, "", "What to do next:", *_wrapped(hints)])


def _wrapped(hints: Sequence[tuple[str, str]]) -> list[str]:
    return [line for why, command in hints for line in (f"  # {why}", f"  {command}")]


def _verdict(elsa: ElsaCallback | None, steps: int) -> tuple[list[str], int | None]:
    """Return a line that tells whether the run converged, and the steps of a longer run if it did not."""
    admm = None if elsa is None else elsa.admm
    if admm is None or admm.last_update is None or not admm.finished:
        return [], None
    done, exchanged, _ = settled(admm.last_update)
    if done:
        return ["Converged: the mask had settled before it was fixed"], None
    why = f"the last update still exchanged {100 * exchanged:.1f} % of the kept weights"
    if exchanged < STILL:
        why = "the weights were still away from the constraint when the mask was fixed"
    return [f"Not converged: {why}"], 2 * steps
