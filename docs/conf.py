"""Sphinx configuration: offline, warnings are errors (`make docs`)."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

generate.write(HERE / "generated", HERE.parent / "notebooks")

project = "objective-circuits"
author = "The objective-circuits contributors"
release = version("objective-circuits")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "circuits"
# The notebook's figures are drawn by the plotly that is installed: a build and its pages need no network.
html_static_path = ["_static", "generated/static"]

nb_execution_mode = "off"  # outputs are kept in the notebook, which the test suite executes
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Fails when"]
