"""World-model probes over objectives: a heat map of scores, and curves by depth and by detours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from circuits._style import SEQUENTIAL, SERIES

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon")


def score_figure(
    scores: Mapping[str, Mapping[str, float]], raw: Mapping[str, Mapping[str, float]], *, title: str
) -> go.Figure:
    """Return scores (rows) by objective (columns) as a heat map, the controls among the columns.

    Args:
        scores: for each objective, its scores between the controls by name; NaN where the probe tells nothing.
        raw: the statistics that they are from, shown in each cell.
        title: the figure's title.
    """
    names = list(next(iter(scores.values())))
    z = [[_or_none(of[name]) for of in scores.values()] for name in names]
    text = [[_shown(of[name]) for of in raw.values()] for name in names]
    heat = go.Heatmap(
        z=z,
        x=list(scores),
        y=names,
        text=text,
        texttemplate="%{text}",
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        colorbar={"title": "score"},
        hovertemplate="%{y}, %{x}: statistic %{text}, score %{z:.2f}<extra></extra>",
        hoverongaps=False,
    )
    figure = go.Figure([heat])
    figure.update_layout(
        title=title,
        template="circuits",
        xaxis_title="objective (0: random-init, 1: state)",
        yaxis={"title": "score", "autorange": "reversed"},
    )
    return figure


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Return one line for each objective.

    Args:
        curves: x and y of each objective.
        title: the figure's title.
        x_title: what x is, with its unit.
        y_title: what y is, with its unit.
    """
    figure = go.Figure()
    for number, (name, (x, y)) in enumerate(curves.items()):
        marker = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8}
        line = {"color": SERIES[number % len(SERIES)], "dash": ("solid", "dot")[number // len(SERIES) % 2]}
        figure.add_scatter(x=list(x), y=list(y), mode="lines+markers", name=name, line=line, marker=marker)
    figure.update_layout(
        title=title, template="circuits", xaxis_title=x_title, yaxis={"title": y_title, "range": [-0.03, 1.03]}
    )
    return figure


def _or_none(value: float) -> float | None:
    return None if value != value else value


def _shown(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"
