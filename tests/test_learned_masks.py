"""Learned masks: their distributions, their gradients, and what they find."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from discovery_models import build, hugging_face, planted, some_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import discovery
from circuits.discovery import Graph, ablated_metric
from circuits.discovery.learned_masks import hard_concrete, kept_probability
from circuits.discovery.uniform_gradient_sampling import uniform_samples
from circuits.errors import BadInput, Diverged

LEARNED = ("subnetwork-probing", "edge-pruning", "uniform-gradient-sampling")
TRUTH = {("embed", "a0.h1.v"), ("a0.h1", "a1.h0.v"), ("a1.h0", "logits")}


@given(st.floats(-3, 3))
@settings(max_examples=20)
def test_hard_concrete_samples_are_kept_as_often_as_they_should(log_alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([log_alpha])
    samples = hard_concrete(value, 20_000, generator)
    assert bool(((samples >= 0) & (samples <= 1)).all())
    expected = float(kept_probability(value))
    assert abs(float((samples > 0).double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


def test_hard_concrete_gradients_are_those_of_its_samples() -> None:
    log_alpha = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def mean(value: torch.Tensor) -> torch.Tensor:
        return hard_concrete(value, 500, torch.Generator().manual_seed(1)).mean()

    (gradient,) = torch.autograd.grad(mean(log_alpha), log_alpha)
    step = 1e-5
    numeric = (mean(log_alpha.detach() + step) - mean(log_alpha.detach() - step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(numeric), rel=1e-4)


@given(st.floats(-2.5, 2.5), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=20)
def test_uniform_samples_have_the_right_mean_and_gradient(logit: float, slope: float, bend: float) -> None:
    value = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    n = 40_000
    scale = uniform_samples(value, n, torch.Generator().manual_seed(0))
    p = torch.sigmoid(value.detach())
    assert float(scale.detach().mean()) == pytest.approx(float(p), abs=0.02)
    between = (scale.detach() > 0) & (scale.detach() < 1)
    assert float(between.double().mean()) == pytest.approx(float(p * (1 - p)), abs=0.02)
    loss = (slope * scale + bend * scale**2).mean()
    (gradient,) = torch.autograd.grad(loss, value)
    # loss(kept) - loss(ablated), times dp / dlogit
    assert float(gradient) == pytest.approx(float((slope + bend) * p * (1 - p)), abs=0.05)


@pytest.mark.parametrize("method", LEARNED)
def test_the_only_path_is_kept_and_little_else(method: str) -> None:
    model, pairs = planted(), some_pairs(24, 3, 4)
    options: dict[str, Any] = {"sparsity": 1 - 3 / 42} if method == "edge-pruning" else {"price": 0.3}
    circuit = discovery.attribute(model, pairs, method=method, steps=150, **options)
    assert set(circuit.edges) == TRUTH
    assert not circuit.signed and float(circuit.scores.min()) >= 0 and float(circuit.scores.max()) <= 1


@pytest.mark.parametrize("method", LEARNED)
def test_the_seed_decides(method: str) -> None:
    model, pairs = planted(), some_pairs(24, 3, 4)
    scores = [discovery.attribute(model, pairs, method=method, steps=4, seed=seed).scores for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_edge_pruning_reaches_its_target() -> None:
    model, pairs = build(), some_pairs(16)
    for sparsity in (0.4, 0.8):
        circuit = discovery.edge_pruning(model, pairs, sparsity=sparsity, steps=160, learning_rate=0.2, batch_size=4)
        assert circuit.details["expected_sparsity"] == pytest.approx(sparsity, abs=0.08)
        assert circuit.n_kept == round(61 * (1 - sparsity))


def test_a_higher_price_keeps_fewer_edges() -> None:
    model, pairs = build(), some_pairs(16)
    for method in (discovery.subnetwork_probing, discovery.uniform_gradient_sampling):
        cheap, dear = (method(model, pairs, price=price, steps=50).scores.mean() for price in (0.0, 100.0))
        assert float(dear) < 0.5 * float(cheap)


@pytest.mark.parametrize("method", LEARNED)
def test_masks_learn_from_a_metric_and_on_a_bridge(method: str) -> None:
    bridge = hugging_face("Llama")
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    circuit = discovery.attribute(
        bridge, some_pairs(4), method=method, metric=discovery.logit_difference, steps=3, ablation="mean"
    )
    assert circuit.metric == "logit_difference" and circuit.graph == Graph.from_model(bridge)
    for name, p in bridge.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad


def test_optimal_constants_hurt_less_than_means_and_zeros() -> None:
    model, pairs = build(), some_pairs(24)
    graph = Graph.from_model(model)
    constants = discovery.optimal_constants(model, pairs, steps=150, learning_rate=0.03, batch_size=24)
    source, _ = graph.ends()
    alone = source[None] != torch.arange(len(graph.sources))[:, None]

    def loss(ablation: Any) -> torch.Tensor:
        def negative_divergence(logits: torch.Tensor, part: Any) -> torch.Tensor:
            clean = model(part.clean).detach()[torch.arange(len(part)), part.position].log_softmax(-1)
            return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

        return ablated_metric(model, pairs, alone, metric=negative_divergence, ablation=ablation).mean(1)

    best = loss(constants)
    assert bool((best <= loss("zero") + 1e-4).all()) and float(best.mean()) < 0.9 * float(loss("mean").mean())
    with pytest.raises(BadInput, match="constants lack hook_pos_embed"):
        loss({name: value for name, value in constants.items() if name != "hook_pos_embed"})
    curve = discovery.faithfulness(model, discovery.eap(model, pairs), pairs, ablation=constants)
    assert curve.ablation == "constants"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("edge-pruning", {"sparsity": 1.0}, "sparsity = 1.0"),
        ("subnetwork-probing", {"price": -1.0}, "price = -1.0"),
        ("uniform-gradient-sampling", {"mask_samples": 0}, "mask_samples = 0"),
        ("subnetwork-probing", {"price": float("nan")}, "price = nan"),
        ("subnetwork-probing", {"learning_rate": -0.1}, "learning_rate = -0.1"),
        ("edge-pruning", {"multiplier_rate": 0.0}, "multiplier_rate = 0.0"),
        ("uniform-gradient-sampling", {"constant_rate": float("inf")}, "constant_rate = inf"),
        ("subnetwork-probing", {"steps": 0}, "steps = 0"),
        ("edge-pruning", {"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_bad_options_are_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        discovery.attribute(build(), some_pairs(), method=method, **options)


def test_a_loss_that_is_not_finite_stops_with_the_remedy() -> None:
    model = build()
    with torch.no_grad():
        model.unembed.W_U *= 1e30
    with pytest.raises(BadInput, match="logit_difference of a masked model is not finite: check the metric"):
        discovery.subnetwork_probing(model, some_pairs(), discovery.logit_difference, steps=3)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(Diverged, match=r"at step 1: .*lower learning_rate"):
        discovery.optimal_constants(build(), some_pairs(), steps=3, learning_rate=1e20)
