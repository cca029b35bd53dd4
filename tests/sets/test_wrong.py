"""What a user gives wrongly to a set is told in one line, where it is given, with the argument and what it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from elsa_lightning import (
    ADMM,
    NM,
    Block,
    ByPattern,
    ElsaCallback,
    Experts,
    Heads,
    Layers,
    Neurons,
    Quantized,
    Unstructured,
    Width,
    project,
)
from elsa_lightning.errors import UserError

NAN, INF = float("nan"), float("inf")
NO_FRACTIONS: list[Any] = [1.0, 1, -0.1, 50, NAN, INF, -INF, "0.5", None, True, [0.5], {"a": 0.5}]
NO_NUMBERS: list[Any] = [0, -3, NAN, -INF, "30e6", True, [3], {"a": 3}, 0.5, -0.5]
NO_COUNTS: list[Any] = [0, -4, 2.5, "4", True, [4], NAN, INF, None, {"m": 4}]
NO_SETS: list[Any] = [0.9, "NM", NM, ["attn"], 4, True, {"attn": 0.9}, len, b"", (NM(2, 4),)]

WRONG: dict[str, tuple[Callable[[Any], Any], list[Any], str]] = {
    "Unstructured sparsity": (Unstructured, NO_FRACTIONS, "sparsity"),
    "Unstructured keep": (lambda v: Unstructured(keep=v), NO_NUMBERS, "keep"),
    "Unstructured keep_bytes": (lambda v: Unstructured(keep_bytes=v), NO_NUMBERS, "keep_bytes"),
    "Unstructured scope": (lambda v: Unstructured(0.5, v), ["layer", None, 1, "", ["row"], "Tensor"], "scope"),
    "Unstructured floor": (lambda v: Unstructured(0.9, "model", floor=v), ["0.1", 2, NAN, 0.5, -0.5], "floor"),
    "Unstructured ceiling": (lambda v: Unstructured(0.9, "model", ceiling=v), ["1", None, 2, NAN, 0.05], "ceiling"),
    "Unstructured depth": (lambda v: Unstructured(0.9, "tensor", depth=v), ["0.1", None, 2, NAN, INF, -3], "depth"),
    "NM n": (lambda v: NM(v, 4), [*NO_COUNTS, 5], "n must"),
    "NM m": (lambda v: NM(2, v), [*NO_COUNTS, 1], "m"),
    "Block sparsity": (Block, NO_FRACTIONS, "sparsity"),
    "Block rows": (lambda v: Block(0.5, rows=v), NO_COUNTS, "rows"),
    "Block columns": (lambda v: Block(0.5, columns=v), NO_COUNTS, "columns"),
    "ByPattern sets": (ByPattern, [{}, None, [NM(2, 4)], NM(2, 4), "attn", 3, 0.5, True, {"(": NM(2, 4)}], "sets"),
    "ByPattern set": (lambda v: ByPattern({"attn": v}), [None, *NO_SETS], r"sets\['attn'\]"),
    "Quantized bits": (Quantized, [0, 1, 5, 16, -4, "4", None, [4], 4.5, True, NAN], "bits"),
    "Quantized group_size": (lambda v: Quantized(4, v), [v for v in NO_COUNTS if v is not None], "group_size"),
    "Quantized inside": (lambda v: Quantized(4, 32, v), [*NO_SETS, Quantized(3)], "inside"),
    "Neurons": (Neurons, NO_FRACTIONS, "fraction .* neurons"),
    "Heads": (Heads, NO_FRACTIONS, "fraction .* heads"),
    "Layers": (Layers, NO_FRACTIONS, "fraction .* layers"),
    "Experts": (Experts, NO_FRACTIONS, "fraction .* experts"),
    "Width keep": (Width, [*NO_NUMBERS, None], "keep"),
    "Width keep_bytes": (lambda v: Width(keep_bytes=v), [*NO_NUMBERS, None], "keep_bytes"),
    "ElsaCallback": (lambda v: ElsaCallback(constraint=v), [v for v in NO_SETS if v], "constraint"),
    "project": (lambda v: project(nn.Linear(4, 4), v), [None, *NO_SETS], "constraint"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_value_is_told_in_one_line(name: str) -> None:
    make, values, argument = WRONG[name]
    for value in values:
        with pytest.raises(UserError, match=argument) as told:
            make(value)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("wrong", [v for v in NO_SETS if v])
def test_what_is_no_set_constrains_nothing(wrong: Any) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(UserError, match="constraint must be a set"):
        ADMM(torch.optim.SGD([p], lr=0.1), {"p": p}, wrong, total_steps=3)
