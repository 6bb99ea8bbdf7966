"""Writes the pages that follow from the code: one per entry of the dicts, the commands, the presets and the notebooks.

A new entry in one of the dicts has its page with the next build; nothing here names an entry.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly
import plotly.io

from circuits import cli, discovery, mechanisms, objectives, reference, study, tasks, worldmodels

PLOTLY_SCRIPT = "plotly.min.js"
PLOTLY_OUTPUT = "application/vnd.plotly.v1+json"


@dataclasses.dataclass(frozen=True)
class Table:
    """One dict of the package: the page that lists it and how an entry of it is used."""

    folder: str
    title: str
    about: str
    module: ModuleType
    entries: Mapping[str, Any]
    usage: str


TABLES = (
    Table(
        "tasks",
        "Tasks",
        "A task is a finite, verifiable world with a known true state behind every token.",
        tasks,
        tasks.TASKS,
        'task = cx.tasks.get("{name}")',
    ),
    Table(
        "games",
        "Games",
        "A game is a task whose sequences are moves, with a known state behind every prefix.",
        tasks.games,
        tasks.games.GAMES,
        'game = cx.tasks.get("{name}")',
    ),
    Table(
        "objectives",
        "Objectives",
        "An objective is a loss on a task's batches; a recipe is a tuple of stages of them.",
        objectives,
        objectives.OBJECTIVES,
        'run = cx.train(task, cx.objectives.get("{name}"), seed=0, out="runs/{name}")',
    ),
    Table(
        "methods",
        "Discovery methods",
        "A method scores the nodes and edges of a model's graph over clean and corrupt pairs.",
        discovery,
        discovery.METHODS,
        'circuit = cx.discovery.attribute(model, task.pairs(256, seed=1), method="{name}")',
    ),
    Table(
        "analyses",
        "Analyses of models and circuits",
        "Beside the methods that score edges: nodes, paths, places and patterns, rules for gradients, and what says "
        "how good a circuit is.",
        discovery,
        discovery.ANALYSES,
        "help(cx.discovery.{function})",
    ),
    Table(
        "tests",
        "Mechanism tests",
        "A test returns one piece of evidence: a value with its interval, its control and its threshold.",
        mechanisms,
        mechanisms.TESTS,
        'evidence = cx.mechanisms.TESTS["{name}"](model, task, seed=0)',
    ),
    Table(
        "probes",
        "World-model probes",
        "A probe reads one statistic of a model on a game, with its controls: see [world models](../world-models.md).",
        worldmodels,
        worldmodels.PROBES,
        'reading = cx.worldmodels.PROBES["{name}"](model, game, seed=0)',
    ),
    Table(
        "references",
        "Reference models",
        "A reference model's mechanism is known by construction: the tests of mechanisms are held to it.",
        reference,
        reference.REFERENCES | reference.TRAINED,
        'model, task, truth = cx.reference.build("{name}", seed=0)',
    ),
)


def write(out: Path, notebooks: Path) -> None:
    """Write all generated pages under ``out``."""
    for table in TABLES:
        names = list(table.entries)
        toctree = "\n".join(f"{table.folder}/{name}" for name in names)
        listing = "\n".join(f"| [{n}]({table.folder}/{n}.md) | {first_line(table.entries[n])} |" for n in names)
        text = f"# {table.title}\n\n{table.about}\n\n| name | is |\n|---|---|\n{listing}\n\n"
        save(out / f"{table.folder}.md", f"{text}```{{toctree}}\n:hidden:\n\n{toctree}\n```\n")
        for stale in (out / table.folder).glob("*.md"):  # of an entry that has gone, or stands in another table now
            if stale.stem not in table.entries:
                stale.unlink()
        for name, entry in table.entries.items():
            save(out / table.folder / f"{name}.md", page(name, entry, table))
    save(out / "presets.md", presets_page())
    save(out / "commands.md", commands_page())
    for path in sorted(notebooks.glob("*.ipynb")):
        notebook = with_drawn_figures(json.loads(path.read_text(encoding="utf-8")))
        save(out / path.name, json.dumps(notebook, indent=1, sort_keys=True))
    script = Path(plotly.__file__).parent / "package_data" / PLOTLY_SCRIPT
    (out / "static").mkdir(exist_ok=True)
    if not (out / "static" / PLOTLY_SCRIPT).exists():
        shutil.copy(script, out / "static" / PLOTLY_SCRIPT)


def first_line(entry: Any) -> str:
    """Return the first line of an entry's docstring, fit for a table cell."""
    return (inspect.getdoc(entry) or "").splitlines()[0].replace("``", "`").replace("|", "\\|")


