"""Sphinx configuration: offline, warnings are errors (`make docs`)."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

generate.write(HERE / "generated", HERE.parent / "notebooks")

project = "objective-circuits"
author = "The objective-circuits contributors"
copyright = f"2026, {author}"
release = metadata.version("objective-circuits")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "circuits"
# The notebook's figures are drawn by the plotly that is installed: a build and its pages need no network.
html_static_path = ["generated/static"]

nb_execution_mode = "off"  # outputs are kept in the notebook, which the test suite executes
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "no-value": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def own_paragraphs(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give ``Formula:``, ``Cost:``, ``Conventions:``, ``Source:`` and ``Fails when:`` one paragraph each."""
    shown: list[str] = []
    inside = False
    for line in lines:
        label = re.match(r"(Formula|Cost|Conventions|Source|Fails when): ?(.*)", line)
        if label:
            shown += ["", f"**{label[1]}:** {label[2]}"]
        else:
            shown.append(line.lstrip() if inside else line)
        inside = bool(label) or (inside and bool(line.strip()))
    lines[:] = shown


def setup(app: Any) -> None:
    """Run before napoleon, which would read the labels as types of attributes."""
    app.connect("autodoc-process-docstring", own_paragraphs, priority=100)
