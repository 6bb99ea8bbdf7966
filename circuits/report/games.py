"""What the report says of runs on games: scores between the controls, curves, headline figures and an edited state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from circuits import worldmodels
from circuits._io import to_json
from circuits.plots import board_figure, curves_figure, score_figure
from circuits.study.game_analysis import PLANTED, TOLD, UNTRAINED, GameAnalysis, uninformative_probes
from circuits.study.study import Study
from circuits.tasks.games import GAMES
from circuits.worldmodels import Assessment
from circuits.worldmodels.verdict import between

MEANINGS = {
    "world-model": "It distinguishes states that share their legal moves as the network that was told the state does, "
    "is not shown to compress prefixes or to use the state less (as far as the probes say anything on the game), and "
    "plays as well off the policy that it saw.",
    "heuristic": "It plays legally, but two or more of distinguishes, compresses, follows counterfactuals and holds "
    "off-policy are no better than half way to a network that was told the state, from an untrained one or from one "
    "that plays by a planted rule of legality, whichever is better.",
}
"""What ``worldmodels.judge`` asks for before it gives a label that other tasks have not."""
SHARED = {
    "mixed": "It plays legally, and its scores are neither all high nor low in two.",
    "undetermined": "It plays legally, and fewer than two of its probes tell their controls apart on this game.",
    "not-learned": "Too much of its probability is on illegal moves.",
}
"""The same for labels that other tasks have too."""

HEADLINE = {
    "inductive_bias": "Extrapolates by the state",
    "d_ib_same_legal": "D-IB, same legal moves",
    "d_ib_ceiling": "D-IB of the labels",
    "d_ib_other_legal": "D-IB, other legal moves",
    "r_ib": "R-IB",
    "exact_legal_set": "Exact legal set",
    "labels": "Labels",
    "labels_total": "Labels, with next tokens",
}
CURVES = (
    ("myhill-nerode", "compression", "Compression by depth"),
    ("myhill-nerode", "distinction recall", "Distinction recall by depth"),
    ("myhill-nerode", "distinction precision", "Distinction precision by depth"),
    ("latent-rollout", "rolled out", "States rolled out in the residual stream"),
    ("detours", "random", "Detours: legal play although moves are replaced"),
    ("intervention", "dose", "Intervention: errors undone by the length of the edit"),
)


@runtime_checkable
class Placing(Protocol):
    """What keeps figures for the page."""

    def add(self, figure: Any, label: str, *, height: int = ...) -> dict[str, Any]:
        """Keep a figure and return what the template needs to place it."""
        ...


def world_models(study: Study, table: pd.DataFrame, figures: Placing) -> list[dict[str, Any]]:
    """Return one section for each cell that is a game."""
    analyses, verdicts = study.games()
    done = table[(table["status"] == "done") & table["task"].isin(GAMES)]
    return [
        _section(str(cell), group, analyses, verdicts, uninformative_probes(str(cell), study.plan, analyses), figures)
        for cell, group in done.groupby("cell", sort=False)
        if set(group["run_id"]) <= analyses.keys()
    ]


def probes() -> list[dict[str, str]]:
    """Return every probe with its documentation."""
    return [{"name": n, "text": inspect.cleandoc(probe.__doc__ or "")} for n, probe in worldmodels.PROBES.items()]


def thresholds() -> dict[str, Any]:
    """Return the version and thresholds of the rule."""
    values = to_json(worldmodels.Thresholds()).items()
    return {"version": worldmodels.VERSION, "thresholds": [(name.replace("_", " "), value) for name, value in values]}


def _section(
    cell: str,
    group: pd.DataFrame,
    analyses: Mapping[str, GameAnalysis],
    verdicts: Mapping[str, Assessment],
    silent: Sequence[str],
    figures: Placing,
) -> dict[str, Any]:
    recipes = {str(name): list(rows["run_id"]) for name, rows in group.groupby("recipe", sort=False)}
    scores = {name: _means([_values(verdicts[run], "value") for run in runs]) for name, runs in recipes.items()}
    raw = {name: _means([_values(verdicts[run], "raw") for run in runs]) for name, runs in recipes.items()}
    placed = [
        figures.add(
            score_figure(scores, raw, title="Scores by objective, statistics in the cells"),
            f"Scores between the controls by objective, {cell}, mean over seeds",
            height=620,
        )
    ]
    scaled, values = _every_probe(group, analyses, recipes, silent)
    placed.append(
        figures.add(
            score_figure(scaled, values, title="Every probe by objective", rows="probe"),
            f"Every probe by objective, {cell}, mean over seeds",
            height=760,
        )
    )
    for probe, name, title in CURVES:
        curves = {recipe: _curve([analyses[run] for run in runs], probe, name) for recipe, runs in recipes.items()}
        shown = {recipe: curve for recipe, curve in curves.items() if curve is not None}
        if shown:
            x_title, y_title = _titles(analyses, group, probe, name)
            figure = curves_figure(shown, title=title, x_title=x_title, y_title=y_title)
            label = f"{title}, {cell}, mean over seeds"
            placed.append(figures.add(figure, label, height=380 + 20 * len(shown)))
    informed = [run for runs in recipes.values() for run in runs]
    return {
        "cell": cell,
        "why": str(group["why"].iloc[0]),
        "headline": [_headline(name, group[group["recipe"] == name]) for name in recipes],
        "columns": list(HEADLINE.values()),
        "uninformative": sorted({name for run in informed for name in verdicts[run].uninformative}),
        "silent": list(silent),
        "controls": sorted({verdicts[run].controls for run in informed}),
        "verdicts": [_verdict(row, verdicts[row["run_id"]]) for row in group.to_dict("records")],
        "boards": _boards(cell, recipes, analyses, figures),
        "figures": placed,
    }


def _every_probe(
    group: pd.DataFrame,
    analyses: Mapping[str, GameAnalysis],
    recipes: Mapping[str, Sequence[str]],
    silent: Sequence[str],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Each probe's value by recipe, between those of the two controls (of none that says nothing), and as it is."""

    def means(runs: Sequence[str]) -> dict[str, float]:
        return _means([{probe: analyses[run].readings[probe].value for probe in worldmodels.PROBES} for run in runs])

    values = {recipe: means(runs) for recipe, runs in recipes.items()}
    bottom, top = (means(list(group[group["objective"] == name]["run_id"])) for name in (UNTRAINED, TOLD))
    said = [probe for probe in worldmodels.PROBES if probe not in silent and top[probe] > bottom[probe]]
    scaled = {
        recipe: {p: between(x, bottom[p], top[p]) if p in said else float("nan") for p, x in of.items()}
        for recipe, of in values.items()
    }
    return scaled, values


