"""The command ``elsa report``: its parser and entry point."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from elsa_lightning.commands import CommandParser

_EXAMPLES = """\
examples:
  elsa report runs/elsa/lightning_logs/version_0      one run
  elsa report runs/elsa                               all runs below a folder, compared
  elsa report runs/a runs/b exports/cpu               some runs, and what was exported of them
  elsa report runs/elsa --output evidence/elsa.html   somewhere else
  elsa report runs/elsa --png                         each figure as a PNG, too

It reads what runs leave anyway: elsa_run.json, TensorBoard's events or CSVLogger's metrics.csv, and elsa.json beside a
saved model. A run that still goes on can be looked at too. docs/report.md says what each figure shows.
"""


def parser() -> CommandParser:
    """Return the parser, without slow imports."""
    made = CommandParser(
        "elsa report",
        description="Write one page of what runs left: results, curves, where the zeros are, settings and commands. It "
        "opens offline, in any browser. Beside it is the same as JSON.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="folder of a run, or one with runs below it; or of an export"
    )
    made.add_argument(
        "--output", default="report.html", metavar="FILE.html", help="page to write (default: %(default)s); an earlier "
        "report is replaced, another file is not",
    )  # fmt: skip
    made.add_argument(
        "--png", action="store_true", help="draw each figure into FILE_figures, as a PNG; needs Chromium or Chrome"
    )
    return made


def main(arguments: Sequence[str]) -> None:
    """Write the report.

    Args:
        arguments: The arguments after ``report``.
    """
    given = parser().parse_args(arguments)
    report(given.runs, Path(given.output).expanduser(), given.png)


def report(paths: Sequence[str | Path], output: Path, png: bool = False) -> None:
    """Write a report and print its path.

    Args:
        paths: Folders of runs.
        output: File to write; its name ends in ``.html``.
        png: Whether to write each figure as a PNG, too.

    Raises:
        UserError: A folder has no run, a file would be overwritten that is not a report, or a package is missing.
    """
    from elsa_lightning.reports.page import check_output, check_packages, write_report
    from elsa_lightning.reports.pictures import check_pictures, figures_of, write_pictures
    from elsa_lightning.reports.runs import read_runs

    check_packages()
    check_output(output)
    browser = check_pictures(output) if png else None
    runs = read_runs(paths)
    page = write_report(runs, output)
    told = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    size = f"{page.stat().st_size / 1e6:.1f} MB"
    print(f"Report of {told}: {page} ({size}, opens offline; {page.stem}.json has its numbers)")
    if browser is not None:
        print(f"Figures: {figures_of(page)} ({len(write_pictures(page, browser))} PNGs)")
