"""Edge attribution patching with integrated gradients over the inputs."""

from __future__ import annotations

from circuits.discovery.attribution import edge_circuit, integration_points
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules
from circuits.discovery.metrics import Metric, logit_difference
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def eap_ig_inputs(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    steps: int = 5,
    rules: GradientRules | str | None = None,
    by_position: bool = False,
    neurons: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's effect, with the gradient averaged from the corrupt to the clean token embeddings.

    As ``eap``, but dm/dx_v is the mean over k = 1 ... ``steps`` of the gradient at the token embeddings
    corrupt + (k / steps) (clean - corrupt).

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        steps: Points on the path.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        by_position: Whether to keep each token position's part of every score too, in ``Circuit.by_position``.
        neurons: Whether every neuron of an MLP is a source, and not the MLP as a whole.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: ``steps`` + 1 forwards (one on the corrupt inputs) and ``steps`` backwards.

    Conventions: the clean end of the path is included, the corrupt end is not, so that one step is ``eap``. (The
        authors' released code takes k = 0 ... steps - 1 instead and so includes the corrupt end and not the clean one.)
        The gradients are averaged. The score is the effect of corrupting the edge: below zero it supports the answer
        under ``logit_difference`` (MIB's files have the opposite sign).

    Source: Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806, section 3.

    Fails when: the points between the two inputs' embeddings mean nothing to the model, so that gradients there
    say nothing about either input. Components that differ in nothing between clean and corrupt score zero.

    Raises:
        BadInput: ``steps`` is less than 1, the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    return edge_circuit(
        model,
        pairs,
        metric,
        integration_points(steps),
        method="eap-ig-inputs",
        details={"steps": steps},
        rules=rules,
        by_position=by_position,
        neurons=neurons,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
