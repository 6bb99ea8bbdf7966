"""From probes to a vector of scores between two controls, and from that to a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits._io import from_json, is_file, make_directory, read_json, to_json, write_json
from circuits.errors import BadInput, CorruptRun
from circuits.worldmodels.reading import NAN, Reading

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

VERSION = "world-model-1"
LABELS = ("world-model", "heuristic", "mixed", "undetermined", "not-learned")
SCORES: dict[str, tuple[str, str]] = {
    "encodes the state": ("state-probe", "value"),
    "uses it": ("intervention", "value"),
    "compresses": ("myhill-nerode", "value"),
    "distinguishes": ("inductive-bias", "value"),
    "holds off-policy": ("detours", "value"),
    "follows counterfactuals": ("counterfactual", "value"),
    "adapts": ("adaptation", "value"),
}
"""Each score of the vector: the probe that it is from, and which of its numbers."""

OF_A_WORLD_MODEL = ("distinguishes", "compresses", "uses it")
OF_NO_HEURISTIC = ("distinguishes", "compresses", "follows counterfactuals", "holds off-policy")


@dataclass(frozen=True)
class Thresholds:
    """What the verdict asks for; written into every result.

    Attributes:
        learned: probability of legal tokens, in the mean over positions, below which nothing was learned.
        high: score from which a network does as one that was told the state.
        low: score up to which it does as one that was not trained.
        gap: largest off-policy gap of a world model.
        informative: least distance of the two controls at which a probe says anything.
    """

    learned: float = 0.95
    high: float = 0.8
    low: float = 0.5
    gap: float = 0.05
    informative: float = 0.1


@dataclass(frozen=True)
class Score:
    """One score: 0 as the untrained control, 1 as the one that was told the state; NaN where a probe tells nothing."""

    value: float
    low: float
    high: float
    raw: float
    untrained: float
    told: float

    @property
    def known(self) -> bool:
        """Whether the probe tells its controls apart on this game, and was measured."""
        return self.value == self.value


@dataclass(frozen=True)
class Assessment:
    """What a network is, by which scores, between which controls.

    Attributes:
        label: ``world-model``, ``heuristic``, ``mixed``, ``undetermined`` or ``not-learned``.
        why: the reason in words.
        scores: the vector by name.
        readings: what every probe found.
        thresholds: what was asked for.
        controls: which controls the scores stand between.
        rule: version of the rule.
    """

    label: str
    why: str
    scores: Mapping[str, Score]
    readings: Mapping[str, Reading]
    thresholds: Thresholds = field(default_factory=Thresholds)
    controls: str = ""
    rule: str = VERSION

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise BadInput(f"label {self.label!r} is not one of {', '.join(LABELS)}")

    @property
    def uninformative(self) -> tuple[str, ...]:
        """The scores whose probe cannot tell the controls apart on this game."""
        return tuple(name for name, score in self.scores.items() if not score.known)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per score: its value with interval, the raw statistic and the two controls'."""
        import pandas as pd

        rows = [
            {
                "score": name,
                "value": s.value,
                "low": s.low,
                "high": s.high,
                "raw": s.raw,
                "untrained": s.untrained,
                "told the state": s.told,
                "probe": SCORES[name][0],
            }
            for name, s in self.scores.items()
        ]
        return pd.DataFrame(rows).set_index("score")

    def figure(self) -> go.Figure:
        """Return the scores with their intervals."""
        import plotly.graph_objects as go

        from circuits._style import WORLD_MODEL_COLOURS

        known = {name: score for name, score in self.scores.items() if score.known}
        bars = go.Bar(
            x=[score.value for score in known.values()],
            y=list(known),
            orientation="h",
            name="score",
            marker_color=WORLD_MODEL_COLOURS[self.label],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, s.high - s.value) for s in known.values()],
                "arrayminus": [max(0.0, s.value - s.low) for s in known.values()],
            },
        )
        figure = go.Figure([bars])
        figure.update_layout(
            title=f"World-model scores: {self.label}",
            xaxis={"title": "score (0: untrained, 1: told the state)", "range": [-0.05, 1.1]},
            yaxis={"title": "score", "autorange": "reversed"},
            template="circuits",
            showlegend=True,
        )
        return figure

    def _repr_html_(self) -> str:
        from html import escape

        table = self.to_frame().to_html(float_format=lambda value: f"{value:.3f}")
        return f"<b>{escape(self.label)}</b> {escape(self.why)}{table}<small>{escape(self.controls)}</small>"

    def save(self, folder: Path | str) -> None:
        """Write ``assessment.json`` into a folder.

        Raises:
            StorageError: it cannot be written.
        """
        write_json(make_directory(folder) / "assessment.json", to_json(self))

    @staticmethod
    def load(folder: Path | str) -> Assessment:
        """Return what ``save`` wrote.

        Raises:
            CorruptRun: there is none, or it is damaged.
        """
        file = Path(folder) / "assessment.json"
        if not is_file(file):
            raise CorruptRun(f"{folder} holds no assessment.json: assess the model again")
        try:
            loaded: Assessment = from_json(Assessment, read_json(file))
        except BadInput as error:
            raise CorruptRun(f"{file} is no assessment ({error}): assess the model again") from error
        return loaded


