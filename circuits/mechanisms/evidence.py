"""Evidence (one named test's outcome) and Verdict (a rule over evidence)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits._io import atomic_write, make_directory
from circuits.errors import BadInput, CorruptRun

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LABELS = ("algorithm", "heuristics", "memorisation", "mixed", "undetermined", "not-learned")


@dataclass(frozen=True)
class Evidence:
    """One test's outcome: a statistic with its 95 % interval, its control and the threshold it is held against.

    ``passed`` is None where the test only describes and does not decide.
    """

    test: str
    value: float
    interval: tuple[float, float]
    control: float | None
    control_name: str
    threshold: str
    passed: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    seconds: float = 0.0

    def number(self, key: str, default: float = float("nan")) -> float:
        """A numeric entry of ``details``, or ``default`` where there is none."""
        value = self.details.get(key, default)
        return default if value is None else float(value)


@dataclass(frozen=True)
class Verdict:
    """Which mechanism a network has, by which evidence, under which version of the rule."""

    label: str
    mechanism: str | None
    items: tuple[Evidence, ...]
    why: str
    rule: str
    sub_label: str | None = None
    """Of a Fourier algorithm: clock, pizza or mixed. A description; nothing is decided by it."""
    evidence_for: tuple[str, ...] = ()
    """What each test that speaks for the verdict says; for ``undetermined``: for some mechanism."""
    evidence_against: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """The rule's thresholds by name."""

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise BadInput(f"verdict label {self.label!r} is not one of {', '.join(LABELS)}")

    def __getitem__(self, test: str) -> Evidence:
        for item in self.items:
            if item.test == test:
                return item
        raise KeyError(f"no evidence from {test!r}; there is: {', '.join(item.test for item in self.items)}")

    def __contains__(self, test: str) -> bool:
        return any(item.test == test for item in self.items)

    @property
    def evidence(self) -> pd.DataFrame:
        """The evidence as a table, one row per test."""
        return self.to_frame()

    def to_frame(self) -> pd.DataFrame:
        """Return the evidence as a table, one row per test."""
        import pandas as pd

        rows = [
            {
                "test": e.test,
                "value": e.value,
                "low": e.interval[0],
                "high": e.interval[1],
                "control": e.control,
                "control_name": e.control_name,
                "threshold": e.threshold,
                "passed": e.passed,
                "seconds": e.seconds,
                "source": e.source,
            }
            for e in self.items
        ]
        return pd.DataFrame(rows).set_index("test")

    def figure(self) -> go.Figure:
        """Return a dot plot: each test's value with its interval, and its control."""
        import plotly.graph_objects as go

        from circuits._style import VERDICT_COLOURS

        items = [e for e in self.items if e.value == e.value]
        colour = VERDICT_COLOURS[self.label]
        values = go.Scatter(
            x=[e.value for e in items],
            y=[e.test for e in items],
            mode="markers",
            name="model",
            marker={"size": 11, "color": colour},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(e.interval[1] - e.value, 0) for e in items],
                "arrayminus": [max(e.value - e.interval[0], 0) for e in items],
            },
            text=[e.threshold for e in items],
            hovertemplate="%{y}: %{x:.3f}<br>%{text}<extra></extra>",
        )
        with_control = [e for e in items if e.control is not None]
        controls = go.Scatter(
            x=[e.control for e in with_control],
            y=[e.test for e in with_control],
            mode="markers",
            name="control",
            marker={"size": 10, "symbol": "x-thin", "line": {"width": 2}},
            text=[e.control_name for e in with_control],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
        )
        title = f"Evidence for {self.label}" + (f" ({self.mechanism})" if self.mechanism else "")
        figure = go.Figure([values, controls])
        figure.update_layout(
            title=title,
            xaxis_title="statistic (share unless the test says otherwise)",
            yaxis={"title": "test", "autorange": "reversed"},
            template="circuits",
        )
        return figure

    def _repr_html_(self) -> str:
        from html import escape

        head = f"<b>{escape(self.label)}</b>" + (f" · {escape(self.mechanism)}" if self.mechanism else "")
        columns = ["value", "low", "high", "control", "threshold", "passed", "seconds"]
        table = self.to_frame()[columns].to_html(float_format=lambda v: f"{v:.3f}")
        shown = "".join(f"<tr><td>{name}</td><td>{value:g}</td></tr>" for name, value in self.thresholds.items())
        rule = f"<details><summary>rule {escape(self.rule)}</summary><table>{shown}</table></details>"
        said = "".join(
            f"<p>{title}</p><ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"
            for title, sentences in (("For", self.evidence_for), ("Against", self.evidence_against))
            if sentences
        )
        return f"<p>{head}<br>{escape(self.why)}</p>{said}{table}{rule}"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON data; not-a-number becomes null."""
        return json.loads(json.dumps(finite_or_null(asdict(self))))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Verdict:
        """Return the verdict that ``to_json`` wrote.

        Raises:
            CorruptRun: the data lacks a field or has an unknown one.
        """
        try:
            items = tuple(
                Evidence(**{**e, "interval": tuple(_nan(v) for v in e["interval"]), "value": _nan(e["value"])})
                for e in data["items"]
            )
            said = {name: tuple(data[name]) for name in ("evidence_for", "evidence_against")}
            return Verdict(**{**data, "items": items, **said})
        except (KeyError, TypeError) as error:
            raise CorruptRun(f"not a stored verdict ({error}); run the analysis again") from error

    def save(self, directory: Path | str) -> Path:
        """Write ``verdict.json`` into a directory and return its path."""
        path = make_directory(directory) / "verdict.json"
        atomic_write(path, json.dumps(self.to_json(), indent=1, allow_nan=False).encode())
        return path

    @staticmethod
    def load(directory: Path | str) -> Verdict:
        """Return the verdict stored in a directory.

        Raises:
            CorruptRun: the file is missing or damaged.
        """
        path = Path(directory) / "verdict.json"
        try:
            return Verdict.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise CorruptRun(f"{path}: no readable verdict ({error}); run the analysis again") from error


def finite_or_null(value: Any) -> Any:
    """JSON has no not-a-number: write it as null."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {str(k): finite_or_null(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(v) for v in value]
    return value


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
