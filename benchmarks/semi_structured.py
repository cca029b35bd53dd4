"""Products with 2:4 weights on a GPU's sparse tensor cores beside the same weights dense, in float16; prints a JSON.

python benchmarks/semi_structured.py
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

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


def measure() -> list[dict[str, Any]]:
    """Return times of products with 2:4 weights and with the same weights dense; raise where they differ."""
    found = []
    for outputs, inputs in ((4096, 4096), (11008, 4096), (4096, 11008)):
        model = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.float16))
        project(model, NM(2, 4))
        batches = [torch.randn(rows, inputs, device="cuda", dtype=torch.float16) for rows in (1, 64, 4096)]
        with torch.inference_mode():
            dense = [(model(x), microseconds(model, x)) for x in batches]
            to_semi_structured(model)
            for x, (y, dense_us) in zip(batches, dense, strict=True):
                error = float((model(x) - y).float().norm() / y.float().norm())
                if error > 1e-2:
                    raise RuntimeError(f"2:4 products of {outputs} × {inputs} differ by {error:.1e} from dense ones")
                sparse_us = microseconds(model, x)
                row = {"outputs": outputs, "inputs": inputs, "rows": len(x), "dense_us": dense_us}
                found.append({**row, "sparse_us": sparse_us, "error": error})
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
