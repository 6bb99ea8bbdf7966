"""Edge attribution patching."""

from __future__ import annotations

from circuits.discovery.attribution import edge_circuit
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules
from circuits.discovery.metrics import Metric, logit_difference
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def eap(
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
    """Return every edge's first-order effect, with the gradient at the clean input.

    The score of the edge u -> v is (a_u on the corrupt run - a_u on the clean run) . dm/dx_v, summed over positions
    and averaged over pairs: what corrupting that edge alone would do to the metric m if m were linear.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        by_position: Whether to keep each token position's part of every score too, in ``Circuit.by_position``.
        neurons: Whether every neuron of an MLP is a source, and not the MLP as a whole.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards (on the corrupt and on the clean inputs) and one backward, on activations alone, and products of
        the size of the attention projections: four to five forwards in all.

    Conventions: no path is integrated: the gradient is that at the clean input. The score is the effect of corrupting
        the edge: below zero it supports the answer under ``logit_difference`` (MIB's files have the opposite sign).

    Source: Syed, Rager and Conmy 2023, arXiv 2310.10348 (edge attribution patching).

    Fails when: the metric saturates (a softmax near 0 or 1, an attention pattern that has already chosen), where
    the gradient at the clean input is small although the effect is large; ``eap_ig_inputs`` exists for that.
    Components that differ in nothing between clean and corrupt score zero whatever they do.

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
        [1.0],
        method="eap",
        rules=rules,
        by_position=by_position,
        neurons=neurons,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
