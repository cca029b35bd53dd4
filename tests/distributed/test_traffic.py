"""The data that processes exchange for ADMM does not grow with the tensors or the number of processes."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

RUN = Path(__file__).parents[2] / "benchmarks/sharding/run.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("sharding_benchmark", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [4, 64])
def test_a_step_sums_one_number_and_a_projection_some_bins(processes: int, benchmark: Any) -> None:
    shapes = [torch.Size((100, 16))] * 5 + [torch.Size((3, 100, 16))]
    ordinary, update = benchmark.as_process_of(processes, lambda mesh: benchmark.traffic(shapes, processes, mesh))
    assert ordinary == [4]  # whether the gradients are finite
    each = 8 * 2 * (8 + 1)  # bytes of two numbers of each matrix, of which there are 8, and of whether one has no F
    bins = [8 * (2048 + 1), 8 * (4096 + 1)]  # bytes around the threshold of the last projection, common to all
    numbers = 6 * 12 * 8  # bytes of what is counted of each tensor: residuals, norms, kept entries
    assert update == [4, *bins, each, numbers]


def test_the_shards_of_all_processes_make_the_whole(benchmark: Any, tiny_llama: str) -> None:
    held = {n: benchmark.as_process_of(n, lambda mesh: benchmark.row(tiny_llama, mesh.size(), mesh)) for n in (1, 4)}
    assert all("tiny-llama" in line for line in held.values())
