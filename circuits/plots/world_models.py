"""World-model probes over objectives: a heat map of scores, curves by depth and by detours, and edited boards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits._style import BLUE, RED, SEQUENTIAL, SERIES
from circuits.worldmodels import EditedBoard

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon")


def score_figure(
    scores: Mapping[str, Mapping[str, float]],
    raw: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    rows: str = "score",
) -> go.Figure:
    """Return scores (rows) by objective (columns) as a heat map, the controls among the columns.

    Args:
        scores: for each objective, its scores between the controls by name; NaN where the probe tells nothing.
        raw: the statistics that they are from, shown in each cell.
        title: the figure's title.
        rows: what the rows are.
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
        yaxis={"title": rows, "autorange": "reversed"},
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
        line = {"color": SERIES[number % len(SERIES)], "dash": ("solid", "dot", "dash")[number // len(SERIES) % 3]}
        figure.add_scatter(x=list(x), y=list(y), mode="lines+markers", name=name, line=line, marker=marker)
    lowest = min((value for _, y in curves.values() for value in y), default=0.0)
    figure.update_layout(
        title=title,
        template="circuits",
        xaxis_title=x_title,
        yaxis={"title": y_title, "range": [min(-0.03, lowest - 0.05), 1.03]},
    )
    return figure


def board_figure(board: EditedBoard, *, title: str) -> go.Figure:
    """Return a state and what it was edited to, with the moves' probabilities before and after.

    Bars of moves that are legal in the state above them are blue.

    Args:
        board: what an intervention kept of its clearest case.
        title: the figure's title.
    """
    figure = make_subplots(
        rows=2,
        cols=2,
        row_heights=[0.55, 0.45],
        vertical_spacing=0.2,
        subplot_titles=("state", "edited state", "moves before the edit", "moves after the edit"),
    )
    sides = ((board.picture, board.legal, board.before), (board.edited_picture, board.edited_legal, board.after))
    shown = [i for i in range(len(board.tokens)) if any((board.legal[i], board.edited_legal[i], board.after[i] > 0.02))]
    for column, (picture, legal, chances) in enumerate(sides, start=1):
        cells = go.Heatmap(
            z=[[int(bool(cell)) for cell in row] for row in picture],
            text=[list(row) for row in picture],
            texttemplate="%{text}",
            textfont={"size": 20},
            colorscale=[[0, "#dfe4ea"], [1, BLUE]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=3,
            ygap=3,
            hoverinfo="text",
        )
        figure.add_trace(cells, row=1, col=column)
        bars = go.Bar(
            x=[board.tokens[i] for i in shown],
            y=[chances[i] for i in shown],
            marker={"color": [BLUE if legal[i] else RED for i in shown]},
            showlegend=False,
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )
        figure.add_trace(bars, row=2, col=column)
        figure.update_xaxes(visible=False, row=1, col=column)
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=None, row=1, col=column)
        figure.update_xaxes(title="move", type="category", row=2, col=column)
        figure.update_yaxes(title="probability", range=[0, 1], row=2, col=column)
    for name, colour in (("legal in the state above", BLUE), ("illegal", RED)):
        figure.add_scatter(x=[None], y=[None], mode="markers", marker={"color": colour, "symbol": "square"}, name=name)
    figure.update_layout(title=title, template="circuits")
    return figure


def _or_none(value: float) -> float | None:
    return None if value != value else value


def _shown(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"
