"""Reads the files that runs leave: journals, TensorBoard events, CSVLogger tables, records of models and exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export.folders import RECORD
from elsa_lightning.reports.metrics import EVENTS, TABLE, Series, logged, noted, number
from elsa_lightning.reports.saved import Saved, saved_in

JOURNALS = "elsa_run*.json"
_LEVELS = 3  # folders at most from a checkpoint up to that of its run
_EVALUATIONS = "evaluation*.json"


@dataclass
class Run:
    """The known facts about a run.

    Attributes:
        name: Name that distinguishes it from the other runs on the page.
        folder: Folder of the run.
        journal: Contents of ``elsa_run.json``, or empty.
        record: The record of the model; see :class:`elsa_lightning.export.record.Record`.
        series: All metrics.
        saved: Models on disk.
        missing: Unknown facts, with advice how to get them.
        ancestors: Folders of the runs that it resumed.
        source: File of the journal.
        evaluations: Rows of ``elsa evaluate``: ``name``, ``metric``, ``count``, ``value``, ``error``, ``difference``.
    """

    name: str
    folder: Path
    journal: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    saved: list[Saved] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ancestors: list[Path] = field(default_factory=list)
    source: Path | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> Path:
        """The path that identifies the run."""
        return (self.source or self.folder).resolve()

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The notes of the journal."""
        return list(self.journal.get("notes", []))

    @property
    def method(self) -> dict[str, Any]:
        """Settings of the (first) method."""
        methods = self.record.get("method") or [{}]
        return dict(methods[0])

    @property
    def dense(self) -> float | None:
        """Perplexity before the first step."""
        known = self.record.get("perplexity", {})
        return number(known.get("dense", known.get("start"))) or self._last("val/dense_perplexity")

    @property
    def sparse(self) -> float | None:
        """Perplexity of the final model."""
        return number(self.record.get("perplexity", {}).get("sparse")) or self._last("val/final_perplexity")

    @property
    def protocol(self) -> str | None:
        """How both perplexities were measured."""
        found: str | None = self.record.get("perplexity", {}).get("protocol")
        return found

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros in the constrained weights at the end."""
        kept = sum(counts[0] for counts in self.tensors.values())
        entries = sum(counts[1] for counts in self.tensors.values())
        if entries and (self.journal.get("status") != "running"):
            return 1 - kept / entries
        zeros = [z for z in self.record.get("sparsity", {}).values() if z["zeros"] > 0.05 * z["entries"]]
        if zeros:
            return float(sum(z["zeros"] for z in zeros) / sum(z["entries"] for z in zeros))
        return self._last("elsa/sparsity")

    @property
    def tensors(self) -> dict[str, list[int]]:
        """Kept entries, entries, dead rows and rows of each constrained tensor."""
        return dict(self.journal.get("tensors", {}))

    @property
    def status(self) -> str:
        """How the run ended, in a word."""
        return str(self.journal.get("status", "unknown"))

    @property
    def seed(self) -> str | None:
        """The seed on the command line, or None."""
        found = re.search(r"--seed_everything[ =](\d+)", str(self.record.get("command") or ""))
        return found[1] if found else None

    @property
    def but_for_seed(self) -> str:
        """A key that is equal for runs which differ only in their seed."""
        data = {name: value for name, value in self.record.get("data", {}).items() if name != "seed"}
        known = [*(self.record.get(of) for of in ("base_model", "method", "training", "evaluation")), data]
        return json.dumps(known, sort_keys=True, default=str) if self.record.get("method") else str(self.folder)

    @property
    def smallest(self) -> Saved | None:
        """The smallest saved model, or None."""
        return min(self.saved, key=lambda saved: saved.size, default=None)

    @property
    def dense_size(self) -> int | None:
        """Bytes of the dense model's weights, from records of exports or the size of a model saved with its zeros."""
        known = [s.dense_size for s in self.saved if s.dense_size]
        return max(known or [s.size for s in self.saved if s.format == "hf"], default=None)

    @property
    def dense_speed(self) -> float | None:
        """Tokens a second of the dense model: the median of its measurements beside exports."""
        return median(known) if (known := [s.dense_speed for s in self.saved if s.dense_speed]) else None

    @property
    def fastest(self) -> Saved | None:
        """The export with the largest speed relative to the dense model, timed at the same time."""
        return max((s for s in self.saved if s.tokens_per_second), key=_times_as_fast, default=None)

    def _last(self, metric: str) -> float | None:
        return self.series[metric][-1][1] if self.series.get(metric) else None