def _values(verdict: Assessment, key: str) -> dict[str, float]:
    return {name: float(getattr(score, key)) for name, score in verdict.scores.items()}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over seeds of each number, over those that are known."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        known = [row[name] for row in rows if row[name] == row[name]]
        found[name] = sum(known) / len(known) if known else float("nan")
    return found


def _curve(
    analyses: Sequence[GameAnalysis], probe: str, name: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean over seeds of a curve, as far as all have it; None where one lacks it."""
    curves = [analysis.readings[probe].curves.get(name) for analysis in analyses]
    known = [curve for curve in curves if curve is not None]
    if not known or len(known) < len(curves):
        return None
    length = min(len(curve.x) for curve in known)
    means = tuple(sum(curve.y[i] for curve in known) / len(known) for i in range(length))
    return (known[0].x[:length], means) if length else None


def _titles(analyses: Mapping[str, GameAnalysis], group: pd.DataFrame, probe: str, name: str) -> tuple[str, str]:
    curves = (analyses[run].readings[probe].curves.get(name) for run in group["run_id"])
    first = next(curve for curve in curves if curve is not None)
    return first.x_title, first.y_title


def _headline(recipe: str, group: pd.DataFrame) -> dict[str, Any]:
    """A row of the headline table: the mean over seeds of each number, with its 95 % interval by Student's t."""
    numbers = []
    for name in HEADLINE:
        values = group[name].dropna()
        if values.empty:
            numbers.append("–")
        elif name.startswith("labels"):
            numbers.append(f"{values.mean():,.0f}")
        elif name == "d_ib_ceiling":  # of the labels, whoever answers them
            numbers.append(f"{values.mean():.3f}")
        else:
            numbers.append(f"{values.mean():.3f}{_interval(values)}")
    roles = {UNTRAINED: "control at 0", TOLD: "control at 1", PLANTED: "rule of legality"}
    role = roles.get(str(group["objective"].iloc[0]), "")
    return {"recipe": recipe, "role": role, "numbers": numbers}


def _interval(values: pd.Series) -> str:
    """The 95 % interval of a mean over seeds; none of one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return ""
    reach = float(t.ppf(0.975, len(values) - 1)) * values.std() / len(values) ** 0.5
    return f" [{values.mean() - reach:.3f}, {values.mean() + reach:.3f}]"


def _verdict(row: Mapping[Any, Any], verdict: Assessment) -> dict[str, Any]:
    shown = [f"{name} {score.value:.2f}" for name, score in verdict.scores.items() if score.known]
    return {
        "recipe": row["recipe"],
        "seed": row["seed"],
        "label": verdict.label,
        "why": verdict.why,
        "scores": ", ".join(shown) or "none",
    }


def _boards(
    cell: str, recipes: Mapping[str, Sequence[str]], analyses: Mapping[str, GameAnalysis], figures: Placing
) -> list[dict[str, Any]]:
    """An intervention of the first seed of each recipe that has one, before and after."""
    found = []
    for recipe, runs in recipes.items():
        reading = analyses[runs[0]].readings["intervention"]
        if reading.board is None:
            continue
        figure = board_figure(reading.board, title=f"An edited state: {recipe}")
        found.append(
            {
                "recipe": recipe,
                "success": f"{reading.value:.2f}",
                "board": reading.board,
                "figure": figures.add(
                    figure, f"State and moves before and after an edit, {cell}, {recipe}", height=430
                ),
            }
        )
    return found
