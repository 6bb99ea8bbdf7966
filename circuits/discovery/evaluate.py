"""How faithful a circuit is: the metric of the model with every edge outside the circuit ablated, size by size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits, name_of_ablation, replacement, shared_replacement
from circuits.discovery.activations import check_model
from circuits.discovery.circuit import Circuit
from circuits.discovery.curves import Curve, Faithfulness, summarise
from circuits.discovery.graph import Graph
from circuits.discovery.memory import churning, pairs_at_a_time
from circuits.discovery.metrics import Metric, beside, check_pairs, logit_difference, measure, name_of, select
from circuits.discovery.nested import nested_metric
from circuits.discovery.random_circuits import random_sizes
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The circuit sizes of the MIB benchmark: pass them as ``shares`` for its numbers."""
EVERY_SIZE_UP_TO = 2**17
"""Unless told otherwise every size is evaluated where edges times pairs are at most this many: about a minute."""
EVERY_EDGE_UP_TO = 2**12
"""... and where there are at most this many edges: what says which circuit has which edge grows with their square."""
GRID = 24
"""Sizes from one edge to all that are evaluated beyond that."""
EVERY_CONTROL_UP_TO = GRID + 1
"""Sizes of the curve up to which random circuits are evaluated at all of them."""
FEW = 9
"""Sizes at which they are beyond that: the control is not read size by size."""
MOST_HELD = 2**32
"""Bytes that which circuit has which edge may take where no budget is given."""
PRUNED_AT_A_TIME = 32 * 2**20
"""Bytes of the matrices, readers by sources, by which circuits are pruned."""


