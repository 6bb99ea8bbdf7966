"""Node attribution: the first-order effect of each source at its output."""

from __future__ import annotations

from circuits.discovery.attribution import integration_points, source_effects
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules, rules_details
from circuits.discovery.metrics import Metric, is_distance, logit_difference, name_of
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def node_attribution(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    steps: int = 5,
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every source's first-order effect, as the score of each edge that leaves it.

    The score of source u is (a_u on the corrupt run - a_u on the clean run) . dm/da_u, with the gradient averaged
    over the points of ``eap_ig_inputs`` (``steps=1`` takes it at the clean input alone). It equals the sum of the
    scores that ``eap_ig_inputs`` gives to the edges that leave u. ``Circuit.source_frame`` has one row per source.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        steps: Points on the path from the corrupt to the clean token embeddings.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: ``steps`` + 1 forwards and ``steps`` backwards.

    Conventions: the clean end of the path is included, the corrupt end is not. Below zero the source supports the
        answer under ``logit_difference``. All edges of a source have its score, and its scores per pair.

    Source: Syed, Rager and Conmy 2023, arXiv 2310.10348 (attribution patching of nodes, after Nanda);
        the path is that of Hanna et al. 2024, arXiv 2403.17806, section 3.

    Fails when: as ``eap_ig_inputs``; and where a source's effects along different edges cancel, its score is small
    although the edges matter.

    Raises:
        BadInput: ``steps`` is less than 1, the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    sites, effects = source_effects(
        model,
        pairs,
        metric,
        integration_points(steps),
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    return Circuit.of_source_effects(
        sites.graph,
        effects,
        method="node-attribution",
        metric=name_of(metric),
        details={"pairs": len(pairs), "changed": pairs.changed, "steps": steps} | rules_details(rules),
        signed=not is_distance(metric),
    )
