"""Circuits drawn at random: the baseline that a found circuit has to beat."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.discovery.graph import Graph
from circuits.errors import BadInput

ATTEMPTS = 30
"""Paths that are drawn in vain, one after the other, before a random circuit is completed edge by edge."""
RESTARTS = 20
"""Circuits that are begun anew before one is accepted a few edges short."""


@dataclass(frozen=True, eq=False)
class _Ways:
    """What random paths of a graph are drawn from."""

    visible: Sequence[int]
    starts: Sequence[int]
    """The number of each reader's first edge."""
    reads: Mapping[int, Sequence[int]]
    """The readers that each source is computed from; embeddings are from none."""

    def draw(
        self, generator: torch.Generator, longest: int | None = None, skip: frozenset[int] = frozenset()
    ) -> list[int]:
        path: list[int] = []
        reader = len(self.visible) - 1
        while True:
            choices: Sequence[int] = range(self.visible[reader])
            last = longest is not None and len(path) + 1 >= longest
            if last or skip:
                choices = [u for u in choices if u not in skip and not (last and u in self.reads)]
            source = choices[_draw(len(choices), generator)]
            path.append(self.starts[reader] + source)
            if source not in self.reads:
                return path
            reader = self.reads[source][_draw(len(self.reads[source]), generator)]


@lru_cache(maxsize=8)
def _ways(graph: Graph) -> _Ways:
    reads: dict[int, list[int]] = {}
    for reader, fed in enumerate(graph.feeds):
        for source in fed:
            reads.setdefault(source, []).append(reader)
    return _Ways(graph.visible, [0, *itertools.accumulate(graph.visible)], reads)


def random_path(graph: Graph, generator: torch.Generator, *, skip: frozenset[int] = frozenset()) -> list[int]:
    """Return the numbers of the edges on a random path from an embedding to the logits.

    The path is drawn backwards: a source that the logits can see, one of the readers that it is computed from, a
    source that this one can see, and so on, each with equal probability.

    Args:
        graph: The graph.
        generator: Of the draw.
        skip: Numbers of sources that no path goes through: those of which an ablation leaves nothing to be seen.

    Raises:
        BadInput: every embedding is to be skipped.
    """
    _check_skipped(graph, skip)
    return _ways(graph).draw(generator, skip=skip)


def random_circuits(
    graph: Graph,
    n_edges: int,
    n: int,
    *,
    seed: int = 0,
    without: Bool[Tensor, " edge"] | None = None,
    skip: frozenset[int] = frozenset(),
) -> Bool[Tensor, "circuit edge"]:
    """Return circuits of ``n_edges`` edges that are unions of random paths from an embedding to the logits.

    The circuit is C = P_1 | P_2 | ... with abs(C) = ``n_edges``: paths are added as long as one that fits is found, and
    edges between parts that are in the circuit already fill what is left. A circuit stays short of ``n_edges`` only
    where ``without`` leaves no other choice.

    Args:
        graph: The graph.
        n_edges: Edges per circuit.
        n: Number of circuits.
        seed: Of the draw.
        without: Edges that may not be used: a path that has one is drawn again.
        skip: Numbers of sources none of whose edges may be used: a path is drawn from the others at every step.

    Cost: no forward and no backward.

    Conventions: sizes count edges, and every edge is on a path; paths are drawn from the logits backwards, each step
        with equal probability.

    Source: Shi et al. 2024, arXiv 2410.13032, section 4 (the reference distribution of random circuits); the filling
        up to the very size is our own.

    Fails when: every path crosses a bottleneck that the true circuit uses too: random circuits are then as good as it,
        and no baseline.

    Raises:
        BadInput: ``n_edges`` is negative or exceeds the number of edges, or every embedding is to be skipped.
    """
    _check_skipped(graph, skip)
    allowed = torch.tensor([source not in skip for source in graph.ends()[0].tolist()])
    if not 0 <= n_edges <= int(allowed.sum()):
        raise BadInput(f"n_edges = {n_edges}: expected 0 to {int(allowed.sum())}")
    generator = torch.Generator().manual_seed(seed)
    allowed = allowed if without is None else allowed & ~without.cpu()
    none = torch.zeros(graph.n_edges, dtype=torch.bool)
    rows = [_grown(graph, none, n_edges, allowed, generator, skip) for _ in range(n)]
    return torch.stack(rows) if rows else none[None][:0]


