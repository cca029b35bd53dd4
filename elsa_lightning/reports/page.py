"""Writes the page of a report, and its contents as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import elsa_lightning
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export.folders import write
from elsa_lightning.report import finite
from elsa_lightning.reports.charts import Chart, curves
from elsa_lightning.reports.pareto import trade_offs
from elsa_lightning.reports.runs import Run
from elsa_lightning.reports.zeros import of_run

_MARK = "elsa-lightning report"  # only files with this mark may be replaced
_STATUS = {
    "finished": "finished",
    "unfinished": "ended before its schedule did: the zeros are exact, and were not trained with as planned",
    "interrupted": "was interrupted; ckpt_path resumes it",
    "failed": "failed",
    "running": "had not ended when this was written",
    "unknown": "left nothing that says how it ended",
}


def check_packages() -> None:
    """Raise UnavailableError if the packages for drawing are not installed."""
    try:
        import jinja2
        import plotly  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"a report needs {error.name}, which is not installed: pip install 'plotly>=6' 'jinja2>=3'"
        ) from error
    del jinja2


def check_output(output: Path) -> None:
    """Raise UserError if the name does not end in .html, or a file would be overwritten that is not a report."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {str(output)!r} is to be a page: give a name that ends in .html")
    for file in (output, output.with_suffix(".json")):
        if file.is_dir() or (file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace")[:4000]):
            raise UserError(f"{str(file)!r} is there and is no report, so it would be lost: give another --output")


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write the page, and its contents as JSON beside it.

    Args:
        runs: The runs to show, in this order.
        output: File to write; its name ends in ``.html``.

    Returns:
        The path of the page.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output.with_suffix(".json"), _json(runs))
    write(output, page(runs))
    return output


