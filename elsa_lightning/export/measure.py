"""Measures an export: perplexity by the protocol of the run, and decoding speed beside the dense model's."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.export.record import Record
from elsa_lightning.export.reload import PROMPT, Look
from elsa_lightning.export.source import Source
from elsa_lightning.optim.moments import dtype_name

_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Measured:
    """How an export is measured.

    Attributes:
        text: ``segments`` and ``labels``, int64 ``(segments, length)``; labels are -100 where nothing is scored.
        precision: Precision, as Lightning names it.
        protocol: Description in words, without the precision.
        exact: Whether perplexity must equal the recorded one, up to the order of sums: nothing was rounded, and the
            precision is that of the run.
        dense: Folder of the dense model for comparing speed; None if the export decodes like that model.
    """

    text: dict[str, Tensor]
    precision: str
    protocol: str
    exact: bool
    dense: Path | None


def check_measurable(record: Record, to: str) -> None:
    """Raise UserError if perplexity cannot be measured as a run did."""
    if to == "gguf":
        raise UserError("--measure loads what was written with transformers, and gguf is for llama.cpp: leave it out")
    if not record.evaluation:
        raise UserError(
            "--measure needs to know how the run measured, and nothing is known of that here: only runs of CausalLM on "
            "CalibrationData say it; leave it out, and use elsa test on what is written"
        )


def prepare(source: Source, to: str, folder: Path) -> Measured:
    """Return the text on which the run measured, and the folder of the dense model.

    Args:
        source: The source of the export, before it is changed.
        to: The format.
        folder: Folder for the dense model, if it is in none yet or has another dtype there.

    Raises:
        UserError: The text no longer exists, or has changed.
    """
    from elsa_lightning.lm.data import CalibrationData

    record, tokenizer = source.record, source.tokenizer
    known = dict(record.evaluation)
    theirs, first = str(known.pop("precision")), known.pop("first", None)
    data = CalibrationData(tokenizer=tokenizer, **known)
    data.setup("validate")
    protocol, recorded = data.protocol(), record.perplexity.get("protocol")
    if recorded is not None and not recorded.startswith(protocol):
        raise UserError(f"--measure: the run measured on {recorded}, and the text is now {protocol}: leave it out")
    segments, labels = [], []
    for batch in data.val_dataloader():
        item: Any = batch if isinstance(batch, dict) else {"input_ids": batch, "labels": batch}
        segments.append(item["input_ids"])
        labels.append(item["labels"])
    precision = "32-true" if to == "cpu-sparse" else theirs
    wide = not theirs.endswith("-true") or theirs == "32-true"
    exact = precision == theirs and not (wide and record.dtype in _NARROW)
    text = {"segments": torch.cat(segments)[:first], "labels": torch.cat(labels)[:first].clone()}
    protocol = protocol if recorded is None else recorded.rpartition(", ")[0]
    return Measured(text, precision, protocol, exact, _dense(source, to, folder))


def _dense(source: Source, to: str, folder: Path) -> Path | None:
    if to == "hf":
        return None
    config = source.path / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("dtype") == dtype_name(source.model.dtype):
        return source.path
    source.model.save_pretrained(folder)
    return folder


def judge(record: Record, measured: Measured, value: float, rounded: bool) -> tuple[Record, str]:
    """Return the record with an export's perplexity, and a message about it.

    Raises:
        UserError: The perplexity differs from the run's, although nothing was rounded.
    """
    recorded = record.perplexity.get("sparse")
    protocol = f"{measured.protocol}, {measured.precision}"
    found = {"protocol": protocol} | record.perplexity | {"exported": value}
    if recorded is None:
        return replace(record, perplexity=found), f"Perplexity {value:.3f} on {protocol}."
    off = value / recorded - 1
    most = 1e-3 if measured.precision in ("32-true", "64-true") else 1e-2
    if measured.exact and not rounded and not abs(off) <= most:
        raise UserError(
            f"what was written has perplexity {value:.3f}, the run measured {recorded:.3f}, and nothing was rounded in "
            f"between: it is not kept"
        )
    if measured.protocol + ", " + measured.precision != record.perplexity.get("protocol"):
        found["exported in"] = measured.precision
    why = "rounding cost" if rounded or not measured.exact else "as recorded, up to"
    said = f"Perplexity {value:.3f}, recorded {recorded:.3f}: {why} {off:+.2%} (on {protocol})."
    return replace(record, perplexity=found), said


def timed(record: Record, look: Look) -> tuple[Record, str]:
    """Return the record with the speeds of an export and of the dense model, and a message about them."""
    speed = look.speed
    threads = f"{speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
    where = f"{threads} of {processor()}"
    protocol = f"one sequence decoded after {PROMPT} tokens, {where}"
    found = {"exported": speed["exported"], "dtype": speed["dtype"], "protocol": protocol}
    found |= {"dense": speed["dense"], "dense dtype": speed["dense_dtype"]}
    said = (
        f"Decodes {speed['exported']:,.1f} tokens/s, the dense model ({speed['dense_dtype']}) {speed['dense']:,.1f}: "
        f"{speed['exported'] / speed['dense']:.2f}× (one sequence, {where})."
    )
    return replace(record, speed=found), said


def processor() -> str:
    """Return the system's name of its processor."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
