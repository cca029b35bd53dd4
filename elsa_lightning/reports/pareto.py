"""Perplexity against zeros, bytes and tokens a second, with the Pareto front of runs and models."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from elsa_lightning.reports.charts import Chart, Points, figure, plotly, share
from elsa_lightning.reports.runs import Run

_NAMED = 12  # up to so many points have their names beside them; with more, only when pointed at


def trade_offs(runs: Sequence[Run]) -> list[Chart]:
    """Return the Pareto charts of all with a perplexity: runs against sparsity, models against bytes and tokens/s."""
    charts = []
    if len(runs) > 1:
        of_runs = [(run.sparsity, run.sparse, run.name, run) for run in runs]
        charts.append(_pareto(runs, "pareto", "Perplexity against sparsity", "Zeros among the constrained weights",
                              of_runs, more_is_better=True, percent=True))  # fmt: skip
    saved = [(s, f"{run.name}, {s.format}" if len(runs) > 1 else s.format, run) for run in runs for s in run.saved]
    sizes = [(s.size / 2**20, s.perplexity, name, run) for s, name, run in saved]
    speeds = [(s.tokens_per_second, s.perplexity, name, run) for s, name, run in saved if s.tokens_per_second]
    dense_sizes = [(run.dense_size / 2**20, run.dense) for run in runs if run.dense_size and run.dense]
    dense_speeds = [(run.dense_speed, run.dense) for run in runs if run.dense_speed and run.dense]
    if len({x for x, y, *_ in sizes if y is not None}) > 1:
        charts.append(_pareto(runs, "pareto-bytes", "Perplexity against size", "MiB of weights on disk", sizes,
                              more_is_better=False, dense=dense_sizes))  # fmt: skip
    if len({x for x, y, *_ in speeds if y is not None}) > 1:
        charts.append(_pareto(runs, "pareto-speed", "Perplexity against speed", "Tokens a second", speeds,
                              more_is_better=True, dense=dense_speeds))  # fmt: skip
        if len({s.speed_protocol for s, *_ in saved if s.tokens_per_second}) > 1:
            charts[-1].text += " The speeds were measured in several ways: the tables below say which."
    if len({run.protocol for run in runs if run.protocol and run.sparse is not None}) > 1:
        for chart in charts:
            chart.text += " The perplexities were measured in several ways, so the line means nothing: see each run."
    return charts


def _pareto(
    runs: Sequence[Run], name: str, title: str, axis: str,
    points: Sequence[tuple[float | None, float | None, str, Run]], *, more_is_better: bool, percent: bool = False,
    dense: Points = (),
) -> Chart:  # fmt: skip
    """Return a chart of perplexity against another quantity.

    Args:
        runs: All runs.
        name: Name of the chart.
        title: Title of the chart.
        axis: Title of the quantity's axis.
        points: The quantity, perplexity, a name and the run.
        more_is_better: Whether larger values of the quantity are better.
        percent: Whether the quantity is a fraction.
        dense: The quantity and perplexity of the dense models.
    """
    known = [(x, y, label, run) for x, y, label, run in points if x is not None and y is not None]
    if not known:
        return Chart(name, title, "No run has both.")
    groups: dict[str, list[tuple[float, float]]] = {}
    for x, y, label, run in known:
        groups.setdefault(run.but_for_seed + label.removeprefix(run.name), []).append((x, y))
    means = [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups.values()]
    best: list[tuple[float, float]] = []
    for x, y in sorted(means, key=lambda mean: (-mean[0] if more_is_better else mean[0], mean[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    best.sort()
    show = share if percent else figure
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": [x for x, _ in best], "y": [y for _, y in best],
            "name": "best of each", "meta": {"colour": 0}, "hoverinfo": "skip", "showlegend": False,
        },
        {
            "type": "scatter", "mode": "markers+text" if len(known) <= _NAMED else "markers",
            "x": [x for x, *_ in known], "y": [y for _, y, *_ in known], "textposition": "top center",
            "name": "runs", "meta": {"colour": 0}, "marker": {"size": 10}, "showlegend": False,
            "text": [escape(label) for _, _, label, _ in known],
            "hovertemplate": f"%{{text}}<br>%{{x:{'.2%' if percent else '.4~g'}}}, perplexity %{{y:.4~g}}"
            "<extra></extra>",
        },
    ]  # fmt: skip
    whole = sorted({(float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in dense})
    if whole:
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [x for x, _ in whole], "y": [y for _, y in whole],
                "name": "dense model", "meta": {"colour": "muted"}, "marker": {"size": 11, "symbol": "diamond"},
                "hovertemplate": "dense model<br>%{x:.4~g}, perplexity %{y:.4~g}<extra></extra>", "showlegend": True,
            }
        )  # fmt: skip
    places = [x for x, *_ in known] + [x for x, _ in whole]
    room = 0.1 * (max(places) - min(places)) or 0.05 * abs(places[0]) or 1.0  # margin for names, and for a single point
    for value in sorted({float(f"{run.dense:.4g}") for run in runs if run.dense is not None})[:3]:
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": [min(places) - room, max(places) + room], "y": [value, value],
                "name": f"dense, {value:.4g}",
                "meta": {"colour": "muted"}, "line": {"dash": "dash"}, "hoverinfo": "skip", "showlegend": True,
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": axis}, "tickformat": ".1~%" if percent else None,
                  "range": [min(places) - room, max(places) + room]},
        "yaxis": {"title": {"text": "perplexity"}}, "hovermode": "closest",
    }  # fmt: skip
    told = [*((x, y, label) for x, y, label, _ in known), *((x, y, "dense model") for x, y in whole)]
    rows = [(label, show(x), f"{y:.3f}") for x, y, label in sorted(told)]
    several = len({run.but_for_seed for *_, run in known}) < len({id(run) for *_, run in known})
    seeds = " (means, of runs that differ by their seed alone)" if several else ""
    what = "runs" if len(runs) > 1 else "models"
    text = f"Lower is better. The line joins the {what}{seeds} that no other beats in both."
    spoken = ", ".join(f"{label}: {show(x)}, perplexity {y:.4g}" for x, y, label in told[:20])
    head = (what.removesuffix("s"), axis, "perplexity")
    return Chart(name, title, text, f"Scatter plot. {spoken}.", plotly(traces, layout), head, rows, 380)
