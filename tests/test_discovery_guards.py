"""What discovery refuses or reports: metrics that measure distance, dropout, numbers that are none, odd answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from discovery_models import build, close, hugging_face, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import attribute, exact, kl_divergence
from circuits.errors import BadInput, UnsupportedModel

DISTANCE = ["eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "mask-ig", "exact"]


@pytest.mark.parametrize("method", DISTANCE)
def test_scores_by_a_distance_have_no_good_and_bad_sign(method: str) -> None:
    model, pairs = build(), some_pairs(6)
    circuit = attribute(model, pairs, method=method, metric=kl_divergence(model, pairs))
    assert circuit.signed is False
    largest = int(exact(model, pairs, kl_divergence(model, pairs)).scores.abs().argmax())
    assert largest in circuit.ranking(absolute=False)[:10].tolist()


@pytest.mark.parametrize("method", ["eap", "mask-gradient"])
def test_a_distance_has_no_gradient_where_it_is_zero(method: str) -> None:
    model, pairs = build(), some_pairs(4)
    with pytest.raises(BadInput, match="kl_divergence has zero gradient at the clean point: scores would all be zero"):
        attribute(model, pairs, method=method, metric=kl_divergence(model, pairs))


def own_metrics(model: Any, pairs: Any) -> dict[str, Any]:
    """Distances from stored clean logits as users write them, without a name that tells."""
    rows = torch.arange(len(pairs))
    with torch.no_grad():
        # one by one, so that rounding differs from that of any batch
        one_by_one = [model(pairs.clean[i : i + 1])[0, pairs.position[i]] for i in range(len(pairs))]
    stored = dict(zip(map(tuple, pairs.clean.tolist()), one_by_one, strict=True))
    assert len(stored) == len(rows)

    def reference(of: Any) -> Tensor:
        return torch.stack([stored[tuple(row)] for row in of.clean.tolist()])

    def divergence(logits: Tensor, of: Any) -> Tensor:
        p = reference(of).log_softmax(-1)
        return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)

    def distance(logits: Tensor, of: Any) -> Tensor:
        return (logits - reference(of)).square().sum(-1)

    def change_of_entropy(logits: Tensor, of: Any) -> Tensor:
        entropies = [-(x.softmax(-1) * x.log_softmax(-1)).sum(-1) for x in (logits, reference(of))]
        return (entropies[0] - entropies[1]).square()

    return {f.__name__: f for f in (divergence, distance, change_of_entropy)}


FLAT: dict[str, Any] = {
    "eap": discovery.eap,
    "eap-ig-inputs": lambda *a, **o: discovery.eap_ig_inputs(*a, steps=1, **o),
    "eap-ig-activations": lambda *a, **o: discovery.eap_ig_activations(*a, steps=1, **o),
    "mask-gradient": discovery.mask_gradient,
    "hisp": discovery.hisp,
    "nodes": lambda *a, **o: discovery.node_attribution(*a, steps=1, **o),
    "patterns": discovery.attention_patterns,
    "gim": lambda *a, **o: discovery.eap(*a, rules="gim", **o),
}


@pytest.mark.parametrize("method", FLAT)
def test_any_metric_that_is_flat_at_the_clean_point_is_refused_by_what_its_gradient_is(method: str) -> None:
    model, pairs = build(), some_pairs(4)
    for name, metric in own_metrics(model, pairs).items():
        for options in ({}, {"batch_size": 2}):
            with pytest.raises(BadInput, match=f"{name} has zero gradient at the clean point: scores would all be ze"):
                FLAT[method](model, pairs, metric, **options)


@pytest.mark.parametrize("method", [*DISTANCE, "acdc"])
def test_a_flat_metric_serves_where_gradients_are_taken_elsewhere_or_not_at_all(method: str) -> None:
    model, pairs = build(), some_pairs(4)
    own = attribute(model, pairs, method=method, metric=own_metrics(model, pairs)["divergence"])
    if method != "acdc":
        ours = attribute(model, pairs, method=method, metric=kl_divergence(model, pairs))
        assert close(own.scores, ours.scores, 1e-3)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_saturated_metric_is_not_taken_for_a_flat_one(scale: float) -> None:
    model, pairs = build(), some_pairs(4)
    with torch.no_grad():
        answers = model(pairs.clean)[torch.arange(4), pairs.position].argmax(-1)
        model.W_U.mul_(scale)
    pairs = replace(pairs, correct=answers)
    assert float(discovery.eap(model, pairs, discovery.log_probability).scores.abs().max()) > 0


@pytest.mark.parametrize("method", ["edge-pruning", "subnetwork-probing", "uniform-gradient-sampling"])
def test_learned_masks_refuse_a_metric_that_no_edge_changes(method: str) -> None:
    def constant(logits: Tensor, pairs: Any) -> Tensor:
        return logits[:, 0] * 0 + 1

    with pytest.raises(BadInput, match="constant at all"):
        attribute(build(), some_pairs(4), method=method, metric=constant, steps=3)


def test_numbers_that_are_none_are_not_passed_on() -> None:
    model, pairs = build(), some_pairs(4)

    def undefined(logits: Tensor, pairs: Any) -> Tensor:
        return logits[:, 0] * float("nan")

    circuit = discovery.eap(model, pairs)
    with pytest.raises(BadInput, match="not finite on 4 of 4 pairs"):
        discovery.minimality(model, circuit.top(3), pairs, metric=undefined)
    with torch.no_grad():
        model.W_E[:] = float("nan")
    with pytest.raises((BadInput, UnsupportedModel)):
        attribute(model, pairs, method="information-flow-routes")


def test_dropout_that_is_no_module_is_found() -> None:
    model = hugging_face("Llama")
    model.blocks[0].attn.attention_dropout = 0.3
    model.train()
    with pytest.raises(BadInput, match=r"dropout is active in .*attention_dropout: call model\.eval"):
        discovery.eap(model, some_pairs(2))


def test_right_or_wrong_is_a_metric_of_exact_patching() -> None:
    model, pairs = build(), some_pairs(8)
    with torch.no_grad():
        answers = model(pairs.clean)[torch.arange(8), pairs.position].argmax(-1)
    pairs = replace(pairs, correct=answers)

    def right(logits: Tensor, pairs: Any) -> Tensor:
        return logits.argmax(-1) == pairs.correct

    def as_number(logits: Tensor, pairs: Any) -> Tensor:
        return (logits.argmax(-1) == pairs.correct).float()

    assert close(exact(model, pairs, right).scores, exact(model, pairs, as_number).scores, 1e-6)


@pytest.mark.parametrize("method", ["eap", "eap-ig-activations", "clean-corrupted", "mask-ig", "hisp", "exact", "acdc"])
def test_answers_beyond_the_vocabulary_are_named(method: str) -> None:
    pairs = some_pairs(2)
    with pytest.raises(BadInput, match="an answer is token 50: expected 0 to 10"):
        attribute(build(), replace(pairs, correct=torch.tensor([50, 1])), method=method)
