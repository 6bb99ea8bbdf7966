"""Circuits drawn at random: the baseline that a found circuit has to beat."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.discovery.graph import Graph
from circuits.errors import BadInput

ATTEMPTS = 100
"""Paths that are drawn in vain before a random circuit is accepted as it is."""


def random_path(graph: Graph, generator: torch.Generator) -> list[int]:
    """Return the numbers of the edges on a random path from an embedding to the logits.

    The path is drawn backwards: a source that the logits can see, one of the readers that it is computed from, a
    source that this one can see, and so on, each with equal probability.
    """
    reads: dict[int, list[int]] = {}
    for reader, fed in enumerate(graph.feeds):
        for source in fed:
            reads.setdefault(source, []).append(reader)
    starts = torch.tensor(graph.visible).cumsum(0) - torch.tensor(graph.visible)
    path: list[int] = []
    reader = len(graph.readers) - 1
    while True:
        source = _draw(graph.visible[reader], generator)
        path.append(int(starts[reader]) + source)
        if source not in reads:
            return path
        reader = reads[source][_draw(len(reads[source]), generator)]


def random_circuits(
    graph: Graph, n_edges: int, n: int, *, seed: int = 0, without: Bool[Tensor, " edge"] | None = None
) -> Bool[Tensor, "circuit edge"]:
    """Return circuits that are unions of random paths from an embedding to the logits.

    Paths are added as long as they fit; a circuit may stay a few edges short of ``n_edges`` where none fits.

    Args:
        graph: The graph.
        n_edges: Edges per circuit.
        n: Number of circuits.
        seed: Of the draw.
        without: Edges that may not be used.

    Source: Shi et al. 2024, arXiv 2410.13032, section 4 (the reference distribution of random circuits).

    Raises:
        BadInput: ``n_edges`` is negative or exceeds the number of edges.
    """
    if not 0 <= n_edges <= graph.n_edges:
        raise BadInput(f"n_edges = {n_edges}: expected 0 to {graph.n_edges}")
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(n, graph.n_edges, dtype=torch.bool)
    for row in kept:
        failures = 0
        while failures < ATTEMPTS and int(row.sum()) < n_edges:
            path = torch.tensor(random_path(graph, generator))
            new = path[~row[path]]
            fits = len(new) > 0 and int(row.sum()) + len(new) <= n_edges
            if not fits or (without is not None and bool(without[path].any())):
                failures += 1
                continue
            row[path] = True
    return kept


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))
