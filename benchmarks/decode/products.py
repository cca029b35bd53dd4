"""Products of one layer by rows and zeros: where the thresholds of cpu-sparse come from.

    python benchmarks/decode/products.py --shape 2048x2048 5632x2048 2048x5632

For each shape (out × in) and sparsity: how many times as fast as the dense float32 product the sparse ones are, for 1
to 256 rows, by a vector a row, by one matrix, and by matrices of so many rows. Weights are fetched from memory, as in a
model, not from the cache. All products are timed in turn; medians of processor time on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_lightning.export.cpu_sparse import BLOCK, BREAK_EVEN, CSRLinear

ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
BLOCKS = (8, 16, 32, 48, 64)
LARGER_THAN_CACHES = 100_000_000  # bytes


def medians(products: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the processor time of each product, in seconds."""
    spent: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds + 1):
        for name, product in products.items():
            start = time.process_time()
            product()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def sparse_products(layers: list[CSRLinear], x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the ways to multiply; each call takes the next of the copies of a layer."""
    matrices = itertools.cycle([layer.matrix() for layer in layers])
    blocks = [b for b in BLOCKS if b < len(x)]
    made: dict[str, Callable[[], object]] = {"matrix": lambda: (next(matrices) @ x.T.contiguous()).T.contiguous()}
    if len(x) <= 3:
        made["vectors"] = lambda: [torch.mv(w, row) for w in [next(matrices)] for row in x]

    def by(block: int) -> Callable[[], object]:
        return lambda: torch.cat([(w @ b.T.contiguous()).T for w in [next(matrices)] for b in x.split(block)])

    return made | {f"matrices of {block}": by(block) for block in blocks}


@torch.no_grad()
def table(out: int, width: int, sparsity: float, rounds: int) -> None:
    """Print the speed of every product relative to the dense one."""
    weight = torch.randn(out, width)
    weight.masked_fill_(torch.rand(weight.shape) < sparsity, 0)
    dense = itertools.cycle([weight.clone() for _ in range(1 + LARGER_THAN_CACHES // weight.nbytes)])
    sparse = CSRLinear.of(weight, None)
    layers = [CSRLinear.of(weight, None) for _ in range(1 + LARGER_THAN_CACHES // (8 * len(sparse.values) + 1))]
    for rows in ROWS:
        x = torch.randn(rows, width)
        taken = medians({"dense": lambda x=x: F.linear(x, next(dense))} | sparse_products(layers, x), rounds)  # type: ignore[misc]
        base = taken.pop("dense")
        told = ", ".join(f"{name} {base / seconds:.2f}" for name, seconds in taken.items())
        print(f"{out}x{width}, {sparsity:.0%} zeros, {rows} rows: dense {base * 1e3:.3f} ms; times as fast: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["2048x2048", "5632x2048", "2048x5632", "576x576", "1536x576"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"A layer takes a vector for one row, matrices of {BLOCK} for more; it is dense below {BREAK_EVEN:.0%} zeros."
    )
    for shape, sparsity in itertools.product(given.shape, given.sparsity):
        table(*map(int, shape.split("x")), sparsity, given.rounds)


if __name__ == "__main__":
    main()
