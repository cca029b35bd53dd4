"""The progress of a run on a terminal of 80 columns or fewer, tested on a real one."""

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from elsa_lightning.callbacks.progress import WordProgress, duration
from tests.callbacks.tiny import Net, Points, fit, loader, make_trainer


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, action: Callable[[], Any]) -> list[str]:
    """Return the frames that an action draws on a terminal, each as it is seen, in order."""
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    drawn: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(outer, 1 << 16):
                drawn.append(data)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(inner, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            action()
    finally:
        monkeypatch.undo()
        reader.join()
        os.close(outer)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", b"".join(drawn).decode())
    return [frame for frame in (part.rstrip() for part in re.split(r"[\r\n]+", text)) if frame]


class Talking(Net):
    """Logs what CausalLM logs."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/perplexity", 1e5 + self.loss(batch), prog_bar=True)


@pytest.mark.parametrize("columns", [80, 44])
def test_the_bar_says_sparsity_phase_and_time_left_and_fits(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.callbacks.tiny.Net", Talking)
    frames = on_terminal(
        monkeypatch,
        columns,
        lambda: fit(tmp_path, WordProgress(seconds=0), enable_progress_bar=True, validation=loader(2, shuffle=False),
                    val_check_interval=4),
    )  # fmt: skip
    drawn = [frame for frame in frames if columns == 80 or not frame.startswith("step")]  # lines may be wrapped
    assert all(len(frame) <= columns for frame in drawn), max(drawn, key=len)
    bar = (
        r"(nothing pruned yet|[\d.]+ % zeros, (rising|mask moves|mask fixed)) +\|.*\| +\d+/20"
        r"(, \d+ s left)?(, loss [\d.]+)?(, perplexity [\d.e+]+)?"
    )
    said = r"step \d+, .*perplexity [\d.e+]+"
    validating = r"validating( DataLoader 0:)? +\|.*\| \d/[2?]"
    others = [f for f in frames if not any(re.fullmatch(one, f) for one in (bar, said, validating, r"training +\|.*"))]
    assert not others
    states = list(dict.fromkeys(re.findall(r"yet|rising|moves|fixed", " ".join(frames))))
    assert states == ["yet", "rising", "moves", "fixed"]
    bars = [frame for frame in frames if re.fullmatch(bar, frame)]
    assert (
        bars[-1].startswith("90.0 % zeros, mask fixed")
        and ("| 20/20, 0 s left" if columns == 80 else "| 20/20") in bars[-1]
    )
    assert len([frame for frame in frames if re.fullmatch(said, frame)]) == 3  # one a validation, epochs have six steps


def test_a_resumed_run_goes_on_where_it_was_and_a_dense_one_says_nothing_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.fit(Talking(), loader())
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    further = make_trainer(tmp_path, WordProgress(seconds=0), max_steps=12, enable_progress_bar=True)
    frames = on_terminal(monkeypatch, 80, lambda: further.fit(Talking(), loader(), ckpt_path=tmp_path / "six.ckpt"))
    steps = [int(found) for frame in frames for found in re.findall(r"(\d+)/12", frame)]
    assert steps[0] == 6 and steps == sorted(steps) and steps[-1] == 12
    assert all(frame.startswith("training |") for frame in frames)


def test_several_loaders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Testing(Talking):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.loss(batch)

        predict_step = test_step

    loaders = [DataLoader(Points(4), batch_size=2) for _ in range(2)]
    trainer = make_trainer(tmp_path, WordProgress(), enable_progress_bar=True)
    tested = on_terminal(monkeypatch, 80, lambda: trainer.test(Testing(), loaders))
    assert any(re.match(r"testing 1 of 2 +\|.*2/2", frame) for frame in tested)
    assert any(re.match(r"testing 2 of 2 +\|.*2/2", frame) for frame in tested)
    predicted = on_terminal(monkeypatch, 80, lambda: trainer.predict(Testing(), loaders[0]))
    assert any(re.match(r"predicting +\|.*2/2", frame) for frame in predicted)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (3 * 3600 + 300, "3 h 05 min")],
)
def test_a_time_is_short_at_any_length(seconds: float, words: str) -> None:
    assert duration(seconds) == words
