"""What the report says: the matrix, the sections and the figures of a study, as plain data for the template."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from circuits import __version__
from circuits._io import to_json
from circuits._stats import wilson_interval
from circuits._style import VERDICT_GLYPHS, WORLD_MODEL_GLYPHS
from circuits.errors import CorruptRun
from circuits.mechanisms import TESTS, VERSION, Evidence, rule_table
from circuits.plots import fourier_figure, neuron_figure, training_figure
from circuits.report import games
from circuits.report.in_words import in_words
from circuits.report.provenance import circuits_by, counted, made_with, reasons
from circuits.study import tables
from circuits.study.analyse import MATCHED, Analysis
from circuits.study.study import Study
from circuits.tasks.games import GAMES

MEANINGS = {
    "algorithm": "A candidate algorithm passes all its tests, no test of heuristics or lists passes too, and the "
    "held-out block, where there is one, agrees, or the errors are alike on training pairs and on unseen ones.",
    "heuristics": "Ranges of the operands, or ranges and residues of the result, are matched and survive idealisation, "
    "with no algorithm beside them; or unseen pairs are right, with two or more signs of heuristics and no algorithm.",
    "memorisation": "Training pairs are right and unseen ones, once mirror images are set aside, are wrong or right by "
    "luck; or all pairs, unseen ones too, are looked up one by one.",
    "mixed": "A candidate algorithm passes all its tests, but unseen pairs or the held-out block do not agree; or its "
    "variables work on some pairs, and a list or something else answers the rest.",
    "undetermined": "The task is learned, and none of the above is shown, or an algorithm and something else both "
    "pass: no mechanism is claimed.",
    "not-learned": "Neither training pairs, nor unseen ones, nor sums without a carry cascade are right, and no "
    "mechanism passes that errs alike on all pairs: there is none to name.",
}
"""What ``mechanisms.rule.decide`` asks for before it gives a label; ``docs/concepts.md`` has the same words."""


GLYPHS = {**VERDICT_GLYPHS, **WORLD_MODEL_GLYPHS}


class Figures:
    """Collects figures; each gets an id of ours and becomes one JSON script of the page."""

    def __init__(self) -> None:
        self.items: list[dict[str, str]] = []

    def add(self, figure: Any, label: str, *, height: int = 380) -> dict[str, Any]:
        """Keep a figure and return what the template needs to place it."""
        figure.update_layout(height=height, autosize=True, width=None)
        number = f"figure-{len(self.items)}"
        text = figure.to_json()
        # no tag can close the script element early
        text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        self.items.append({"id": number, "json": text})
        return {"id": number, "label": label, "height": height, "words": in_words(figure)}


def build(study: Study) -> dict[str, Any]:
    """Return everything that the template shows."""
    table = study.table
    figures = Figures()
    why_not = reasons(study)
    analyses: dict[str, Analysis] = {}
    done = table[table["status"] == "done"]
    columns = list(dict.fromkeys(table["cell"]))
    rows = list(dict.fromkeys(table["recipe"]))
    groups = {key: group for key, group in table.groupby(["cell", "recipe"], sort=False)}
    matrix = [
        {"recipe": recipe, "cells": [_cell(groups.get((column, recipe)), column, recipe) for column in columns]}
        for recipe in rows
    ]
    sections = []
    of_games = set(table.loc[table["task"].isin(GAMES), "cell"])
    for (cell, recipe), group in groups.items():
        if cell in of_games:
            continue
        found, problems = _read(study, group, why_not)
        analyses |= found
        by_seed = {int(row["seed"]): found[row["run_id"]] for row in group.to_dict("records") if row["run_id"] in found}
        sections.append(_section(str(cell), str(recipe), group, by_seed, problems, figures))
    by_cell = [{"cell": c, "sections": [s for s in sections if s["cell"] == c]} for c in columns if c not in of_games]
    world_models = games.world_models(study, table, figures)
    meanings = (MEANINGS if by_cell else {}) | (games.MEANINGS if of_games else {})
    meanings |= {} if by_cell else games.SHARED
    counts = Counter(done["label"])
    run = {item.test for analysis in analyses.values() for item in analysis.verdict.items}
    return {
        "title": study.spec.title,
        "name": study.spec.name,
        "headline": _headline(table, counts),
        "columns": columns,
        "matrix": matrix,
        "matched_accuracy": f"{MATCHED:.0%}",
        "matched": [row for key, group in groups.items() if (row := _matched(group, str(key[0]), str(key[1])))],
        "by_cell": by_cell,
        "legend": [{"label": label, "glyph": GLYPHS[label], "meaning": meaning} for label, meaning in meanings.items()],
        "tests": [{"name": n, "text": inspect.cleandoc(t.__doc__ or "")} for n, t in TESTS.items() if n in run],
        "tests_not_run": [n for n in TESTS if n not in run] if by_cell else [],
        "world_models": world_models,
        "probes": games.probes() if of_games else [],
        "game_rule": games.thresholds(),
        "rule": {"version": VERSION, "thresholds": [(k.replace("_", " "), v) for k, v in rule_table().items()]},
        "recipes": [_recipe(study, recipe) for recipe in rows],
        "discovery": circuits_by(analyses.values()),
        "made": made_with(study),
        "version": __version__,
        "runs": _runs(table, why_not),
        "csv": table.to_csv(index=False),
        "latex": tables.to_latex(table),
        "figures": figures.items,
        "n_figures": len(figures.items),
    }


def _headline(table: pd.DataFrame, counts: Mapping[str, int]) -> str:
    done = table[table["status"] == "done"]
    failed = int((table["status"].isin(["failed", "diverged"])).sum())
    parts = [f"{n} {label}" for label, n in sorted(counts.items(), key=lambda item: -item[1])]
    groups = done.groupby(["cell", "recipe"])["label"]
    repeated = groups.filter(lambda g: len(g) > 1)
    agree = sum(g.nunique() == 1 for _, g in groups if len(g) > 1)
    cells = sum(len(g) > 1 for _, g in groups)
    were = "was" if len(done) == 1 else "were"
    text = (
        f"{counted(len(done), 'network')} {were} trained on {counted(done['cell'].nunique(), 'task')} by "
        f"{counted(done['recipe'].nunique(), 'recipe')}. Verdicts: {', '.join(parts) or 'none yet'}."
    )
    if len(repeated):
        text += f" Seeds agree on the label in {agree} of {counted(cells, 'combination')} of task and recipe."
    if failed:
        are = "is" if failed == 1 else "are"
        text += f" {counted(failed, 'run')} failed or diverged and {are} listed at the end."
    return text


def _cell(group: pd.DataFrame | None, cell: str, recipe: str) -> dict[str, Any] | None:
    if group is None:
        return None
    done = group[group["status"] == "done"]
    if done.empty:
        return {"label": None, "text": ", ".join(sorted(set(group["status"]))), "anchor": anchor(cell, recipe)}
    chips = [_chip(str(label), n, done) for label, n in Counter(done["label"]).most_common()]
    return {
        "label": chips[0]["label"],
        "disagree": len(chips) > 1,
        "chips": chips,
        "agree": _agreement(done["label"], len(group) - len(done)),
        "accuracy": _range(done["accuracy"]),
        "block": _range(done["accuracy_block"]),
        "anchor": anchor(cell, recipe),
    }


def _agreement(labels: pd.Series, missing: int) -> str:
    """How many seeds have the most frequent label, with the interval of its share."""
    most, of = int(labels.value_counts().iloc[0]), len(labels)
    low, high = wilson_interval(most, of)
    text = f"{most} of {counted(of, 'seed')} ({100 * low:.0f} to {100 * high:.0f}\u00a0%)"
    return f"{text}, {missing} not done" if missing else text


def _matched(group: pd.DataFrame, cell: str, recipe: str) -> dict[str, Any] | None:
    """Return a row of the comparison at matched accuracy, None where no seed reached it."""
    done = group[group["status"] == "done"]
    reached = done[done["matched_label"].notna()].drop(columns=["label", "mechanism"])
    if reached.empty:
        return None
    reached = reached.rename(columns={"matched_label": "label", "matched_mechanism": "mechanism"})
    first, last = int(reached["matched_steps"].min()), int(reached["matched_steps"].max())
    return {
        "cell": cell,
        "recipe": recipe,
        "seeds": f"{len(reached)} of {len(done)}",
        "steps": f"{first}" if first == last else f"{first} to {last}",
        "accuracy": _range(reached["matched_accuracy"]),
        "chips": [_chip(str(label), n, reached) for label, n in Counter(reached["label"]).most_common()],
    }


def _chip(label: str, count: int, done: pd.DataFrame) -> dict[str, Any]:
    mechanisms = sorted({str(m) for m in done.loc[done["label"] == label, "mechanism"].dropna()})
    return {
        "label": label,
        "glyph": GLYPHS[label],
        "mechanism": " / ".join(mechanisms),
        "count": f"{count} of {len(done)}" if count < len(done) else "",
    }


def _range(values: pd.Series) -> str | None:
    kept = values.dropna()
    if kept.empty:
        return None
    low, high = 100 * float(kept.min()), 100 * float(kept.max())
    mean = 100 * float(kept.mean())
    return f"{mean:.1f} %" if high - low < 0.05 else f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def anchor(cell: str, recipe: str) -> str:
    """Return the id of a section: plain characters only, whatever the names hold."""
    names = json.dumps([cell, recipe])
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{cell}--{recipe}").lower()
    return f"s-{plain}-{hashlib.sha256(names.encode()).hexdigest()[:6]}"  # other names may look the same by then


def _read(study: Study, group: pd.DataFrame, why_not: Mapping[str, str]) -> tuple[dict[str, Analysis], list[str]]:
    """The analyses of some runs by id, and what is wrong with those that have none."""
    found: dict[str, Analysis] = {}
    problems: list[str] = []
    for row in group.to_dict("records"):
        if row["status"] != "done":
            problems.append(f"seed {row['seed']}: {_status(row, why_not)}")
            continue
        try:
            found[row["run_id"]] = study.analysis(row["run_id"])
        except CorruptRun as error:
            problems.append(f"seed {row['seed']}: {error}")
    return found, problems


def _status(row: Mapping[Any, Any], why_not: Mapping[str, str]) -> str:
    reason = why_not.get(row["run_id"])
    return f"{row['status']}: {reason}" if reason and row["status"] != "done" else str(row["status"])


def _section(
    cell: str,
    recipe: str,
    group: pd.DataFrame,
    analyses: Mapping[int, Analysis],
    problems: list[str],
    figures: Figures,
) -> dict[str, Any]:
    section: dict[str, Any] = {
        "cell": cell,
        "recipe": recipe,
        "anchor": anchor(cell, recipe),
        "why": str(group["why"].iloc[0]),
        "matrix": _cell(group, cell, recipe),
        "problems": problems,
        "verdicts": [],
        "figures": [],
        "absent": [],
    }
    for seed, analysis in analyses.items():
        verdict = analysis.verdict
        section["verdicts"].append(
            {
                "seed": seed,
                "label": verdict.label,
                "glyph": GLYPHS[verdict.label],
                "mechanism": verdict.mechanism,
                "why": verdict.why,
                "for": verdict.evidence_for,
                "against": verdict.evidence_against,
                "evidence": [_evidence(e) for e in verdict.items],
            }
        )
    if analyses:
        section["figures"] = _figures(analyses, f"{cell}: {recipe}", figures)
        section["absent"] = _absent(next(iter(analyses.values())))
    return section


def _evidence(item: Evidence) -> dict[str, Any]:
    mark = {True: ("✓", "passed"), False: ("✗", "not passed"), None: ("–", "does not decide")}[item.passed]
    number = "not measured" if item.value != item.value else f"{item.value:.3f}"
    low, high = item.interval
    return {
        "test": item.test,
        "value": number,
        "interval": "" if low != low else f"{low:.2f} to {high:.2f}",
        "control": "" if item.control is None else f"{item.control:.3f}",
        "control_name": item.control_name,
        "threshold": item.threshold,
        "mark": mark[0],
        "said": mark[1],
        "seconds": f"{item.seconds:.1f}",
    }


def _figures(analyses: Mapping[int, Analysis], name: str, figures: Figures) -> list[dict[str, Any]]:
    """Training curves over all seeds; evidence, circuit, spectrum and neurons of the first seed."""
    curves = {f"seed {seed}": analysis.figures["training"] for seed, analysis in analyses.items()}
    placed = [figures.add(training_figure(curves, title="Training curves"), f"Accuracy by training step, {name}")]
    seed, first = next(iter(analyses.items()))
    placed.append(figures.add(first.verdict.figure(), f"Evidence by test with controls, {name}, seed {seed}"))
    if (spectrum := first.figures["fourier"]) is not None:
        title = f"Fourier spectrum, seed {seed}"
        placed.append(figures.add(fourier_figure(spectrum, title=title), f"Variance by frequency, {name}, seed {seed}"))
    if (neurons := first.figures["neurons"]) is not None:
        title = f"Most important neurons (share of importance), seed {seed}"
        label = f"Activation of the most important neurons over both operands, {name}, seed {seed}"
        placed.append(figures.add(neuron_figure(neurons, title=title), label, height=520))
    if first.circuit is not None:
        placed.append(figures.add(first.circuit.figure(), f"Circuit graph, {name}, seed {seed}", height=520))
    if first.faithfulness is not None:
        placed.append(figures.add(first.faithfulness.figure(), f"Faithfulness by circuit size, {name}, seed {seed}"))
    return placed


def _absent(analysis: Analysis) -> list[str]:
    """Why a figure that other sections have is not in this one."""
    found = []
    if analysis.figures["fourier"] is None:
        found.append("No spectrum and no neuron maps: an answer of several tokens has no one place to read neurons at.")
    if analysis.circuit is None:
        found.append("No circuit: what was not learned has none to be found.")
    elif analysis.faithfulness is None:
        found.append("No faithfulness curve: the metric is the same when every edge is ablated.")
    return found


def _recipe(study: Study, recipe: str) -> dict[str, Any]:
    stages = []
    for run in study.plan:
        if run.recipe.name == recipe and (run.cell, "") not in stages:
            for stage in to_json(run.recipe)["stages"]:
                text = ", ".join(f"{k} {_plain(v)}" for k, v in stage.items() if v is not None)
                if (run.cell, text) not in stages:
                    stages.append((run.cell, text))
    return {"name": recipe, "stages": stages}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) + ")"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_plain(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _runs(table: pd.DataFrame, why_not: Mapping[str, str]) -> list[dict[str, str]]:
    def shown(value: Any) -> str:
        if value is None or value is pd.NA or value != value:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = ["run_id", "cell", "recipe", "seed", "status", "label", "mechanism", "accuracy", "steps", "seconds"]
    rows = [{**row, "status": _status(row, why_not)} for row in table.to_dict("records")]
    return [{key: shown(row[key]) for key in columns} for row in rows]
