"""Drawings of a circuit and of its faithfulness curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from circuits._style import BLUE, GREY, NAVY, RED  # which registers the template too
from circuits.discovery.graph import Graph, component

if TYPE_CHECKING:
    import pandas as pd

    from circuits.discovery.circuit import Circuit
    from circuits.discovery.completeness import Completeness
    from circuits.discovery.curves import Faithfulness
    from circuits.discovery.stability import Stability

SUPPORTS, OPPOSES, NEUTRAL = BLUE, RED, GREY
RANKINGS = {"signed": ("ranked by signed score (CPR)", SUPPORTS), "absolute": ("ranked by size (CMD)", NAVY)}
DASH = {"q": "dot", "k": "dash", "v": "solid"}
PORT = {"q": -0.07, "k": 0.0, "v": 0.07}
"""Queries enter a head at its left, keys in the middle, values at its right, so that their lines do not coincide."""
MOST_BEND = 2.5
"""In head numbers."""
MIN_HEIGHT, ROW_HEIGHT = 450, 46
"""In pixels."""
Point = tuple[float, float]


def draw_circuit(circuit: Circuit, *, top: int) -> go.Figure:
    """Return the largest kept edges between the components, from the embeddings at the bottom up to the logits.

    Width is the score's size, colour its sign, where scores have one, and the line's style the input of a head that the
    edge goes to.
    """
    graph = circuit.graph
    order = [i for i in circuit.ranking().tolist() if bool(circuit.kept[i]) and float(circuit.scores[i]) != 0][:top]
    targets = dict(zip(graph.readers, graph.feeds, strict=True))
    reached = {i: _targets(graph, targets, i) for i in order}
    used = {component(graph.edges[i][0]) for i in order} | {name for names in reached.values() for name in names}
    places = _places(list(dict.fromkeys(component(source) for source in graph.sources)), used)
    largest = max((abs(float(circuit.scores[i])) for i in order), default=1.0) or 1.0
    interval = circuit.interval() if circuit.per_example is not None else None
    traces: list[go.Scatter] = []
    # the largest edges last, so that they lie on top
    for i in reversed(order):
        source, reader = graph.edges[i]
        score = float(circuit.scores[i])
        text = f"{source} → {reader}<br>score {score:+.4g}"
        if interval is not None:
            text += f"<br>95 % interval {float(interval[0][i]):+.4g} to {float(interval[1][i]):+.4g}"
        for target in reached[i]:
            shown = score if circuit.signed else 0.0
            traces.append(_edge(places, component(source), target, reader, abs(score) / largest, _colour(shown), text))
    figure = go.Figure([*traces, *_legend(signed=circuit.signed), _nodes(places, used)])
    rows = {places[name][1]: _row(name) for name in sorted(used, key=lambda name: places[name][1])}
    figure.update_layout(
        template="circuits",
        title=f"The {len(order)} largest of {circuit.n_kept} edges<br><sup>{circuit.method}, {circuit.metric}</sup>",
        xaxis={
            "title": "head number; MLPs at the right",
            "showticklabels": False,
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "title": "order of computation, upwards",
            "tickvals": list(rows),
            "ticktext": list(rows.values()),
            "zeroline": False,
        },
        hovermode="closest",
        height=max(MIN_HEIGHT, 170 + ROW_HEIGHT * len(rows)),
    )
    return figure


def _targets(graph: Graph, feeds: Mapping[str, Sequence[int]], edge: int) -> list[str]:
    """The components that an edge goes into: the heads that share a key, or the logits."""
    reader = graph.edges[edge][1]
    return list(dict.fromkeys(component(graph.sources[t]) for t in feeds[reader])) or ["logits"]


def _places(sources: Sequence[str], used: set[str]) -> dict[str, Point]:
    """Where each component is drawn: a row for the embeddings, then one for each layer's heads and one for its MLP.

    Rows without a component that is used are left out, so that a deep model's few edges stand close together.
    """
    heads = max((int(m[2]) for s in sources if (m := re.fullmatch(r"a(\d+)\.h(\d+)", s))), default=0) + 1
    places: dict[str, Point] = {}
    top = 0
    for name in sources:
        if name in ("embed", "pos_embed"):
            places[name] = (-0.75 if name == "embed" else 0.75, 0.0)
        elif name.startswith("a"):
            layer, head = (int(part) for part in name[1:].split(".h"))
            top = 2 * layer + 1
            places[name] = (head - (heads - 1) / 2, float(top))
        else:
            top = 2 * int(name[1:]) + 2
            places[name] = (heads / 2 + 0.25, float(top))
    if "pos_embed" not in places:
        places["embed"] = (0.0, 0.0)
    places["logits"] = (0.0, float(top + 1))
    levels = sorted({places[name][1] for name in used})
    return {name: (x, float(levels.index(y))) for name, (x, y) in places.items() if y in levels}


def _row(name: str) -> str:
    if name == "logits":
        return "logits"
    if name in ("embed", "pos_embed"):
        return "embeddings"
    layer = name[1:].split(".")[0]
    return f"layer {layer} heads" if name.startswith("a") else f"layer {layer} MLP"


def _edge(
    places: Mapping[str, Point], source: str, target: str, reader: str, size: float, colour: str, text: str
) -> go.Scatter:
    (x0, y0), (x1, y1) = places[source], places[target]
    x1 += PORT.get(reader.rpartition(".")[2], 0.0)
    # Edges that skip rows bend outwards, away from the components between their ends.
    bend = min(0.18 * (y1 - y0 - 1), MOST_BEND) * (1 if x0 + x1 >= 0 else -1)
    middle = ((x0 + x1) / 2 + bend, (y0 + y1) / 2)
    steps = [i / 12 for i in range(13)]
    return go.Scatter(
        x=[(1 - t) ** 2 * x0 + 2 * t * (1 - t) * middle[0] + t**2 * x1 for t in steps],
        y=[(1 - t) ** 2 * y0 + 2 * t * (1 - t) * middle[1] + t**2 * y1 for t in steps],
        mode="lines",
        line={
            "width": 1 + 7 * size,
            "color": colour,
            "dash": DASH.get(reader.rpartition(".")[2], "solid"),
        },
        opacity=0.75,
        text=[text] * len(steps),
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _colour(score: float) -> str:
    return SUPPORTS if score < 0 else OPPOSES if score > 0 else NEUTRAL


def _legend(*, signed: bool) -> list[go.Scatter]:
    signs = [
        ("corrupting it lowers the metric", SUPPORTS, "solid"),
        ("corrupting it raises the metric", OPPOSES, "solid"),
    ]
    entries = [
        *(signs if signed else [("the wider, the larger the score, which has no sign", NEUTRAL, "solid")]),
        ("into a query", NEUTRAL, DASH["q"]),
        ("into a key", NEUTRAL, DASH["k"]),
    ]
    return [
        go.Scatter(x=[None], y=[None], mode="lines", name=name, line={"color": colour, "dash": dash, "width": 3})
        for name, colour, dash in entries
    ]


def _nodes(places: Mapping[str, Point], used: set[str]) -> go.Scatter:
    names = sorted(used, key=lambda name: places[name][::-1])
    return go.Scatter(
        x=[places[name][0] for name in names],
        y=[places[name][1] for name in names],
        mode="markers+text",
        text=[name.replace("pos_embed", "pos") for name in names],
        customdata=names,
        textposition="middle center",
        textfont={"size": 10, "color": "#20242a"},
        marker={"size": 34, "color": "white", "opacity": 1, "line": {"width": 1.5, "color": NEUTRAL}},
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def draw_faithfulness(result: Faithfulness, *, log: bool = False) -> go.Figure:
    """Return f against the share of edges kept, by both rankings, with intervals, the control and the ideal."""
    traces: list[go.Scatter] = []
    curves = {"random": (f"random circuits, {result.n_random} draws", NEUTRAL), **RANKINGS}
    for ranking, (name, colour) in curves.items():
        part = result.curve[result.curve["ranking"] == ranking].sort_values("share", kind="stable")
        traces.append(
            go.Scatter(
                x=[*part["share"], *part["share"][::-1]],
                y=[*part["high"], *part["low"][::-1]],
                fill="toself",
                fillcolor=colour,
                opacity=0.18,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=ranking,
            )
        )
        traces.append(
            go.Scatter(
                x=part["share"],
                y=part["faithfulness"],
                mode="lines+markers",
                name=name,
                legendgroup=ranking,
                line={"color": colour, "width": 2, "dash": "dot" if ranking == "random" else "solid"},
                marker={"size": 5},
                customdata=part[["n_edges", "n_connected"]],
                hovertemplate="%{customdata[0]} edges (%{customdata[1]:.0f} connected)<br>"
                "recovers %{y:.3f} of the gap<extra></extra>",
            )
        )
    low, high = (min(0.0, *result.curve["faithfulness"]), max(1.0, *result.curve["faithfulness"]))
    smallest = min(share for share in result.curve["share"] if share > 0)
    # named in the legend: written at the line it would lie under the curves
    whole = {"dash": "dash", "width": 1, "color": NEUTRAL}
    traces.append(go.Scatter(x=[smallest, 1], y=[1, 1], mode="lines", line=whole, name="whole model", hoverinfo="skip"))
    figure = go.Figure(traces)
    figure.update_layout(
        template="circuits",
        title=f"Faithfulness: CPR {result.cpr:.2f}, CMD {result.cmd:.2f}"
        f"<br><sup>{result.method}, {result.ablation} ablation, {result.n_pairs} pairs, "
        f"{result.sizes}</sup>",
        xaxis={"title": f"edges kept (share of {result.n_edges:,})"}
        | ({"type": "log", "range": [log10(smallest), 0.02]} if log else {"range": [0, 1.01]}),
        # Intervals may be as wide as they like; the curve decides what is shown.
        yaxis={"title": f"share of the {result.metric} gap recovered", "range": [low - 0.1, high + 0.2]},
    )
    return figure


def draw_completeness(result: Completeness) -> go.Figure:
    """Return the knocked-out circuit's metric against the knocked-out model's: a complete circuit is on the line."""
    names = {
        "none": ("nothing removed", "circle"),
        "random": ("random half of the circuit removed", "circle-open"),
        "greedy": ("removed greedily to set them apart", "diamond"),
        "circuit": ("the whole circuit removed", "x"),
    }
    frame = result.knockouts
    low = min(0.0, *frame["of_circuit"], *frame["of_model"]) - 0.05
    high = max(1.0, *frame["of_circuit"], *frame["of_model"]) + 0.05
    line = {"dash": "dash", "width": 1, "color": NEUTRAL}
    figure = go.Figure(go.Scatter(x=[low, high], y=[low, high], mode="lines", line=line, name="complete"))
    for kind, (name, symbol) in names.items():
        part = frame[frame["kind"] == kind]
        figure.add_scatter(
            x=part["of_model"],
            y=part["of_circuit"],
            mode="markers",
            name=name,
            marker={"size": 9, "symbol": symbol, "color": OPPOSES if kind == "greedy" else SUPPORTS},
            customdata=part[["n_removed", "incompleteness"]],
            hovertemplate="%{customdata[0]} edges removed<br>incompleteness %{customdata[1]:.3f}<extra></extra>",
        )
    figure.update_layout(
        template="circuits",
        title=f"Completeness: largest gap {result.score:.2f}"
        f"<br><sup>{result.n_edges} edges, {result.n_pairs} pairs</sup>",
        xaxis={"title": f"model without the edges (share of the {result.metric} gap)", "range": [low, high]},
        yaxis={"title": "circuit without the edges (same unit)", "range": [low, high]},
    )
    return figure


def draw_stability(result: Stability) -> go.Figure:
    """Return the share of resamples that find each edge, by rank: a step at the circuit's size is a stable circuit."""
    frame = result.to_frame().assign(rank=lambda edges: range(1, len(edges) + 1))
    figure = go.Figure()
    for kept, name, colour in ((True, "in the circuit of all pairs", SUPPORTS), (False, "not in it", OPPOSES)):
        part = frame[frame["kept"] == kept]
        figure.add_bar(
            x=part["rank"],
            y=part["frequency"],
            name=name,
            marker_color=colour,
            customdata=part[["source", "reader"]],
            hovertemplate="%{customdata[0]} → %{customdata[1]}<br>in %{y:.0%} of the resamples<extra></extra>",
        )
    low, high = result.interval
    figure.update_layout(
        template="circuits",
        title=f"Stability: Jaccard {result.jaccard:.2f} [{low:.2f}, {high:.2f}]"
        f"<br><sup>{result.n_edges} edges, {result.n_resamples} resamples of the pairs, "
        f"random sets {result.jaccard_random:.2f}</sup>",
        xaxis={"title": "edges, the most often found first"},
        yaxis={"title": "share of resamples that find it", "range": [0, 1.02]},
        bargap=0,
    )
    return figure


