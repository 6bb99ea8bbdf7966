"""Automatic circuit discovery: edges removed one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.batches import Ablation, Setting, patched_at_a_time, patchings_of, setting_of
from circuits.discovery.circuit import Circuit
from circuits.discovery.exact import check_effects, check_finite
from circuits.discovery.memory import churning, pairs_at_a_time, peak_bytes
from circuits.discovery.metrics import Metric, is_distance, logit_difference, name_of
from circuits.discovery.removal import (
    AT_A_TIME,
    Kept,
    PartialRun,
    Removal,
    WholeRun,
    masked_metric,
    reproducible_metric,
)
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

TIE = 128
"""How near to the threshold, in roundings of logits and metric, a change may be moved across it by rounding."""


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
        memory_budget: Bytes that the computation may take beside the model, its result included. Where what every part
            computes on all pairs does not fit, whole forwards are run for every edge, some pairs at a time. None: no
            bound.
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
    work. A removal whose change is within rounding of ``tau`` is decided by a run of fixed shape on one thread, so that
    batches and threads do not decide it; of a metric that jumps, such as accuracy, rounding can still move a pair.

    Raises:
        BadInput: ``tau`` or ``speculate`` is out of range, the pairs do not line up, a source is not finite, or the
            budget does not hold a single pair.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if not 0 < tau < float("inf"):
        raise BadInput(f"tau = {tau}: expected a finite number above 0, in the unit of the metric")
    if speculate < 1:
        raise BadInput(f"speculate = {speculate}: expected at least 1")
    with torch.no_grad():
        setting = setting_of(
            model,
            pairs,
            metric,
            ablation=ablation,
            denoising=False,
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
        runs, why_whole = _runs(setting, speculate, churning(memory_budget), batch_size)
        with tqdm(total=setting.sites.graph.n_edges, desc="acdc", unit="edge", disable=not progress) as bar:
            kept, change, tried = _decide(setting, runs, tau, speculate, bar)
    check_finite(setting, change)
    check_effects(setting, change, moved=bool(kept.any()))
    graph = setting.sites.graph
    source, reader = graph.ends()
    weight = change.mean(0).clamp(min=0).sign() if is_distance(metric) else change.mean(0).sign()
    details = setting.details(ablation) | {"tau": tau, "tried": tried}
    details |= {"whole_forwards_because": why_whole} if why_whole else {}
    keep = torch.from_numpy(kept)[reader, source].to(change.device)
    change.mul_(weight)
    return Circuit(graph, change.mean(0), keep, "acdc", name_of(metric), change, details, signed=False)


def _runs(
    setting: Setting, speculate: int, memory_budget: int | None, batch_size: int | None
) -> tuple[Sequence[tuple[Tensor, Removal]], str]:
    """Return the pairs' numbers and their run, batch by batch, and why whole forwards are run, if they are."""
    n, n_edges, device = len(setting.pairs), setting.sites.graph.n_edges, setting.pairs.clean.device
    every = torch.ones(n_edges, dtype=torch.bool, device=device)
    kept = 4 * n * n_edges
    if memory_budget is not None:
        kept += peak_bytes(lambda: reproducible_metric(setting, every, pairs=min(n, AT_A_TIME)))
    why = setting.why_whole
    if setting.blocks is not None and setting.half_precision:
        why = f"sums of many small changes are not to be trusted in {str(setting.dtype).removeprefix('torch.')}"
    elif setting.blocks is not None:
        fits = n
        if memory_budget is not None:
            fits = patched_at_a_time(
                setting,
                lambda patching: PartialRun(patching).rehearse(speculate),
                kept=kept,
                memory_budget=memory_budget,
                batch_size=None,
            )
        if fits >= n:
            batches = patchings_of(setting, batch_size or n, memory_budget)
            return [(rows, PartialRun(patching)) for rows, patching in batches], ""
        why = f"what every part computes on {n} pairs does not fit the memory budget"
    size = pairs_at_a_time(
        lambda m: masked_metric(setting, torch.arange(m, device=device), every.expand(speculate, -1)),
        n,
        memory_budget=memory_budget,
        kept=kept,
        batch_size=batch_size,
    )
    return [(torch.arange(n, device=device), WholeRun(setting, size))], why


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
    rounding = TIE * max(torch.finfo(torch.float32).eps, torch.finfo(setting.dtype).eps)
    tie = rounding * max(run.scale for _, run in runs)
    order = torch.cat([rows for rows, _ in runs])
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
            n = 0
            for k in range(len(sources)):
                size = _size(setting, steps[k])
                if abs(size - tau) <= tie + rounding * float(after[k].abs().mean()):
                    steps[k] = _reproducible_step(setting, kept, reader, sources[: k + 1])[order]
                    size = _size(setting, steps[k])
                if size >= tau:
                    break
                n += 1
            for _, run in runs:
                run.accept(n)
            seen = sources[: n + 1]
            for k, u in enumerate(seen):
                kept[reader, u] = k >= n
                change[order, first[reader] + u] = steps[k].to(change.dtype)
            waiting = waiting[len(seen) :]
            bar.update(len(seen))
        onwards[reader] = kept[reader]
    return kept, change, tried


def _size(setting: Setting, step: Float[Tensor, " pair"]) -> float:
    """Return what is compared with the threshold, the same whatever the order of the pairs."""
    mean = math.fsum(step.tolist()) / len(step)
    return mean if is_distance(setting.metric) else abs(mean)


def _reproducible_step(setting: Setting, kept: Kept, reader: int, sources: Sequence[int]) -> Float[Tensor, " pair"]:
    """Return what removing the last of some edges into a reader changes, with the others removed, in pairs' order."""
    ends = setting.sites.graph.ends()
    masks = [kept.copy(), kept.copy()]
    masks[0][reader, list(sources[:-1])] = False
    masks[1][reader, list(sources)] = False
    device = setting.pairs.clean.device
    before, after = (
        reproducible_metric(setting, torch.from_numpy(mask)[ends[1], ends[0]].to(device)) for mask in masks
    )
    return after - before
