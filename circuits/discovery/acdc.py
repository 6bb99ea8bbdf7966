"""Automatic circuit discovery: edges removed one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.activations import source_values
from circuits.discovery.batches import Ablation, Setting, fitting, patchings, setting_of
from circuits.discovery.circuit import Circuit
from circuits.discovery.exact import check_effects
from circuits.discovery.metrics import Metric, is_distance, logit_difference, name_of
from circuits.discovery.removal import Kept, PartialRun, Removal, WholeRun
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def acdc(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    tau: float = 0.01,
    ablation: Ablation = "corrupt",
    speculate: int = 1,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return the circuit that is left after removing, one by one, every edge whose removal changes little.

    Readers are visited from the last to the first, and the sources of each from the last to the first. With M the edges
    still there, the edge u -> v is removed (v reads u's replacement from then on) if m(M without it) - m(M) < ``tau``,
    for a metric that is a distance from the clean output (``kl_divergence``, ``squared_error``: the published rule), or
    if abs(m(M without it) - m(M)) < ``tau``, for any other metric. The order is that of the graph, so that the circuit
    is the same in every process.

    An edge's score is the change on removal at its turn, never negative: an edge that may go although it changes a
    distance for the better scores zero. Edges whose reader leads nowhere any more, or whose source
    writes the same when replaced, are removed unseen, with score zero.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``kl_divergence(model, pairs)`` is that of the
            paper. It need not be differentiable.
        tau: What a removal may change at most, in the metric's unit; above zero.
        ablation: What a removed edge carries: see ``exact``.
        speculate: How many edges of one reader to try at a time, each with those before it removed, in the hope that
            all can go. The first that cannot ends the round, and what lies behind it is tried again: the decisions are
            those of one at a time. It pays on a GPU; on a CPU rows that are thrown away cost more than calls.
        memory_budget: Bytes that the activations of a batch of pairs may take.
        batch_size: Pairs at a time, at most. All pairs take part in every decision.
        progress: Whether to show a bar.

    Cost: two forwards; then, for each edge, what its reader's change reaches through the edges still there: parts that
        it does not reach keep what they computed last. While few edges survive that is a small part of a forward. No
        backward.

    Conventions: removal is strict: an edge whose removal changes exactly ``tau`` stays. Later readers come first, and
        of a reader the later sources. Scores are sizes, and have no sign.

    Source: Conmy et al. 2023, arXiv 2304.14997, algorithm 1. Trying several edges at a time, and computing only what a
        removal reaches, are our own.

    Fails when: two edges stand in for each other: the one visited first goes and the other stays, whichever did the
    work; and ``tau`` near a removal's true change, where rounding decides.

    Raises:
        BadInput: ``tau`` or ``speculate`` is out of range, the pairs do not line up, or a source is not finite.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if not 0 < tau < float("inf"):
        raise BadInput(f"tau = {tau}: expected a finite number above 0, in the unit of the metric")
    if speculate < 1:
        raise BadInput(f"speculate = {speculate}: expected at least 1")
    with torch.no_grad():
        setting = setting_of(model, pairs, metric, ablation=ablation, denoising=False, batch_size=batch_size)
        runs = list(_runs(setting, memory_budget, batch_size))
        with tqdm(total=setting.sites.graph.n_edges, desc="acdc", unit="edge", disable=not progress) as bar:
            kept, change, tried = _decide(setting, runs, tau, speculate, bar)
    check_effects(setting, change, moved=bool(kept.any()))
    graph = setting.sites.graph
    source, reader = graph.ends()
    weight = change.mean(0).clamp(min=0).sign() if is_distance(metric) else change.mean(0).sign()
    details = setting.details(ablation) | {"tau": tau, "tried": tried}
    keep = torch.from_numpy(kept)[reader, source].to(change.device)
    per_example = change * weight
    return Circuit(graph, per_example.mean(0), keep, "acdc", name_of(metric), per_example, details, signed=False)


def _runs(setting: Setting, memory_budget: int | None, batch_size: int | None) -> Sequence[tuple[Tensor, Removal]]:
    """Return the pairs' numbers and their run, batch by batch."""
    pairs = setting.pairs
    if setting.blocks is not None:
        found = patchings(setting, memory_budget=memory_budget, batch_size=batch_size)
        return [(rows, PartialRun(patching)) for rows, patching in found]
    runs: list[tuple[Tensor, Removal]] = []
    for rows in torch.arange(len(pairs), device=pairs.clean.device).split(batch_size or len(pairs)):
        part = pairs.take(rows)
        if setting.replaced is None:
            replaced = source_values(setting.model, setting.sites, part.corrupt)
        else:
            replaced = {name: fitting(t, rows, pairs.clean.shape[1]) for name, t in setting.replaced.items()}
        runs.append((rows, WholeRun(setting.model, setting.sites, setting.metric, part, replaced)))
    return runs


def _decide(
    setting: Setting, runs: Sequence[tuple[Tensor, Removal]], tau: float, speculate: int, bar: tqdm
) -> tuple[Kept, Float[Tensor, "pair edge"], int]:
    """Return which edges stay, how much each pair's metric changed at each edge's turn, and how many were tried."""
    graph = setting.sites.graph
    kept = np.arange(len(graph.sources)) < np.array(graph.visible)[:, None]
    change = torch.zeros(len(setting.pairs), graph.n_edges, device=setting.pairs.clean.device)
    first = np.cumsum((0, *graph.visible))
    onwards = np.zeros_like(kept)
    live = frozenset().union(*(run.live for _, run in runs))
    tried = 0
    for reader in reversed(range(len(graph.readers))):
        feeds = graph.feeds[reader]
        leads = not feeds or bool(onwards[:, list(feeds)].any())
        waiting = [u for u in reversed(range(graph.visible[reader])) if leads and u in live]
        kept[reader] &= np.isin(np.arange(len(graph.sources)), waiting)
        bar.update(graph.visible[reader] - len(waiting))
        while waiting:
            sources = waiting[:speculate]
            tried += len(sources)
            before = torch.cat([run.metric for _, run in runs])
            after = torch.cat([run.propose(reader, sources, onwards) for _, run in runs], 1)
            steps = after - torch.cat([before[None], after[:-1]])
            mean = steps.double().mean(1)
            goes = (mean if is_distance(setting.metric) else mean.abs()) < tau
            n = int(goes.long().cumprod(0).sum())
            for _, run in runs:
                run.accept(n)
            seen = sources[: n + 1]
            for k, u in enumerate(seen):
                kept[reader, u] = k >= n
                change[torch.cat([rows for rows, _ in runs]), first[reader] + u] = steps[k].to(change.dtype)
            waiting = waiting[len(seen) :]
            bar.update(len(seen))
        onwards[reader] = kept[reader]
    return kept, change, tried
