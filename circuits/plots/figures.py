"""Training curves, Fourier spectra and neuron maps as plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits._style import SEQUENTIAL, SERIES, SPLIT_COLOURS

SPLIT_NAMES = {"train": "trained pairs", "random": "unseen, at random", "block": "unseen block"}
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")


def training_figure(curves: Mapping[str, Mapping[str, Sequence[Any]]], *, title: str) -> go.Figure:
    """Return accuracy on each split by training step, one dash style per run.

    Args:
        curves: the ``training`` numbers of ``figure_data`` by the name of the run (such as ``seed 0``).
        title: the figure's title.
    """
    figure = go.Figure()
    for number, (run, columns) in enumerate(curves.items()):
        for split, name in SPLIT_NAMES.items():
            values = columns.get(f"accuracy_{split}")
            if values is None:
                continue
            line = {"color": SPLIT_COLOURS[split], "dash": DASHES[number % len(DASHES)], "width": 2}
            figure.add_scatter(x=list(columns["step"]), y=list(values), mode="lines", name=f"{name}, {run}", line=line)
    figure.update_layout(
        title=title,
        template="circuits",
        xaxis_title="training step",
        yaxis={"title": "accuracy (share)", "range": [-0.03, 1.03]},
    )
    return figure


def fourier_figure(data: Mapping[str, Sequence[float]], *, title: str) -> go.Figure:
    """Return the share of variance over operand values at each frequency, for embedding and neurons."""
    figure = go.Figure()
    for colour, key in zip(SERIES, ("embedding", "neurons"), strict=False):
        figure.add_bar(x=list(data["frequency"]), y=list(data[key]), name=key, marker_color=colour)
    figure.update_layout(
        title=title,
        template="circuits",
        barmode="group",
        xaxis_title="frequency (periods over the operand range)",
        yaxis_title="share of variance",
    )
    return figure


def neuron_figure(data: Mapping[str, Any], *, title: str, most: int = 4) -> go.Figure:
    """Return activation maps over both operands of the most important neurons."""
    count = min(most, len(data["maps"]))
    heads = [
        f"layer {layer}, neuron {index}: {100 * share:.0f} %"
        for layer, index, share in zip(data["layer"], data["index"], data["importance"], strict=True)
    ][:count]
    columns = min(2, count)
    figure = make_subplots(
        rows=-(-count // columns),
        cols=columns,
        subplot_titles=heads,
        x_title=data["x_title"],
        y_title=data["y_title"],
        horizontal_spacing=0.12,
        vertical_spacing=0.18,
    )
    for number in range(count):
        values = data["maps"][number]
        peak = max((max(row) for row in values), default=0.0) or 1.0
        scaled = [[round(100 * value / peak) for value in row] for row in values]
        figure.add_heatmap(
            z=scaled,
            row=number // columns + 1,
            col=number % columns + 1,
            colorscale=SEQUENTIAL,
            showscale=number == count - 1,
            colorbar={"title": "% of its<br>maximum", "thickness": 10},
            hovertemplate="first %{y}, second %{x}: %{z} %<extra></extra>",
        )
    figure.update_layout(title=title, template="circuits", margin={"b": 60})
    figure.update_annotations(font_size=12)
    return figure
