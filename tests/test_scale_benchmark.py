"""The time of a step on paper: closed forms of its arithmetic, and the plan's bytes."""

import math
from typing import Any

import pytest
import torch

from elsa_lightning import CausalLM
from elsa_lightning.plan import plan
from tests.test_decode_benchmark import script


@pytest.fixture(scope="module")
def scale() -> Any:
    return script("sharding/scale.py")


@pytest.fixture(scope="module")
def model(tiny_llama: str) -> Any:
    return CausalLM(tiny_llama).on_meta()


def test_a_time_is_bytes_over_bandwidth_and_launches(scale: Any) -> None:
    gpu = scale.Gpu(bandwidth=1e12, reached=0.5, launch=1e-6)
    counts = {"bytes": 20.0, "moved": 50.0, "kernels_a_piece": 7, "kernels": 9}
    least, most = gpu.span(counts, weights=10**9, pieces=100)
    assert least == pytest.approx(20e9 / 0.5e12)  # 709 launches hide behind it
    assert most == pytest.approx(50e9 / 0.5e12 + 709e-6)
    least, most = gpu.span(counts, weights=1000, pieces=100)
    assert least == pytest.approx(709e-6) and most == pytest.approx(709e-6 + 50e3 / 0.5e12)


def test_pieces_are_those_of_a_gpu(scale: Any) -> None:
    shapes = {(4096, 4096): 1, (8192, 4096): 2, (8193, 4096): 3, (64, 1024, 1024): 4}
    assert {shape: scale.pieces_of(torch.Size(shape), 1) for shape in shapes} == shapes
    assert scale.pieces_of(torch.Size((8192, 4096)), 2) == 1


@pytest.mark.parametrize("run", [0, 1])
def test_a_line_is_made_of_counts_and_plan(run: int, scale: Any, model: Any) -> None:
    run, gpu = scale.RUNS[run], scale.Gpu()
    one, two = (scale.row(model, "tiny", gpus, run, gpu, tokens=1000, interval=1) for gpus in (1, 2))
    planned = plan(model, scale.make_optimizer(run), dtype=run.dtype, state_dtype=run.state)
    assert one["held"] == 2 * two["held"] == sum(planned.exact.values()) and one["weights"] == planned.constrained
    assert one["training"] == pytest.approx(6 * planned.parameters * 1000 / (0.4 * 989e12)) == two["training"]
    assert one["share"] == pytest.approx([seconds / one["training"] for seconds in one["update"]])
    often = scale.row(model, "tiny", 1, run, gpu, tokens=1000, interval=4)
    assert all(
        share * one["training"] == pytest.approx((3 * step + update) / 4)
        for share, step, update in zip(often["share"], one["step"], one["update"], strict=True)
    )
    assert all(least <= most for least, most in (one[phase] for phase in scale.PHASES))
    assert one["optimizer"] == pytest.approx(2 * two["optimizer"]) and math.isfinite(one["most"])
    assert len(scale.cells(one)) == len(scale.COLUMNS)
