"""Writes the figures of a report as PNGs, drawn by an installed Chromium."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export.folders import new_folder

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 300  # timeout for all figures, generous for a busy machine
_FLAGS = (
    "--headless", "--dump-dom", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,2000", "--virtual-time-budget=120000",
    "--blink-settings=preferredColorScheme=1",
)  # fmt: skip
# waits until the page is drawn, then replaces it by its pictures
_SCRIPT = """
<script>
"use strict";
(async () => {
  while (!document.documentElement.dataset.drawn) await new Promise((done) => setTimeout(done, 50));
  const ground = getComputedStyle(document.documentElement).getPropertyValue("--ground").trim();
  const pictures = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const { data, layout } = plot.querySelector(".canvas"), figure = plot.closest("figure");
    const text = figure.querySelector("h3").textContent.replaceAll("<", "&lt;");
    const title = { text, x: 0.02, y: 0.98, yanchor: "top" };
    const margin = { ...layout.margin, t: 48 };
    const whole = { ...layout, title, margin, paper_bgcolor: ground, plot_bgcolor: ground, autosize: false };
    const size = { format: "png", width: 900, height: layout.height + 60, scale: 2 };
    pictures.push([figure.id, await Plotly.toImage({ data, layout: whole }, size)]);
  }
  document.body.replaceChildren(...pictures.map(([name, uri]) => {
    const made = document.createElement("p");
    made.textContent = `${name} ${uri}`;
    return made;
  }));
})();
</script>
</body>"""


def figures_of(page: Path) -> Path:
    """Return the folder of a page's PNGs."""
    return page.with_name(f"{page.stem}_figures")


def check_pictures(page: Path) -> str:
    """Return the browser with which to draw a page.

    Raises:
        UserError: There is none, or the folder of the PNGs has other files, which would be lost.
    """
    folder = figures_of(page)
    others = [folder] if folder.is_file() else [p for p in folder.glob("*") if p.suffix != ".png"]
    if others:
        raise UserError(f"{str(others[0])!r} is no figure of a report, and would be lost: give another --output")
    named = os.environ.get("BROWSER_PATH")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        why = f"BROWSER_PATH is {named!r}, which is no program" if named else "none is installed"
        raise UnavailableError(
            f"--png draws with Chromium or Chrome, and {why}: install one (apt-get install chromium), give its path in "
            f"BROWSER_PATH, or save figures by the button over each of them in the page"
        )
    return found


def write_pictures(page: Path, browser: str) -> list[Path]:
    """Write each figure of a page as a PNG, all of them or none.

    Args:
        page: The page of a report.
        browser: Command of a Chromium.

    Returns:
        The files, in the page's order.

    Raises:
        UserError: The browser failed.
    """
    text = page.read_text(encoding="utf-8")
    expected = text.partition("<body>")[2].count("<figure ")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        drawn = Path(place) / "page.html"
        drawn.write_text(_SCRIPT.join(text.rsplit("</body>", 1)), encoding="utf-8")
        alone = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # required for root
        command = [browser, *_FLAGS, *alone, f"--user-data-dir={place}/profile", drawn.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            said, made = done.stderr, done.stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            said, made = str(error), ""
    found = re.findall(r"<p>([\w-]+) data:image/png;base64,([\w+/=]+)</p>", made)
    if len(found) != expected:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{browser} drew {len(found)} of {expected} figures, and no PNG is written: {last}")
    folder = figures_of(page)
    with new_folder(folder) as whole:
        for name, picture in found:
            (whole / f"{name}.png").write_bytes(base64.b64decode(picture))
    return [folder / f"{name}.png" for name, _ in found]
