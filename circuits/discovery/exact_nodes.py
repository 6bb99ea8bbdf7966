"""Exact patching of every source."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from circuits.discovery.batches import Ablation, patchings, setting_of, whole_effects
from circuits.discovery.circuit import Circuit
from circuits.discovery.exact import check_effects, check_finite
from circuits.discovery.metrics import Metric, is_distance, logit_difference, name_of
from circuits.discovery.patching import Patching
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def exact_nodes(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: Ablation = "corrupt",
    denoising: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every source's exact effect on the metric, as the score of each edge that leaves it.

    The score of source u is m(the model in which u writes its replacement) - m(the model as it is): all edges that
    leave u are ablated together. ``Circuit.source_frame`` has one row per source; ``threshold(...)`` and then
    ``pruned()`` keep the edges between the sources whose score is as large.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        ablation: What an ablated source writes: see ``exact``.
        denoising: Restore the source in the corrupt run instead: m(corrupt run) - m(corrupt run with the source from
            the clean run), negative where restoring helps.
        memory_budget: Bytes that the computation may take beside the model, its result included, from which the
            batches follow by what a few pairs are measured to take; None: 512 MB beside the result.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards, and for each source what lies behind it: half a forward on average. No backward.

    Conventions: the source is ablated in the clean run (noising) unless ``denoising`` is asked for. Below zero the
        source supports the answer under ``logit_difference``. All edges of a source have its score, and its scores per
        pair.

    Source: Vig et al. 2020, arXiv 2004.12265, and Meng et al. 2022, arXiv 2202.05262 (patching of activations).

    Fails when: two sources stand in for each other (ablating either alone changes little), or a source's effects along
    different edges cancel: ``exact`` shows the edges one by one.

    Raises:
        BadInput: the pairs do not line up, the budget does not hold one pair, a source is not finite, or the metric
            does not depend on the logits.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    with torch.no_grad():
        setting = setting_of(
            model,
            pairs,
            metric,
            ablation=ablation,
            denoising=denoising,
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
        graph = setting.sites.graph
        device = setting.pairs.clean.device
        effects = torch.empty(len(pairs), len(graph.sources), device=device)
        with tqdm(total=None, desc="exact patching", unit="source", disable=not progress) as bar:
            if setting.blocks is None:
                leaving = torch.arange(len(graph.sources), device=device)[:, None] == graph.ends(device)[0]
                effects = whole_effects(
                    setting, leaving, memory_budget=memory_budget, batch_size=batch_size, advance=bar.update
                )
            else:
                batches = patchings(
                    setting,
                    Patching.rehearse,
                    kept=4 * len(pairs) * (len(graph.sources) + graph.n_edges),
                    memory_budget=memory_budget,
                    batch_size=batch_size,
                )
                for rows, patching in batches:
                    effects[rows] = patching.source_effects(bar.update).T.to(effects.dtype)
                    del patching  # before the next one is made
    check_finite(setting, effects)
    check_effects(setting, effects)
    effects = -effects if denoising else effects
    return Circuit.of_source_effects(
        graph,
        effects,
        method="exact-nodes",
        metric=name_of(metric),
        details=setting.details(ablation),
        signed=not is_distance(metric),
    )
