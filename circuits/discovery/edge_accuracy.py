"""How well a circuit's scores tell true edges from others, where the truth is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import resampling_counts
from circuits.discovery.circuit import Circuit
from circuits.discovery.graph import Graph
from circuits.discovery.memory import BUDGET
from circuits.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd


Merging = tuple[Graph, Int[Tensor, " part"], Int[Tensor, " part"]]
"""What ``Graph.merging`` gives."""


@dataclass(frozen=True)
class EdgeAccuracy:
    """Area under the ROC curve and average precision of a circuit's scores as a detector of the true edges."""

    auroc: float
    auroc_interval: tuple[float, float] | None
    """95 % bootstrap interval over pairs; None where the method kept no scores per pair."""
    average_precision: float
    average_precision_interval: tuple[float, float] | None
    n_true: int
    n_edges: int

    def to_frame(self) -> pd.DataFrame:
        """Return both measures, one row each, with their intervals (not a number where there is none)."""
        import pandas as pd

        rows = {
            name: (getattr(self, name), *(getattr(self, f"{name}_interval") or (float("nan"), float("nan"))))
            for name in ("auroc", "average_precision")
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])

    def _repr_html_(self) -> str:
        return (
            f"<p><b>AUROC {self.auroc:.3f}</b> {_shown(self.auroc_interval)}, "
            f"<b>average precision {self.average_precision:.3f}</b> {_shown(self.average_precision_interval)}, "
            f"{self.n_true} of {self.n_edges} edges are true</p>"
        )


def edge_accuracy(
    circuit: Circuit,
    truth: Collection[tuple[str, str]],
    *,
    components: bool = False,
    resamples: int = 200,
    seed: int = 0,
    memory_budget: int | None = None,
) -> EdgeAccuracy:
    """Return how well the size of a score tells the true edges from all others.

    AUROC = P(a true edge's score is larger than another edge's) + P(they are equal) / 2. Average precision = the sum
    over ranks k of (recall at k - recall at k - 1) x precision at k. All edges of the graph count, whichever the
    circuit keeps.

    Args:
        circuit: Scores of a model whose true edges are known.
        truth: The true edges as (source, reader).
        components: Whether to merge a head's q, k and v into the head, and an MLP's neurons into the MLP, first; the
            largest score stands for them.
        resamples: Bootstrap resamples of the pairs.
        seed: Of the resamples.
        memory_budget: Bytes that the computation may take; None: 512 MB.

    Cost: no forward and no backward: the scores are there.

    Conventions: the size of the score ranks, whatever its sign; ties count half in the area under the ROC curve. The
        intervals are over pairs, with the truth held.

    Source: Gupta et al. 2024, InterpBench, arXiv 2407.14494 (edges of known circuits, components merged);
        Mann and Whitney 1947 (the area under the ROC curve as a sum of ranks). The numbers are those of scikit-learn's
        ``roc_auc_score`` and ``average_precision_score``.

    Fails when: the corrupt inputs leave a true edge's value as it is: no method can find it then, so give the edges
    that are active under these pairs as ``truth``, besides those of the program.

    Raises:
        BadInput: one of the true edges is not of this graph, or none or all edges are true.
    """
    is_true = circuit.graph.mask(truth)
    if not 0 < int(is_true.sum()) < circuit.graph.n_edges:
        raise BadInput(f"{int(is_true.sum())} of {circuit.graph.n_edges} edges are true: expected some but not all")
    merging = circuit.graph.merging() if components else None
    truth_of = np.asarray(_merge(is_true.double()[None], merging)[0]) > 0
    if truth_of.all():
        raise BadInput("with components merged every edge is true: expected some that are not")
    found = [areas(np.asarray(_merge(circuit.scores.double().cpu()[None].abs(), merging)), truth_of)]
    for scores in _resampled(circuit, resamples, seed, BUDGET if memory_budget is None else memory_budget):
        found.append(areas(np.asarray(_merge(scores.abs(), merging)), truth_of))
        del scores  # before the next ones are made
    auroc, precision = (np.concatenate(parts) for parts in zip(*found, strict=True))
    alone = len(auroc) == 1
    return EdgeAccuracy(
        float(auroc[0]),
        None if alone else _span(auroc[1:]),
        float(precision[0]),
        None if alone else _span(precision[1:]),
        int(truth_of.sum()),
        len(truth_of),
    )


def _resampled(circuit: Circuit, resamples: int, seed: int, memory_budget: int) -> Iterator[Float[Tensor, "row edge"]]:
    """Yield the scores of bootstrap resamples of the pairs, some resamples at a time; none without scores per pair."""
    if circuit.per_example is None:
        return
    n = len(circuit.per_example)
    counts = torch.from_numpy(resampling_counts(n, seed=seed, resamples=resamples))
    # of a resample: scores, their sizes, merged, and what ranks them
    for rows in counts.split(max(1, memory_budget // (96 * circuit.graph.n_edges))):
        weights = rows.double() / n
        columns = circuit.per_example.split(max(1, memory_budget // (16 * n)), dim=1)
        yield torch.cat([weights @ part.double().cpu() for part in columns], 1)


def areas(
    scores: Float[np.ndarray, "row item"], true: Bool[np.ndarray, " item"]
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Return the area under the ROC curve and the average precision of each row of scores, all rows at once.

    At a true item's score, precision is its rank among the true ones, counted from above with ties last, over its
    rank among all; the average over true items is the average precision.

    Source: as ``edge_accuracy``; by scipy.stats.rankdata, since scikit-learn's functions take one row at a time, at a
        hundred times the cost for graphs of a hundred edges.
    """
    from scipy.stats import rankdata

    n_true, n_other = int(true.sum()), int((~true).sum())
    below = rankdata(scores, axis=1)[:, true].sum(1) - n_true * (n_true + 1) / 2
    among_true = rankdata(-scores[:, true], method="max", axis=1)
    among_all = rankdata(-scores, method="max", axis=1)[:, true]
    return below / (n_true * n_other), (among_true / among_all).mean(1)


def _merge(values: Float[Tensor, "row edge"], merging: Merging | None) -> Float[Tensor, "row group"]:
    if merging is None:
        return values
    merged, part, whole = merging
    out = values.new_zeros(len(values), merged.n_edges)
    return out.scatter_reduce_(1, whole.expand(len(values), -1), values[:, part], "amax")


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
