"""House style: one plotly template, the colours of verdicts, and others for all that is no verdict.

Importing this module registers the plotly template ``circuits``.
"""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

VERDICT_COLOURS: dict[str, str] = {
    "algorithm": "#0b7d6d",
    "heuristics": "#9c4406",
    "memorisation": "#7c46d8",
    "mixed": "#a8157f",
    "undetermined": "#7d7600",
    "not-learned": "#7a1220",
}
"""One colour per verdict label, which nothing else has: distinct in hue and, under white text, of a contrast of at
least 4.5 to 1."""

VERDICT_GLYPHS: dict[str, str] = {
    "algorithm": "●",
    "heuristics": "▦",
    "memorisation": "≡",
    "mixed": "◐",
    "undetermined": "?",
    "not-learned": "○",
}
"""One sign per verdict label, so that colour never speaks alone."""

WORLD_MODEL_NAMES: dict[str, str] = {
    "world-model": "algorithm",
    "heuristic": "heuristics",
    "mixed": "mixed",
    "undetermined": "undetermined",
    "not-learned": "not-learned",
}
"""Which verdict on arithmetic each verdict on a game corresponds to."""
WORLD_MODEL_COLOURS: dict[str, str] = {name: VERDICT_COLOURS[same] for name, same in WORLD_MODEL_NAMES.items()}
WORLD_MODEL_GLYPHS: dict[str, str] = {name: VERDICT_GLYPHS[same] for name, same in WORLD_MODEL_NAMES.items()}

BLUE, NAVY, RED, GREY = "#0a7fc8", "#1c2a6b", "#e63a60", "#525b68"
SERIES = (BLUE, NAVY, RED, GREY)
"""Curves, bars and edges: blues, a red and a grey, which are no verdict's."""
SPLIT_COLOURS: dict[str, str] = {"train": GREY, "random": BLUE, "block": NAVY}
SEQUENTIAL = "Viridis"

ON_DARK: dict[str, str] = {
    VERDICT_COLOURS["algorithm"]: "#52d6b2",
    VERDICT_COLOURS["heuristics"]: "#f08428",
    VERDICT_COLOURS["memorisation"]: "#ab78fa",
    VERDICT_COLOURS["mixed"]: "#e65cbc",
    VERDICT_COLOURS["undetermined"]: "#cfc35e",
    VERDICT_COLOURS["not-learned"]: "#f7a3ae",
    BLUE: "#2f9fe0",
    NAVY: "#e0e7ff",
    RED: "#e5486a",
    GREY: "#8f98a6",
}
"""What each of the colours above is on a dark page."""

PAGES: dict[str, dict[str, str]] = {
    "light": {
        "bg": "#fbfaf7",
        "card": "#ffffff",
        "ink": "#1d2430",
        "soft": "#5b6472",
        "line": "#e3e1da",
        "accent": "#1746c8",
        "on-verdict": "#ffffff",
    },
    "dark": {
        "bg": "#14171c",
        "card": "#1c2027",
        "ink": "#e8e9ec",
        "soft": "#a3abb8",
        "line": "#323843",
        "accent": "#84acff",
        "on-verdict": "#14171c",
    },
}
"""Colours of a page in each theme: grounds, texts, lines, links, and text on a verdict's colour."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def template() -> go.layout.Template:
    """Return the house template: clear backgrounds, quiet grid, legends below the plot, thin signs in grey."""
    axis = {"gridcolor": "rgba(127,127,127,0.2)", "zerolinecolor": "rgba(127,127,127,0.35)", "automargin": True}
    return go.layout.Template(
        data={"scatter": [{"marker": {"line": {"color": GREY}}}]},
        layout={
            "font": {"family": FONT, "size": 13, "color": "#4b5563"},
            "title": {"font": {"size": 15}, "x": 0, "xanchor": "left", "xref": "paper"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 100},
            "hoverlabel": {"font": {"family": FONT}},
        },
    )


pio.templates["circuits"] = template()
