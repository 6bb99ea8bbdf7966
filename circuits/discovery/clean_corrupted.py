"""Edge attribution patching with the gradients of both ends, the clean and the corrupt input."""

from __future__ import annotations

from circuits.discovery.attribution import edge_circuit
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules
from circuits.discovery.metrics import Metric, logit_difference
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def clean_corrupted(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    rules: GradientRules | str | None = None,
    by_position: bool = False,
    neurons: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's effect, with the mean of the gradients on the clean and on the corrupt input.

    As ``eap``, but dm/dx_v is the mean of its values on the two inputs: the trapezoid with one step of the path of
    ``eap_ig_inputs``.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        by_position: Whether to keep each token position's part of every score too, in ``Circuit.by_position``.
        neurons: Whether every neuron of an MLP is a source, and not the MLP as a whole.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: three forwards and two backwards.

    Conventions: both ends of the path are included, with equal weight, and nothing between them. The score is the
        effect of corrupting the edge: below zero it supports the answer under ``logit_difference`` (MIB's files have
        the opposite sign).

    Source: Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806 (``clean-corrupted`` in the released code).

    Fails when: the metric bends between the two inputs and is flat at both. Components that differ in nothing between
    clean and corrupt score zero.

    Raises:
        BadInput: the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    return edge_circuit(
        model,
        pairs,
        metric,
        [1.0, 0.0],
        method="clean-corrupted",
        rules=rules,
        by_position=by_position,
        neurons=neurons,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