def judge(
    readings: Mapping[str, Reading],
    untrained: Mapping[str, Reading] | None = None,
    told: Mapping[str, Reading] | None = None,
    planted: Mapping[str, Reading] | None = None,
    *,
    thresholds: Thresholds | None = None,
    controls: str = "",
) -> Assessment:
    """Return scores and label of a network from its probes and those of its controls.

    A score is (x - untrained) / (told - untrained), cut to [0, 1]; without controls 0 and 1 stand in for theirs, and
    for the inductive bias, whose ceiling is in the statistic, as well. A score is unknown where the controls are alike,
    and where a network that plays by a planted rule of legality does as well as the one that was told the state: there
    the probe cannot tell what the verdict is about.

    ``not-learned``: too much of its probability is on illegal tokens. ``world-model``: distinguishes, compresses and
    uses the state as the network that was told it, as far as probes can say so (two of them at least), with no
    off-policy gap. ``heuristic``: two or more of distinguishes, compresses, follows counterfactuals and holds
    off-policy are no better than half way from the untrained network. ``undetermined``: fewer than two of these say
    anything. ``mixed``: none of it.

    Source: ours; thresholds in ``Thresholds``, calibrated as docs/world-models.md says.
    """
    asked = thresholds or Thresholds()
    scores = {
        name: _score(readings, untrained, told, planted, probe, key, asked) for name, (probe, key) in SCORES.items()
    }
    label, why = _label(scores, readings, asked)
    return Assessment(label, why, scores, dict(readings), asked, controls)


def _score(
    readings: Mapping[str, Reading],
    untrained: Mapping[str, Reading] | None,
    told: Mapping[str, Reading] | None,
    planted: Mapping[str, Reading] | None,
    probe: str,
    key: str,
    asked: Thresholds,
) -> Score:
    if probe not in readings:
        return Score(NAN, NAN, NAN, NAN, NAN, NAN)
    raw = readings[probe].number(key)
    low, high = readings[probe].interval
    bottom = 0.0 if untrained is None else untrained[probe].number(key)
    top = 1.0 if told is None else told[probe].number(key)
    beside = bottom if planted is None else planted[probe].number(key)
    if not top - bottom >= asked.informative or top - beside < asked.informative:
        return Score(NAN, NAN, NAN, raw, bottom, top)

    def scaled(x: float) -> float:
        return x if x != x else min(1.0, max(0.0, (x - bottom) / (top - bottom)))

    return Score(scaled(raw), scaled(low), scaled(high), raw, bottom, top)


def _label(scores: Mapping[str, Score], readings: Mapping[str, Reading], asked: Thresholds) -> tuple[str, str]:
    legal = 1 - readings["legal-actions"].number("illegal_mass") if "legal-actions" in readings else 1.0
    if not legal >= asked.learned:
        return "not-learned", f"it gives legal moves {legal:.1%} of its probability, less than {asked.learned:.0%}"
    of_state = {name: scores[name].value for name in OF_A_WORLD_MODEL if scores[name].known}
    of_play = {name: scores[name].value for name in OF_NO_HEURISTIC if scores[name].known}
    if len(of_state) < 2 and len(of_play) < 2:
        return "undetermined", "fewer than two of its probes tell their controls apart on this game"
    gap = readings["fan-out"].number("off_policy_gap") if "fan-out" in readings else 0.0
    low = [f"{name} {value:.2f}" for name, value in of_play.items() if value <= asked.low]
    if len(of_state) >= 2 and all(value >= asked.high for value in of_state.values()) and gap <= asked.gap:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in of_state.items())
        return "world-model", f"{shown}: all at least {asked.high}, with an off-policy gap of {gap:.3f}"
    if len(low) >= 2:
        return (
            "heuristic",
            f"{', '.join(low)}: no more than {asked.low}, although {legal:.1%} of its probability is on legal moves",
        )
    shown = ", ".join(f"{name} {value:.2f}" for name, value in {**of_state, **of_play}.items())
    return "mixed", f"{shown}: neither all high nor two low"
