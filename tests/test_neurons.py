"""Graphs whose sources are the neurons of MLPs."""

from __future__ import annotations

import pytest
import torch
from discovery_models import at_answers, build, close, model_of, planted, shapes, some_pairs

from circuits import discovery
from circuits.discovery import Graph, ablated_metric, eap, exact, faithfulness
from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.sites import sites_of
from circuits.errors import UnsupportedModel


def with_mlps(shape: str) -> bool:
    return shape != "attention-only"


@shapes
def test_the_graph_has_every_neuron_and_merges_to_the_usual_components(shape: str) -> None:
    model = model_of(shape)
    graph, usual = Graph.from_model(model, neurons=True), Graph.from_model(model)
    n = model.cfg.d_mlp if with_mlps(shape) else 0
    assert len(graph.sources) == len(usual.sources) + 2 * max(0, n - 1) and graph.readers == usual.readers
    assert graph.has_neurons == with_mlps(shape) and not usual.has_neurons
    assert graph.merged() == usual.merged()


@shapes
def test_neurons_add_up_to_their_mlp(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    whole = eap(model, pairs)
    for method in (eap, discovery.eap_ig_inputs, discovery.clean_corrupted):
        fine, coarse = method(model, pairs, neurons=True), method(model, pairs)
        assert close(fine.merged().scores, coarse.merged().scores, 1e-4)
    kept = torch.rand(3, whole.graph.n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    graph = Graph.from_model(model, neurons=True)
    numbers = [whole.graph.index(source.split(".n")[0], reader) for source, reader in graph.edges]
    fine_metric = ablated_metric(model, pairs, kept[:, numbers], neurons=True)
    assert close(fine_metric, ablated_metric(model, pairs, kept), 1e-4)


@pytest.mark.parametrize("shape", ["layer-norm", "rms-gated-no-positions", "GPTNeoX", "Llama"])
def test_exact_scores_ablate_one_neuron_into_one_reader(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    circuit = exact(model, pairs, neurons=True)
    graph = circuit.graph
    assert graph.has_neurons and circuit.per_example is not None
    numbers = [i for i, (source, _) in enumerate(graph.edges) if ".n3" in source or ".n1" in source]
    keep = torch.ones(len(numbers), graph.n_edges, dtype=torch.bool)
    keep[torch.arange(len(numbers)), numbers] = False
    with torch.no_grad():
        base = at_answers(model(pairs.clean), pairs)
    expected = (ablated_metric(model, pairs, keep, neurons=True) - base).T
    got = circuit.per_example[:, numbers]
    assert float((got - expected).abs().max()) < 1e-5 + 1e-4 * float(expected.abs().max())
    assert close(circuit.merged().scores[:3], exact(model, pairs).merged().scores[:3], 1e-3)


def test_first_order_scores_are_slopes_of_the_ablation() -> None:
    model, pairs = build(), some_pairs(3)
    sites = sites_of(model, neurons=True)
    keep = torch.ones(1, sites.graph.n_edges, requires_grad=True)
    logits = ablated_logits(model, sites, pairs.clean, replacement(model, sites, pairs, "corrupt"), keep)[0]
    (slope,) = torch.autograd.grad(at_answers(logits, pairs).mean(), keep)
    assert close(eap(model, pairs, neurons=True).scores, -slope[0], 1e-3)


def test_neurons_are_ranked_drawn_and_exported() -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs, neurons=True)
    result = faithfulness(model, circuit, pairs, n_random=2, shares=[0, 0.05, 0.2, 0.6, 1])
    last = result.curve.query("ranking == 'absolute'").iloc[-1]
    assert last["faithfulness"] == pytest.approx(1, abs=1e-4) and result.n_edges == circuit.graph.n_edges - 15
    figure = circuit.figure(top=10)
    assert any(".n" in str(trace.text) for trace in figure.data)
    nodes = set(circuit.top(40).to_networkx().nodes)
    assert nodes <= {"embed", "pos_embed", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"}
    both = exact(model, pairs, neurons=True, by_position=True)
    assert both.by_position is not None and both.by_position.shape == (4, both.graph.n_edges)


def test_neuron_circuits_are_evaluated_as_others_are() -> None:
    model, pairs = build(d_mlp=4), some_pairs(6)
    circuit = exact(model, pairs, neurons=True)
    top = circuit.top(40)
    complete = discovery.completeness(model, top, pairs, n_random=3, greedy_steps=1, greedy_candidates=2)
    keep = torch.stack([torch.ones_like(top.kept), torch.zeros_like(top.kept), top.kept])
    full, empty, own = ablated_metric(model, pairs, keep, neurons=True).double().mean(1).tolist()
    judged = ablated_metric(model, pairs, keep, neurons=True).double()[:, 1::2].mean(1).tolist()
    share = (judged[2] - judged[1]) / (judged[0] - judged[1])
    assert complete.knockouts["of_circuit"][0] == pytest.approx(share, abs=1e-5)
    frame = discovery.minimality(model, top, pairs)
    assert len(frame) == top.n_kept and any(".n" in source for source in frame["source"])
    row = frame.iloc[-1]
    less = top.kept.clone()
    less[circuit.graph.index(row["source"], row["reader"])] = False
    without = float(ablated_metric(model, pairs, less[None], neurons=True).double().mean())
    assert row["effect"] == pytest.approx((without - own) / abs(full - empty), abs=1e-4)
    tests = discovery.hypothesis_tests(model, top, pairs, n_random=44, permutations=99)
    assert len(tests.edges) == top.n_kept and tests.edges["source"].tolist() == [source for source, _ in top.edges]
    truth = [edge for edge in top.edges if edge[0].startswith("m")][:1]
    merged = discovery.edge_accuracy(circuit, truth, components=True)
    assert merged.n_true == 1 and merged.n_edges == Graph.from_model(model).merged().n_edges
    every = faithfulness(model, circuit, pairs, n_random=2)
    assert every.sizes == "every size" and every.curve["faithfulness"].iloc[every.n_edges] == pytest.approx(1, abs=1e-4)


def test_a_model_without_neurons_at_hand_is_refused() -> None:
    model = build()
    del model.blocks[0].mlp.W_out  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.mlp of Transformer has no hook_post or no W_out"):
        sites_of(model, neurons=True)
    graph = Graph.from_model(planted(), neurons=True)
    assert not graph.has_neurons
