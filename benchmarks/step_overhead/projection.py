"""How fast a mask of the k largest entries is found, beside the way by torch.topk.

    python benchmarks/step_overhead/projection.py

Both make a boolean mask of 10 % of the entries of one float32 tensor of scores. ``topk`` takes the tensor whole and
scatters the indices; ours goes over pieces and keeps nothing of the tensor's size. The two take turns; medians, of
the process's own time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from elsa_lightning.layout.rows import PIECE, PIECE_ON_CPU
from elsa_lightning.sets.threshold import Scores, largest


def by_topk(score: Tensor, kept: int) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(kept, sorted=False).indices] = True
    return mask


def by_counting(score: Tensor, kept: int, guesses: dict[Hashable, Tensor] | None) -> list[Tensor]:
    each = PIECE if score.is_cuda else PIECE_ON_CPU
    pieces = [Scores(piece[None], piece[None], 0) for piece in score.split(each)]
    pools, ranks = (torch.tensor([n], device=score.device) for n in (0, kept))
    return list(largest(lambda _: pieces, pools, ranks, guesses=guesses))


def alike(one: Tensor, other: Tensor, score: Tensor) -> bool:
    """Say whether two masks keep as many, and as large ones; which of equal ones is torch's choice."""
    smallest = [score[mask].min() for mask in (one, other)]
    return int(one.sum()) == int(other.sum()) and bool(smallest[0] == smallest[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", type=int, default=[1 << 20, 1 << 22, 1 << 24], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="where to write a JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time  # other programs' time is not counted
    print("| entries | topk, ms | ours, ms | × | ours, near the last threshold, ms | × |\n|---|---|---|---|---|---|")
    rows = []
    for entries in arguments.entries:
        score = torch.randn(entries, generator=torch.Generator().manual_seed(0)).abs().to(device)
        guesses: dict[Hashable, Tensor] = {}
        ways = [
            lambda: by_topk(score, entries // 10),  # noqa: B023
            lambda: by_counting(score, entries // 10, None),  # noqa: B023
            lambda: by_counting(score, entries // 10, guesses),  # noqa: B023
        ]
        times: list[list[float]] = [[], [], []]
        assert alike(ways[0](), torch.cat(ways[2](), dim=1)[0], score)
        for _ in range(arguments.rounds):
            for way, taken in zip(ways, times, strict=True):
                start = clock()
                way()
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(1e3 * (clock() - start))
        topk, cold, warm = (statistics.median(taken) for taken in times)
        print(f"| {entries:,} | {topk:.1f} | {cold:.1f} | {topk / cold:.1f} | {warm:.1f} | {topk / warm:.1f} |")
        rows.append({"entries": entries, "topk_ms": topk, "ours_ms": cold, "near_ms": warm})
    if arguments.results is not None:
        part = arguments.results.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        part.replace(arguments.results)


if __name__ == "__main__":
    main()
