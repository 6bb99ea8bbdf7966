"""A circuit: a score for every edge of a model's graph, and which edges are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._io import atomic_write, from_json, make_directory, read_bytes, read_json, to_json, write_json
from circuits._stats import resampling_counts
from circuits.discovery.graph import Graph, component
from circuits.errors import BadInput, CorruptRun, IncompatibleRun

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import plotly.graph_objects as go

SCHEMA = 4


@dataclass(frozen=True, eq=False)
class Circuit:
    """Scores over the edges of a graph, and the edges that are kept (all of them, as a method returns it).

    A signed score is the effect of corrupting the edge on the mean metric, in the metric's unit: an edge that supports
    the answer has a negative score under ``logit_difference``. Methods that only say how much an edge matters give
    scores of zero and above, which are not ``signed``.
    """

    graph: Graph
    scores: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    method: str
    metric: str
    per_example: Float[Tensor, "pair edge"] | None = None
    """The effect on each pair's own metric, of which ``scores`` is the mean."""
    details: Mapping[str, Any] = field(default_factory=dict)
    signed: bool = True
    """Whether a score's sign says which way the metric goes; without, every ranking goes by size."""
    per_position: Float[Tensor, "pair pos edge"] | None = None
    """The effect at each token position by itself, where it was asked for: of the source's output and the reader's
    input at that position. ``at_position`` makes a circuit of it."""

    def __post_init__(self) -> None:
        for name in ("scores", "kept"):
            if getattr(self, name).shape != (self.graph.n_edges,):
                shape = tuple(getattr(self, name).shape)
                raise BadInput(f"{name} has shape {shape}: expected one number for each of {self.graph.n_edges} edges")
        if not bool(torch.isfinite(self.scores).all()):
            bad = self.graph.edges[int((~torch.isfinite(self.scores)).nonzero()[0])]
            raise BadInput(f"the score of edge {bad[0]} -> {bad[1]} is not finite: check the model and the metric")
        if self.per_example is not None and self.per_example.shape[1:] != self.scores.shape:
            shape = tuple(self.per_example.shape)
            raise BadInput(f"per_example has shape {shape}: expected [pair, {self.graph.n_edges}]")
        if self.per_position is not None and self.per_position.shape[2:] != self.scores.shape:
            raise BadInput(
                f"per_position has shape {tuple(self.per_position.shape)}: expected [pair, pos, {self.graph.n_edges}]"
            )

    @staticmethod
    def of_effects(
        graph: Graph,
        effects: Float[Tensor, "pair edge"],
        *,
        method: str,
        metric: str,
        details: Mapping[str, Any],
        signed: bool = True,
    ) -> Circuit:
        """Return the circuit that keeps every edge, scored by its mean effect over pairs."""
        scores = effects.mean(0)
        return Circuit(
            graph, scores, torch.ones_like(scores, dtype=torch.bool), method, metric, effects, details, signed
        )

    @staticmethod
    def of_source_effects(
        graph: Graph,
        effects: Float[Tensor, "pair source"],
        *,
        method: str,
        metric: str,
        details: Mapping[str, Any],
        signed: bool = True,
    ) -> Circuit:
        """Return the circuit in which every edge has its source's effects."""
        of_edges = effects[:, graph.ends(effects.device)[0]]
        return Circuit.of_effects(graph, of_edges, method=method, metric=metric, details=details, signed=signed)

    @property
    def by_position(self) -> Float[Tensor, "pos edge"] | None:
        """The mean effect at each token position, where it was asked for."""
        return None if self.per_position is None else self.per_position.mean(0)

    @property
    def n_kept(self) -> int:
        """Number of edges kept."""
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The kept edges as (source, reader), in order of execution."""
        return tuple(edge for edge, kept in zip(self.graph.edges, self.kept.tolist(), strict=True) if kept)

    def ranking(self, *, absolute: bool = True) -> Int[Tensor, " edge"]:
        """Return all edges' numbers, the most important first; ties in order of execution.

        Args:
            absolute: By the size of the score; otherwise by how much corrupting the edge lowers the metric.
        """
        importance = self.scores.abs() if absolute or not self.signed else -self.scores
        return importance.argsort(descending=True, stable=True)

    def top(self, n: int, *, absolute: bool = True) -> Circuit:
        """Return the circuit that keeps the ``n`` most important edges.

        Raises:
            BadInput: ``n`` is negative or exceeds the number of edges.
        """
        if not 0 <= n <= self.graph.n_edges:
            raise BadInput(f"n = {n}: expected 0 to {self.graph.n_edges} edges")
        kept = torch.zeros_like(self.kept)
        kept[self.ranking(absolute=absolute)[:n]] = True
        return replace(self, kept=kept)

    def at_position(self, position: int) -> Circuit:
        """Return the circuit whose scores, and scores per pair, are those at one token position.

        Raises:
            BadInput: the method was not asked for scores by position, or has none at this one.
        """
        per_position = self._by_position_of()
        if not 0 <= position < per_position.shape[1]:
            raise BadInput(f"position = {position}: expected 0 to {per_position.shape[1] - 1}")
        here = per_position[:, position]
        details = {**self.details, "position": position}
        return replace(self, scores=here.mean(0), per_example=here, per_position=None, details=details)

    def top_by_position(self, n: int) -> Bool[Tensor, "pos edge"]:
        """Return the ``n`` largest edges at single token positions, as ``ablated_metric`` takes them.

        Raises:
            BadInput: the method was not asked for scores by position, or there are not so many.
        """
        sizes = self._by_position_of().mean(0).abs()
        if not 0 <= n <= sizes.numel():
            raise BadInput(f"n = {n}: expected 0 to {sizes.numel()}, the edges times the positions")
        kept = torch.zeros(sizes.numel(), dtype=torch.bool, device=sizes.device)
        kept[sizes.flatten().argsort(descending=True, stable=True)[:n]] = True
        return kept.view(sizes.shape)

    def _by_position_of(self) -> Float[Tensor, "pair pos edge"]:
        if self.per_position is None:
            raise BadInput(f"{self.method} kept no scores by position: ask for them with by_position=True")
        return self.per_position

    def threshold(self, at_least: float) -> Circuit:
        """Return the circuit that keeps the edges whose score is at least this large in size."""
        return replace(self, kept=self.scores.abs() >= at_least)

    def pruned(self) -> Circuit:
        """Return the circuit without the edges that are on no path from an embedding to the logits."""
        return replace(self, kept=self.graph.connected(self.kept))

    def complement(self) -> Circuit:
        """Return the circuit that keeps what this one does not."""
        return replace(self, kept=~self.kept)

    def __and__(self, other: Circuit) -> Circuit:
        """Return the circuit that keeps what both keep, with this one's scores."""
        return replace(self, kept=self.kept & self._kept_of(other))

    def __or__(self, other: Circuit) -> Circuit:
        """Return the circuit that keeps what either keeps, with this one's scores."""
        return replace(self, kept=self.kept | self._kept_of(other))

    def __sub__(self, other: Circuit) -> Circuit:
        """Return the circuit that keeps what this one keeps and the other does not, with this one's scores."""
        return replace(self, kept=self.kept & ~self._kept_of(other))

    def _kept_of(self, other: Circuit) -> Bool[Tensor, " edge"]:
        if other.graph != self.graph:
            raise BadInput(
                f"circuits of {self.graph.n_edges} and {other.graph.n_edges} edges of different graphs have no edges "
                f"in common: expected circuits of one model"
            )
        return other.kept.to(self.kept.device)

    def merged(self) -> Circuit:
        """Return the circuit between whole components, in which a head's q, k and v (and an MLP's neurons) are one.

        A merged edge's score is the sum of its edges', which is what ablating them together does to first order (of
        scores that are not ``signed``, the largest of them, of every pair where each has its own); it is kept if one of
        them is.
        """
        graph, *ends = self.graph.merging()
        part, whole = (end.to(self.scores.device) for end in ends)
        zeros = self.scores.new_zeros(graph.n_edges)

        def joined(values: Float[Tensor, "*pair edge"]) -> Float[Tensor, "*pair merged"]:
            empty = zeros.expand(*values.shape[:-1], -1)
            if self.signed:
                return empty.index_add(-1, whole, values[..., part])
            return empty.scatter_reduce(-1, whole.expand(*values.shape[:-1], -1), values[..., part], "amax")

        per_example, per_position = (
            None if values is None else joined(values) for values in (self.per_example, self.per_position)
        )
        scores = joined(self.scores) if self.signed or per_example is None else per_example.mean(0)
        kept = zeros.index_add(0, whole, self.kept[part].to(zeros)) > 0
        return replace(self, graph=graph, scores=scores, kept=kept, per_example=per_example, per_position=per_position)

    def interval(
        self, *, level: float = 0.95, seed: int = 0, resamples: int = 1000
    ) -> tuple[Float[Tensor, " edge"], Float[Tensor, " edge"]]:
        """Return each score's percentile-bootstrap interval over pairs, low and high.

        Raises:
            BadInput: the method kept no scores per pair.
        """
        if self.per_example is None:
            raise BadInput(f"{self.method} kept no scores per pair, so there are no intervals")
        return mean_interval(self.per_example, level=level, seed=seed, resamples=resamples)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per edge, the largest score first; the index is the edge's number in the graph."""
        import pandas as pd

        order = self.ranking().tolist()
        columns: dict[str, Any] = {
            "source": [self.graph.edges[i][0] for i in order],
            "reader": [self.graph.edges[i][1] for i in order],
            "score": self.scores[order].tolist(),
        }
        if self.per_example is not None:
            low, high = self.interval()
            columns |= {"low": low[order].tolist(), "high": high[order].tolist()}
        return pd.DataFrame(columns | {"kept": self.kept[order].tolist()}, index=pd.Index(order, name="edge"))

    def source_frame(self) -> pd.DataFrame:
        """Return one row per source, of a method that scores sources and not edges: ``score``, ``low``, ``high``.

        The largest comes first; the interval is the 95 % bootstrap interval over pairs; the index is the source.

        Raises:
            BadInput: edges of one source have scores of their own.
        """
        import pandas as pd

        source, _ = self.graph.ends(self.scores.device)
        first = torch.stack([(source == u).nonzero()[0, 0] for u in range(len(self.graph.sources))])
        # means of equal columns may differ in their last bit
        if not torch.allclose(self.scores[first][source], self.scores, rtol=1e-5, atol=0):
            raise BadInput(f"{self.method} scores each edge by itself: to_frame() has them; exact_nodes scores sources")
        columns: dict[str, Any] = {"score": self.scores[first].tolist()}
        if self.per_example is not None:
            low, high = mean_interval(self.per_example[:, first])
            columns |= {"low": low.tolist(), "high": high.tolist()}
        frame = pd.DataFrame(columns, index=pd.Index(self.graph.sources, name="source"))
        return frame.sort_values("score", key=abs, ascending=False, kind="stable")

    def to_networkx(self) -> nx.MultiDiGraph:
        """Return the kept edges between components; every edge has its ``writer``, ``reader`` and ``score``."""
        import networkx as nx

        graph = nx.MultiDiGraph(method=self.method, metric=self.metric)
        targets = dict(zip(self.graph.readers, self.graph.feeds, strict=True))
        scores = self.scores.tolist()
        for source, reader in self.edges:
            score = scores[self.graph.index(source, reader)]
            for target in dict.fromkeys(component(self.graph.sources[i]) for i in targets[reader]) or [reader]:
                graph.add_edge(component(source), target, writer=source, reader=reader, score=score)
        return graph

    def figure(self, *, top: int = 40) -> go.Figure:
        """Return the kept edges, at most the ``top`` largest of them, drawn from the embeddings up to the logits."""
        from circuits.discovery.figures import draw_circuit

        return draw_circuit(self, top=top)

    def positions_figure(self, *, top: int = 25) -> go.Figure:
        """Return at which token positions the ``top`` largest kept edges count.

        Raises:
            BadInput: the method was not asked for scores by position.
        """
        from circuits.discovery.figures import draw_map

        by_position = self._by_position_of().mean(0)
        largest = by_position.abs().amax(0) * self.kept
        order = largest.argsort(descending=True, stable=True)[:top]
        order = order[largest[order] > 0].flip(0)
        return draw_map(
            by_position[:, order].T.tolist(),
            title=f"The {len(order)} largest edges by token position",
            subtitle=f"{self.method}, {self.metric}",
            x="position",
            y="edge",
            unit=self.metric,
            names=[" → ".join(self.graph.edges[i]) for i in order.tolist()],
        )

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        rows = frame[frame.pop("kept")].head(15).to_html(float_format=lambda v: f"{v:+.4f}")
        return f"<p><b>{escape(self._title())}</b></p>{rows}"

    def __repr__(self) -> str:
        return f"Circuit({self._title()})"

    def _title(self) -> str:
        return f"{self.n_kept} of {self.graph.n_edges} edges, {self.method}, {self.metric}"

    def save(self, directory: Path | str) -> Path:
        """Write ``circuit.safetensors``, then ``circuit.json``, into a directory and return its path.

        Raises:
            StorageError: the directory cannot be written.
        """
        from safetensors.torch import save

        directory = make_directory(directory)
        tensors = {"scores": self.scores, "kept": self.kept}
        tensors |= {
            name: tensor for name in ("per_example", "per_position") if (tensor := getattr(self, name)) is not None
        }
        data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        fields = {name: getattr(self, name) for name in ("graph", "method", "metric", "details", "signed")}
        digest = atomic_write(directory / "circuit.safetensors", data)
        write_json(directory / "circuit.json", {"schema": SCHEMA, "sha256": digest} | to_json(fields))
        return directory

    @staticmethod
    def load(directory: Path | str) -> Circuit:
        """Return the circuit stored in a directory.

        Raises:
            CorruptRun: a file is missing, damaged or altered.
            IncompatibleRun: it was written in another format version.
        """
        from safetensors.torch import load

        where = Path(directory) / "circuit.json"
        stored = read_json(where)
        if not isinstance(stored, dict) or "schema" not in stored:
            raise CorruptRun(f"{where} does not describe a circuit: compute it anew")
        if stored["schema"] != SCHEMA:
            raise IncompatibleRun(f"{where} has schema {stored['schema']}: expected {SCHEMA}; compute it anew")
        try:
            tensors: dict[str, Any] = load(read_bytes(Path(directory) / "circuit.safetensors", sha256=stored["sha256"]))
            graph = from_json(Graph, stored["graph"])
            return Circuit(
                graph=graph, **tensors, **{name: stored[name] for name in ("method", "metric", "details", "signed")}
            )
        except (KeyError, TypeError, BadInput) as error:
            raise CorruptRun(f"{where} does not describe a circuit ({error}): compute it anew") from error


