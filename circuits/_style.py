"""House style: one plotly template and one colour per verdict, everywhere.

Importing this module registers the plotly template ``circuits``.
"""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

VERDICT_COLOURS: dict[str, str] = {
    "algorithm": "#0b7a75",
    "heuristics": "#b4540a",
    "memorisation": "#7b3fa0",
    "mixed": "#3f66b8",
    "undetermined": "#6b7280",
    "not-learned": "#9a3b4c",
}
"""One colour per verdict label: distinct in hue and, under white text, of a contrast of at least 4.5 to 1."""

VERDICT_GLYPHS: dict[str, str] = {
    "algorithm": "●",
    "heuristics": "▦",
    "memorisation": "≡",
    "mixed": "◐",
    "undetermined": "?",
    "not-learned": "○",
}
"""One sign per verdict label, so that colour never speaks alone."""

SPLIT_COLOURS: dict[str, str] = {"train": "#9ca3af", "random": "#0b7a75", "block": "#b4540a"}
SERIES = ("#0b7a75", "#b4540a", "#3f66b8", "#7b3fa0", "#9a3b4c", "#6b7280", "#a37f00")
DIVERGING = "RdBu"
SEQUENTIAL = "Viridis"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def template() -> go.layout.Template:
    """Return the house template: clear backgrounds, quiet grid, legends below the title."""
    axis = {"gridcolor": "rgba(127,127,127,0.2)", "zerolinecolor": "rgba(127,127,127,0.35)", "automargin": True}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": "#4b5563"},
            "title": {"font": {"size": 15}, "x": 0, "xanchor": "left", "xref": "paper"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 50},
            "hoverlabel": {"font": {"family": FONT}},
        }
    )


pio.templates["circuits"] = template()
