"""Writes ``report.html``."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from circuits._io import atomic_write
from circuits.report.content import build
from circuits.study.study import Study

HERE = Path(__file__).parent


def write(study: Study) -> Path:
    """Write the report of a study beside its table and return its path.

    The file holds everything that it needs, plotly.js included once, and forbids itself the network.

    Raises:
        StorageError: the study's directory cannot be written.
    """
    from plotly.offline import get_plotlyjs

    page = template().render(
        **build(study),
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )
    path = study.path / "report.html"
    atomic_write(path, page.encode())
    return path


@functools.cache
def template() -> jinja2.Template:
    """Return the page's template; everything that it is given is escaped unless the template says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html")
