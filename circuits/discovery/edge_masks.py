"""The engine under the mask methods: gradients of the metric with respect to one scale for every edge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits_by_pair, name_of_ablation, replacement, shared_replacement
from circuits.discovery.activations import check_model, outside_inference_mode
from circuits.discovery.attribution import pair_slices
from circuits.discovery.circuit import Circuit
from circuits.discovery.metrics import (
    Metric,
    beside,
    check_pairs,
    is_distance,
    is_flat,
    measure,
    name_of,
    select,
    zero_gradient,
)
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


@outside_inference_mode
def mask_circuit(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    points: list[float],
    *,
    method: str,
    ablation: str | Mapping[str, Tensor],
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return the circuit whose scores are minus the gradient of every edge's scale, averaged over points.

    Args:
        model: The model.
        pairs: Clean and corrupt inputs.
        metric: One number per pair.
        points: The scales of all edges at which gradients are taken; 1 is the clean run, 0 that without any edge.
        method: The circuit's method.
        ablation: What an edge carries at 0: see ``ablated_metric``.
        memory_budget: Bytes that the computation may take beside the model.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Raises:
        BadInput: the pairs do not line up, the metric gives no gradient, a score is not finite, or the budget holds no
            pair.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    pairs = beside(model, pairs)
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
            edge = " -> ".join(sites.graph.edges[int((~torch.isfinite(part).all(0)).nonzero()[0])])
            raise BadInput(f"the score of edge {edge} is not finite: check the model's weights and the metric")
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
