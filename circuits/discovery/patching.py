"""The engine under exact patching: what changing one edge or one source does to the logits, without a whole forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import Store
from circuits.discovery.blocks import ALL, Blocks

Measure = Callable[[Float[Tensor, "row d_vocab_out"]], Float[Tensor, "set pair"]]
Advance = Callable[[int], object]


def _silent(n: int) -> None:
    """Where no progress is shown."""


@dataclass(frozen=True, eq=False)
class Patching:
    """A run of some pairs, and functions that say what a change to one part of it does to the metric of each pair.

    What lies before the change is never computed again, and what the change cannot reach is not either: of the last
    block, only the position at which the metric is taken.
    """

    blocks: Blocks
    values: Store
    """The run's activations at every hook of the sites."""
    changes: Float[Tensor, "source batch pos d_model"]
    """What each source would write, if replaced, minus what it writes."""
    position: int
    measure: Measure
    """From the logits of several sets of these pairs to each set's metric of each pair."""
    chunk: int
    """How many sets to take at a time where all positions matter."""
    chunk_of_one: int
    """How many sets to take at a time where only the answer's position does."""

    @cached_property
    def live(self) -> list[int]:
        """The sources whose change is not zero everywhere; those of no change have no effect."""
        return self.changes.flatten(1).any(1).nonzero().flatten().tolist()

    @cached_property
    def base(self) -> Float[Tensor, " pair"]:
        """The metric of the run as it is."""
        return self.measure(self.blocks.logits(self.values[self.blocks.sites.final][:, self._one])[:, 0])[0]

    @property
    def _one(self) -> slice:
        return slice(self.position, self.position + 1)

    def at(self, i: int) -> slice:
        """The positions at which what block ``i`` writes can matter."""
        return self._one if i + 1 == len(self.blocks.sites.layers) else ALL

    def stream(self, i: int) -> Float[Tensor, "batch pos d_model"]:
        """The run's stream before block ``i``, or after the last."""
        layers = self.blocks.sites.layers
        return self.values[self.blocks.sites.final if i == len(layers) else layers[i].resid]

    def _sets(self, i: int) -> int:
        """How many sets of changes to what block ``i`` writes to take at a time."""
        return self.chunk if self.at(i) == ALL else self.chunk_of_one

    def _changes(self, sources: list[int], at: slice = ALL) -> Float[Tensor, "set batch _ d_model"]:
        """What some sources change, at some positions; without a copy where they stand beside each other."""
        changes, first = self.changes[:, :, at], sources[0]
        if sources == list(range(first, first + len(sources))):
            return changes[first : first + len(sources)]
        return changes[sources]

    def edge_effects(self, advance: Advance = _silent) -> Float[Tensor, "edge pair"]:
        """Return what changing each edge alone does to each pair's metric, in the order of the graph's edges."""
        graph = self.blocks.sites.graph
        out = self.base.new_zeros(graph.n_edges, len(self.base))
        if not self.live:
            return out
        table = graph.dense(torch.arange(graph.n_edges, device=out.device)).tolist()
        reader = 0
        for i, layer in enumerate(self.blocks.sites.layers):
            counts = [W.shape[0] for W in layer.W]
            for sources in self._groups(graph.visible[reader], self._sources_at_a_time(i)):
                first = reader
                for count, effects in zip(counts, self._into_heads(i, sources), strict=True):
                    sets = [table[first + h][u] for u in sources for h in range(count)]
                    out[sets] = effects
                    first += count
                    advance(len(sets))
            reader += sum(counts)
            if layer.mlp_in is not None:
                for sources in self._groups(graph.visible[reader], self._sets(i)):
                    change = self.through_mlp(i, self._changes(sources, self.at(i)))
                    out[[table[reader][u] for u in sources]] = self.after_block(i, change)
                    advance(len(sources))
                reader += 1
        last = len(self.blocks.sites.layers) - 1
        for sources in self._groups(len(self.changes), self._sets(last)):
            out[[table[reader][u] for u in sources]] = self.after_block(last, self._changes(sources, self.at(last)))
            advance(len(sources))
        return out

    def _sources_at_a_time(self, i: int) -> int:
        heads = len(self.blocks.sites.layers[i].W_O)
        # a stream and its norm take about a quarter of what a set takes on its way through a whole block
        most = self.chunk // heads if self.at(i) == ALL else min(self.chunk_of_one // heads, 4 * self.chunk)
        return max(1, most)

    def _into_heads(self, i: int, sources: list[int]) -> Iterator[Float[Tensor, "set pair"]]:
        """Yield the effects of changing the edges from some sources into the queries, keys, values of block ``i``."""
        x = self.blocks.norm(i, (self.stream(i) + self._changes(sources)).flatten(0, 1))
        for which in range(3):
            yield self.after_attention(i, self.through_heads(i, which, x).flatten(0, 1))

    def rehearse(self) -> list[Float[Tensor, "set pair"]]:
        """Return some of the effects: those of which the most are taken at a time, to see what memory that takes."""
        layers, n_sources = self.blocks.sites.layers, len(self.changes)
        # Behind the block before the last every source is as good as seen, and there is still a whole block to come.
        i = max(0, len(layers) - 2)
        found = []
        for j in range(i, len(layers)):
            sources = list(range(min(n_sources, self._sources_at_a_time(j))))
            found += [effects.clone() for effects in self._into_heads(j, sources)]
        many = list(range(min(n_sources, self.chunk)))
        if layers[i].mlp_in is not None:
            found.append(self.after_block(i, self.through_mlp(i, self._changes(many, self.at(i)))))
        last = len(layers) - 1
        some = list(range(min(n_sources, self._sets(last))))
        logits = self.after_block(last, self._changes(some, self.at(last)))
        return [*found, self.from_block(0, self.stream(0) + self.changes[many]), logits]

    def source_effects(self, advance: Advance = _silent) -> Float[Tensor, "source pair"]:
        """Return what changing all that each source alone writes does to each pair's metric."""
        out = self.base.new_zeros(len(self.changes), len(self.base))
        if not self.live:
            return out
        u = len(self.changes) - sum(len(y.W_O) + (y.mlp_out is not None) for y in self.blocks.sites.layers)
        for sources in self._groups(u, self.chunk):
            out[sources] = self.from_block(0, self.stream(0) + self.changes[sources])
            advance(len(sources))
        for i, layer in enumerate(self.blocks.sites.layers):
            heads = [s for s in self.live if u <= s < u + len(layer.W_O)]
            if heads:
                out[heads] = self.after_attention(i, self.changes[heads][:, :, self.at(i)])
            u += len(layer.W_O)
            if layer.mlp_out is not None and u in self.live:
                out[[u]] = self.after_block(i, self.changes[[u]][:, :, self.at(i)])
            u += layer.mlp_out is not None
            advance(len(heads) + 1)
        return out

    def _groups(self, visible: int, size: int) -> Iterator[list[int]]:
        live = [u for u in self.live if u < visible]
        for i in range(0, len(live), size):
            yield live[i : i + size]

    def through_heads(
        self, i: int, which: int, x: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "set reader batch _ d_model"]:
        """Return what each q (0), k (1) or v (2) of block ``i`` changes in the stream if it alone reads another one.

        The other two of a head, and all other heads, are those of the run. ``x`` is the norm of one or more sets of
        the pairs' streams.
        """
        blocks, layer, at = self.blocks, self.blocks.sites.layers[i], self.at(i)
        z = self.values[layer.z].transpose(1, 2)[:, :, at]
        n = len(x) // len(z)
        read = self._read_by_one if blocks.folds(i, at, x.shape[1]) else self._read
        return self._written(i, read(i, which, x, n).unflatten(0, (n, -1)) - z, layer.W[which].shape[0])

    def _read(
        self, i: int, which: int, x: Float[Tensor, "row pos d_model"], n: int
    ) -> Float[Tensor, "row head _ d_head"]:
        """Return what the heads of block ``i`` read with q (0), k (1) or v (2) of ``x``, and the rest of the run."""
        blocks, at = self.blocks, self.at(i)
        q, k, v = self._qkv[i]

        def repeated(t: Tensor) -> Tensor:
            return t.expand(n, *t.shape).flatten(0, 1)

        if which == 0:
            (new,) = blocks.project(i, x[:, at], (0,), at)
            return blocks.patterns[i].read(new, repeated(k), repeated(v), at)
        (new,) = blocks.project(i, x, (which,))
        new = blocks.share(i, new)
        now = (new, repeated(v)) if which == 1 else (repeated(k), new)
        return blocks.patterns[i].read(repeated(q[:, :, at]), *now, at)

    def _read_by_one(
        self, i: int, which: int, x: Float[Tensor, "row pos d_model"], n: int
    ) -> Float[Tensor, "row head 1 d_head"]:
        """Return the same where only one query matters: neither keys nor values of ``x`` are computed."""
        blocks, at, batch = self.blocks, self.at(i), len(x) // n
        _, k, v = self._qkv[i]
        directions, weights = self._of_one
        if which == 2:
            return blocks.read_by_one(i, weights.repeat(n, 1, 1), x)
        if which == 0:
            changed = blocks.project(i, x[:, at], (0,), at)[0][:, :, 0]
        else:
            changed = blocks.pattern_of_one(i, directions.repeat(n, 1, 1), x, at)
        # the sets stand as queries beside each other, so that a pair's keys and values are not repeated
        beside = changed.unflatten(0, (n, batch)).permute(1, 2, 0, 3)
        read = blocks.patterns[i].read(beside, k, v, at) if which == 0 else beside @ v
        return read.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]

    @cached_property
    def _of_one(self) -> tuple[Float[Tensor, "batch head d_model"], Float[Tensor, "batch head pos"]]:
        """Of the last block's query: its directions in the normalised stream, and its attention pattern."""
        i = len(self.blocks.sites.layers) - 1
        at, y = self.at(i), self.blocks.norm(i, self.stream(i))
        q, _, _ = self._qkv[i]
        directions = self.blocks.key_directions(i, q[:, :, at])
        return directions, self.blocks.pattern_of_one(i, directions, y, at)

    @cached_property
    def _qkv(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The run's queries and keys, turned, and values, once per query head."""
        out = []
        for i, layer in enumerate(self.blocks.sites.layers):
            q, k, v = (self.values[name].transpose(1, 2) for name in layer.qkv)
            turn = self.blocks.patterns[i].turn
            out.append((turn(q), self.blocks.share(i, turn(k)), self.blocks.share(i, v)))
        return out

    def _written(
        self, i: int, z: Float[Tensor, "set batch head pos d_head"], readers: int
    ) -> Float[Tensor, "set reader batch pos d_model"]:
        """What changes of z change in the stream, by reader: all query heads of a key or value head together."""
        W_O = self.blocks.sites.layers[i].W_O
        n, batch, heads, pos, d_head = z.shape
        group = heads // readers
        rows = z.unflatten(2, (readers, group)).permute(2, 0, 1, 4, 3, 5)
        out = rows.reshape(readers, n * batch * pos, group * d_head) @ W_O.reshape(readers, group * d_head, -1)
        return out.view(readers, n, batch, pos, -1).transpose(0, 1)

    def through_mlp(
        self, i: int, change: Float[Tensor, "set batch pos d_model"]
    ) -> Float[Tensor, "set batch _ d_model"]:
        """Return what the MLP of block ``i`` changes in the stream if what it reads (where it matters) changes."""
        layer, at = self.blocks.sites.layers[i], self.at(i)
        assert layer.mlp_stream is not None and layer.mlp_out is not None
        x = self.values[layer.mlp_stream][:, at] + change
        return self.blocks.mlp(i, x.flatten(0, 1)).view_as(x) - self.values[layer.mlp_out][:, at]

    def after_attention(self, i: int, change: Float[Tensor, "set batch pos d_model"]) -> Float[Tensor, "set pair"]:
        """Return the effects of changes to what the heads of block ``i`` write (at the positions that matter)."""
        layer, at = self.blocks.sites.layers[i], self.at(i)
        if layer.mlp_in is None or self.blocks.parallel:
            return self.after_block(i, change)
        parts = []
        for part in change.split(self._sets(i)):
            middle = (self.values[layer.mlp_in][:, at] + part).flatten(0, 1)
            parts.append(self._finish(i + 1, middle + self.blocks.mlp(i, middle)))
        return torch.cat(parts) if parts else self.base[None][:0]

    def after_block(self, i: int, change: Float[Tensor, "set batch pos d_model"]) -> Float[Tensor, "set pair"]:
        """Return the effects of changes to the stream after block ``i`` (at the positions that matter)."""
        return self.from_block(i + 1, self.stream(i + 1)[:, self.at(i)] + change)

    def from_block(self, i: int, x: Float[Tensor, "set batch pos d_model"]) -> Float[Tensor, "set pair"]:
        """Return the effects of other streams before block ``i``."""
        # what the last block writes is there at one position alone
        size = self._sets(i - 1) if i == len(self.blocks.sites.layers) else self.chunk
        parts = [self._finish(i, part.flatten(0, 1)) for part in x.split(size)]
        return torch.cat(parts) if parts else self.base[None][:0]

    def _finish(self, i: int, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "set pair"]:
        return self.measure(self.blocks.finish(i, x, self.position)) - self.base
