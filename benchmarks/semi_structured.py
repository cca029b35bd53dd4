"""Products with 2:4 weights on a GPU's sparse tensor cores beside the same weights dense, in float16; prints a JSON.

Of each both kernels that torch has: what a call takes, and the part of it in which the GPU works.

python benchmarks/semi_structured.py
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.sparse import SparseSemiStructuredTensor

from elsa_lightning import NM, project
from elsa_lightning.export import to_semi_structured


def microseconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Return the time of a product, after ten that warm up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repetition in range(60):
        if repetition == 10:
            start.record()
        layer(x)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / 50


def working(layer: nn.Module, x: torch.Tensor) -> float:
    """Return the microseconds of a product in which the GPU works."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(10):
            layer(x)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 10


def measure() -> list[dict[str, Any]]:
    """Return times of products with 2:4 weights and with the same weights dense; raise where they differ."""
    found = []
    for cutlass in (False, True):
        SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
        for outputs, inputs in ((4096, 4096), (11008, 4096), (4096, 11008)):
            model = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.float16))
            project(model, NM(2, 4))
            batches = [torch.randn(rows, inputs, device="cuda", dtype=torch.float16) for rows in (1, 64, 4096)]
            with torch.inference_mode():
                dense = [(model(x), microseconds(model, x), working(model, x)) for x in batches]
                to_semi_structured(model)
                for x, (y, dense_us, dense_works) in zip(batches, dense, strict=True):
                    error = float((model(x) - y).float().norm() / y.float().norm())
                    if error > 1e-2:
                        raise RuntimeError(
                            f"2:4 products of {outputs} × {inputs} differ by {error:.1e} from dense ones"
                        )
                    found.append({
                        "kernels": "CUTLASS" if cutlass else "cuSPARSELt", "outputs": outputs, "inputs": inputs,
                        "rows": len(x), "dense_us": dense_us, "sparse_us": microseconds(model, x),
                        "dense_works_us": dense_works, "sparse_works_us": working(model, x), "error": error,
                    })  # fmt: skip
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
