"""How faithful a circuit is: the metric of the model with every edge outside the circuit ablated, size by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.activations import check_model
from circuits.discovery.circuit import Circuit
from circuits.discovery.curves import Curve, Faithfulness, summarise
from circuits.discovery.graph import Graph
from circuits.discovery.metrics import Metric, check_pairs, logit_difference, measure, name_of, select
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The circuit sizes of the MIB benchmark: pass them as ``shares`` for its numbers."""
ALL_SIZES_UP_TO = 256
"""Graphs of up to this many edges are evaluated at every size unless told otherwise."""


def ablated_metric(
    model: HookedModel,
    pairs: Pairs,
    keep: Bool[Tensor, "set *pos edge"],
    *,
    metric: Metric = logit_difference,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    neurons: bool = False,
    progress: bool = False,
) -> Float[Tensor, "set pair"]:
    """Return the metric of every pair's clean input in the model that keeps only some edges, for each set of edges.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        keep: Which edges of ``Graph.from_model(model)`` keep their source's output of this very run; with a dimension
            for token positions in between, at which of them.
        metric: One number per pair.
        ablation: What the other edges carry: ``corrupt``: their source's output on the corrupt input; ``mean``: its
            mean over the clean inputs, position by position; ``zero``: nothing; or constants, by hook name, as from
            ``optimal_constants``.
        neurons: Whether the edges are those of the graph whose sources are neurons.
        progress: Whether to show a bar.

    Raises:
        BadInput: the pairs do not line up, ``keep`` does not have one column per edge, or the metric is not finite.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    pairs = pairs.to(model.cfg.device)
    sites = sites_of(model, neurons=neurons)
    check_model(model, sites, pairs.clean)
    rows, sets = _batch_sizes(sites, pairs, model.cfg.d_model)
    # The mean is over all pairs; a corrupt activation belongs to its own pair.
    replaced = {} if ablation == "corrupt" else replacement(model, sites, pairs, ablation, batch_size=rows)
    out = torch.empty(len(keep), len(pairs), device=pairs.clean.device)
    starts = [(i, k) for i in range(0, len(pairs), rows) for k in range(0, len(keep), sets)]
    with torch.no_grad():
        for i, k in tqdm(starts, desc="ablation", unit="forward", disable=not progress):
            part = select(pairs, slice(i, i + rows))
            if k == 0 and ablation == "corrupt":
                replaced = replacement(model, sites, part, ablation)
            logits = ablated_logits(model, sites, part.clean, replaced, keep[k : k + sets])
            for j, of_set in enumerate(logits):
                out[k + j, i : i + rows] = measure(metric, of_set, part)
    if not bool(torch.isfinite(out).all()):
        bad = int((~torch.isfinite(out)).any(0).sum())
        raise BadInput(f"metric {name_of(metric)} is not finite on {bad} of {len(pairs)} pairs: check the model and it")
    return out


def _batch_sizes(sites: Sites, pairs: Pairs, d_model: int) -> tuple[int, int]:
    """How many pairs, and how many sets of edges, to take at a time.

    On a CPU temporaries beyond the cache, and beyond what the allocator keeps, cost more than more calls do.
    """
    heads = max(max(layer.W_O.shape[0], layer.n_mlp_sources) for layer in sites.layers)
    per_pair = pairs.clean.shape[1] * d_model * 4 * heads
    small, large = (8 * 2**20, 64 * 2**20) if pairs.clean.device.type == "cpu" else (2**28, 2**30)
    rows = min(len(pairs), max(1, large // per_pair))
    return rows, max(1, small // (per_pair * rows))


def faithfulness(
    model: HookedModel,
    circuit: Circuit,
    pairs: Pairs,
    *,
    metric: Metric = logit_difference,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    shares: Sequence[float] | str | None = None,
    n_random: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Faithfulness:
    """Return how much of the model's metric the top of a circuit recovers, over circuit sizes.

    With C_k the k most important edges, pruned to paths from an embedding to the logits, and m the mean metric of
    the model in which all other edges are ablated,

        f(k) = (m(C_k) - m(no edge)) / (m(all edges) - m(no edge)).

    CPR is the area under f against the share of edges kept, where importance is the signed score (how much
    corrupting the edge lowers the metric); it can exceed 1. CMD is the area under abs(1 - f), where importance is the
    score's size; 0 is best. Areas are by trapezoids. All edges of the graph are ranked, whichever the circuit keeps.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        circuit: Scores of the edges of this model's graph.
        pairs: Clean and corrupt inputs: others than those that the scores are from, if the curve is to tell more
            than how well the scores fit their own pairs.
        metric: One number per pair.
        ablation: ``corrupt`` or ``mean``: see ``ablated_metric``.
        shares: Shares of the edges to evaluate at, ascending. ``"every"``: every number of edges from none to all.
            None: every number in a graph of up to 256 edges, a geometric grid in larger ones. ``MIB_SHARES``: those
            of the benchmark.
        n_random: Circuits of random edges that are evaluated alike, as the control; at least two.
        seed: Of the random circuits and of the bootstrap over pairs.
        progress: Whether to show a bar.

    Source: Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark, arXiv 2504.13151 (circuit
        localization track), and its released evaluation code.

    Fails when: corrupting everything hardly changes the metric, so that f divides by little (its interval shows it);
    and where clean and corrupt inputs agree, so that nothing that both share is ever ablated.

    Raises:
        BadInput: the circuit is of another graph, the pairs do not line up, or ablating all edges changes nothing.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    graph = Graph.from_model(model, neurons=circuit.graph.has_neurons)
    if graph != circuit.graph:
        raise BadInput(
            f"the circuit has {circuit.graph.n_edges} edges of another graph than this model's {graph.n_edges}: "
            f"attribute this model first"
        )
    if n_random < 2:
        raise BadInput(f"n_random = {n_random}: expected at least 2, for the control to have a spread")
    curves, keep = _plan(circuit, shares, n_random, seed)
    unique, back = torch.unique(keep, dim=0, return_inverse=True)
    values = ablated_metric(
        model, pairs, unique, metric=metric, ablation=ablation, neurons=graph.has_neurons, progress=progress
    )
    table = values[back.to(values.device)].double().cpu().numpy()
    names = {
        "method": circuit.method,
        "metric": name_of(metric),
        "ablation": ablation if isinstance(ablation, str) else "constants",
    }
    return summarise(table, curves, keep.sum(1).tolist(), n_edges=graph.n_edges, seed=seed, **names)