def ablated_metric(
    model: HookedModel,
    pairs: Pairs,
    keep: Bool[Tensor, "set *pos edge"],
    *,
    metric: Metric = logit_difference,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    neurons: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
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
        memory_budget: Bytes that the computation may take beside the model, the sets and its result included. None:
            about 64 MB at a time (1 GB on a GPU) beside what the vocabulary takes.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Raises:
        BadInput: the pairs do not line up, ``keep`` does not have one column per edge, the metric is not finite, or the
            budget does not hold one pair.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    pairs = beside(model, pairs)
    sites = sites_of(model, neurons=neurons)
    check_model(model, sites, pairs.clean)
    budgets = {"memory_budget": memory_budget, "batch_size": batch_size}
    # The mean is over all pairs; a corrupt activation belongs to its own pair.
    shared = shared_replacement(model, sites, pairs, ablation, **budgets)
    part, replaced = pairs, shared

    def measured(sets: Bool[Tensor, "set *pos edge"]) -> Float[Tensor, "set row"]:
        logits = ablated_logits(model, sites, part.clean, replaced or {}, sets)
        return torch.stack([measure(metric, of_set, part) for of_set in logits])

    def take(rows: slice) -> None:
        nonlocal part, replaced
        part, replaced = select(pairs, rows), shared  # what was the rows' own goes before what is
        replaced = replacement(model, sites, part, ablation) if shared is None else shared

    def rehearse(n: int, n_sets: int = 1) -> object:
        take(slice(n))
        return replaced, measured(keep.new_zeros(n_sets, *keep.shape[1:]))

    out = torch.empty(len(keep), len(pairs), device=pairs.clean.device)
    with torch.no_grad():
        # beside what the sets and the result take, which callers want in double precision
        held = keep.numel() + 12 * out.numel() + sum(t.numel() * t.element_size() for t in (shared or {}).values())
        rows, sets = _batch_sizes(sites, pairs, model.cfg.d_model)
        rows, sets = _within(rehearse, rows, max(1, min(sets, len(keep))), held, **budgets)
        starts = [(i, k) for i in range(0, len(pairs), rows) for k in range(0, len(keep), sets)]
        for i, k in tqdm(starts, desc="ablation", unit="forward", disable=not progress):
            if k == 0:
                take(slice(i, i + rows))
            out[k : k + sets, i : i + rows] = measured(keep[k : k + sets])
    if not bool(torch.isfinite(out).all()):
        bad = int((~torch.isfinite(out)).any(0).sum())
        raise BadInput(f"metric {name_of(metric)} is not finite on {bad} of {len(pairs)} pairs: check the model and it")
    return out


def _within(
    rehearse: Callable[..., object],
    rows: int,
    sets: int,
    held: int,
    *,
    memory_budget: int | None,
    batch_size: int | None,
) -> tuple[int, int]:
    """How many pairs, and how many sets, of those that are best taken at a time fit a budget."""
    if memory_budget is None:
        return pairs_at_a_time(rehearse, rows, memory_budget=None, batch_size=batch_size, estimate=0), sets
    memory_budget = churning(memory_budget)
    fit = pairs_at_a_time(rehearse, rows, memory_budget=memory_budget, kept=held, batch_size=batch_size)
    if fit < min(rows, batch_size or rows):
        return fit, 1
    return fit, pairs_at_a_time(partial(rehearse, fit), sets, memory_budget=memory_budget, kept=held)


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
    positions: bool = False,
    n_random: int = 8,
    seed: int = 0,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Faithfulness:
    """Return how much of the model's metric the top of a circuit recovers, over circuit sizes.

    With C_k the k most important edges, pruned to paths from an embedding to the logits, and m the mean metric of
    the model in which all other edges are ablated,

        f(k) = (m(C_k) - m(no edge)) / (m(all edges) - m(no edge)).

    CPR is the area under f against the share of edges kept, k / E before pruning, where importance is the signed score
    (how much corrupting the edge lowers the metric); it can exceed 1. CMD is the area under abs(1 - f), where
    importance is the score's size; 0 is best. Areas are by trapezoids. All edges of the graph are ranked, whichever the
    circuit keeps.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        circuit: Scores of the edges of this model's graph.
        pairs: Clean and corrupt inputs: others than those that the scores are from, if the curve is to tell more
            than how well the scores fit their own pairs.
        metric: One number per pair.
        ablation: ``corrupt``, ``mean``, ``zero`` or constants: see ``ablated_metric``.
        shares: Shares of the edges to evaluate at, ascending. ``"every"``: every number of edges from none to all.
            None: every number where edges times pairs are at most 131,072, and edges 4,096, else none and 24 sizes in
            geometric progression up to all; ``Faithfulness.sizes`` says which. ``MIB_SHARES``: those of the benchmark.
        positions: Whether edges from a position embedding count like any other. They matter under ``zero`` ablation
            and constants.
        n_random: Circuits of random edges that are evaluated alike, as the control; at least two. Of more than 25 sizes
            they have nine, and areas of the found circuits over those alone are given to compare.
        seed: Of the random circuits and of the bootstrap over pairs.
        memory_budget: Bytes that the computation may take beside the model, its result and which circuit has which
            edge included, but for the bootstrap, which takes 8 KB for each pair and circuit, and 6 MB. None: 512 MB at
            a time beside which circuit has which edge.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards, and one per size and ranking and per random circuit. Under ``corrupt`` and ``mean`` ablation it
        is about a fifth of a forward per size where every size is asked for, since then only what the one edge between
        two sizes reaches is computed. No backward.

    Conventions: as in the benchmark's graph, edges from a position embedding are not counted among the E edges, not
        ranked, and kept in every circuit, and a path starts at the token embedding: a corrupt input has the same
        positions, so that there is nothing to ablate. With ``MIB_SHARES`` CPR and CMD are the benchmark's, with one
        exception: where query heads share keys, the benchmark has an edge for each of the query heads and this graph
        one for all of them. The size on the axis is the nominal one; pruning leaves fewer edges (``n_connected``).
        Random circuits have as many edges as the nominal size says, all of them on paths, so that no circuit is
        compared with a smaller one.

    Source: Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark, arXiv 2504.13151 (circuit
        localization track), and its released code (hannamw/MIB-circuit-track, ``evaluate_area_under_curve``).

    Fails when: corrupting everything hardly changes the metric, so that f divides by little (its interval shows it);
    and where clean and corrupt inputs agree, so that nothing that both share is ever ablated.

    Raises:
        BadInput: the circuit is of another graph, the pairs do not line up, ablating all edges changes nothing, or the
            budget does not hold which circuit has which edge and one pair.
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
    counted = graph.counted(positions=positions)
    n_edges = int(counted.sum())
    x, sizes, said = _sizes(n_edges, len(pairs), shares)
    held = _held(len(sizes), graph.n_edges, memory_budget)
    n_few = len(sizes) if len(sizes) <= EVERY_CONTROL_UP_TO else FEW
    few = np.linspace(0, len(sizes) - 1, n_few).round().astype(int).tolist()
    curves = [Curve("signed", x, sizes), Curve("absolute", x, sizes)]
    curves += [Curve("random", [x[i] for i in few], [sizes[i] for i in few])] * n_random
    random = random_sizes(graph, curves[-1].sizes, n_random, allowed=counted, seed=seed)
    orders = [circuit.ranking(absolute=absolute).cpu() for absolute in (False, True)]
    ranked = [_pruned(graph, order[counted[order]], sizes, memory_budget) for order in orders]
    ends = torch.stack([torch.zeros_like(counted), counted])
    kept = [part | ~counted for part in (ends, *ranked, *random)]
    options: dict[str, Any] = {"ablation": ablation, "neurons": graph.has_neurons, "progress": progress}
    options |= {"memory_budget": None if memory_budget is None else memory_budget - held, "batch_size": batch_size}
    table = _table(model, pairs, kept, metric, nested=sizes == [*range(n_edges + 1)], **options)
    connected = [int(n) for part in (ends, *ranked, *random) for n in part.sum(1)]
    names = {"method": circuit.method, "metric": name_of(metric), "ablation": name_of_ablation(ablation)}
    return summarise(table, curves, connected, n_edges=n_edges, sizes=said, seed=seed, **names)


def _table(
    model: HookedModel,
    pairs: Pairs,
    kept: Sequence[Bool[Tensor, "_ edge"]],
    metric: Metric,
    *,
    nested: bool,
    neurons: bool,
    **options: Any,
) -> Float[np.ndarray, "row pair"]:
    """The metric of every pair in every set; the second and third group may be nested, each set in the next."""
    found: dict[int, Tensor] = {}
    for i in (1, 2) if nested and not neurons else ():
        if i == 2 and torch.equal(kept[1], kept[2]):  # scores without a sign have one ranking
            found[2] = found[1]
            continue
        part = nested_metric(model, pairs, kept[i].flip(0), metric, **options)
        if part is None:  # the model runs whole
            break
        found[i] = part.flip(0)
    rest = torch.cat([part for i, part in enumerate(kept) if i not in found])
    unique, back = torch.unique(rest, dim=0, return_inverse=True)
    values = ablated_metric(model, pairs, unique.to(model.cfg.device), metric=metric, neurons=neurons, **options)
    values = values[back.to(model.cfg.device)]
    others = iter(values.split([len(part) for i, part in enumerate(kept) if i not in found]))
    parts = [found[i] if i in found else next(others) for i in range(len(kept))]
    return torch.cat(parts).double().cpu().numpy()


def _sizes(n_edges: int, n_pairs: int, shares: Sequence[float] | str | None) -> tuple[list[float], list[int], str]:
    """The points of the curve: shares of the edges, numbers of edges, and what to say of them."""
    if isinstance(shares, str) and shares != "every":
        raise BadInput(f"shares = {shares!r}: expected 'every', or ascending numbers from 0 to 1")
    if shares is not None and not isinstance(shares, str):
        x = [float(share) for share in shares]
        if len(x) < 2 or x != sorted(set(x)) or x[0] < 0 or x[-1] > 1:
            raise BadInput(f"shares = {list(shares)}: expected at least two ascending numbers from 0 to 1")
        mib = "the ten sizes of MIB" if tuple(x) == MIB_SHARES else f"{len(x)} given sizes"
        return x, [int(share * n_edges) for share in x], mib
    sizes, said = list(range(n_edges + 1)), "every size"
    if shares is None and (n_edges * n_pairs > EVERY_SIZE_UP_TO or n_edges > EVERY_EDGE_UP_TO):
        sizes = sorted({0, *np.geomspace(1, n_edges, GRID).round().astype(int).tolist()})
        said = f"{len(sizes)} sizes in geometric progression"
    return [size / n_edges for size in sizes], sizes, said


def _held(n_sizes: int, n_edges: int, memory_budget: int | None) -> int:
    """Bytes that it takes to say which circuit has which edge: both rankings, and one of them once more.

    Raises:
        BadInput: there is no room for that.
    """
    held = 3 * n_sizes * n_edges
    if held > (MOST_HELD if memory_budget is None else memory_budget):
        room = f"more than the {MOST_HELD}" if memory_budget is None else f"more than memory_budget = {memory_budget}"
        raise BadInput(
            f"{n_sizes} circuits of {n_edges} edges take {held} bytes to say which has which, {room}: expected fewer "
            f"shares, or None for {GRID + 1} of them"
        )
    return held


def _pruned(
    graph: Graph, order: Int[Tensor, " ranked"], sizes: Sequence[int], memory_budget: int | None
) -> Bool[Tensor, "size edge"]:
    """The circuits of the first edges of a ranking, without those on no path, a few sizes at a time."""
    room = PRUNED_AT_A_TIME if memory_budget is None else min(PRUNED_AT_A_TIME, memory_budget // 8)
    rows = max(1, room // (len(graph.readers) * len(graph.sources) + 8 * graph.n_edges))
    starts = range(0, len(sizes), rows)
    return torch.cat([graph.connected(_prefixes(order, graph.n_edges, sizes[i : i + rows])) for i in starts])


def _prefixes(order: Int[Tensor, " ranked"], n_edges: int, sizes: Sequence[int]) -> Bool[Tensor, "size edge"]:
    rank = torch.full((n_edges,), n_edges)
    rank[order] = torch.arange(len(order))
    return rank[None] < torch.tensor(sizes)[:, None]
