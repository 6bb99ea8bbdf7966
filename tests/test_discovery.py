"""Edge scores and ablations against slow references: a naive masked model and one edge at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import needs_native_bridge
from discovery_models import Naive, at_answers, build, close, hugging_face, planted, some_pairs, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import discovery
from circuits.discovery import Graph, eap, eap_ig_inputs
from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.activations import head_outputs
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName
from circuits.tasks.base import Pairs


@variants
def test_eap_is_the_gradient_of_a_naive_masked_model(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    circuit = eap(model, pairs)
    expected = Naive(model).gradient(pairs)
    assert circuit.per_example is not None and close(circuit.per_example, expected, 1e-4)
    assert close(circuit.scores, expected.mean(0), 1e-4)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["layer-norm", "none"])
def test_eap_ig_averages_gradients_from_near_the_corrupt_to_the_clean_end(variant: str) -> None:
    model, pairs = build(variant), some_pairs(2)
    naive = Naive(model)
    expected = sum(naive.gradient(pairs, k / 3) for k in (1, 2, 3)) / 3
    got = eap_ig_inputs(model, pairs, steps=3).per_example
    assert isinstance(expected, Tensor) and got is not None and close(got, expected, 1e-4)
    assert torch.equal(eap_ig_inputs(model, pairs, steps=1).scores, eap(model, pairs).scores)


@variants
def test_any_set_of_edges_is_ablated_as_in_a_naive_masked_model(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    naive, n = Naive(model), Graph.from_model(model).n_edges
    keep = torch.rand(5, n, generator=torch.Generator().manual_seed(0)) < torch.tensor([0, 0.3, 0.6, 0.9, 2])[:, None]
    with torch.no_grad():
        _, other = naive.run(pairs.corrupt, torch.ones(n))
        _, clean = naive.run(pairs.clean, torch.ones(n))
        for ablation, put in (("corrupt", other), ("mean", [c.mean(0, keepdim=True) for c in clean])):
            got = discovery.ablated_metric(model, pairs, keep, ablation=ablation)
            expected = torch.stack([at_answers(naive.run(pairs.clean, k.float(), put)[0], pairs) for k in keep])
            assert close(got, expected, 1e-4), ablation
        assert close(got[4], at_answers(model(pairs.clean), pairs), 1e-4)
        none = discovery.ablated_metric(model, pairs, keep[:1])[0]
        assert close(none, at_answers(model(pairs.corrupt), pairs), 1e-4)


def test_sets_and_pairs_can_be_taken_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build(), some_pairs(5)
    keep = torch.rand(7, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = {a: discovery.ablated_metric(model, pairs, keep, ablation=a) for a in ("corrupt", "mean")}
    assert close(eap(model, pairs, batch_size=2).scores, eap(model, pairs).scores, 1e-5)
    monkeypatch.setattr("circuits.discovery.evaluate._batch_sizes", lambda *_: (2, 3))
    for ablation, expected in whole.items():
        assert close(discovery.ablated_metric(model, pairs, keep, ablation=ablation), expected, 1e-5)


@variants
def test_sources_and_constants_add_up_to_what_every_reader_reads(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    sites = sites_of(model)
    names = [*sites.source_hooks, *(layer.resid for layer in sites.layers), sites.final]
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean, names_filter=names)
        total = cache[sites.embed] + (cache[sites.pos_embed] if sites.pos_embed else 0)
        for layer in sites.layers:
            assert close(total, cache[layer.resid], 1e-5)
            total = total + head_outputs(layer, cache[layer.z]).sum(0) + (0 if layer.b_O is None else layer.b_O)
            total = total if layer.mlp_out is None else total + cache[layer.mlp_out]
        assert close(total, cache[sites.final], 1e-5)


@variants
def test_a_sources_score_is_the_sum_over_its_edges(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    circuit = eap_ig_inputs(model, pairs, steps=2)
    source, _ = circuit.graph.ends()
    sums = torch.zeros(len(circuit.graph.sources)).index_add(0, source, circuit.scores)
    frame = discovery.node_attribution(model, pairs, steps=2).source_frame().loc[list(circuit.graph.sources)]
    assert close(torch.tensor(frame["score"].to_numpy()), sums.double(), 1e-4)
    assert ((frame["low"] <= frame["score"] + 1e-6) & (frame["score"] <= frame["high"] + 1e-6)).all()


def test_in_a_linear_network_edges_into_the_logits_add_up_to_the_total_effect() -> None:
    model, pairs = build("uniform", attn_only=True), some_pairs()
    circuit = eap(model, pairs)
    _, reader = circuit.graph.ends()
    into_logits = reader == circuit.graph.readers.index("logits")
    with torch.no_grad():
        total = at_answers(model(pairs.corrupt), pairs) - at_answers(model(pairs.clean), pairs)
    assert circuit.per_example is not None
    assert close(circuit.per_example[:, into_logits].sum(1), total, 1e-5)
    # First order is exact: for every edge by itself, and at every point of the path.
    one_off = ~torch.eye(circuit.graph.n_edges, dtype=torch.bool)
    with torch.no_grad():
        exact = discovery.ablated_metric(model, pairs, one_off) - at_answers(model(pairs.clean), pairs)
    assert close(circuit.per_example, exact.T, 1e-4)
    assert close(eap_ig_inputs(model, pairs, steps=4).scores, circuit.scores, 1e-4)


@pytest.mark.parametrize("method", discovery.METHODS)
def test_every_method_recovers_a_planted_circuit(method: str) -> None:
    truth = {("embed", "a0.h1.v"), ("a0.h1", "a1.h0.v"), ("a1.h0", "logits")}
    model = planted()
    pairs = Pairs(
        torch.tensor([[0, 1, 2], [3, 1, 2]]),
        torch.tensor([[3, 1, 2], [1, 0, 0]]),
        torch.tensor([2, 2]),
        torch.tensor([0, 2]),
        torch.tensor([3, 0]),
        "first token",
    )
    learned = method in ("subnetwork-probing", "edge-pruning", "uniform-gradient-sampling")
    options = {"steps": 30} if learned else {}
    circuit = discovery.attribute(model, pairs, method=method.replace("-", "_"), **options)
    of_sources = method in ("exact-nodes", "node-attribution")
    if of_sources or not circuit.signed:  # of whole components, or sizes of what is written: others count too
        assert truth <= set(circuit.threshold(1e-6).edges)
        return
    assert set(circuit.threshold(1e-6).edges) == truth == set(circuit.top(3).edges)
    assert set(circuit.top(12).pruned().edges) >= truth
    result = discovery.faithfulness(model, circuit, pairs)
    row = result.curve.query("ranking == 'absolute' and n_edges == 3").iloc[0]
    assert row["faithfulness"] == pytest.approx(1, abs=1e-5)
    assert row["n_connected"] == 3
    assert result.cmd == pytest.approx(2.5 / result.n_edges, abs=1e-5)
    assert result.cmd < result.cmd_random_interval[0]


def one_edge_through_the_models_own_modules(model: Any, pairs: Pairs, source: Tensor, reader: str) -> Tensor:
    """The metric of the clean run in which one reader sees ``source`` more, by the bridge's own norm and weights."""
    if reader == "logits" or reader.startswith("m"):
        layer = 1 if reader == "logits" else int(reader[1:])
        place = f"blocks.{layer}.hook_resid_post" if reader == "logits" else f"blocks.{layer}.ln2.hook_in"
        hooks: list[Any] = [(place, lambda x, hook: x + source)]
    else:
        part, head, kind = reader.split(".")
        block, index, seen = model.blocks[int(part[1:])], int(head.lstrip("hkv")), {}

        def remember(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def edit(x: Tensor, hook: Any) -> Tensor:
            weight = getattr(block.attn, f"W_{kind.upper()}")[index]
            bias = getattr(block.attn, f"b_{kind.upper()}")
            y = block.ln1.original_component(seen["x"] + source) @ weight
            x = x.clone()
            x[:, :, index] = y if bias is None else y + bias[index]
            return x

        name = f"blocks.{part[1:]}"
        hooks = [(f"{name}.hook_resid_pre", remember), (f"{name}.attn.hook_{kind}", edit)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return at_answers(model(pairs.clean), pairs)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama"])
def test_single_edges_of_hugging_face_models_equal_a_loop_that_patches_one_at_a_time(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    sites = sites_of(model)
    graph = sites.graph
    clean = replacement(model, sites, replace(pairs, corrupt=pairs.clean), "corrupt")
    corrupt = replacement(model, sites, pairs, "corrupt")
    outputs = [corrupt[name] - clean[name] for name in sites.source_hooks]
    by_source = [w for d in outputs for w in ([d] if d.ndim == 3 else d.unbind(2))]
    heads = {f"a{i}.h{h}": layer.W_O[h] for i, layer in enumerate(sites.layers) for h in range(len(layer.W_O))}
    changes = {s: d @ heads[s] if s in heads else d for s, d in zip(graph.sources, by_source, strict=True)}
    expected = torch.stack(
        [one_edge_through_the_models_own_modules(model, pairs, changes[s], r) for s, r in graph.edges]
    )
    got = discovery.ablated_metric(model, pairs, ~torch.eye(graph.n_edges, dtype=torch.bool))
    base = at_answers(model(pairs.clean), pairs).detach()
    assert close(got - base, expected - base, 1e-4)
    assert ("kv" in str(graph.readers)) == (architecture == "Llama")


@needs_native_bridge
@pytest.mark.parametrize("variant", ["none", "layer-norm", "rms-gated-no-positions", "attention-only"])
def test_a_native_bridge_gives_what_our_own_model_gives(variant: str) -> None:
    changes = {"positional": True, "mlp_bias": True, "gated": False} if variant.startswith("rms") else {}
    model, pairs = build(variant, **changes), some_pairs()
    bridge = model.to_bridge()
    assert Graph.from_model(bridge) == Graph.from_model(model)
    assert close(eap(bridge, pairs).scores, eap(model, pairs).scores, 1e-4)
    keep = torch.rand(3, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    ours = discovery.ablated_metric(model, pairs, keep)
    assert close(discovery.ablated_metric(bridge, pairs, keep), ours, 1e-4)


def test_gradients_of_the_mask_go_through_the_ablated_model() -> None:
    model, pairs = build(), some_pairs()
    sites = sites_of(model)
    keep = torch.ones(1, sites.graph.n_edges, requires_grad=True)
    logits = ablated_logits(model, sites, pairs.clean, replacement(model, sites, pairs, "corrupt"), keep)[0]
    (gradient,) = torch.autograd.grad(at_answers(logits, pairs).mean(), keep)
    assert close(-gradient[0], eap(model, pairs).scores, 1e-4)


def test_graph_sizes_and_order() -> None:
    assert Graph.build(2, 4, positions=False).n_edges == 110
    assert Graph.build(4, 8, positions=False).n_edges == 1519
    graph = Graph.build(1, 2, n_kv_heads=1, parallel=True)
    assert graph.sources == ("embed", "pos_embed", "a0.h0", "a0.h1", "m0")
    assert graph.readers == ("a0.h0.q", "a0.h1.q", "a0.kv0.k", "a0.kv0.v", "m0", "logits")
    assert graph.visible == (2, 2, 2, 2, 2, 5)
    assert graph.feeds == ((2,), (3,), (2, 3), (2, 3), (4,), ())
    source, reader = graph.ends()
    assert [(graph.sources[s], graph.readers[r]) for s, r in zip(source, reader, strict=True)] == list(graph.edges)
    assert [graph.index(*edge) for edge in graph.edges] == list(range(graph.n_edges))
    with pytest.raises(UnknownName, match=r"unknown source 'a0.h7': did you mean"):
        graph.index("a0.h7", "m0")
    with pytest.raises(BadInput, match="computed before"):
        graph.index("m0", "a0.h0.q")


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6), parallel=st.booleans(), kv=st.sampled_from([None, 1]))
@settings(max_examples=40)
def test_connected_edges_are_those_on_a_path_from_embeddings_to_logits(
    seed: int, share: float, parallel: bool, kv: int | None
) -> None:
    graph = Graph.build(2, 2, parallel=parallel, n_kv_heads=kv)
    kept = torch.rand(3, graph.n_edges, generator=torch.Generator().manual_seed(seed)) < share
    for row, connected in zip(kept, graph.connected(kept), strict=True):
        edges = [edge for edge, k in zip(graph.edges, row.tolist(), strict=True) if k]
        whole = nx.DiGraph()
        whole.add_nodes_from(["embed", "pos_embed", *graph.readers])
        whole.add_edges_from((s, f"in {r}") for s, r in edges)
        for reader, fed in zip(graph.readers, graph.feeds, strict=True):
            whole.add_edges_from((f"in {reader}", graph.sources[s]) for s in fed)
        starts = nx.descendants(whole, "embed") | nx.descendants(whole, "pos_embed") | {"embed", "pos_embed"}
        finish = nx.ancestors(whole, "in logits") | {"in logits"} if "in logits" in whole else set()
        expected = [(s, r) for s, r in edges if s in starts and f"in {r}" in finish]
        assert [e for e, k in zip(graph.edges, connected.tolist(), strict=True) if k] == expected


def test_small_graphs_are_patched_exactly_unless_a_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = some_pairs(2)
    assert discovery.attribute(build(), pairs).method == "exact"
    monkeypatch.setattr(discovery, "EXACT_UP_TO", discovery.Graph.from_model(build()).n_edges - 1)
    assert discovery.attribute(build(), pairs).method == "eap-ig-inputs"
    assert discovery.attribute(build(), pairs, method="eap").method == "eap"