def page(name: str, entry: Any, table: Table) -> str:
    """Return the page of one entry: how to call it, its signature and docstring, where its source is."""
    directive, option = ("autoclass", "   :no-members:\n") if inspect.isclass(entry) else ("autofunction", "")
    public = hasattr(table.module, entry.__name__)
    path = f"{table.module.__name__ if public else entry.__module__}.{entry.__name__}"
    usage = table.usage.format(name=name, function=entry.__name__)
    measured = separation(name) if table.folder == "tests" else ""
    return (
        f"# {name}\n\n```python\nimport circuits as cx\n\n{usage}\n```\n\n"
        f"```{{eval-rst}}\n.. {directive}:: {path}\n   :no-index:\n{option}```\n\n"
        f"Source code: `{entry.__module__.replace('.', '/')}.py`.\n{measured}"
    )


def separation(test: str) -> str:
    """Return which families of reference models a test's value tells apart, as ``circuits calibrate`` measured it."""
    with (Path(__file__).parent / "separation.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["test"] == test]
    if not rows:
        return "\n## Measured separation\n\nNo pair of families of reference models has values of this test.\n"
    # below one half the other family has the higher values, which tells the two apart as well
    areas = {(row["family"], row["other"]): max(float(row["auroc"]), 1 - float(row["auroc"])) for row in rows}
    families = families_of(areas)
    sizes = {
        row[name]: int(row[f"n_{kind}"]) for row in rows for kind, name in (("family", "family"), ("other", "other"))
    }
    header = "| | " + " | ".join(families[1:]) + " |\n|---|" + "---|" * len(families[1:])
    lines = [
        f"| {one} | "
        + " | ".join(f"{areas[one, other]:.2f}" if (one, other) in areas else "" for other in families[1:])
        + " |"
        for one in families[:-1]
    ]
    return (
        "\n## Measured separation\n\n"
        "Area under the ROC curve of telling two families of [reference models](../references.md) apart by this value: "
        "1 always, 0.5 never. Models that have learned their task, and untrained ones, as in "
        "[calibration](../../calibration.md).\n\n"
        + "\n".join([header, *lines])
        + f"\n\nModels with a value: {', '.join(f'{family} {size}' for family, size in sizes.items())}.\n"
    )


def families_of(areas: Mapping[tuple[str, str], float]) -> list[str]:
    """Return the families of some pairs, in the order in which they first come."""
    return list(dict.fromkeys([one for one, _ in areas] + [other for _, other in areas]))


def commands_page() -> str:
    """Return the page of the command line: what each command says of itself."""
    parts = ["# Commands\n\nBad input ends with one line and exit code 2.\n"]
    for name in ("", *cli.COMMANDS):
        words = ["circuits", *filter(None, [name])]
        program = [sys.executable, "-m", "circuits.cli", *words[1:], "--help"]
        said = subprocess.run(program, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
        parts.append(f"## {' '.join(words)}\n\n```text\n{said.stdout.rstrip()}\n```\n")
    return "\n".join(parts)


def presets_page() -> str:
    """Return the page of the studies that come with the package, each as its TOML."""
    parts = ["# Presets\n\nStudies that come with the package: `circuits study NAME --out DIR`.\n"]
    for name, path in study.PRESETS.items():
        parts.append(f"## {name}\n\n```toml\n{path.read_text(encoding='utf-8').rstrip()}\n```\n")
    return "\n".join(parts)


def with_drawn_figures(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook whose plotly outputs are HTML that the copied script draws."""
    script: str | bool = f"../_static/{PLOTLY_SCRIPT}"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get(PLOTLY_OUTPUT)
            if figure is None:
                continue
            shown = {"data": figure["data"], "layout": figure["layout"]}
            html = plotly.io.to_html(shown, include_plotlyjs=script, full_html=False, validate=False)
            output["data"] = {"text/html": html}
            script = False
    return notebook


def save(path: Path, text: str) -> None:
    """Write a page, leaving it alone where it says the same already, so that a rebuild is quick."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
