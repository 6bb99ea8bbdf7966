"""Writes ``report.html``, of a study or of a calibration."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from circuits._io import atomic_write
from circuits._style import ON_DARK
from circuits.mechanisms import VERSION, rule_table
from circuits.report import theme
from circuits.report.content import build
from circuits.report.provenance import counted
from circuits.study.calibration import Calibration
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
        style=_style(),
        on_dark=ON_DARK,
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )
    path = study.path / "report.html"
    atomic_write(path, page.encode())
    return path


def write_calibration(calibration: Calibration) -> Path:
    """Write what verdicts on built models amount to beside their table, and return the page's path.

    Raises:
        StorageError: the directory cannot be written.
    """
    separation = calibration.separation()
    areas = separation.assign(
        auroc=separation["auroc"].clip(lower=0).where(separation["auroc"] >= 0.5, 1 - separation["auroc"])
    )
    confusion = calibration.confusion()
    page = template("calibration.html").render(
        style=_style(),
        version=VERSION,
        summary=_records(calibration.summary()),
        verdicts=list(confusion.columns),
        heads=_heads(list(confusion.columns)),
        confusion=[{"truth": truth, "counts": row.tolist()} for truth, row in confusion.iterrows()],
        left_out=_records(calibration.left_out()),
        separation=[
            {
                "test": test,
                "best": float(group["auroc"].max()),
                "mean": float(group["auroc"].mean()),
                "pairs": len(group),
            }
            for test, group in areas.groupby("test", sort=False)
        ],
        thresholds=[(name.replace("_", " "), value) for name, value in rule_table().items()],
        models=counted(len(calibration.table), "built model"),
    )
    path = calibration.path / "report.html"
    atomic_write(path, page.encode())
    return path


def _heads(verdicts: Sequence[str]) -> list[dict[str, Any]]:
    """Each label of a row of verdicts with its mechanisms, of which one that is not named is empty."""
    return [
        {"label": label, "mechanisms": [verdict.partition("/")[2] for verdict in group]}
        for label, group in itertools.groupby(verdicts, key=lambda verdict: verdict.partition("/")[0])
    ]


def _style() -> str:
    return theme.css() + (HERE / "report.css").read_text(encoding="utf-8")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name).replace(" ", "_"): value for name, value in row.items()} for row in frame.to_dict("records")]


@functools.cache
def template(name: str = "report.html") -> jinja2.Template:
    """Return a page's template; everything that it is given is escaped unless the template says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)
