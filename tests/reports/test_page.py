"""The page: what it says, what it never loses, and, in a browser, what it looks like."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from elsa_lightning.cli import main
from elsa_lightning.reports.page import _json
from elsa_lightning.reports.pareto import trade_offs
from elsa_lightning.reports.pictures import check_pictures, write_pictures
from elsa_lightning.reports.runs import Run, read_runs
from elsa_lightning.reports.saved import Saved

from .runs import run

pytest.importorskip("plotly", reason="plotly is not installed (the extra report)")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
FIGURES = {"loss", "perplexity", "residuals", "sparsity", "penalty", "flips", "dead", "kept", "memory", "time"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs at one sparsity and one at another, below a folder whose name is no markup."""
    place = tmp_path_factory.mktemp("runs") / "<script>alert(1)<"
    for name, sparsity, final in (("a", 0.9, 30.0), ("b", 0.9, 34.0), ("c", 0.5, 22.0)):
        run(place / name, sparsity=sparsity, final=final)
    return place


@pytest.fixture(scope="module")
def pages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    for name, of in (("one", folder / "a"), ("three", folder)):
        main(["report", str(of), "--output", str(place / f"{name}.html")])
    return {name: place / f"{name}.html" for name in ("one", "three")}


def test_a_page_begins_with_the_result_and_loads_nothing(pages: dict[str, Path]) -> None:
    text = pages["one"].read_text()
    body = text.partition("<body>")[2]
    assert body.index("20.00 → 30.00") < body.index("<figure")
    assert "a text, 3 segments" in body and "90.0 % zeros" in body
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert set(re.findall(r'<figure id="([\w-]+)"', body)) == FIGURES | {"zeros-0", "scores-0"}
    assert body.count('role="img" aria-label=') == body.count("<figure") == body.count("<details><summary>Numbers of")


def test_several_runs_are_compared_and_names_are_no_markup(pages: dict[str, Path], folder: Path) -> None:
    text = pages["three"].read_text()
    assert re.search(r"<h1>3 runs</h1>", text) and 'id="pareto"' in text
    assert "<script>alert" not in text and "alert(1)" in text
    told = json.loads(pages["three"].with_suffix(".json").read_text())["runs"]
    assert [one["perplexity"]["sparse"] for one in told] == [30.0, 34.0, 22.0]
    assert all(one["series"]["loss"] and one["journal"]["notes"] for one in told)


def test_the_curve_joins_means_of_seeds_that_nothing_beats(folder: Path) -> None:
    (chart,) = trade_offs(read_runs([folder]))
    assert chart.figure is not None
    line, points, dense = json.loads(chart.figure)["data"]
    assert line["x"] == [pytest.approx(0.5, abs=1e-3), pytest.approx(0.9, abs=1e-3)] and line["y"] == [22.0, 32.0]
    assert sorted(points["y"]) == [22.0, 30.0, 34.0] and dense["y"] == [20.0, 20.0]
    assert "means, of runs that differ by their seed alone" in chart.text


def test_runs_measured_on_other_text_are_not_averaged_as_seeds_and_the_chart_says_so(folder: Path) -> None:
    runs = read_runs([folder])
    (chart,) = trade_offs(runs)
    assert "several ways" not in chart.text
    other = runs[1].record  # of two that would differ by their seed alone
    other["evaluation"], other["perplexity"]["protocol"] = {"eval_name": "another"}, "another text, 3 segments"
    (chart,) = trade_offs(runs)
    assert chart.figure is not None and json.loads(chart.figure)["data"][0]["y"] == [22.0, 30.0]
    assert "several ways" in chart.text and "seed alone" not in chart.text


def test_sizes_make_a_curve_where_models_differ_in_them(folder: Path) -> None:
    runs = read_runs([folder])
    assert [chart.name for chart in trade_offs(runs)] == ["pareto"]
    for found, size in zip(runs, (1, 2, 3), strict=True):
        its = Saved(found.folder, "shrunk", size * 2**20, 10.0 / size, perplexity=found.sparse)
        found.saved.append(replace(its, dense_size=4 * 2**20, dense_speed=3.0))
    _, sizes, speeds = trade_offs(runs)
    assert sizes.figure is not None and speeds.figure is not None
    line, points, dense, _ = json.loads(sizes.figure)["data"]
    assert dense["x"] == [4] and dense["y"] == [20.0]
    assert points["x"] == [1, 2, 3] and points["y"] == [30.0, 34.0, 22.0] and line["y"] == [32.0, 22.0]
    assert json.loads(speeds.figure)["data"][1]["x"] == [10.0, 5.0, pytest.approx(10 / 3)]
    runs[0].saved.append(replace(runs[0].saved[0], size=2**19, tokens_per_second=20.0))  # of one run, its models
    assert [chart.name for chart in trade_offs(runs[:1])] == ["pareto-bytes", "pareto-speed"]