def draw_map(
    scores: Sequence[Sequence[float]],
    *,
    title: str,
    subtitle: str,
    x: str,
    y: str,
    unit: str,
    names: Sequence[str] | None = None,
) -> go.Figure:
    """Return effects as colours, the first row at the bottom, the same colours as of edges; rows may have names."""
    largest = max((abs(value) for row in scores for value in row), default=0.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=scores,
            y=None if names is None else list(names),
            zmin=-largest,
            zmax=largest,
            colorscale=[[0, SUPPORTS], [0.5, "white"], [1, OPPOSES]],
            colorbar={"title": {"text": f"effect on {unit}", "side": "right"}},
            hovertemplate=f"{y} %{{y}}, {x} %{{x}}<br>effect %{{z:+.4g}}<extra></extra>",
        )
    )
    rows = {"dtick": max(1, len(scores) // 16)} if names is None else {"type": "category", "automargin": True}
    figure.update_layout(
        template="circuits",
        title=f"{title}<br><sup>{subtitle}</sup>",
        xaxis={"title": x, "dtick": max(1, len(scores[0]) // 16) if scores else 1, "showgrid": False},
        yaxis={"title": y if names is None else "", "showgrid": False, **rows},
        height=None if names is None else 160 + 20 * len(names),
    )
    return figure


def draw_bars(names: Sequence[str], frame: pd.DataFrame, *, title: str, subtitle: str, unit: str) -> go.Figure:
    """Return the scores of a table as horizontal bars with their intervals, the first at the top."""
    bars = go.Bar(
        x=frame["score"],
        y=list(names),
        orientation="h",
        marker={"color": [_colour(score) for score in frame["score"]]},
        error_x={"array": frame["high"] - frame["score"], "arrayminus": frame["score"] - frame["low"], "width": 2},
        hovertemplate="%{y}: %{x:+.4g}<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_layout(
        template="circuits",
        title=f"{title}<br><sup>{subtitle}; bars with 95 % intervals</sup>",
        xaxis={"title": f"effect on {unit}"},
        yaxis={"title": "", "autorange": "reversed", "type": "category"},
        height=160 + 18 * len(names),
    )
    return figure


def draw_similarity(grid: Sequence[Sequence[float]], names: Sequence[str], *, title: str, unit: str) -> go.Figure:
    """Return how alike every two of some things are, from 0 to 1, with the number in each cell."""
    heat = go.Heatmap(
        z=grid,
        x=list(names),
        y=list(names),
        zmin=0,
        zmax=1,
        colorscale=[[0, "white"], [1, SUPPORTS]],
        texttemplate="%{z:.2f}",
        colorbar={"title": {"text": unit, "side": "right"}},
        hovertemplate=f"%{{y}} and %{{x}}<br>{unit} %{{z:.3f}}<extra></extra>",
    )
    figure = go.Figure(heat)
    axis = {"type": "category", "showgrid": False}
    figure.update_layout(
        template="circuits", title=title, xaxis={"title": "", **axis}, yaxis={"autorange": "reversed", **axis}
    )
    return figure