def random_sizes(
    graph: Graph, sizes: Sequence[int], n: int, *, allowed: Bool[Tensor, " edge"], seed: int = 0
) -> Bool[Tensor, "draw size edge"]:
    """Return random circuits of several sizes, each of that very number of edges, every one of which is on a path.

    All edges are ranked at random, and of the longest prefix whose connected part fits, that part is taken; random
    paths and edges between its parts make up what it lacks. So the circuit differs from a found one's connected part
    in its ranking alone.

    Args:
        graph: The graph.
        sizes: Edges of the circuits, at most as many as are allowed.
        n: Circuits of each size.
        allowed: Edges that may be used.
        seed: Of the draw.

    Source: Mueller et al. 2025, MIB, arXiv 2504.13151 (random scores as the baseline; pruned there, and so smaller).
    """
    allowed = allowed.cpu()
    generator = torch.Generator().manual_seed(seed)
    numbers = allowed.nonzero().flatten()
    rank = torch.full((n, 1, graph.n_edges), graph.n_edges)
    for row in rank[:, 0]:
        row[numbers[torch.randperm(len(numbers), generator=generator)]] = torch.arange(len(numbers))
    wanted = torch.tensor(list(sizes)).expand(n, -1)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, len(numbers))
    while bool((low < high).any()):  # the longest prefix whose connected part is no larger than wanted
        middle = (low + high + 1) // 2
        fits = graph.connected(rank < middle[..., None]).sum(-1) <= wanted
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    kept = graph.connected(rank < low[..., None])
    for row, size in itertools.product(kept, range(len(sizes))):
        row[size] = _grown(graph, row[size], sizes[size], allowed, generator)
    return kept


def _grown(
    graph: Graph,
    begun: Bool[Tensor, " edge"],
    n_edges: int,
    allowed: Bool[Tensor, " edge"],
    generator: torch.Generator,
    skip: frozenset[int] = frozenset(),
) -> Bool[Tensor, " edge"]:
    """A circuit of ``n_edges`` edges that has those begun with, by random paths and then by single edges."""
    if n_edges >= int(allowed.sum()):
        return graph.connected(allowed)
    best = begun
    for attempt in range(RESTARTS):
        kept = begun.clone() if attempt == 0 else torch.zeros_like(begun)
        _add_paths(graph, kept, n_edges, allowed, generator, skip)
        _fill(graph, kept, n_edges, allowed, generator, skip)
        if int(kept.sum()) == n_edges:
            return kept
        best = max(best, kept, key=lambda row: int(row.sum()))
    return best


def _add_paths(
    graph: Graph,
    kept: Bool[Tensor, " edge"],
    n_edges: int,
    allowed: Bool[Tensor, " edge"],
    generator: torch.Generator,
    skip: frozenset[int],
    longest: int | None = None,
) -> None:
    """Add random paths to ``kept`` until none of those drawn fits."""
    ways = _ways(graph)
    chosen, usable = set(kept.nonzero().flatten().tolist()), allowed.tolist()
    failures = 0
    while failures < ATTEMPTS and len(chosen) < n_edges:
        path = ways.draw(generator, longest, skip)
        longer = chosen.union(path)
        if not len(chosen) < len(longer) <= n_edges or not all(usable[edge] for edge in path):
            failures += 1
            continue
        chosen, failures = longer, 0
    kept[list(chosen)] = True


def _fill(
    graph: Graph,
    kept: Bool[Tensor, " edge"],
    n_edges: int,
    allowed: Bool[Tensor, " edge"],
    generator: torch.Generator,
    skip: frozenset[int],
) -> None:
    """Add edges between parts of the circuit to ``kept``, and short paths where those do not suffice."""
    while (missing := n_edges - int(kept.sum())) > 0:
        between = _between(graph, kept, allowed)
        chosen = between[torch.randperm(len(between), generator=generator)[:missing]]
        kept[chosen] = True
        if len(chosen) == missing:
            return
        before = int(kept.sum())
        _add_paths(graph, kept, min(n_edges, before + 3), allowed, generator, skip, longest=n_edges - before)
        if int(kept.sum()) == before:
            return


def _between(graph: Graph, kept: Bool[Tensor, " edge"], allowed: Bool[Tensor, " edge"]) -> Int[Tensor, " _"]:
    """The edges that are on a path as soon as they are added: from a part of the circuit to another."""
    source, reader = graph.ends()
    reads = _ways(graph).reads
    used = torch.zeros(len(graph.sources), dtype=torch.bool)
    used[source[kept]] = True
    reached = used.clone()
    reached[[u for u in range(len(graph.sources)) if u not in reads]] = True
    useful = torch.tensor([not fed or bool(used[list(fed)].any()) for fed in graph.feeds])
    return (allowed & ~kept & reached[source] & useful[reader]).nonzero().flatten()


def _check_skipped(graph: Graph, skip: frozenset[int]) -> None:
    if {u for u in range(len(graph.sources)) if u not in _ways(graph).reads} <= skip:
        raise BadInput(f"skip = {sorted(skip)}: no path is left; expected at least one embedding that it does not hold")


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))
