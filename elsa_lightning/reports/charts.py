"""The figures of a report, each with a sentence for screen readers and a table of its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from elsa_lightning.report import finite
from elsa_lightning.reports.runs import Run

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_ROWS = 40  # rows of the table under a figure; the JSON file has all
_METHOD = r"^elsa(_\d+)?/"
Points = Sequence[tuple[float, float]]


@dataclass
class Chart:
    """A figure.

    Attributes:
        name: Name of the figure, for links.
        title: Title of the figure.
        text: Explanation for reading it.
        spoken: Text for screen readers.
        figure: Plotly figure as JSON; None if there is nothing to draw.
        head: Header of the table of its numbers.
        rows: Rows of that table.
        height: Height in pixels.
    """

    name: str
    title: str
    text: str
    spoken: str = ""
    figure: str | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    height: int = 320


@dataclass(frozen=True)
class _Line:
    run: int
    of: str
    points: Points
    dashed: bool = False


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Return charts over the steps: colours stand for runs and dashes for quantities; for one run colours do."""
    method = _METHOD + r"({})$"
    dense = [_across(runs, line) for line in _lines(runs, r"dense_perplexity$", dashed=True)]
    measured = _lines(runs, r"(?<!dense_)(?<!final_)(perplexity|ppl)\w*$")
    final = _lines(runs, r"final_perplexity$")
    perplexity = _joined(measured, final) + dense
    return [
        _chart(runs, "loss", "Loss", "In nats a token where the model is a language model.", _lines(runs, r"loss")),
        _chart(runs, "perplexity", "Perplexity", "On the validation text; dashed: the dense model's.", perplexity),
        _chart(
            runs, "residuals", "Residuals and stationarity",
            "How far the weights are from the set (primal), how far the set's choice moved (dual), and how far the "
            "weights are from a stationary point by one batch's gradient. Falling is what converging looks like.",
            _lines(runs, method.format("primal_residual|dual_residual|stationarity")), log=True,
        ),
        _chart(runs, "sparsity", "Sparsity ramp", "Share of zeros that the projection asks for.",
               _lines(runs, method.format("sparsity")), percent=True),
        _chart(runs, "penalty", "Penalty", "λ or κ.", _lines(runs, method.format("penalty"))),
        _chart(
            runs, "flips", "Mask flips",
            "Share of the mask that an update exchanged; and entries off it that outrank kept ones, by one batch.",
            _lines(runs, method.format("mask_flips|outranking")), percent=True,
        ),
        _chart(runs, "dead", "Dead rows", "Outputs of which no weight is left, of all outputs of constrained tensors.",
               [_Line(i, "dead rows", p) for i, run in enumerate(runs) if (p := _dead(run))], percent=True),
        _chart(runs, "kept", "What tensors keep", "Least, median and most of the shares that tensors keep.",
               _lines(runs, method.format("kept_(least|median|most)")), percent=True),
        _chart(runs, "memory", "Peak memory", "In GiB: what torch allocated on a GPU, elsewhere what the process held.",
               [_Line(i, "peak memory", p) for i, run in enumerate(runs) if (p := _memory(run))]),
        _chart(runs, "time", "Time", "Minutes since training began.",
               [_Line(i, "minutes", [(n["step"], n["seconds"] / 60) for n in run.notes])
                for i, run in enumerate(runs) if run.notes]),
    ]  # fmt: skip


def _lines(runs: Sequence[Run], pattern: str, dashed: bool = False) -> list[_Line]:
    return [
        _Line(index, re.sub(r"^elsa/", "", name).replace("_", " "), values, dashed)
        for index, run in enumerate(runs)
        for name, values in sorted(run.series.items())
        if values and re.search(pattern, name, re.I)
    ]


def _across(runs: Sequence[Run], line: _Line) -> _Line:
    """Extend a value that was measured once over the whole run."""
    steps = [step for values in runs[line.run].series.values() for step, _ in values]
    return _Line(line.run, line.of, [(min(steps), line.points[0][1]), (max(steps), line.points[-1][1])], line.dashed)


def _joined(measured: list[_Line], final: list[_Line]) -> list[_Line]:
    """Append the final perplexity to each run's perplexity curve, or show it alone."""
    joined = []
    for end in final:
        own = [line for line in measured if line.run == end.run and line.of.startswith("val")][:1]
        points = dict([*(own[0].points if own else []), *end.points])
        joined.append(_Line(end.run, own[0].of if own else end.of, sorted(points.items())))
        measured = [line for line in measured if line not in own]
    return sorted(joined + measured, key=lambda line: line.run)


