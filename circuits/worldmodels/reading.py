"""What a world-model probe returns: one number with its interval and controls, and what stands behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from circuits.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NAN = float("nan")


class NothingToMeasure(BadInput):
    """The game offers nothing that a probe could be measured on."""


@dataclass(frozen=True)
class Curve:
    """One measurement at several settings, such as accuracy by depth."""

    x_title: str
    y_title: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class EditedBoard:
    """A state before and after an intervention, for people to look at.

    Attributes:
        moves: the moves that led there.
        state: the state in words.
        edited_state: the state that it was edited to, in words.
        picture: the state as rows of cells.
        edited_picture: the edited state as rows of cells.
        tokens: the tokens of the game.
        legal: which of them are legal.
        edited_legal: which of them are legal in the edited state.
        before: the network's probabilities of them.
        after: the same after the edit.
    """

    moves: str
    state: str
    edited_state: str
    picture: tuple[tuple[str, ...], ...]
    edited_picture: tuple[tuple[str, ...], ...]
    tokens: tuple[str, ...]
    legal: tuple[bool, ...]
    edited_legal: tuple[bool, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """One probe's outcome on one model.

    Attributes:
        probe: the probe's name.
        value: its statistic; NaN where the game offers nothing to measure it on.
        interval: 95 % interval of the statistic over the sequences, pairs or labellings that it is a mean of.
        details: other numbers by name.
        controls: the same statistic where it should be low, or as high as can be, by name.
        curves: measurements at several settings, by name.
        board: a state before and after an intervention.
        source: where the definition is from.
        note: why there is no statistic, where there is none.
    """

    probe: str
    value: float
    interval: tuple[float, float] = (NAN, NAN)
    details: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    board: EditedBoard | None = None
    source: str = ""
    note: str = ""

    def number(self, name: str) -> float:
        """The statistic (``value``), or a detail or control by name; NaN where there is none."""
        return self.value if name == "value" else self.details.get(name, self.controls.get(name, NAN))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number: the statistic first, then details and controls."""
        import pandas as pd

        rows = [{"name": self.probe, "kind": "statistic", "value": self.value}]
        rows += [{"name": name, "kind": "detail", "value": value} for name, value in self.details.items()]
        rows += [{"name": name, "kind": "control", "value": value} for name, value in self.controls.items()]
        return pd.DataFrame(rows).set_index("name")

    def figure(self) -> go.Figure:
        """Return the curves, or the statistic beside its controls where there is no curve."""
        import plotly.graph_objects as go

        import circuits._style  # registers the template

        assert circuits._style.VERDICT_COLOURS
        figure = go.Figure()
        if self.curves:
            for name, curve in self.curves.items():
                figure.add_scatter(x=curve.x, y=curve.y, name=name, mode="lines+markers")
            first = next(iter(self.curves.values()))
            titles = (first.x_title, first.y_title)
        else:
            shown = {self.probe: self.value, **self.controls}
            figure.add_bar(x=list(shown), y=list(shown.values()), name="value")
            titles = ("the model, then controls", "statistic")
        figure.update_layout(
            title=self.probe, xaxis_title=titles[0], yaxis_title=titles[1], template="circuits", showlegend=True
        )
        return figure

    def _repr_html_(self) -> str:
        from html import escape

        low, high = self.interval
        between = "" if low != low else f" [{low:.3f}, {high:.3f}]"
        table = self.to_frame().to_html(float_format=lambda value: f"{value:.3f}")
        return f"<b>{escape(self.probe)}</b> {self.value:.3f}{between}{table}"
