"""A model with some edges removed, of which only what one more removal touches is computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.ablate import ablated_logits
from circuits.discovery.batches import Setting, whole_replaced
from circuits.discovery.metrics import measure
from circuits.discovery.patching import Patching

Kept = Bool[np.ndarray, "reader source"]


@dataclass
class _Changed:
    """What the proposed removals change, each with one entry per set."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    projected: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    z: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    metric: Tensor | None = None


class PartialRun:
    """Keeps what every reader reads and every part computes, and renews what lies behind a change."""

    metric: Float[Tensor, " pair"]
    live: frozenset[int]
    """The sources that are not replaced by what they write anyway."""
    scale: float
    """The largest logit of the run as it is."""

    def __init__(self, patching: Patching) -> None:
        self.patching, self.graph = patching, patching.blocks.sites.graph
        self.blocks, self.layers = patching.blocks, patching.blocks.sites.layers
        self.inputs: list[Tensor] = []
        self.projected: dict[tuple[int, int, int], Tensor] = {}
        self.z: dict[tuple[int, int], Tensor] = {}
        self.mlp: dict[int, Tensor] = {}
        self.spans: list[slice] = []
        values = patching.values
        for i, layer in enumerate(self.layers):
            at = patching.at(i)
            for which, name in enumerate(layer.qkv):
                span = at if which == 0 else slice(None)
                heads = values[name].transpose(1, 2)
                heads = heads if which == 2 else self.blocks.patterns[i].turn(heads)
                for h in range(heads.shape[1]):
                    self._add_reader(patching.stream(i), span)
                    self.projected[i, which, h] = heads[:, h, span]
            for h, z in enumerate(values[layer.z].unbind(2)):
                self.z[i, h] = z[:, at]
            if layer.mlp_stream is not None and layer.mlp_out is not None:
                self._add_reader(values[layer.mlp_stream], at)
                self.mlp[i] = values[layer.mlp_out][:, at]
        self._add_reader(patching.stream(len(self.layers)), patching.at(len(self.layers) - 1))
        self.metric = patching.base
        self.live = frozenset(patching.live)
        at = patching.at(len(self.layers) - 1)
        self.scale = float(self.blocks.logits(patching.stream(len(self.layers))[:, at]).abs().max())
        self.changed = _Changed()

    def _add_reader(self, x: Tensor, span: slice) -> None:
        self.inputs.append(x[:, span])
        self.spans.append(span)

    def propose(self, reader: int, sources: Sequence[int], kept: Kept) -> Float[Tensor, "set pair"]:
        """Return the metric with the edges from the first, the first two, ... of ``sources`` removed as well.

        ``kept`` says which edges carry a change onwards; those into a reader that leads nowhere need not be among them.
        """
        shift = self.patching.changes[list(sources)].cumsum(0)
        return self.follow({reader: shift}, kept)

    def follow(self, changes: Mapping[int, Float[Tensor, "set batch pos d_model"]], kept: Kept) -> Tensor:
        """Return the metric, [set, pair], where some readers read something else, and changes go along kept edges."""
        self.changed = _Changed()
        for reader, change in changes.items():
            self.changed.inputs[reader] = self.inputs[reader] + change[:, :, self.spans[reader]]
        start, n_sets = min(changes), max(len(change) for change in changes.values())
        moved: dict[int, Tensor] = {}
        at, source = 0, len(self.graph.sources) - sum(len(y.W_O) + (y.mlp_out is not None) for y in self.layers)
        for i, layer in enumerate(self.layers):
            counts = [W.shape[0] for W in layer.W]
            if start < at + sum(counts):
                self._renew_heads(i, at, counts, source, kept, moved)
            at, source = at + sum(counts), source + len(layer.W_O)
            if layer.mlp_out is not None:
                if start <= at:
                    self._renew_mlp(i, at, source, kept, moved)
                at, source = at + 1, source + 1
        x = self._read(at, kept, moved)
        if x is None:
            return self.metric.expand(n_sets, -1)
        self.changed.metric = self.patching.measure(self.blocks.logits(x.flatten(0, 1))[:, 0])
        return self.changed.metric

    def accept(self, n: int) -> None:
        """Remove the first ``n`` of the edges that were proposed last."""
        if n == 0:
            return
        changed, self.changed = self.changed, _Changed()
        for r, x in changed.inputs.items():
            self.inputs[r] = _row(x, n - 1)
        self.projected.update({key: _row(x, n - 1) for key, x in changed.projected.items()})
        self.z.update({key: _row(x, n - 1) for key, x in changed.z.items()})
        self.mlp.update({key: _row(x, n - 1) for key, x in changed.mlp.items()})
        if changed.metric is not None:
            self.metric = _row(changed.metric, n - 1)

    def rehearse(self, speculate: int) -> Float[Tensor, "set pair"]:
        """Have every part computed anew, and then all of it once more for some sets: there is no more to keep."""
        shape = (len(self.graph.readers), len(self.graph.sources))
        for reader in range(shape[0]):
            self.propose(reader, [0], np.zeros(shape, dtype=bool))
            self.accept(1)
        return self.propose(0, [0] * speculate, np.arange(shape[1]) < np.array(self.graph.visible)[:, None])

    def _read(self, reader: int, kept: Kept, moved: Mapping[int, Tensor]) -> Tensor | None:
        """Return what a reader reads in each set, None where nothing of it changes."""
        x = self.changed.inputs.get(reader)
        for u, change in moved.items():
            if kept[reader, u]:
                # what the last block writes is there at the answer's position alone
                here = change if change.shape[2] == 1 else change[:, :, self.spans[reader]]
                x = (self.inputs[reader] if x is None else x) + here
        if x is not None:
            self.changed.inputs[reader] = x
        return x

    def _renew_heads(
        self, i: int, first: int, counts: list[int], source: int, kept: Kept, moved: dict[int, Tensor]
    ) -> None:
        layer, group = self.layers[i], self.blocks.group(i)
        touched: set[int] = set()
        reader = first
        for which, count in enumerate(counts):
            new = {h: x for h in range(count) if (x := self._read(reader + h, kept, moved)) is not None}
            reader += count
            if not new:
                continue
            at = self.patching.at(i) if which == 0 else slice(None)
            for h, y in zip(new, self.blocks.project_each(i, which, list(new), list(new.values()), at), strict=True):
                self.changed.projected[i, which, h] = y
                touched |= {h} if which == 0 else set(range(h * group, (h + 1) * group))
        if not touched:
            return
        heads = sorted(touched)
        q, k, v = (self._gather(i, which, heads, 1 if which == 0 else group) for which in range(3))
        z = self.blocks.patterns[i].read(q, k, v, self.patching.at(i)).transpose(0, 1)
        for h, of_head in zip(heads, z, strict=True):
            new_z = of_head.unflatten(0, (-1, len(self.metric)))
            self.changed.z[i, h] = new_z
            moved[source + h] = (new_z - self.z[i, h]) @ layer.W_O[h]

    def _gather(self, i: int, which: int, heads: list[int], group: int) -> Float[Tensor, "row head pos d_head"]:
        keys = [(i, which, h // group) for h in heads]
        found = [self.changed.projected.get(key, self.projected[key][None]) for key in keys]
        n = max(len(x) for x in self.changed.inputs.values())
        return torch.stack([x.expand(n, *x.shape[1:]) for x in found], 2).flatten(0, 1)

    def _renew_mlp(self, i: int, reader: int, source: int, kept: Kept, moved: dict[int, Tensor]) -> None:
        x = self._read(reader, kept, moved)
        if x is not None:
            self.changed.mlp[i] = self.blocks.mlp(i, x.flatten(0, 1)).view_as(x)
            moved[source] = self.changed.mlp[i] - self.mlp[i]


def _row(x: Tensor, k: int) -> Tensor:
    """Return one set's entry, not as a view, so that the other sets' can go."""
    return x[0] if len(x) == 1 else x[k].clone()


class WholeRun:
    """Runs the whole model for every proposal and keeps nothing of it but the metric.

    For models that cannot be taken apart, and where what all parts of it compute on all pairs does not fit.
    """

    metric: Float[Tensor, " pair"]
    live: frozenset[int]
    scale: float
    """The largest logit of the run as it is."""

    def __init__(self, setting: Setting, size: int) -> None:
        self.setting, self.size = setting, size
        graph, device = setting.sites.graph, setting.pairs.clean.device
        self.table = graph.dense(torch.arange(graph.n_edges, device=device))
        self.proposed = torch.ones(1, graph.n_edges, dtype=torch.bool, device=device)
        self.keep = self.proposed[0]
        self.live = frozenset(range(len(graph.sources)))
        self.scale = 0.0
        self.values = self._metric(self.proposed)
        self.metric = self.values[0]

    def _metric(self, keep: Bool[Tensor, "set edge"]) -> Float[Tensor, "set pair"]:
        every = torch.arange(len(self.setting.pairs), device=keep.device)
        found = [masked_metric(self.setting, rows, keep) for rows in every.split(self.size)]
        if self.scale == 0:
            self.scale = max(largest for _, largest in found)
        return torch.cat([values for values, _ in found], 1)

    def propose(self, reader: int, sources: Sequence[int], kept: Kept) -> Float[Tensor, "set pair"]:
        """Return the metric with the edges from the first, the first two, ... of ``sources`` removed as well."""
        self.proposed = self.keep.repeat(len(sources), 1)
        for k, source in enumerate(sources):
            self.proposed[k:, self.table[reader, source]] = False
        self.values = self._metric(self.proposed)
        return self.values

    def accept(self, n: int) -> None:
        """Remove the first ``n`` of the edges that were proposed last."""
        if n:
            self.keep, self.metric = self.proposed[n - 1], self.values[n - 1]


Removal = PartialRun | WholeRun
"""Some pairs' run of a model from which edges are removed one by one."""

AT_A_TIME = 8
"""Pairs that a reproducible run takes at a time."""


def masked_metric(
    setting: Setting, rows: Int[Tensor, " row"], keep: Bool[Tensor, "set edge"]
) -> tuple[Float[Tensor, "set row"], float]:
    """Return the metric of some pairs under each set of edges, and the largest logit at an answer."""
    part = setting.pairs.take(rows)
    logits = ablated_logits(setting.model, setting.sites, part.clean, whole_replaced(setting, rows), keep)
    values = torch.stack([measure(setting.metric, of_set, part) for of_set in logits])
    return values, float(logits.abs().max())


def reproducible_metric(
    setting: Setting, keep: Bool[Tensor, " edge"], *, pairs: int | None = None
) -> Float[Tensor, " pair"]:
    """Return the metric with some edges kept, the same to the last bit however anything else is batched.

    Sums of floating-point numbers depend on how they are split, and that on the shapes and on the number of threads:
    here both are fixed.

    Args:
        setting: What is patched.
        keep: The edges that are kept.
        pairs: Only of the first pairs.
    """
    rows = torch.arange(len(setting.pairs) if pairs is None else pairs, device=keep.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.cat([masked_metric(setting, some, keep[None])[0][0] for some in rows.split(AT_A_TIME)])
    finally:
        torch.set_num_threads(threads)
