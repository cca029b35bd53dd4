"""How Sphinx builds the documentation: `make docs`, any warning is an error."""

import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

project = "elsa-lightning"
author = "the elsa-lightning authors"
release = version = installed("elsa-lightning")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "elsa-lightning"
html_show_sphinx = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _read(app: Any, name: str, source: list[str]) -> None:
    """Begin the front page with the README, and take what lies outside of docs/ along as files."""
    text = source[0]
    if name == "index":
        readme = Path(app.srcdir, "../README.md").read_text()
        text = re.sub(r"\]\((?!https?:|docs/|#)", "](../", readme).replace("](docs/", "](") + text
    source[0] = re.sub(r"\]\((\.\./[^)]*\.md)\)", r"](path:\1)", text)


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("source-read", _read)
