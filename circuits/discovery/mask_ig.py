"""The gradient of the metric with respect to a mask over all edges, on the way from no edge to all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from circuits.discovery.circuit import Circuit
from circuits.discovery.edge_masks import mask_circuit
from circuits.discovery.metrics import Metric, logit_difference
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


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
    return mask_circuit(
        model,
        pairs,
        metric,
        points,
        method="mask-ig",
        ablation=ablation,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
