"""The figures of a single run: the distribution of its scores around the threshold, and a map of its zeros."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from elsa_lightning.reports.charts import Chart, plotly, share
from elsa_lightning.reports.runs import Run
from elsa_lightning.watch import BINS, DECADES

_BLOCK = re.compile(r"(?<![^.])(\d+)(?![^.])")


def of_run(run: Run, number: int) -> list[Chart]:
    """Return the charts of a single run: the distribution of its scores, and the map of its zeros."""
    return [_scores(run, number), _heat_map(run, number)]


def _heat_map(run: Run, number: int) -> Chart:
    title = "Sparsity by layer and kind"
    zeros = {name: (n - kept, n) for name, (kept, n, *_) in run.tensors.items()}
    if not zeros:
        zeros = {n: (z["zeros"], z["entries"]) for n, z in run.record.get("sparsity", {}).items()}
    cells: dict[tuple[str, str], list[int]] = {}
    for name, (zero, size) in zeros.items():
        found = _BLOCK.search(name)
        kind = name[found.end() + 1 :] if found else name
        cell = cells.setdefault((found[1] if found else "", kind.removesuffix(".weight")), [0, 0])
        cell[0], cell[1] = cell[0] + zero, cell[1] + size
    if not cells:
        return Chart(f"zeros-{number}", title, "")
    blocks = sorted({block for block, _ in cells}, key=lambda block: (block == "", int(block or 0)))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    shares = [[_ratio(cells.get((block, kind))) for block in blocks] for kind in kinds]
    flat = [share for row in shares for share in row if share is not None]
    low = min(flat) if max(flat) - min(flat) > 0.02 else min(flat) - 0.02
    labels = [f"layer {block}" if block else "elsewhere" for block in blocks]
    trace = {
        "type": "heatmap", "z": shares, "x": labels, "y": [escape(kind) for kind in kinds], "zmin": low,
        "zmax": max(max(flat), low + 0.02), "xgap": 2, "ygap": 2, "hoverongaps": False,
        "hovertemplate": "%{y}, %{x}: %{z:.2%} zeros<extra></extra>",
        "colorbar": {"tickformat": ".1%", "thickness": 12},
        "texttemplate": "%{z:.1%}" if len(blocks) <= 8 else None,
    }  # fmt: skip
    layout = {"xaxis": {"showgrid": False}, "yaxis": {"showgrid": False, "autorange": "reversed"}}
    order = sorted(zeros, key=lambda name: zeros[name][0] / max(1, zeros[name][1]))
    least, most = order[0], order[-1]
    spoken = (
        f"Heat map of {len(zeros)} tensors, {len(blocks)} layers by {len(kinds)} kinds. Least sparse: {least}, "
        f"{share(zeros[least][0] / max(1, zeros[least][1]))}; most: {most}, "
        f"{share(zeros[most][0] / max(1, zeros[most][1]))}."
    )
    dead = {n: f"{counts[2]:,} of {counts[3]:,}" for n, counts in run.tensors.items() if counts[3]}
    rows = [(n, f"{size:,}", share(zero / max(1, size)), dead.get(n, "–")) for n, (zero, size) in zeros.items()]
    text = "The stronger the colour, the more zeros." if len(flat) > 1 else ""
    return Chart(
        f"zeros-{number}", title, text, spoken, plotly([trace], layout), ("tensor", "weights", "zeros", "dead rows"),
        rows, 140 + 34 * len(kinds),
    )  # fmt: skip


def _ratio(cell: list[int] | None) -> float | None:
    return None if cell is None else cell[0] / max(1, cell[1])


def _scores(run: Run, number: int) -> Chart:
    title = "Scores about the threshold"
    noted = [note for note in run.notes if note.get("scores")]
    if not noted:
        return Chart(f"scores-{number}", title, "")
    note = noted[-1]
    kept, cut = note["scores"]["kept"], note["scores"]["cut"]
    whole = max(1, sum(kept) + sum(cut))
    places = [(index - DECADES * BINS + 0.5) / BINS for index in range(2 * DECADES * BINS)]
    inner = slice(1, -1)  # the bins at the ends hold all scores out of range
    traces = [
        {
            "type": "bar", "x": places[inner], "y": [count / whole for count in counts[inner]], "name": name,
            "width": 1 / BINS, "meta": {"colour": colour},
            "hovertemplate": f"%{{y:.3%}} of all, {name}<extra></extra>",
        }
        for name, counts, colour in (("cut", cut, "muted"), ("kept", kept, 0))
    ]  # fmt: skip
    layout: dict[str, Any] = {
        "barmode": "stack", "bargap": 0, "hovermode": "x unified",
        "xaxis": {"title": {"text": "decades of F v² above the threshold of its tensor"}},
        "yaxis": {"tickformat": ".1%", "title": {"text": "of all weights"}},
        "shapes": [{"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot"}}],
    }  # fmt: skip
    seen = [p for p, a, b in zip(places, kept, cut, strict=True) if a + b > whole / 5000]
    layout["xaxis"] |= {"range": [min(seen[0], -1.0) - 0.2, max(seen[-1], 1.0) + 0.2]} if seen else {}
    near = sum(counts[index] for counts in (kept, cut) for index, place in enumerate(places) if abs(place) < 0.5)
    text = (
        f"At step {note['step']}, the last that was noted before the mask was fixed. {share(near / whole)} of the "
        f"weights are within half a decade of the threshold, and so are the next to be exchanged; "
        f"{share((kept[0] + cut[0]) / whole)} are further below than is shown."
    )
    rows = [
        (f"{low} to {low + 1}", *(share(sum(of[i] for i, p in enumerate(places) if low <= p < low + 1) / whole)
                                   for of in (cut, kept)))
        for low in range(-DECADES, DECADES)
    ]  # fmt: skip
    wrong = sum(count for count, place in zip(kept, places, strict=True) if place < 0)
    spoken = (
        f"Histogram of the scores of {whole:,} weights on a logarithmic axis: {share(sum(kept) / whole)} are kept, "
        f"{share(wrong / whole)} are kept although they lie below the threshold."
    )
    return Chart(f"scores-{number}", title, text, spoken, plotly(traces, layout), ("decades", "cut", "kept"), rows)
