"""The documentation: it builds without a warning, knows every public name, and quotes what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import elsa_lightning

ROOT = Path(__file__).parents[1]


def test_it_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees"),
         str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr  # links to pages, headings and files are checked, too
    api = (tmp_path / "html" / "api.html").read_text()
    missing = [name for name in elsa_lightning.__all__ if f'id="elsa_lightning.{name}"' not in api]
    assert not missing
    front = (tmp_path / "html" / "index.html").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert not [page for page in pages if f'href="{page}.html"' not in front]


def test_troubleshooting_quotes_what_the_code_says() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    joined = re.compile(r'"\s*f?"')  # of a string that goes on in the next line
    code = [joined.sub("", file.read_text()) for file in (ROOT / "elsa_lightning").rglob("*.py")]
    assert not [row for row in rows if not any(row in text for text in code)]
