"""From probes to a vector of scores between two controls, and from that to a label."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits._io import from_json, is_file, make_directory, read_json, to_json, write_json
from circuits.errors import BadInput, CorruptRun
from circuits.worldmodels.reading import NAN, Reading

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

VERSION = "world-model-2"
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

OF_NO_HEURISTIC = ("distinguishes", "compresses", "follows counterfactuals", "holds off-policy")
CORE = (*OF_NO_HEURISTIC, "uses it")


@dataclass(frozen=True)
class Thresholds:
    """What the verdict asks for; written into every result.

    Attributes:
        learned: probability of legal tokens, in the mean over positions, below which nothing was learned.
        high: score from which a network does as one that was told the state.
        low: share of the way, from the better of the untrained network and the one that plays by a rule of legality
            to the one that was told the state, up to which it does as these.
        gap: largest off-policy gap of a world model.
        informative: least distance of the two controls at which a probe says anything.
        errors_apart: the same in standard errors of that distance, over seeds.
        told_least: least of a statistic that the network which was told the state must have for it to say anything:
            between two controls that hardly do it at all, everybody who does is perfect.
    """

    learned: float = 0.95
    high: float = 0.8
    low: float = 0.5
    gap: float = 0.05
    informative: float = 0.1
    errors_apart: float = 3
    told_least: float = 0.5


@dataclass(frozen=True)
class Score:
    """One score: 0 as the untrained control, 1 as the one that was told the state; NaN where a probe tells nothing."""

    value: float
    low: float
    high: float
    raw: float
    untrained: float
    told: float
    planted: float = NAN
    """The statistic of a network that plays by a planted rule of legality, where there is one."""

    @property
    def known(self) -> bool:
        """Whether the probe tells its controls apart on this game, and was measured."""
        return self.value == self.value

    def near_told(self, share: float) -> bool:
        """Whether more than so much of the way lies behind it, from whichever control is better to who was told."""
        start = self.planted if self.planted > self.untrained else self.untrained
        return self.raw > start + share * (self.told - start)


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
                "rule of legality": s.planted,
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


Controls = Mapping[str, Reading] | Sequence[Mapping[str, Reading]] | None
"""What probes found of a control, or of one for each of several seeds."""


def judge(
    readings: Mapping[str, Reading],
    untrained: Controls = None,
    told: Controls = None,
    planted: Controls = None,
    *,
    thresholds: Thresholds | None = None,
    informative: Collection[str] | None = None,
    controls: str = "",
) -> Assessment:
    """Return scores and label of a network from its probes and those of its controls.

    A score is (x - untrained) / (told - untrained), cut to [0, 1], between the means of the controls over their seeds;
    without controls 0 and 1 stand in for theirs. A score is unknown where its probe is not ``informative``.

    ``not-learned``: too much probability is on illegal moves. ``heuristic``: two or more of distinguishes, compresses,
    follows counterfactuals and holds off-policy are no better than half way to the network that was told the state,
    from the untrained one or, where that is better, from the one that plays by a planted rule. ``world-model``: it
    distinguishes states as the network that was told them, has none of the others low and no off-policy gap, is not
    shown (by the upper end of its interval) to compress less, and is shown to use the state (lower end above 0) and not
    shown to use it less; what is unknown of these two is left out, and said. ``undetermined``: without a network that
    was told the state, or without a reading of what is legal, of how it continues off its policy or of what edits do;
    where fewer than two of the scores say anything; or where all that do are high and ``distinguishes`` is not among
    them. ``mixed``: none of it.

    Args:
        readings: what ``measure`` found of the network.
        untrained: the control at 0, or one for each seed; None: 0 stands in.
        told: the control at 1, or one for each seed; None: 1 stands in, and no mechanism is named.
        planted: a network that plays by a rule of legality, or one for each seed; None: there is none.
        thresholds: what the label asks for; None: the defaults.
        informative: the scores that say anything on this game; None: those that ``informative_scores`` finds.
        controls: what is said of the controls.

    Source: ours; thresholds in ``Thresholds``, held to known players as docs/world-models.md says.
    """
    asked = thresholds or Thresholds()
    said = informative_scores(untrained, told, planted, thresholds=asked) if informative is None else informative
    found = {
        name: _score(
            readings.get(probe), [_pooled(c, probe, key) for c in (untrained, told, planted)], key, name in said
        )
        for name, (probe, key) in SCORES.items()
    }
    label, why = _label(found, readings, asked, bool(told))
    return Assessment(label, why, found, dict(readings), asked, controls)


def informative_scores(
    untrained: Controls, told: Controls, planted: Controls = None, *, thresholds: Thresholds | None = None
) -> tuple[str, ...]:
    """Return the scores whose probe says anything on a game, by what it makes of networks that are known.

    It must tell the network that was told the state from the untrained one, and from the one that plays by a planted
    rule of legality where there is one, by ``informative`` and by ``errors_apart`` standard errors over seeds (or of
    the interval of a single one); and the network that was told must have ``told_least``.
    """
    asked = thresholds or Thresholds()
    return tuple(name for name, (probe, key) in SCORES.items() if _tells(probe, key, (untrained, told, planted), asked))


def informative_probes(
    untrained: Controls,
    told: Controls,
    planted: Controls,
    probes: Collection[str],
    *,
    thresholds: Thresholds | None = None,
) -> tuple[str, ...]:
    """Return the probes whose ``value`` says anything on a game, by what ``informative_scores`` asks of scores."""
    asked = thresholds or Thresholds()
    return tuple(probe for probe in probes if _tells(probe, "value", (untrained, told, planted), asked))


def _tells(probe: str, key: str, controls: Sequence[Controls], asked: Thresholds) -> bool:
    """Whether a statistic tells the network that was told the state (the second control) from the others."""
    bottom, top, rule = (_pooled(control, probe, key) for control in controls)
    high, high_error = top or (1.0, 0.0)
    others = [bottom or (0.0, 0.0), *([rule] if rule else [])]
    errors = [asked.errors_apart * math.hypot(high_error, error) for _, error in others]
    apart = all(high - x >= max(asked.informative, e) for (x, _), e in zip(others, errors, strict=True))
    return apart and high >= asked.told_least


def _pooled(controls: Controls, probe: str, key: str) -> tuple[float, float] | None:
    """Mean and standard error of a control's statistic, over seeds where there are several; None without a control."""
    if not controls:
        return None
    several = [controls] if isinstance(controls, Mapping) else list(controls)
    found = [control[probe] for control in several if probe in control]
    values = [reading.number(key) for reading in found]
    if not values:
        return NAN, NAN
    mean = sum(values) / len(values)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return mean, math.sqrt(variance / len(values))
    low, high = found[0].interval
    return mean, (high - low) / (2 * 1.96) if high == high and low == low else 0.0


