"""The gradient of the metric with respect to a mask over all edges, at the full model or on the way to none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits_by_pair, name_of_ablation, replacement, shared_replacement
from circuits.discovery.activations import check_model
from circuits.discovery.attribution import pair_slices
from circuits.discovery.circuit import Circuit
from circuits.discovery.metrics import (
    Metric,
    check_pairs,
    is_distance,
    is_flat,
    logit_difference,
    measure,
    name_of,
    select,
    zero_gradient,
)
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def mask_gradient(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's effect from the gradient of the metric with respect to a mask, at the full model.

    With keep_e in [0, 1] between the edge's replacement (0) and what its source writes (1), the score is
    -dm/dkeep_e at keep = 1 for all edges. With ``corrupt`` ablation that is ``eap`` by another way, equal up to
    rounding; here the replacement may also be a mean or zero.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards (one for the replacements) and one backward, the latter two through every reader's sum over its
        sources.

    Conventions: no path is integrated: the gradient is that at the full model, keep = 1. The score is the effect of
        corrupting the edge: below zero it supports the answer under ``logit_difference`` (MIB's files have the opposite
        sign).

    Source: Miller, Chughtai and Saunders 2024, arXiv 2407.08734 (edge attribution as a mask gradient).

    Fails when: as ``eap``: the metric is flat at the clean input although the effect is large.

    Raises:
        BadInput: the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    return _circuit(model, pairs, metric, [1.0], "mask-gradient", ablation, memory_budget, batch_size, progress)


def mask_ig(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    steps: int = 5,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's effect, integrating the mask's gradient from no edge to all edges.

    As ``mask_gradient``, but the gradient is the mean over keep = (k - 1/2) / ``steps`` for k = 1 ... ``steps``, the
    same for all edges. The scores then add up to m(no edge) - m(all edges), up to the error of the rule.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        steps: Points on the path.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: ``steps`` + 1 forwards (one for the replacements) and ``steps`` backwards, all but the first through every
        reader's sum over its sources.

    Conventions: the midpoint rule, which takes neither end of the path. (Auto-circuit takes both ends and the points
        between, and sums them instead of averaging.) The score is the effect of corrupting the edge: below zero it
        supports the answer under ``logit_difference`` (MIB's files have the opposite sign).

    Source: Miller, Chughtai and Saunders 2024, arXiv 2407.08734; Sundararajan et al. 2017, arXiv 1703.01365
        (completeness of integrated gradients).

    Fails when: half-ablated models do something that neither end does. Components that differ in nothing between
    clean and corrupt score zero.

    Raises:
        BadInput: ``steps`` is less than 1, the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if steps < 1:
        raise BadInput(f"steps = {steps}: expected at least 1")
    points = [(k - 0.5) / steps for k in range(1, steps + 1)]
    return _circuit(model, pairs, metric, points, "mask-ig", ablation, memory_budget, batch_size, progress)


def _circuit(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    points: list[float],
    method: str,
    ablation: str | Mapping[str, Tensor],
    memory_budget: int | None,
    batch_size: int | None,
    progress: bool,
) -> Circuit:
    check_pairs(pairs)
    pairs = pairs.to(model.cfg.device)
    sites = sites_of(model)
    check_model(model, sites, pairs.clean)
    shared = shared_replacement(model, sites, pairs, ablation, memory_budget=memory_budget, batch_size=batch_size)

    def effects(chosen: slice) -> tuple[Float[Tensor, "pair edge"], bool]:
        part = select(pairs, chosen)
        replaced = replacement(model, sites, part, ablation) if shared is None else shared
        total, flat = torch.zeros((), device=part.clean.device), True
        for point in points:
            gradient, at_a_flat_point = _gradient(model, sites, part, metric, replaced, point)
            total, flat = total - gradient, flat and at_a_flat_point
        return total / len(points), flat

    slices = pair_slices(
        lambda n: effects(slice(n)),
        sites,
        pairs,
        model.cfg,
        kept=4 * len(pairs) * sites.graph.n_edges,
        memory_budget=memory_budget,
        batch_size=batch_size,
    )
    found, flat = None, True
    for chosen in tqdm(slices, desc=method, unit="batch", disable=not progress or len(slices) == 1):
        part, at_flat_points = effects(chosen)
        if not bool(torch.isfinite(part).all()):
            edge = sites.graph.edges[int((~torch.isfinite(part).all(0)).nonzero()[0])]
            raise BadInput(f"the score of edge {edge[0]} -> {edge[1]} is not finite: check the model's weights")
        found = part.new_empty(len(pairs), sites.graph.n_edges) if found is None else found
        found[chosen], flat = part, flat and at_flat_points
    assert found is not None  # there are pairs
    if flat or not bool((found != 0).any()):
        raise BadInput(zero_gradient(metric, "the clean point" if points == [1.0] else "every point of the path"))
    details = {
        "pairs": len(pairs),
        "changed": pairs.changed,
        "ablation": name_of_ablation(ablation),
        "points": points,
    }
    signed = not is_distance(metric)
    return Circuit.of_effects(sites.graph, found, method=method, metric=name_of(metric), details=details, signed=signed)


def _gradient(
    model: HookedModel, sites: Sites, part: Pairs, metric: Metric, replaced: dict[str, Tensor], point: float
) -> tuple[Float[Tensor, "pair edge"], bool]:
    """Return each pair's gradient of every edge's mask, and whether it is that of rounding alone."""
    with torch.inference_mode(False), torch.enable_grad():
        first = replaced[sites.embed]
        keep = torch.full((len(part), sites.graph.n_edges), point, dtype=first.dtype, device=first.device)
        keep.requires_grad_()
        logits = ablated_logits_by_pair(model, sites, part.clean, replaced, keep)
        total = measure(metric, logits, part).sum()
        if not total.requires_grad:
            raise BadInput(f"metric {name_of(metric)} does not depend on the logits: expected a differentiable one")
        return torch.autograd.grad(total, keep)[0], point == 1 and is_flat(metric, logits, part)
