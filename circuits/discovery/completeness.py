"""Completeness and minimality: does a circuit behave as the model does when parts of both are knocked out?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.circuit import Circuit, mean_interval
from circuits.discovery.curves import ends_of_gap
from circuits.discovery.evaluate import ablated_metric
from circuits.discovery.graph import Graph
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Completeness:
    """How the circuit and the model compare when the same edges are knocked out of both."""

    knockouts: pd.DataFrame
    """One row per knock-out: ``kind`` (none, random, greedy, circuit: the whole circuit, which leaves the complement),
    ``n_removed`` edges, ``of_circuit`` and ``of_model`` (normalised: 0 every edge ablated, 1 the whole model),
    ``incompleteness`` (their distance), ``low`` and ``high`` (95 % bootstrap interval of the difference)."""
    metric: str
    n_edges: int
    n_pairs: int

    @property
    def score(self) -> float:
        """The largest incompleteness found: 0 for a circuit that holds everything the model uses."""
        return float(self.knockouts.loc[self.knockouts["kind"] != "circuit", "incompleteness"].max())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per knock-out."""
        return self.knockouts

    def figure(self) -> go.Figure:
        """Return the circuit's metric against the model's, one point per knock-out, with the line of completeness."""
        from circuits.discovery.figures import draw_completeness

        return draw_completeness(self)

    def _repr_html_(self) -> str:
        about = f"{self.n_edges} edges, {self.metric}, {self.n_pairs} pairs"
        table = self.knockouts.groupby("kind", sort=False)["incompleteness"].describe()[["count", "mean", "max"]]
        shown = table.to_html(float_format="{:.3f}".format)
        return f"<p><b>Incompleteness {self.score:.3f}</b>, {escape(about)}</p>{shown}"