def test_what_is_not_there_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    (found / "elsa_run.json").unlink()
    main(["report", str(found), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "<li>Scores about the threshold: this is in elsa_run.json" in text and 'id="scores-0"' not in text
    assert 'id="loss"' in text and 'id="residuals"' in text


def test_its_json_is_json_whatever_a_run_logged(tmp_path: Path) -> None:
    text = _json([Run("a", tmp_path, series={"loss": [(1, math.nan), (2, math.inf), (3, 0.5)]})])
    (told,) = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["runs"]
    assert told["series"] == {"loss": [[1, None], [2, None], [3, 0.5]]}


def test_a_report_takes_the_place_of_a_report_only(
    pages: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(folder / "b"), "--output", str(pages["one"])])
    assert "20.00 → 34.00" in pages["one"].read_text()
    main(["report", str(folder / "a"), "--output", str(pages["one"])])
    (tmp_path / "mine.html").write_text("my page")
    (tmp_path / "data.json").write_text("{}")
    for name, told in (
        ("mine.html", "is there and is no report"), ("data.html", "data.json' is there and is no report"),
        ("page.pdf", "ends in .html"),
    ):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["report", str(folder / "a"), "--output", str(tmp_path / name)])
        assert end.value.code == 1 and told in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "my page"


def test_without_plotly_it_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(SystemExit):
        main(["report", str(folder / "a"), "--output", str(tmp_path / "page.html")])
    assert "pip install 'plotly>=6' 'jinja2>=3'" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    assert end.value.code == 0 and "elsa report runs/elsa  " in capsys.readouterr().out


@pytest.mark.browser
@needs_browser
def test_each_figure_is_a_picture_that_shows_it(pages: dict[str, Path], tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "page_figures"
    shutil.copy(pages["three"], page)
    figures.mkdir()
    (figures / "of-another-report.png").touch()
    made = write_pictures(page, check_pictures(page))
    assert sorted(figures.iterdir()) == sorted(made) and "of-another-report.png" not in made
    drawn = re.findall(r'<figure id="([\w-]+)"', page.read_text().partition("<body>")[2])
    assert [picture.stem for picture in made] == drawn
    for picture in made:
        (most, ground), *others = colours(picture)
        assert Image.open(picture).width == 1800 and sum(ground) > 700 and most > 1000 and len(others) > 50
        assert any(max(colour) - min(colour) > 100 for _, colour in others) or picture.stem.startswith("scores")


def test_pictures_are_refused_before_anything_is_read_and_are_all_there_or_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        with pytest.raises(SystemExit) as end:
            main(["report", str(folder / "a"), "--output", str(tmp_path / "page.html"), "--png"])
        assert end.value.code == 1 and not (tmp_path / "page_figures/loss.png").exists()
        return capsys.readouterr().err

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Chromium or Chrome, and none is installed: install one (apt-get install chromium)" in told()
    monkeypatch.setenv("BROWSER_PATH", "nowhere/chrome")
    assert "BROWSER_PATH is 'nowhere/chrome', which is no program" in told()
    assert not (tmp_path / "page.html").exists()
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho cannot open display >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("BROWSER_PATH")
    assert re.search(r"chromium drew 0 of \d+ figures, and no PNG is written: cannot open display", told())
    assert (tmp_path / "page.html").exists()
    (tmp_path / "page_figures").mkdir()
    (tmp_path / "page_figures/thesis.tex").touch()
    assert "thesis.tex' is no figure of a report, and would be lost" in told()


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """Return the page as a browser made it, and what it had to say."""
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=30000", "--enable-logging=stderr", *flags,
         page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def colours(picture: Path) -> list[tuple[int, tuple[int, int, int]]]:
    """Return how many pixels there are of each colour, the most frequent first."""
    image = Image.open(picture).convert("RGB")
    return sorted(image.getcolors(image.width * image.height) or [], reverse=True)  # type: ignore[arg-type]


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("width", [1200, 500])
def test_every_figure_is_drawn_in_a_browser(name: str, width: int, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    probe = "<script>document.title=document.documentElement.scrollWidth+'/'+innerWidth</script></body>"
    page.write_text(pages[name].read_text().replace("</body>", probe))
    made, said = browse(page, tmp_path, "--dump-dom", f"--window-size={width},2000")
    assert not said
    drawn = re.findall(r'class="plot"[^>]*data-drawn="(\d+)"', made)
    assert len(drawn) == pages[name].read_text().partition("<body>")[2].count("<figure ") and min(map(int, drawn)) > 0
    wide, window = map(int, re.findall(r"<title>(\d+)/(\d+)</title>", made)[0])
    assert wide <= window  # nothing sticks out


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("name", ["one", "three"])
def test_the_page_is_readable_in_light_and_dark(name: str, pages: dict[str, Path], tmp_path: Path) -> None:
    grounds = []
    for scheme in ("1", "0"):  # of Blink: light, dark
        picture = tmp_path / f"{scheme}.png"
        flags = [
            f"--screenshot={picture}",
            "--window-size=1200,3000",
            f"--blink-settings=preferredColorScheme={scheme}",
        ]
        _, said = browse(pages[name], tmp_path, *flags)
        assert not said
        (most, ground), *others = colours(picture)
        assert len(others) > 100 and 0.5 < most / (1200 * 3000) < 0.99
        accent = (0x1F, 0x6F, 0xEB) if scheme == "1" else (0x6E, 0xA8, 0xFE)
        assert {colour: count for count, colour in others}[accent] > 1000
        grounds.append(sum(ground))
    assert grounds[0] > 700 and grounds[1] < 100
