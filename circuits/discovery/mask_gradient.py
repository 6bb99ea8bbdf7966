"""The gradient of the metric with respect to a mask over all edges, at the full model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from circuits.discovery.circuit import Circuit
from circuits.discovery.edge_masks import mask_circuit
from circuits.discovery.metrics import Metric, logit_difference
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
    return mask_circuit(
        model,
        pairs,
        metric,
        [1.0],
        method="mask-gradient",
        ablation=ablation,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