def completeness(
    model: HookedModel,
    circuit: Circuit,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    n_random: int = 32,
    greedy_steps: int = 8,
    greedy_candidates: int = 10,
    seed: int = 0,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Completeness:
    """Return how far the circuit is from the model when the same edges K of the circuit are knocked out of both.

    The incompleteness of K is abs(m(C - K) - m(M - K)) / abs(m(M) - m(no edge)). K is nothing (which is
    faithfulness), random subsets of the circuit (each edge with probability one half), and subsets that are grown
    greedily: of ``greedy_candidates`` random edges that one is added which raises the incompleteness most. Last, K
    is the whole circuit: how much of the metric the complement still gives. The greedy search sees every second pair,
    and every row is measured on the others, so that a search among chance differences finds nothing.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        circuit: The edges to test.
        pairs: Clean and corrupt inputs.
        metric: One number per pair.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        n_random: Random subsets.
        greedy_steps: Edges of the greedy subset; it takes 2 x ``greedy_candidates`` forwards per edge.
        greedy_candidates: Edges that are tried at each greedy step.
        seed: Of the subsets.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: see
            ``ablated_metric``.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards for the scale, two for each knock-out, and 2 x ``greedy_candidates`` for each edge of the greedy
        subset. No backward.

    Conventions: distances are shares of the gap between the model and the model with every edge ablated; 0 is complete.
        Edges are knocked out, where the paper knocks out nodes.

    Source: Wang et al. 2022, Interpretability in the Wild, arXiv 2211.00593, section 4 (completeness; there of nodes).

    Fails when: backups outside the circuit take over only for knock-outs that were not tried; and where ablating
    everything hardly moves the metric, so that distances are divided by little.

    Raises:
        BadInput: the circuit is of another graph or empty, ablating all edges changes nothing, a number of subsets or
            edges is negative, or the budget does not hold one pair.
    """
    for name, value in (("n_random", n_random), ("greedy_steps", greedy_steps)):
        if value < 0:
            raise BadInput(f"{name} = {value}: expected 0 or more")
    if greedy_candidates < 1:
        raise BadInput(f"greedy_candidates = {greedy_candidates}: expected 1 or more (greedy_steps = 0 grows none)")
    kept = _checked(model, circuit)
    options: dict[str, Any] = {"metric": metric, "ablation": ablation, "neurons": circuit.graph.has_neurons}
    options |= {"memory_budget": memory_budget, "batch_size": batch_size}
    generator = torch.Generator().manual_seed(seed)
    members = kept.nonzero().flatten()
    none = torch.zeros_like(kept)
    random = torch.zeros(n_random, len(kept), dtype=torch.bool)
    random[:, members] = torch.rand(n_random, len(members), generator=generator) < 0.5

    def measure(sets: Bool[Tensor, "set edge"]) -> Float[Tensor, "set pair"]:
        found = ablated_metric(model, pairs, sets.to(circuit.kept.device), **options)
        return found.double().cpu()

    searched = judged = slice(None)
    if greedy_steps and len(pairs) > 1:
        searched, judged = slice(0, None, 2), slice(1, None, 2)
    empty_scores, full_scores = measure(torch.stack([none, ~none]))[:, judged].numpy()
    empty, full = ends_of_gap(empty_scores, full_scores, name_of(metric))
    removed = [none, *random]
    kinds = ["none"] + ["random"] * n_random
    grown = none
    for _ in tqdm(range(min(greedy_steps, len(members))), desc="greedy knock-out", unit="edge", disable=not progress):
        left = members[~grown[members]]
        chosen = left[torch.randperm(len(left), generator=generator)[:greedy_candidates]]
        tried = grown.repeat(len(chosen), 1)
        tried[torch.arange(len(chosen)), chosen] = True
        distance = (measure(kept & ~tried) - measure(~tried))[:, searched].mean(1).abs()
        grown = tried[int(distance.argmax())]
        removed.append(grown)
        kinds.append("greedy")
    sets = torch.stack([*removed, kept])
    of_circuit, of_model = (measure(edges)[:, judged] for edges in (kept & ~sets, ~sets))
    rows = _rows([*kinds, "circuit"], sets, of_circuit, of_model, empty, full, seed, memory_budget)
    return Completeness(rows, name_of(metric), len(members), of_model.shape[1])


def minimality(
    model: HookedModel,
    circuit: Circuit,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    seed: int = 0,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Return what knocking each edge out of the circuit does to it, the least first.

    ``effect`` is (m(C without the edge) - m(C)) / abs(m(M) - m(no edge)), with the 95 % bootstrap interval over
    pairs, ``low`` and ``high``. An edge whose interval holds zero is not shown to be needed.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        circuit: The edges to test.
        pairs: Clean and corrupt inputs.
        metric: One number per pair.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        seed: Of the bootstrap.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: see
            ``ablated_metric``.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: three forwards, and one for each edge of the circuit. No backward.

    Conventions: below zero the circuit needs the edge for the answer under ``logit_difference``. The context is the
        whole circuit, and no search for a better one.

    Source: Wang et al. 2022, arXiv 2211.00593, section 4 (minimality; there of nodes, with the best context K).

    Fails when: two edges of the circuit back each other up, so that neither alone seems needed.

    Raises:
        BadInput: the circuit is of another graph or empty, ablating all edges changes nothing, or the budget does not
            hold one pair.
    """
    import pandas as pd

    kept = _checked(model, circuit)
    members = kept.nonzero().flatten()
    without = kept.repeat(len(members), 1)
    without[torch.arange(len(members)), members] = False
    sets = torch.cat([torch.ones_like(kept)[None], torch.zeros_like(kept)[None], kept[None], without])
    options: dict[str, Any] = {"metric": metric, "ablation": ablation, "neurons": circuit.graph.has_neurons}
    options |= {"memory_budget": memory_budget, "batch_size": batch_size, "progress": progress}
    found = ablated_metric(model, pairs, sets.to(circuit.kept.device), **options)
    scores = found.double().cpu()
    full_scores, empty_scores = scores[:2].numpy()
    empty, full = ends_of_gap(empty_scores, full_scores, name_of(metric))
    effects = (scores[3:] - scores[2]) / abs(full - empty)
    low, high = mean_interval(effects.T, seed=seed, memory_budget=memory_budget)
    frame = pd.DataFrame(
        {
            "source": [circuit.graph.edges[i][0] for i in members.tolist()],
            "reader": [circuit.graph.edges[i][1] for i in members.tolist()],
            "effect": effects.mean(1).tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        }
    )
    return frame.sort_values("effect", key=abs, kind="stable", ignore_index=True)


def _checked(model: HookedModel, circuit: Circuit) -> Bool[Tensor, " edge"]:
    if Graph.from_model(model, neurons=circuit.graph.has_neurons) != circuit.graph:
        raise BadInput("the circuit is of another graph than this model's: attribute this model first")
    if circuit.n_kept == 0:
        raise BadInput("the circuit keeps no edge: expected some, such as circuit.top(20)")
    return circuit.kept.cpu()


def _rows(
    kinds: Sequence[str],
    removed: Bool[Tensor, "set edge"],
    of_circuit: Float[Tensor, "set pair"],
    of_model: Float[Tensor, "set pair"],
    empty: float,
    full: float,
    seed: int,
    memory_budget: int | None,
) -> pd.DataFrame:
    import pandas as pd

    difference = (of_circuit - of_model) / abs(full - empty)
    low, high = mean_interval(difference.T, seed=seed, memory_budget=memory_budget)
    return pd.DataFrame(
        {
            "kind": list(kinds),
            "n_removed": removed.sum(1).tolist(),
            "of_circuit": ((of_circuit.mean(1) - empty) / (full - empty)).tolist(),
            "of_model": ((of_model.mean(1) - empty) / (full - empty)).tolist(),
            "incompleteness": difference.mean(1).abs().tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        }
    )