def mean_interval(
    values: Float[Tensor, "pair column"],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 1000,
    memory_budget: int | None = None,
) -> tuple[Float[Tensor, " column"], Float[Tensor, " column"]]:
    """Return the percentile-bootstrap interval, low and high, of each column's mean over resampled pairs.

    Args:
        values: One row per pair.
        level: Of the interval.
        seed: Of the resamples.
        resamples: Their number.
        memory_budget: Bytes that the means over resamples may take at a time; None: some 32 MB.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Fails when: there is one pair, which resampled is itself: the ends are then not numbers.

    Raises:
        BadInput: ``level`` is not between 0 and 1, or ``resamples`` is less than 1.
    """
    if not 0 < level < 1:
        raise BadInput(f"level = {level}: expected a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise BadInput(f"resamples = {resamples}: expected at least 1")
    if len(values) == 1:
        return torch.full_like(values[0], torch.nan), torch.full_like(values[0], torch.nan)
    counts = torch.from_numpy(resampling_counts(len(values), seed=seed, resamples=resamples))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(values)
    # columns in groups: torch.quantile takes at most 16 million numbers
    numbers = 4_000_000 if memory_budget is None else min(4_000_000, memory_budget // 64)
    found: list[Tensor] = []
    for group in values.split(max(1, numbers // resamples), dim=1):
        means = [part.to(values) @ group / len(values) for part in counts.split(max(1, numbers // len(values)))]
        found.append(torch.quantile(torch.cat(means), ends, dim=0))
    low, high = torch.cat(found, 1)
    return low, high