def _score(
    reading: Reading | None, controls: Sequence[tuple[float, float] | None], key: str, informative: bool
) -> Score:
    if reading is None:
        return Score(NAN, NAN, NAN, NAN, NAN, NAN)
    raw, (low, high) = reading.number(key), reading.interval
    bottom, top, rule = ((control or (other, 0.0))[0] for control, other in zip(controls, (0.0, 1.0, NAN), strict=True))
    if not informative or not top > bottom:
        return Score(NAN, NAN, NAN, raw, bottom, top, rule)

    value, least, most = (between(x, bottom, top) for x in (raw, low, high))
    return Score(value, least, most, raw, bottom, top, rule)


def between(x: float, bottom: float, top: float) -> float:
    """Return where a statistic stands between two controls' (0 and 1, and not beyond); NaN where it is NaN."""
    return x if x != x else min(1.0, max(0.0, (x - bottom) / (top - bottom)))


def _label(
    scores: Mapping[str, Score], readings: Mapping[str, Reading], asked: Thresholds, told: bool
) -> tuple[str, str]:
    missing = [name for name in ("legal-actions", "fan-out", "intervention", "inductive-bias") if name not in readings]
    if "legal-actions" in readings:
        legal = 1 - readings["legal-actions"].number("illegal_mass")
        if not legal >= asked.learned:
            return "not-learned", f"it gives legal moves {legal:.1%} of its probability, less than {asked.learned:.0%}"
    if missing:
        return "undetermined", f"not measured: {', '.join(missing)}"
    if not told:
        return "undetermined", (
            "no network that was told the state stands beside it: how high a score can be on this game is not known; "
            "train one by the objective `state` and pass it as `told`"
        )
    known = {name: scores[name] for name in CORE if scores[name].known}
    shown = ", ".join(f"{name} {score.value:.2f} (raw {score.raw:.2f})" for name, score in known.items())
    silent = [name for name in CORE if name not in known]
    unknown = f"; {', '.join(silent)}: the probe says nothing on this game" if silent else ""
    if len(known) < 2:
        return "undetermined", "fewer than two of its probes tell their controls apart on this game"
    low = [f"{n} {known[n].value:.2f}" for n in OF_NO_HEURISTIC if n in known and not known[n].near_told(asked.low)]
    if len(low) >= 2:
        return "heuristic", (
            f"{', '.join(low)}: no more than {asked.low:.0%} of the way to the network that was told the state, "
            f"although it plays legally ({legal:.1%})"
        )
    gap = readings["fan-out"].number("off_policy_gap")
    less = [n for n in ("compresses", "uses it") if n in known and not known[n].high >= asked.high]
    unused = "uses it" in known and not known["uses it"].low > 0
    if not less and not low and not unused and gap <= asked.gap:
        if "distinguishes" not in known:
            return "undetermined", f"{shown}: high, but whether it distinguishes states of the same moves is not known"
        if known["distinguishes"].value >= asked.high:
            return "world-model", f"{shown}, with an off-policy gap of {gap:.3f}{unknown}"
    return "mixed", f"{shown}, with an off-policy gap of {gap:.3f}{unknown}: neither a world model's nor two low"