def _dead(run: Run) -> Points:
    return [(n["step"], n["dead_rows"] / n["rows"]) for n in run.notes if n.get("rows")]


def _memory(run: Run) -> Points:
    return [(n["step"], n["peak_memory"] / 2**30) for n in run.notes if n.get("peak_memory")]


def _chart(
    runs: Sequence[Run], name: str, title: str, text: str, lines: list[_Line], *, log: bool = False,
    percent: bool = False,
) -> Chart:  # fmt: skip
    if log:
        lines = [_Line(x.run, x.of, [(s, v) for s, v in x.points if v > 0], x.dashed) for x in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Chart(name, title, text)
    several = len(runs) > 1
    traces = _traces(runs, lines, ".2%" if percent else ".4~g")
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "optimizer step"}, "rangemode": "tozero"},
        "yaxis": {"type": "log" if log else "linear", "tickformat": ".0%" if percent else None},
        "hovermode": "x unified", "showlegend": len(lines) > 1,
    }  # fmt: skip
    if log:
        layout["yaxis"] |= {"dtick": 1, "exponentformat": "power"}
    show = share if percent else figure
    spoken = "; ".join(
        f"{runs[line.run].name + ', ' if several else ''}{line.of} from {show(line.points[0][1])} at step "
        f"{line.points[0][0]:g} to {show(line.points[-1][1])} at step {line.points[-1][0]:g}"
        for line in lines[:8]
    )
    rows = [
        (runs[line.run].name, line.of, f"{step:g}", show(value))
        for line in lines
        for step, value in _some(line.points, max(6, _ROWS // len(lines)))
    ]
    return Chart(
        name, title, text, f"Line chart. {spoken}.", plotly(traces, layout), ("run", "quantity", "step", "value"), rows
    )


def _traces(runs: Sequence[Run], lines: Sequence[_Line], shown: str) -> list[dict[str, Any]]:
    """Return lines with a legend that has each run's colour and each quantity's dashes once.

    Args:
        runs: All runs.
        lines: The lines to draw.
        shown: Format of numbers.
    """
    quantities = list(dict.fromkeys(line.of for line in lines))
    several, named, traces = len(runs) > 1, set[int](), list[dict[str, Any]]()
    dashes = {of: _DASHES[place % len(_DASHES) if several else 0] for place, of in enumerate(quantities)}
    dashes |= {line.of: "dash" for line in lines if line.dashed}
    for line in lines:
        run = escape(runs[line.run].name)
        label = f"{run}: {escape(line.of)}" if several and len(quantities) > 1 else run if several else escape(line.of)
        few = len(line.points) < 15 and not line.dashed
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers" if few else "lines", "name": run if several else label,
                "x": [step for step, _ in line.points], "y": [value for _, value in line.points],
                "meta": {"colour": line.run if several else quantities.index(line.of)},
                "line": {"dash": dashes[line.of]}, "showlegend": not several or line.run not in named,
                "legendgroup": str(line.run) if several else line.of,
                "hovertemplate": f"%{{y:{shown}}}<extra>{label}</extra>",
            }
        )  # fmt: skip
        named.add(line.run)
    traces += [
        {
            "type": "scatter", "mode": "lines", "x": [None], "y": [None], "name": escape(of),
            "meta": {"colour": "muted"}, "line": {"dash": dashes[of]}, "hoverinfo": "skip",
        }
        for of in (quantities if several and len(quantities) > 1 else ())
    ]  # fmt: skip
    return traces


def plotly(traces: list[dict[str, Any]], layout: dict[str, Any]) -> str:
    """Return a figure as JSON, validated by plotly, for a script element: without <, which could end the element."""
    import plotly.graph_objects as go

    made = go.Figure(data=traces, layout={**layout, "template": "none"}).to_plotly_json()
    made["layout"].pop("template", None)  # colours are the page's
    return json.dumps(finite(made), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _some(points: Points, most: int) -> Iterable[tuple[float, float]]:
    """Return at most so many of the points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def share(value: float) -> str:
    """Return a fraction in per cent."""
    return f"{value:.2%}".replace("%", " %")


def figure(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:,.4g}"
