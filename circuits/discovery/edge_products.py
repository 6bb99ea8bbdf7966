"""First-order scores of edges: the product of each source's difference with the gradient at each reader's input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import ALL, Store, source_differences
from circuits.discovery.reader_gradients import ReaderGradients
from circuits.discovery.sites import Sites

Product = Callable[[Store, Store], Tensor]
"""From the activations and gradients of a run to one number per pair and edge (or source), or zero."""


RUNS = 5
"""How many runs' gradients are added up before they are multiplied: what is kept of each takes memory."""


def edge_product(sites: Sites, corrupt: Store, clean: Store, n_runs: int = 1) -> Product:
    """Prepare the product of every visible difference with every reader's gradient, in the order of the edges.

    The differences are the same for all runs, so that gradients are added up over runs first, as far as they are
    linear: a call gives the sum of what the calls since the last one were given, every ``RUNS`` calls and at the last
    of ``n_runs``, and zero in between.

    Left out is what is zero: the difference of a position embedding, which is the same in both runs, and, where all
    pairs have their answer at one position, what the last block's queries and MLP and the logits read at the others.
    """
    graph, differences = sites.graph, _Differences(sites, corrupt, clean)
    gathered, called = ReaderGradients(sites), 0

    def product(values: Store, grads: Store) -> Float[Tensor, "*batch_edge"]:
        nonlocal gathered, called
        gathered.add(values, grads)
        called += 1
        if called % RUNS and called < n_runs:
            return torch.zeros((), device=clean[sites.embed].device)
        found, gathered = gathered, ReaderGradients(sites)
        at, out = found.at, None
        reader = edge = 0
        for gradient, here in found.by_layer():
            visible = graph.visible[reader]
            seen = differences.seen(visible, here, whole=at == ALL)
            rows = gradient.to(seen.dtype).transpose(0, 1).flatten(2)
            # in this order MKL takes three quarters of the time
            part = torch.bmm(seen, rows.transpose(1, 2)).transpose(1, 2)
            out = part.new_zeros(len(part), graph.n_edges) if out is None else out
            n = rows.shape[1] * visible
            differences.put(part, out[:, edge : edge + n].unflatten(1, (-1, visible)))
            reader, edge = reader + rows.shape[1], edge + n
        assert out is not None  # there are logits
        return out

    return product


class _Differences:
    """What sources write on the corrupt run minus what they write on the clean one, as far as it is looked at."""

    def __init__(self, sites: Sites, corrupt: Store, clean: Store) -> None:
        self.sites, self.corrupt, self.clean = sites, corrupt, clean
        n = len(sites.graph.sources)
        late = next(writer.first for writer in sites.writers if writer.parts is sites.layers[-1])
        self.still = sites.pos_embed is not None and not bool((corrupt[sites.pos_embed] - clean[sites.pos_embed]).any())
        """Whether the position embedding, source 1, is the same in both."""
        self.early, self.late = set(range(late)) - ({1} if self.still else set()), range(late, n)
        self.here: dict[int, Tensor] = {}

    @cached_property
    def of_early(self) -> Float[Tensor, "source batch pos d_model"]:
        """Those of the sources before the last block."""
        return source_differences(self.sites, self.corrupt, self.clean, sources=self.early)

    @cached_property
    def of_all(self) -> Float[Tensor, "source batch pos d_model"]:
        """Those of all sources."""
        return source_differences(self.sites, self.corrupt, self.clean, sources=self.early | set(self.late))

    def _partly(self, at: slice) -> Float[Tensor, "source batch _ d_model"]:
        """The early sources at all positions, or all of them at one."""
        if at == ALL:
            return self.of_early
        if at.start not in self.here:
            late = source_differences(self.sites, self.corrupt, self.clean, sources=self.late, at=at)
            self.here = {at.start: torch.cat([self.of_early[:, :, at], late])}
        return self.here[at.start]

    def seen(self, visible: int, here: slice, *, whole: bool) -> Float[Tensor, "batch source flat"]:
        """Return what readers of the first ``visible`` sources see of them at the positions ``here``."""
        found = self.of_all if whole else self._partly(here)
        return found[: visible - self.still].transpose(0, 1).flatten(2)

    def put(self, found: Float[Tensor, "batch reader seen"], out: Float[Tensor, "batch reader visible"]) -> None:
        """Write the products with what was seen to where those with all visible sources belong."""
        if not self.still:
            out[:] = found
            return
        out[..., 0] = found[..., 0]
        out[..., 2:] = found[..., 1:]


def product_by_position(sites: Sites, corrupt: Store, clean: Store) -> Product:
    """Prepare the same product position by position: of every pair first all edges at position 0, then at 1, ..."""
    differences = source_differences(sites, corrupt, clean)
    by_place = differences.permute(1, 2, 0, 3).flatten(0, 1)
    visible = sites.graph.visible

    def product(values: Store, grads: Store) -> Float[Tensor, "batch edge"]:
        blocks: list[Tensor] = []
        reader = 0
        gathered = ReaderGradients(sites)
        gathered.add(values, grads)
        for gradient, _ in gathered.by_layer(everywhere=True):
            rows = gradient.to(differences.dtype).permute(1, 2, 0, 3).flatten(0, 1)
            blocks.append(torch.bmm(rows, by_place[:, : visible[reader]].transpose(1, 2)).flatten(1))
            reader += rows.shape[1]
        return torch.cat(blocks, 1).unflatten(0, (differences.shape[1], -1)).flatten(1)

    return product
