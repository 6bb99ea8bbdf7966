"""How alike circuits of one model are: their edges, and their scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuits.discovery.circuit import Circuit
from circuits.discovery.stability import jaccard
from circuits.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Comparison:
    """Circuits of one graph, by name, pair by pair."""

    circuits: Mapping[str, Circuit]
    table: pd.DataFrame
    """One row per two circuits: ``first``, ``second``, ``n_first``, ``n_second``, ``n_shared`` (kept edges),
    ``jaccard`` of the kept edges, ``jaccard_random`` (of random sets of these sizes), ``rank_correlation`` of the sizes
    of all scores (Spearman)."""

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.table

    def edges(self) -> pd.DataFrame:
        """Return every edge that a circuit keeps, with each circuit's score and whether it keeps it."""
        import pandas as pd

        first = next(iter(self.circuits.values()))
        kept = torch.stack([circuit.kept for circuit in self.circuits.values()]).any(0)
        numbers = kept.nonzero().flatten().tolist()
        columns: dict[str, list[object]] = {
            "source": [first.graph.edges[i][0] for i in numbers],
            "reader": [first.graph.edges[i][1] for i in numbers],
        }
        for name, circuit in self.circuits.items():
            columns[f"{name} score"] = circuit.scores[numbers].tolist()
            columns[f"{name} kept"] = circuit.kept[numbers].tolist()
        return pd.DataFrame(columns, index=pd.Index(numbers, name="edge"))

    def figure(self) -> go.Figure:
        """Return the Jaccard similarity of every two circuits as a map."""
        from circuits.discovery.figures import draw_similarity

        names = list(self.circuits)
        found = {frozenset(pair): value for *pair, value in self.table[["first", "second", "jaccard"]].to_numpy()}
        grid = [[1.0 if a == b else found[frozenset((a, b))] for b in names] for a in names]
        return draw_similarity(grid, names, title="Edges that circuits share", unit="Jaccard similarity")

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3f}".format, index=False)


def compare(circuits: Mapping[str, Circuit]) -> Comparison:
    """Return how alike circuits of one model are, every two of them.

    The Jaccard similarity of the kept edges is abs(A & B) / abs(A | B).

    Args:
        circuits: At least two, by the names that the table is to have for them.

    Cost: no forward and no backward.

    Conventions: kept edges are compared as sets; scores by the ranks of their sizes, over all edges.

    Source: Jaccard 1912; Spearman 1904 (scipy.stats.spearmanr). The expected Jaccard similarity of random sets of m
        and n of N edges is taken at the expected overlap m n / N.

    Fails when: circuits of very different sizes are compared by their kept edges alone: a small one within a large one
        has a low Jaccard similarity; take ``top`` of both at one size first.

    Raises:
        BadInput: fewer than two circuits, or circuits of different graphs.
    """
    import pandas as pd
    from scipy.stats import spearmanr

    if len(circuits) < 2:
        raise BadInput(f"{len(circuits)} circuits: expected at least two to compare")
    rows = []
    for (first, a), (second, b) in itertools.combinations(circuits.items(), 2):
        shared = a & b
        total, m, n = a.graph.n_edges, a.n_kept, b.n_kept
        expected = m * n / total
        x, y = (circuit.scores.abs().tolist() for circuit in (a, b))
        flat = min(x) == max(x) or min(y) == max(y)
        rows.append(
            {
                "first": first,
                "second": second,
                "n_first": m,
                "n_second": n,
                "n_shared": shared.n_kept,
                "jaccard": float(jaccard(a.kept, b.kept.to(a.kept.device))),
                "jaccard_random": expected / (m + n - expected) if m + n else 1.0,
                "rank_correlation": float("nan") if flat else float(spearmanr(x, y).statistic),
            }
        )
    return Comparison(dict(circuits), pd.DataFrame(rows))