def _plan(
    circuit: Circuit, shares: Sequence[float] | str | None, n_random: int, seed: int
) -> tuple[list[Curve], Bool[Tensor, "set edge"]]:
    """Lay out the curves, and which edges are kept: none, all, then the connected ones of each curve's circuits."""
    n_edges = circuit.graph.n_edges
    x, sizes = _sizes(n_edges, shares)
    # The control answers one question and is not read size by size: a few sizes do.
    few = sorted(set(np.linspace(0, len(sizes) - 1, min(len(sizes), 9)).round().astype(int).tolist()))
    curves = [Curve("signed", x, sizes), Curve("absolute", x, sizes)]
    curves += [Curve("random", [x[i] for i in few], [sizes[i] for i in few])] * n_random
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(n_edges, generator=generator).to(circuit.scores.device) for _ in range(n_random)]
    orders = [circuit.ranking(absolute=False), circuit.ranking(), *shuffled]
    kept = [_prefixes(order, curve.sizes) for order, curve in zip(orders, curves, strict=True)]
    return curves, circuit.graph.connected(torch.cat([_prefixes(orders[0], [0, n_edges]), *kept]))


def _sizes(n_edges: int, shares: Sequence[float] | str | None) -> tuple[list[float], list[int]]:
    """The points of the curve: shares of the edges, and numbers of edges."""
    if isinstance(shares, str) and shares != "every":
        raise BadInput(f"shares = {shares!r}: expected 'every', or ascending numbers from 0 to 1")
    if shares is not None and not isinstance(shares, str):
        x = [float(share) for share in shares]
        if len(x) < 2 or x != sorted(set(x)) or x[0] < 0 or x[-1] > 1:
            raise BadInput(f"shares = {list(shares)}: expected at least two ascending numbers from 0 to 1")
        return x, [int(share * n_edges) for share in x]
    sizes = list(range(n_edges + 1))
    if n_edges > ALL_SIZES_UP_TO and shares is None:
        sizes = sorted({0, *np.geomspace(1, n_edges, 24).round().astype(int).tolist()})
    return [size / n_edges for size in sizes], sizes


def _prefixes(order: Int[Tensor, " edge"], sizes: Sequence[int]) -> Bool[Tensor, "size edge"]:
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank[None] < torch.tensor(sizes, device=order.device)[:, None]
