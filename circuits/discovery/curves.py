"""The faithfulness curve of a circuit, its two areas, and the control of random circuits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from circuits._io import make_directory, read_json, write_json
from circuits._stats import resampling_counts
from circuits.errors import BadInput, CorruptRun, IncompatibleRun

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SCHEMA = 3
EARLIER = 2
"""The format before, whose files are read too: what they lack follows from the curve, but for intervals."""
Interval = tuple[float, float]
SETS_AT_A_TIME = 256
"""Circuits of which all resamples are there at a time."""


AREAS = {"cpr": "signed", "cpr_absolute": "absolute", "cmd": "absolute", "cmd_signed": "signed"}
"""The areas, by the ranking of the circuits."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the metric's gap circuits of growing size recover, with the areas CPR and CMD.

    Intervals are 95 % percentile-bootstrap intervals over pairs; those of the random circuits go from the lowest to the
    highest draw.
    """

    curve: pd.DataFrame
    """One row per size and ``ranking`` (signed, absolute, random): ``n_edges``, the nominal size; ``n_connected``, the
    actual one, of edges on a path from an embedding to the logits; ``share``, nominal, of the edges that count;
    ``metric``, ``faithfulness``, ``low``, ``high``."""
    cpr: float
    """By the signed ranking, as in the benchmark."""
    cpr_interval: Interval
    cpr_absolute: float
    """The same area where circuits are ranked by the score's size."""
    cpr_absolute_interval: Interval
    cpr_at_control: float
    """The area over those sizes alone that the random circuits have: to be compared with ``cpr_random``."""
    cpr_random: float
    cpr_random_interval: Interval
    cmd: float
    """By the ranking by size, as in the benchmark."""
    cmd_interval: Interval
    cmd_signed: float
    """The same area where circuits are ranked by the signed score."""
    cmd_signed_interval: Interval
    cmd_at_control: float
    """As ``cpr_at_control``: to be compared with ``cmd_random``."""
    cmd_random: float
    cmd_random_interval: Interval
    metric_full: float
    metric_empty: float
    n_edges: int
    """Edges that count: without those from a position embedding, unless they were asked for."""
    n_pairs: int
    n_random: int
    sizes: str
    """Which sizes were measured."""
    method: str
    metric: str
    ablation: str

    def to_frame(self) -> pd.DataFrame:
        """Return the areas by both rankings, one row each, with their intervals and the control's.

        ``at_control`` is the area over the sizes of the random circuits alone, to be compared with ``random``.
        """
        import pandas as pd

        rows = {
            name: {
                "ranking": ranking,
                "value": getattr(self, name),
                "low": getattr(self, f"{name}_interval")[0],
                "high": getattr(self, f"{name}_interval")[1],
                "at_control": _at_control(self.curve, name[:3], ranking),
                "random": getattr(self, f"{name[:3]}_random"),
                "random_low": getattr(self, f"{name[:3]}_random_interval")[0],
                "random_high": getattr(self, f"{name[:3]}_random_interval")[1],
            }
            for name, ranking in AREAS.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def figure(self, *, log: bool = False) -> go.Figure:
        """Return the curve of both rankings over the share of edges kept, with intervals and the control.

        Args:
            log: Whether shares are on a logarithmic axis, where small circuits of a large model can be told apart;
                areas under the curve are then not CPR and CMD, and the circuit without edges is not shown.
        """
        from circuits.discovery.figures import draw_faithfulness

        return draw_faithfulness(self, log=log)

    def _repr_html_(self) -> str:
        about = f"{self.method}, {self.metric}, {self.ablation} ablation, {self.n_edges} edges, {self.n_pairs} pairs"
        about += f", {self.sizes}"
        table = self.to_frame().to_html(float_format=lambda v: f"{v:.3f}")
        return f"<p><b>CPR {self.cpr:.3f}, CMD {self.cmd:.3f}</b><br>{escape(about)}</p>{table}"

    def __repr__(self) -> str:
        return f"Faithfulness(cpr={self.cpr:.3f}, cmd={self.cmd:.3f}, {self.n_edges} edges, {self.n_pairs} pairs)"

    def save(self, directory: Path | str) -> Path:
        """Write ``faithfulness.json`` into a directory and return the directory.

        Raises:
            StorageError: the directory cannot be written.
        """
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        data["curve"] = self.curve.to_dict(orient="list")
        write_json(make_directory(directory) / "faithfulness.json", {"schema": SCHEMA} | data)
        return Path(directory)

    @staticmethod
    def load(directory: Path | str) -> Faithfulness:
        """Return what ``save`` wrote into a directory.

        Raises:
            CorruptRun: the file is missing or damaged.
            IncompatibleRun: it was written in another format version.
        """
        import pandas as pd

        where = Path(directory) / "faithfulness.json"
        stored = read_json(where)
        names = {field.name for field in fields(Faithfulness)}
        if not isinstance(stored, dict) or not isinstance(stored.get("curve"), dict):
            raise CorruptRun(f"{where} does not hold a faithfulness curve: compute it anew")
        if (schema := stored.pop("schema", None)) not in (SCHEMA, EARLIER):
            raise IncompatibleRun(f"{where} is not of schema {SCHEMA}: compute it anew")
        curve = pd.DataFrame(stored["curve"])
        if schema == EARLIER:
            stored |= _other_areas(curve)
        if set(stored) != names:
            raise CorruptRun(f"{where} lacks or adds {', '.join(sorted(names ^ set(stored)))}: compute it anew")
        data: dict[str, Any] = {k: tuple(v) if k.endswith("_interval") else v for k, v in stored.items()}
        return Faithfulness(**data | {"curve": curve})


@dataclass(frozen=True)
class Curve:
    """Which circuits one curve evaluates: its ranking, shares of the edges, and numbers of edges."""

    ranking: str
    x: Sequence[float]
    sizes: Sequence[int]


def summarise(
    table: Float[np.ndarray, "set pair"],
    curves: Sequence[Curve],
    connected: Sequence[int],
    *,
    n_edges: int,
    sizes: str,
    seed: int,
    method: str,
    metric: str,
    ablation: str,
) -> Faithfulness:
    """Return the curves, areas and intervals of circuits whose metric is known for every pair.

    Args:
        table: The metric of: the model without any edge, with every edge, and the circuits of each curve in turn.
        curves: Signed ranking, absolute ranking, then the random ones.
        connected: The number of connected edges of each row of ``table``.
        n_edges: Edges that count.
        sizes: Which sizes these are.
        seed: Of the bootstrap.
        method: Of the scores.
        metric: Its name.
        ablation: Its name.

    Raises:
        BadInput: the metric is not finite, or does not change when every edge is ablated.
    """
    n = table.shape[1]
    if not np.isfinite(table).all():
        bad = int((~np.isfinite(table)).any(0).sum())
        raise BadInput(f"metric {metric} is not finite on {bad} of {n} pairs: check the model and the metric")
    empty, full = ends_of_gap(table[0], table[1], metric)
    point = _share_of_gap(table, np.full((1, n), 1 / n))
    ends = np.cumsum([2, *(len(curve.sizes) for curve in curves)])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    spans, areas_drawn = _intervals(table, resampling_counts(n, seed=seed) / n, curves, parts)
    curve = _frame(table, point, spans, curves, parts, connected)
    areas: dict[str, Any] = {}
    for name, ranking in AREAS.items():
        i = [c.ranking for c in curves].index(ranking)
        areas[name] = float(_area(name, curves[i].x, point[:, parts[i]])[0])
        areas[f"{name}_interval"] = _span(areas_drawn[name])
    for name in ("cpr", "cmd"):
        random = [float(_area(name, c.x, point[:, p])[0]) for c, p in list(zip(curves, parts, strict=True))[2:]]
        areas[f"{name}_at_control"] = _at_control(curve, name, AREAS[name])
        areas[f"{name}_random"] = float(np.mean(random))
        areas[f"{name}_random_interval"] = (min(random), max(random))
    return Faithfulness(
        curve=curve,
        metric_full=full,
        metric_empty=empty,
        n_edges=n_edges,
        n_pairs=n,
        n_random=len(curves) - 2,
        sizes=sizes,
        method=method,
        metric=metric,
        ablation=ablation,
        **areas,
    )


def ends_of_gap(
    empty: Float[np.ndarray, " pair"], full: Float[np.ndarray, " pair"], metric: str
) -> tuple[float, float]:
    """Return the mean metric with every edge ablated and of the whole model.

    Raises:
        BadInput: they are the same but for rounding.
    """
    low, high = float(empty.mean()), float(full.mean())
    if abs(high - low) <= 1e-6 * float(np.abs([empty, full]).mean()):
        raise BadInput(
            f"ablating every edge takes {metric} from {high:.4g} to {low:.4g}: there is no gap for a circuit to "
            f"recover; expected pairs whose corruption changes the model's answer"
        )
    return low, high


def _share_of_gap(
    table: Float[np.ndarray, "set pair"], weights: Float[np.ndarray, "draw pair"]
) -> Float[np.ndarray, "draw set"]:
    """How much of the gap each set of edges recovers, by weights of the pairs; first come no edge and every edge."""
    metric = weights @ table.T
    empty, full = metric[:, :1], metric[:, 1:2]
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have no gap: left out of the intervals
        return (metric - empty) / (full - empty)


def _intervals(
    table: Float[np.ndarray, "set pair"],
    weights: Float[np.ndarray, "draw pair"],
    curves: Sequence[Curve],
    parts: Sequence[slice],
) -> tuple[list[Interval], dict[str, Float[np.ndarray, " draw"]]]:
    """The interval of each set of the two found curves, and each area in every draw; never all draws of all sets."""
    spans: list[Interval] = []
    areas = {name: np.zeros(len(weights)) for name in AREAS}
    for i, part in enumerate(parts[:2]):
        steps = np.diff(curves[i].x) / 2
        trapezoid = np.append(steps, 0) + np.append(0, steps)
        for first in range(part.start, part.stop, SETS_AT_A_TIME):
            some = slice(first, min(first + SETS_AT_A_TIME, part.stop))
            f = _share_of_gap(np.concatenate([table[:2], table[some]]), weights)[:, 2:]
            spans += [_span(column) for column in f.T]
            share = trapezoid[some.start - part.start : some.stop - part.start]
            for name, ranking in AREAS.items():
                if ranking == curves[i].ranking:
                    areas[name] += (f if name.startswith("cpr") else np.abs(1 - f)) @ share
    return spans, areas


def _area(name: str, x: Sequence[float], f: Float[np.ndarray, "*draw size"]) -> np.ndarray:
    from scipy.integrate import trapezoid

    return trapezoid(f if name.startswith("cpr") else np.abs(1 - f), x, axis=-1)


def _at_control(curve: pd.DataFrame, name: str, ranking: str) -> float:
    """The area of the found circuits over the sizes that the random ones have."""
    shares = curve.loc[curve["ranking"] == "random", "share"]
    found = curve[(curve["ranking"] == ranking) & curve["share"].isin(shares)]
    return float(_area(name, found["share"].to_list(), found["faithfulness"].to_numpy()))


def _other_areas(curve: pd.DataFrame) -> dict[str, Any]:
    """What a file of the earlier format lacks."""
    out: dict[str, Any] = {f"{name}_at_control": _at_control(curve, name, AREAS[name]) for name in ("cpr", "cmd")}
    for name in ("cpr_absolute", "cmd_signed"):
        found = curve[curve["ranking"] == AREAS[name]]
        out[name] = float(_area(name, found["share"].to_list(), found["faithfulness"].to_numpy()))
        out[f"{name}_interval"] = (float("nan"), float("nan"))
    return out


def _span(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws[np.isfinite(draws)], [0.025, 0.975])
    return float(low), float(high)


def _frame(
    table: np.ndarray,
    point: np.ndarray,
    spans: Sequence[Interval],
    curves: Sequence[Curve],
    parts: Sequence[slice],
    connected: Sequence[int],
) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for curve, part in list(zip(curves, parts, strict=True))[:2]:
        for i, (share, size) in enumerate(zip(curve.x, curve.sizes, strict=True), part.start):
            low, high = spans[i - parts[0].start]
            rows.append(_row(curve.ranking, size, connected[i], share, table[i].mean(), point[0, i], low, high))
    control = parts[2:]
    for j, (share, size) in enumerate(zip(curves[2].x, curves[2].sizes, strict=True)):
        sets = [part.start + j for part in control]
        low, high = float(point[0, sets].min()), float(point[0, sets].max())
        mean_connected = float(np.mean([connected[i] for i in sets]))
        rows.append(_row("random", size, mean_connected, share, table[sets].mean(), point[0, sets].mean(), low, high))
    return pd.DataFrame(rows)


def _row(
    ranking: str, size: int, connected: float, share: float, metric: float, f: float, low: float, high: float
) -> dict[str, Any]:
    return {
        "ranking": ranking,
        "n_edges": int(size),
        "n_connected": float(connected),
        "share": float(share),
        "metric": float(metric),
        "faithfulness": float(f),
        "low": low,
        "high": high,
    }
