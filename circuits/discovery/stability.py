"""How much of a circuit would be found again with other pairs."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits._stats import resampling_counts
from circuits.discovery.circuit import Circuit
from circuits.discovery.memory import BUDGET
from circuits.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Stability:
    """The circuit of the ``n_edges`` best edges, found again in bootstrap resamples of the pairs."""

    jaccard: float
    """Mean Jaccard similarity of the resamples' circuits with the circuit of all pairs."""
    interval: tuple[float, float]
    """2.5th to 97.5th percentile over resamples."""
    jaccard_random: float
    """What two random sets of that many edges share on average."""
    frequency: Float[Tensor, " edge"]
    """Share of resamples whose circuit has the edge."""
    circuit: Circuit
    n_edges: int
    n_resamples: int

    def to_frame(self) -> pd.DataFrame:
        """Return the edges that any resample found, with the share of resamples that did, the largest first."""
        import pandas as pd

        order = [i for i in self.frequency.argsort(descending=True, stable=True).tolist() if self.frequency[i] > 0]
        edges = self.circuit.graph.edges
        return pd.DataFrame(
            {
                "source": [edges[i][0] for i in order],
                "reader": [edges[i][1] for i in order],
                "frequency": self.frequency[order].tolist(),
                "kept": self.circuit.kept[order].tolist(),
            },
            index=pd.Index(order, name="edge"),
        )

    def figure(self) -> go.Figure:
        """Return the share of resamples that find each edge, the surest first: edges of the circuit, and others."""
        from circuits.discovery.figures import draw_stability

        return draw_stability(self)

    def _repr_html_(self) -> str:
        low, high = self.interval
        about = f"{self.n_edges} edges, {self.circuit.method}, {self.n_resamples} resamples of the pairs"
        text = f"Jaccard {self.jaccard:.2f} [{low:.2f}, {high:.2f}], at random {self.jaccard_random:.2f}"
        table = self.to_frame().head(15).to_html(float_format="{:.2f}".format)
        return f"<p><b>{escape(text)}</b>, {escape(about)}</p>{table}"


def stability(
    circuit: Circuit,
    n_edges: int,
    *,
    absolute: bool = True,
    resamples: int = 200,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Stability:
    """Return how far the ``n_edges`` best edges depend on which pairs were drawn; nothing is run again.

    With C the n best edges by the mean score over all pairs, and C_b those by the mean over a bootstrap resample b of
    the pairs, it is the mean over b of the Jaccard similarity abs(C & C_b) / abs(C | C_b). Two random sets of n of E
    edges have n / (2 E - n), at the expected overlap.

    Args:
        circuit: With scores per pair.
        n_edges: Size of the circuits that are compared.
        absolute: Rank by the size of the score: see ``Circuit.ranking``.
        resamples: Bootstrap resamples of the pairs.
        seed: Of the resamples.
        memory_budget: Bytes that the computation may take; None: 512 MB.

    Cost: no forward and no backward: the scores per pair are drawn again.

    Conventions: edges are ranked by size unless ``absolute`` is false; each resample's circuit is compared with the
        circuit of all pairs.

    Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13; Jaccard 1912.

    Fails when: the pairs are all alike, so that resampling them changes nothing that new pairs would.

    Raises:
        BadInput: the method kept no scores per pair or had one pair, or ``n_edges`` is not from 1 to the number of
            edges.
    """
    if circuit.per_example is None:
        raise BadInput(f"{circuit.method} kept no scores per pair, so its stability cannot be told from one run")
    if len(circuit.per_example) < 2:
        raise BadInput("there is one pair, and resampling it changes nothing: expected at least 2")
    total = circuit.graph.n_edges
    if not 1 <= n_edges <= total:
        raise BadInput(f"n_edges = {n_edges}: expected 1 to {total} edges")
    chosen = circuit.top(n_edges, absolute=absolute)
    pairs = len(circuit.per_example)
    counts = torch.from_numpy(resampling_counts(pairs, seed=seed, resamples=resamples))
    frequency = torch.zeros(total, dtype=torch.float64, device=circuit.scores.device)
    found: list[Tensor] = []
    # a score, its size, its place in the order, and twice as much while they are sorted
    for rows in counts.split(max(1, (BUDGET if memory_budget is None else memory_budget) // (32 * total))):
        scores = rows.to(circuit.per_example) @ circuit.per_example / pairs
        importance = scores.abs() if absolute or not circuit.signed else -scores
        order = importance.argsort(dim=1, descending=True, stable=True)[:, :n_edges]
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        found.append(jaccard(kept, chosen.kept.expand_as(kept)))
        frequency += kept.sum(0)
        del scores, importance, order, kept  # before the next ones are made
    similarity = torch.cat(found)
    low, high = torch.quantile(similarity, torch.tensor([0.025, 0.975]).to(similarity)).tolist()
    expected = n_edges / (2 * total - n_edges)
    return Stability(float(similarity.mean()), (low, high), expected, frequency / resamples, chosen, n_edges, resamples)


def jaccard(a: Bool[Tensor, "*batch edge"], b: Bool[Tensor, "*batch edge"]) -> Float[Tensor, "*batch"]:
    """Return the share of the edges in either set that are in both; 1 for two empty sets."""
    union = (a | b).sum(-1)
    shared = (a & b).sum(-1).double()
    return torch.where(union == 0, torch.ones_like(shared), shared / union.clamp_min(1))