def _times_as_fast(saved: Saved) -> float:
    return (saved.tokens_per_second or 0) / (saved.dense_speed or 1)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return the runs in folders, or below them; exports among them are attached to their runs.

    Raises:
        UserError: A folder does not exist, or has no files of a run.
    """
    runs: list[Run] = []
    exports: list[Run] = []
    for path in paths:
        place = Path(path).expanduser()
        if not place.exists():
            raise UnavailableError(
                f"{str(path)!r} does not exist: give the folder of a run, or one that has runs in it"
            )
        found = list(_below(place.parent if place.is_file() else place))
        found = [run for run in found if not place.is_file() or run.source == place]
        if not found:
            raise UserError(
                f"{str(path)!r} is no run and has none below it: there is no elsa_run.json, no TensorBoard events, no "
                f"metrics.csv and no {RECORD}. Give the folder that elsa fit wrote, such as "
                f"runs/elsa/lightning_logs/version_0"
            )
        for run in found:
            if not run.journal and not run.series:
                exports.append(run)
            elif not any(run.place == other.place for other in runs):
                runs.append(run)
    gone_on = {ancestor.resolve() for run in runs for ancestor in run.ancestors}
    asked = {Path(path).expanduser().resolve() for path in paths}
    runs = [run for run in runs if run.folder.resolve() not in gone_on or run.folder.resolve() in asked]
    for export in exports:
        _attach(export, runs)
    _name(runs)
    return runs


def _below(folder: Path, after: frozenset[str] = frozenset()) -> Iterator[Run]:
    """Yield the runs in a folder, or else in those below it.

    Args:
        folder: Folder to search.
        after: Runs that are read already, each of which resumed the next: a run may resume into its own folder.
    """
    if _is_run(folder) or (folder / RECORD).is_file():
        journals: list[Path | None] = [*sorted(folder.glob(JOURNALS))] or [None]
        for journal in journals:
            if str(journal) not in after:
                yield _read(folder, journal, len(journals) == 1, after)
        return
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        yield from _below(inner, after)


def _is_run(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in (JOURNALS, EVENTS, TABLE))


def _read(folder: Path, journal: Path | None, alone: bool, after: frozenset[str] = frozenset()) -> Run:
    """Return a run.

    Args:
        folder: Folder of the run.
        journal: Its journal.
        alone: Whether no other run shares the folder, so that all other files there belong to this one.
        after: Journals of the runs that resumed it.
    """
    run = Run(str(folder), folder, source=journal)
    if journal is not None:
        run.journal = _json(journal)
        if not run.journal:
            run.missing.append(f"{journal} cannot be read, so command, settings, scores and memory are not known")
    records = sorted(folder.rglob(RECORD), key=lambda file: (file.parent.name != "hf", file)) if alone else []
    run.record = dict(run.journal.get("record", {}))
    for file in records:
        known = _json(file)
        if file.parent.parent == folder or file.parent == folder:
            run.record = {**known, **run.record}
        run.saved += saved_in(file.parent, known)
    run.series = logged(folder) if alone else {}
    for file in sorted(folder.glob(_EVALUATIONS)) if alone else ():
        run.evaluations += [row for row in _json(file).get("figures", []) if isinstance(row, dict)]
    for name, values in noted(run.notes).items():
        run.series.setdefault(name, values)
    _go_back(run, after | {str(journal)})
    _say_what_is_missing(run, journal)
    return run


def _go_back(run: Run, after: frozenset[str]) -> None:
    """Prepend the metrics and notes of the runs that a run resumed."""
    resumed = run.journal.get("resumed_from")
    if not resumed:
        return
    start = int(run.journal.get("first_step", 0))
    former = next((p for p in list(Path(resumed).parents)[:_LEVELS] if p.is_dir() and _is_run(p)), None)
    runs = [] if former is None else [r for r in _below(former, after) if r.place != run.place]
    runs = [r for r in runs if r.journal.get("started", "") <= run.journal.get("started", "")]
    if not runs:
        run.missing.append(f"The run went on from {resumed}, which is not there: its figures begin at step {start}.")
        return
    before = max(runs, key=lambda r: str(r.journal.get("started", "")))
    for name, values in before.series.items():
        run.series[name] = [(s, v) for s, v in values if s <= start] + [
            (s, v) for s, v in run.series.get(name, []) if s > start
        ]
    earlier = [note for note in before.notes if note["step"] <= start]
    seconds = earlier[-1]["seconds"] if earlier else 0.0
    later = [{**note, "seconds": note["seconds"] + seconds} for note in run.notes]
    run.journal = {
        **run.journal, "notes": earlier + later, "seconds": seconds + float(run.journal.get("seconds") or 0),
    }  # fmt: skip
    if before.folder.resolve() != run.folder.resolve():
        run.ancestors = [before.folder, *before.ancestors]


def _say_what_is_missing(run: Run, journal: Path | None) -> None:
    if journal is None and run.series:
        run.missing.append(
            "Command, settings, scores, dead rows, memory and time are in elsa_run.json, which this run did not leave: "
            "runs of ElsaCallback with a logger or checkpoints do."
        )
    if run.journal and not any("perplexity" in name.lower() for name in run.series) and run.sparse is None:
        run.missing.append("No perplexity was measured: CausalLM does, on the data's validation text.")


def _attach(export: Run, runs: list[Run]) -> None:
    """Attach an export to the run that made its model, or keep it as an entry of its own."""
    key, named = _of_model(export.record), export.record.get("run")
    made = [run for run in runs if named and Path(named).resolve() == run.folder.resolve()]
    made.sort(key=lambda run: str(run.journal.get("started", "")), reverse=True)  # the latest of those in one folder
    made += [run for run in runs if key[0] and _of_model(run.record) == key]
    if made:
        places = {saved.folder.resolve() for saved in made[0].saved}
        made[0].saved += [saved for saved in export.saved if saved.folder.resolve() not in places]
        return
    export.missing.append("This is a model without the run that made it: its figures are in the run's folder.")
    runs.append(export)


def _of_model(record: dict[str, Any]) -> tuple[Any, ...]:
    perplexity = {n: v for n, v in record.get("perplexity", {}).items() if not n.startswith("exported")}
    return (
        record.get("command"),
        json.dumps(perplexity, sort_keys=True),
        json.dumps(record.get("method"), sort_keys=True),
    )


def _name(runs: list[Run]) -> None:
    """Name runs by the parts of their paths that differ."""
    parts = [run.folder.resolve().parts for run in runs]
    common = 0
    if len(runs) > 1:
        while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
            common += 1
    dull = {"lightning_logs", "csv_logs"}
    for index, (run, of) in enumerate(zip(runs, parts, strict=True)):
        rest = of[common:] if len(runs) > 1 else of[-1:]
        run.name = "/".join(part for part in rest if part not in dull) or of[-1]
        if [r.folder for r in runs].count(run.folder) > 1:
            run.name += f" #{index + 1}"
    names = [run.name for run in runs]
    for run in runs:  # version_N says nothing if names differ without it
        short = re.sub(r"/version_\d+$", "", run.name)
        if [re.sub(r"/version_\d+$", "", name) for name in names].count(short) == 1:
            run.name = short


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