def page(runs: Sequence[Run]) -> str:
    """Return the page as self-contained HTML, which loads nothing from elsewhere."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    here = files("elsa_lightning.reports")
    shared, own = [*trade_offs(runs), *curves(runs)], [of_run(run, index) for index, run in enumerate(runs)]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (here / "page.html").read_text(encoding="utf-8")
    )
    script = "\n".join([get_plotlyjs(), (here / "page.js").read_text(encoding="utf-8")]).replace(
        "</script", "<\\/script"
    )
    return template.render(
        mark=_MARK,
        version=elsa_lightning.__version__,
        title=_title(runs),
        runs=[_described(run, charts) for run, charts in zip(runs, own, strict=True)],
        charts=[chart for chart in shared if chart.figure],
        absent=_absent([*shared, *(chart for charts in own for chart in charts)]),
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=script.replace("</script", "<\\/script"),
    )


def _title(runs: Sequence[Run]) -> str:
    models = {_model(run) for run in runs} - {None}
    if len(runs) == 1:
        share = runs[0].sparsity
        zeros = "" if share is None else f" with {share:.1%} zeros".replace("%", " %")
        return f"{next(iter(models), 'A model')}{zeros}"
    return f"{len(runs)} runs" + (f" of {next(iter(models))}" if len(models) == 1 else "")


def _model(run: Run) -> str | None:
    name = run.record.get("base_model")
    return str(name).rstrip("/").rpartition("/")[2] if name else None


def _described(run: Run, charts: list[Chart]) -> dict[str, Any]:
    """Return the facts about a run that the page shows as text and numbers."""
    dense, sparse = run.dense, run.sparse
    start = "start" if "start" in run.record.get("perplexity", {}) else "dense"
    return {
        "name": run.name,
        "folder": str(run.folder),
        "first": start,
        "dense": _figure(dense),
        "sparse": _figure(sparse),
        "ratio": _ratio(sparse, dense),
        "protocol": run.protocol,
        "sparsity": "–" if run.sparsity is None else f"{run.sparsity:.2%}".replace("%", " %"),
        "size": _bytes(run.smallest.size) if run.smallest else "–",
        "dense_size": _bytes(run.dense_size),
        "smallest": run.smallest.format if run.smallest else None,
        "speed": _rate(run.fastest.tokens_per_second if run.fastest else None),
        "dense_speed": _rate(run.dense_speed),
        "fastest": run.fastest.format if run.fastest else None,
        "steps": f"{run.journal['step']:,}" if "step" in run.journal else "–",
        "time": _duration(run.journal.get("seconds")),
        "memory": _bytes(run.journal.get("peak_memory")),
        "seed": run.seed or "–",
        "status": run.status,
        "ended": _STATUS.get(run.status, run.status),
        "error": run.journal.get("error"),
        "command": run.record.get("command"),
        "convergence": run.record.get("convergence"),
        "notes": run.record.get("notes", []),
        "missing": run.missing,
        "settings": _settings(run),
        "saved": [
            (s.format, _within(s.folder, run.folder), _bytes(s.size), _ratio(s.size, s.dense_size or run.dense_size),
             _bytes(s.archive),
             _rate(s.tokens_per_second, s.dtype), _rate(s.dense_speed, s.dense_dtype),
             _ratio(s.tokens_per_second, s.dense_speed), _figure(s.perplexity))
            for s in run.saved
        ],
        "speeds": list(dict.fromkeys(s.speed_protocol for s in run.saved if s.speed_protocol)),
        "evaluations": [_evaluated(row) for row in run.evaluations],
        "samples": [[str(sample.get(of, "")) for of in ("prompt", "dense", "sparse")] for sample in _samples(run)],
        "charts": [chart for chart in charts if chart.figure],
    }  # fmt: skip


def _evaluated(row: dict[str, Any]) -> tuple[str, ...]:
    def told(found: Any, sign: str = "") -> str:
        if not isinstance(found, dict) or not isinstance(found.get("value"), (int, float)):
            return "–"
        error = found.get("error")
        return f"{found['value']:{sign}.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")

    name, metric, count = (str(row.get(of, "")) for of in ("name", "metric", "count"))
    return name, metric, count, told(row.get("dense")), told(row), told(row.get("difference"), "+")


def _samples(run: Run) -> list[dict[str, Any]]:
    return [sample for sample in run.journal.get("samples", []) if isinstance(sample, dict)]


def _settings(run: Run) -> list[tuple[str, str, str]]:
    """Return the settings of a run as (group, name, value)."""
    known = run.record
    groups = {
        "method": run.method,
        "training": known.get("training", {}),
        "data": known.get("data", {}),
        "run": {name: run.journal.get(name) for name in ("started", "device", "processes", "resumed_from")},
        "versions": known.get("versions", {}),
    }
    return [
        (group, name.replace("_", " "), str(value))
        for group, values in groups.items()
        for name, value in values.items()
        if value is not None
    ]


def _absent(charts: Sequence[Chart]) -> list[tuple[str, str]]:
    """Return the titles of figures without data, with advice how to get it, each once."""
    noted = "is in elsa_run.json, which runs of ElsaCallback leave where they have a logger or checkpoints"
    logged = "is taken from what the run logs: give the Trainer a logger (TensorBoardLogger or CSVLogger)"
    how = {
        "Loss": f"{logged}, and log it in training_step",
        "Perplexity": f"{logged}; CausalLM measures it at val_check_interval and at the end",
        "Peak memory": noted,
        "Time": noted,
        "Dead rows": f"{noted}; shards that cut rows do not count them",
        "Scores about the threshold": f"{noted}; nothing is ranked by KeepMask or in one shot",
        "Sparsity by layer and kind": f"{noted}, and elsa.json",
    }
    missing = dict.fromkeys(chart.title for chart in charts if not chart.figure)
    method = "is logged at every projection of ElsaCallback"
    return [(title, how.get(title, method)) for title in missing]


def _json(runs: Sequence[Run]) -> str:
    told = [
        {
            "name": run.name, "folder": str(run.folder), "status": run.status, "sparsity": run.sparsity,
            "perplexity": {"dense": run.dense, "sparse": run.sparse, "protocol": run.protocol},
            "saved": [asdict(saved) for saved in run.saved], "journal": run.journal, "record": run.record,
            "series": run.series, "evaluations": run.evaluations, "missing": run.missing,
        }
        for run in runs
    ]  # fmt: skip
    known = {"generator": _MARK, "version": elsa_lightning.__version__, "runs": told}
    return json.dumps(finite(known), default=str, allow_nan=False) + "\n"


def _rate(value: float | None, dtype: str | None = None) -> str:
    return "–" if value is None else f"{value:,.1f}" + (f" ({dtype})" if dtype else "")


def _ratio(value: float | None, to: float | None) -> str:
    return f"{value / to:.2f}×" if value and to else "–"


def _within(folder: Path, run: Path) -> str:
    """Return the path of a folder relative to its run's, or the whole path if it lies elsewhere."""
    inside = folder.resolve()
    return str(inside.relative_to(run.resolve())) if inside.is_relative_to(run.resolve()) else str(folder)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if abs(value) < 1e5 else f"{value:.2e}"


def _bytes(value: float | None) -> str:
    if not value:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
