"""Each tensor's share of a budget is logged, drawn, printed at the end and saved with the model."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from elsa_lightning import ByPattern, CausalLM, ElsaCallback, Unstructured
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.selection import select
from tests.callbacks.test_export import tokens
from tests.callbacks.tiny import make_trainer


@pytest.mark.parametrize(
    "constraint",
    [
        Unstructured(0.9, "model", floor=0.05, ceiling=0.2),
        ByPattern({"attn": Unstructured(0.8, "model", floor=0.1), "mlp": Unstructured(0.95, "tensor")}),
        Unstructured(0.9, "tensor", depth=0.05),
    ],
    ids=["floor and ceiling", "patterns", "depth"],
)
def test_shares_of_a_budget_are_logged_drawn_told_and_saved(
    constraint: Any, tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    board, table = TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="table")
    callbacks = [ElsaCallback(constraint=constraint), SaveHuggingFace(str(tmp_path / "hf"))]
    module = CausalLM(tiny_llama, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, *callbacks, max_steps=16, logger=[board, table]).fit(module, tokens())
    weights = select(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), quiet=True).parameters
    record = json.loads((tmp_path / "hf/elsa.json").read_text())["sparsity"]
    saved = {name: record[name] for name in weights}
    for name, p in weights.items():
        assert saved[name] == {"zeros": int((p == 0).sum()), "entries": p.numel()}
    kept = {name: 1 - one["zeros"] / one["entries"] for name, one in saved.items()}
    entries, zeros = (sum(one[what] for one in saved.values()) for what in ("entries", "zeros"))
    if isinstance(constraint, ByPattern):
        attention = {name: one for name, one in saved.items() if "attn" in name}
        total = sum(one["entries"] for one in attention.values())
        assert sum(one["zeros"] for one in attention.values()) == round(0.8 * total)
        assert all(kept[name] >= 0.1 - 1e-9 for name in attention)
        assert all(kept[name] == pytest.approx(0.05, abs=1e-3) for name in kept if "mlp" in name)
    else:
        assert zeros == pytest.approx(round(0.9 * entries), abs=0 if constraint.scope == "model" else len(kept))
        assert (
            min(kept.values()) >= (constraint.floor or 0.0) - 1e-9 and max(kept.values()) <= constraint.ceiling + 1e-9
        )
    assert len(set(kept.values())) > 1

    rows = (tmp_path / "table/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    last = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    logged = [row for row in last if row["elsa/kept_least"]][-1]
    assert float(logged["elsa/kept_least"]) == pytest.approx(min(kept.values()), rel=1e-3)
    assert float(logged["elsa/kept_most"]) == pytest.approx(max(kept.values()), rel=1e-3)
    tags = EventAccumulator(board.log_dir).Reload().Tags()
    assert {"elsa/kept", "elsa/masks"} <= set(tags["images"]) and "elsa/kept_median" in tags["scalars"]
    assert f"tensors keep from {min(kept.values()):.3g} (" in caplog.text
