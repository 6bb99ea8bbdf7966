"""The metric of circuits that grow edge by edge: what tells one from the next is computed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.batches import patched_at_a_time, patchings_of, setting_of
from circuits.discovery.graph import Graph
from circuits.discovery.memory import churning
from circuits.discovery.metrics import Metric
from circuits.discovery.patching import Patching
from circuits.discovery.removal import Kept, PartialRun
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

SUMMED = ("corrupt", "mean")
"""Ablations that leave a stream of its usual size. What thousands of changes leave of one that is ablated to nothing is
rounding, which a norm blows up."""


class NestedRun(PartialRun):
    """Some pairs' run of a model from which edges are removed in any order."""

    def __init__(self, patching: Patching) -> None:
        super().__init__(patching)
        self.whole_z, self.whole_mlp = dict(self.z), dict(self.mlp)
        self.places: dict[int, tuple[int, int | None]] = {}
        source = len(self.graph.sources) - sum(len(x.W_O) + (x.mlp_out is not None) for x in self.layers)
        for i, layer in enumerate(self.layers):
            parts = [*range(len(layer.W_O)), *([None] if layer.mlp_out is not None else [])]
            self.places |= {source + j: (i, part) for j, part in enumerate(parts)}
            source += len(parts)

    def _lacking(self, source: int) -> Float[Tensor, "batch pos d_model"] | None:
        """What a source would write, if replaced, minus what it writes by now; None for nothing."""
        change = self.patching.changes[source]
        i, head = self.places.get(source, (0, None))
        if source not in self.places:
            moved = None
        elif head is None:
            moved = None if self.mlp[i] is self.whole_mlp[i] else self.mlp[i] - self.whole_mlp[i]
        else:
            now, whole = self.z[i, head], self.whole_z[i, head]
            moved = None if now is whole else (now - whole) @ self.layers[i].W_O[head]
        if moved is None:
            return change if source in self.live else None
        change = change.clone()
        change[:, self.patching.at(i)] -= moved
        return change

    def remove(self, edges: Iterable[tuple[int, int]], kept: Kept) -> Float[Tensor, " pair"]:
        """Remove edges, given as (reader, source), and return the metric.

        ``kept`` says which edges are left. Those into a reader that leads nowhere any more need not be computed.
        """
        changes: dict[int, Tensor] = {}
        for reader, source in edges:
            fed = self.graph.feeds[reader]
            if (fed and not kept[:, list(fed)].any()) or (change := self._lacking(source)) is None:
                continue
            changes[reader] = change if reader not in changes else changes[reader] + change
        if changes:
            self.follow({reader: change[None] for reader, change in changes.items()}, kept)
            self.accept(1)
        return self.metric


def nested_metric(
    model: HookedModel,
    pairs: Pairs,
    keep: Bool[Tensor, "set edge"],
    metric: Metric,
    *,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "set pair"] | None:
    """Return the metric of every pair in the model that keeps only some edges, for sets of which each holds the next.

    As ``ablated_metric``, but from set to set only what the lost edges reach is computed again, part by part, which
    takes about a fifth of a forward where sets differ by an edge. None where the model cannot be taken apart, in half
    precision, and for other ablations than ``corrupt`` and ``mean``: changes are summed up, and there rounding tells.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        keep: Which edges of ``Graph.from_model(model)`` are kept, the most first, all of them on paths to the logits
            but for those that are in every set.
        metric: One number per pair.
        ablation: What the other edges carry: see ``ablated_metric``.
        memory_budget: Bytes that the computation may take beside the model, the sets and its result included; None:
            512 MB beside them.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Source: our own; on one edge removed at a time see ``acdc``.

    Raises:
        BadInput: a set has an edge that the one before lacks; and as ``ablated_metric``.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if ablation not in SUMMED:
        return None
    if any(bool((later & ~earlier).any()) for earlier, later in pairwise(keep)):
        raise BadInput("the sets are not nested: expected each to hold the next")
    memory_budget = churning(memory_budget)
    with torch.no_grad():
        budgets: dict[str, Any] = {"memory_budget": memory_budget, "batch_size": batch_size}
        setting = setting_of(model, pairs, metric, ablation=ablation, denoising=False, **budgets)
        if setting.blocks is None or setting.half_precision:
            return None
        graph = setting.sites.graph
        lost = _lost(graph, keep.cpu().numpy())
        largest = max(lost, key=lambda edges: len({reader for reader, _ in edges}))
        size = patched_at_a_time(
            setting,
            lambda patching: _rehearse(patching, largest),
            kept=keep.numel() + 12 * keep.shape[0] * len(pairs),
            **budgets,
        )
        out = torch.empty(len(keep), len(pairs), device=setting.pairs.clean.device)
        with tqdm(total=len(keep) * len(pairs), desc="circuits", unit="pair", disable=not progress) as bar:
            for rows, patching in patchings_of(setting, size, memory_budget):
                run = NestedRun(patching)
                kept = _all(graph)
                for k, edges in enumerate(lost):
                    for edge in edges:
                        kept[edge] = False
                    out[k, rows] = run.remove(edges, kept).to(out.dtype)
                    bar.update(len(rows))
                del run, patching  # before the next ones are made
    return out


def _lost(graph: Graph, keep: Bool[np.ndarray, "set edge"]) -> list[list[tuple[int, int]]]:
    """The edges, as (reader, source), that each set lacks and the one before it, at first the whole graph, has."""
    source, reader = (ends.numpy() for ends in graph.ends())
    before, out = np.ones(graph.n_edges, dtype=bool), []
    for row in keep:
        numbers = (before & ~row).nonzero()[0]
        out.append(list(zip(reader[numbers].tolist(), source[numbers].tolist(), strict=True)))
        before = row
    return out


def _all(graph: Graph) -> Kept:
    return graph.dense(torch.ones(graph.n_edges, dtype=torch.bool)).numpy()


def _rehearse(patching: Patching, largest: Sequence[tuple[int, int]]) -> NestedRun:
    """Have every part computed anew, and the most edges removed that any step removes: there is no more to keep."""
    run = NestedRun(patching)
    run.rehearse(1)
    run.remove(largest, _all(run.graph))
    return run
