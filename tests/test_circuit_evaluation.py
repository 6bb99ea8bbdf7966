"""Hypothesis tests, completeness, minimality, stability and accuracy of circuits."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from discovery_models import build, planted, some_pairs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from circuits import discovery
from circuits.discovery import Circuit, Graph, ablated_metric, eap
from circuits.discovery.edge_accuracy import areas
from circuits.discovery.hypothesis_tests import equivalence_p, holm, hsic
from circuits.discovery.random_circuits import random_circuits, random_path
from circuits.discovery.stability import jaccard
from circuits.errors import BadInput, UnknownName

TRUTH = (("embed", "a0.h1.v"), ("a0.h1", "a1.h0.v"), ("a1.h0", "logits"))


@pytest.mark.parametrize(
    "graph",
    [Graph.build(2, 2), Graph.build(3, 4, n_kv_heads=2, positions=False), Graph.build(2, 2, attn_only=True)],
)
def test_random_paths_and_circuits_lead_from_embedding_to_logits(graph: Graph) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        path = [graph.edges[i] for i in random_path(graph, generator)]
        assert path[0][1] == "logits" and path[-1][0] in ("embed", "pos_embed")
        for (source, _), (_, reader) in itertools.pairwise(path):
            assert graph.sources.index(source) in graph.feeds[graph.readers.index(reader)]
    drawn = random_circuits(graph, 9, 20, seed=1)
    assert torch.equal(drawn, random_circuits(graph, 9, 20, seed=1))
    assert torch.equal(graph.connected(drawn), drawn)
    for size in (1, 2, 9, graph.n_edges // 2, graph.n_edges - 1):
        assert random_circuits(graph, size, 4, seed=size).sum(1).tolist() == [size] * 4
    banned = torch.zeros(graph.n_edges, dtype=torch.bool)
    banned[: graph.n_edges // 2] = True
    assert not bool((random_circuits(graph, 9, 20, seed=1, without=banned) & banned).any())
    with pytest.raises(BadInput, match="n_edges = 9999"):
        random_circuits(graph, 9999, 1)


def test_skipped_sources_are_left_out_of_the_choice_and_not_of_the_outcome() -> None:
    graph = Graph.build(1, 1, attn_only=True)
    generator = torch.Generator().manual_seed(0)
    skip = frozenset({graph.sources.index("pos_embed")})
    drawn = [random_path(graph, generator, skip=skip) for _ in range(600)]
    assert {graph.edges[i][0] for path in drawn for i in path} == {"embed", "a0.h0"}
    # the logits see the token embedding and the head: were paths rejected, two of three would be the short one
    assert 0.43 < np.mean([len(path) == 1 for path in drawn]) < 0.57
    graph = Graph.build(2, 2)
    counted = graph.counted(positions=False)
    for size in (1, 2, 9, int(counted.sum()) - 1, int(counted.sum())):
        circuits = random_circuits(graph, size, 6, seed=size, skip=skip)
        assert circuits.sum(1).tolist() == [size] * 6 and not bool((circuits & ~counted).any())
        assert torch.equal(graph.connected(circuits), circuits)
    with pytest.raises(BadInput, match="n_edges = 47: expected 0 to 46"):
        random_circuits(graph, 47, 1, skip=skip)
    with pytest.raises(BadInput, match=r"skip = \[0, 1\]: no path is left"):
        random_path(graph, generator, skip=frozenset({0, 1}))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float]) -> None:
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - step) > level:
                break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a <= level} == rejected
    assert all(a >= v for a, v in zip(adjusted, p, strict=True))


@given(st.integers(1, 60), st.floats(0.01, 0.3), st.data())
@settings(max_examples=50)
def test_equivalence_p_is_the_tail_of_the_worst_null(n: int, epsilon: float, data: st.DataObject) -> None:
    above = data.draw(st.integers(0, n))
    expected = sum(
        float(binom.pmf(k, n, 0.5 + epsilon)) for k in range(n + 1) if abs(k - n / 2) >= abs(above - n / 2) - 1e-9
    )
    assert equivalence_p(above, n, epsilon) == pytest.approx(min(1.0, expected), abs=1e-9)
    assert equivalence_p(above, n, epsilon) == pytest.approx(equivalence_p(n - above, n, epsilon))


def test_equivalence_keeps_its_level_under_the_null() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.55, size=2000)
    assert np.mean([equivalence_p(int(k), 200, 0.1) <= 0.05 for k in draws]) <= 0.05
    certain = np.random.default_rng(0).binomial(200, 0.8, size=200)
    assert np.mean([equivalence_p(int(k), 200, 0.1) <= 0.05 for k in certain]) > 0.9


def test_independence_keeps_its_level_and_finds_dependence() -> None:
    generator = torch.Generator().manual_seed(0)
    p_null, p_dependent = [], []
    for i in range(60):
        x, y = torch.randn(2, 40, generator=generator)
        p_null.append(hsic(x, y, 99, i)[1])
        p_dependent.append(hsic(x, x**2 + 0.3 * y, 99, i)[1])
    assert np.mean(np.array(p_null) <= 0.05) <= 0.13  # 60 draws at 5 %: 0.13 is beyond the 99th percentile
    assert np.mean(np.array(p_dependent) <= 0.05) > 0.8


def test_the_criterion_is_the_product_of_centred_kernels() -> None:
    x, y = torch.randn(2, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def kernel(v: torch.Tensor) -> torch.Tensor:
        distances = torch.pdist(v[:, None])
        # torch's median of an even number of values is the lower of the middle two, as over the symmetric matrix
        return torch.exp(-(torch.cdist(v[:, None], v[:, None]) ** 2) / (2 * distances.median() ** 2))

    h = torch.eye(7, dtype=torch.float64) - 1 / 7
    expected = float(torch.trace(kernel(x) @ h @ kernel(y) @ h)) / 49
    assert hsic(x, y, 1, 0)[0] == pytest.approx(expected, rel=1e-6)


def test_a_planted_circuit_passes_and_a_random_one_of_its_size_does_not() -> None:
    model, pairs, truth = planted(), some_pairs(24, 3, 4), TRUTH
    graph = Graph.from_model(model)
    found = eap(model, pairs)
    true = Circuit(graph, found.scores, graph.mask(truth), "planted", "logit_difference")
    # Random circuits share an edge with the only path that matters in one of three draws: hence the lower quantile.
    tests = discovery.hypothesis_tests(model, true, pairs, n_random=100, quantile=0.5)
    assert tests["sufficiency"].rejected and tests["partial necessity"].rejected
    assert not tests["equivalence"].rejected and not tests["minimality"].rejected
    assert len(tests.to_frame()) == 5 and "sufficiency" in tests._repr_html_()
    drawn = random_circuits(graph, len(truth), 40, seed=5)
    missing = next(row for row in drawn if not bool((row & graph.mask(truth)).sum() == len(truth)))
    other = Circuit(graph, found.scores, missing, "random", "logit_difference")
    assert not discovery.hypothesis_tests(model, other, pairs, n_random=60)["sufficiency"].rejected


def test_redundant_edges_are_called_so() -> None:
    model, pairs, truth = planted(), some_pairs(24, 3, 4), TRUTH
    graph = Graph.from_model(model)
    scores = eap(model, pairs).scores
    kept = graph.mask(truth)
    idle = int((~kept & (scores.abs() < 1e-6)).nonzero()[0]) if bool((~kept & (scores.abs() < 1e-6)).any()) else None
    assert idle is not None, "the planted model must have an edge that does nothing"
    kept[idle] = True
    tests = discovery.hypothesis_tests(model, Circuit(graph, scores, kept, "x", "m"), pairs, n_random=60)
    edges = tests.edges.set_index(["source", "reader"])
    assert edges.loc[[graph.edges[idle]], "effect"].item() == pytest.approx(0, abs=1e-5)
    assert edges.loc[[graph.edges[idle]], "redundant"].item() and tests["minimality"].rejected
    needed = edges.loc[[edge for edge in truth]]
    assert float(needed["effect"].min()) > 0.1 and not needed["redundant"].any()


@pytest.mark.parametrize("ablation", ["corrupt", "mean", "zero"])
@pytest.mark.parametrize("reference", ["model", "complement"])
def test_random_circuits_hold_no_edge_that_carries_nothing(
    ablation: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = build(), some_pairs(6)
    circuit = eap(model, pairs).top(9)
    circuit.kept[circuit.graph.index("pos_embed", "logits")] = True
    seen: list[torch.Tensor] = []

    def measure(model: object, pairs: object, keep: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append(keep)
        return torch.rand(len(keep), 6, generator=torch.Generator().manual_seed(0))

    # the function of that name hides its module
    monkeypatch.setattr(sys.modules["circuits.discovery.hypothesis_tests"], "ablated_metric", measure)
    found = discovery.hypothesis_tests(
        model, circuit, pairs, ablation=ablation, n_random=50, permutations=99, reference=reference
    )
    counted = circuit.graph.counted(positions=ablation == "zero")
    size = int((circuit.kept & counted).sum())
    assert size == (10 if ablation == "zero" else 9) == found.n_edges == len(found.edges)
    keep = seen[0]
    assert bool(keep[:, ~counted].all())
    random, removed = keep[3:53] & counted, ~keep[53:103]
    assert random.sum(1).tolist() == removed.sum(1).tolist() == [size] * 50
    assert torch.equal(circuit.graph.connected(random), random)
    shared = (removed & circuit.kept).any(1)
    assert not bool(shared.any()) if reference == "complement" else torch.equal(random, removed)
    assert len(keep) == 203 + size


def test_a_complement_without_circuits_of_the_size_is_refused_and_so_is_an_unknown_one() -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs).top(40)
    with pytest.raises(BadInput, match=r"a random circuit of the others has \d+: expected as many"):
        discovery.hypothesis_tests(model, circuit, pairs, reference="complement")
    with pytest.raises(UnknownName, match="unknown reference of partial necessity 'all'"):
        discovery.hypothesis_tests(model, circuit, pairs, reference="all")


def test_many_edges_do_not_hide_what_a_circuit_leaves_out() -> None:
    model, pairs = build(), some_pairs(40)
    circuit = eap(model, pairs)
    # all but the most important edges: what they leave out still says what the model does
    rest = Circuit(circuit.graph, circuit.scores, ~circuit.top(4).kept, "rest", "logit_difference")
    found = discovery.hypothesis_tests(model, rest, pairs, n_random=50, permutations=200)
    p = found["independence"]
    assert rest.n_kept > 50 and p.p_adjusted <= 5 * p.p_value
    assert found["minimality"].p_value == found.edges["p_adjusted"].min()
    assert found["minimality"].p_adjusted >= found["minimality"].p_value


@pytest.mark.parametrize(
    ("draws", "least"), [({"n_random": 0}, 44), ({"n_random": 43}, 44), ({"permutations": 98}, 99)]
)
def test_too_few_draws_for_any_outcome_to_be_significant_are_refused(draws: dict[str, int], least: int) -> None:
    model, pairs = build(), some_pairs()
    name, value = next(iter(draws.items()))
    with pytest.raises(BadInput, match=rf"{name} = {value}: .* expected >= {least}"):
        discovery.hypothesis_tests(model, eap(model, pairs).top(5), pairs, **draws)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"epsilon": 0.0}, {"quantile": 1.0}, {"level": 2.0}])
def test_rates_outside_zero_to_one_are_named(changes: dict[str, float]) -> None:
    model, pairs = build(), some_pairs()
    name, value = next(iter(changes.items()))
    with pytest.raises(BadInput, match=f"{name} = {value}"):
        discovery.hypothesis_tests(model, eap(model, pairs).top(5), pairs, **changes)  # type: ignore[arg-type]


def test_empty_whole_and_foreign_circuits_are_refused() -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs)
    for bad in (circuit, circuit.top(0)):
        with pytest.raises(BadInput, match="expected some but not all"):
            discovery.hypothesis_tests(model, bad, pairs)
    for function in (discovery.completeness, discovery.minimality):
        with pytest.raises(BadInput, match="keeps no edge"):
            function(model, circuit.top(0), pairs)
    foreign = eap(build("attention-only"), pairs).top(3)
    for function in (discovery.completeness, discovery.minimality, discovery.hypothesis_tests):
        with pytest.raises(BadInput, match="another graph"):
            function(model, foreign, pairs)


def test_the_whole_model_is_complete_and_minimality_is_one_edge_at_a_time() -> None:
    model, pairs = build(), some_pairs(6)
    circuit = eap(model, pairs)
    result = discovery.completeness(model, circuit, pairs, n_random=5, greedy_steps=2, greedy_candidates=3)
    assert result.score == pytest.approx(0, abs=1e-6)
    assert list(result.knockouts["kind"]) == ["none", *["random"] * 5, "greedy", "greedy", "circuit"]
    assert result.knockouts.loc[0, "of_model"] == pytest.approx(1) and "0.000" in result._repr_html_()
    figure = result.figure()
    assert len(figure.data) == 5 and figure.layout.title.text and figure.layout.xaxis.title.text

    top = circuit.top(12)
    frame = discovery.minimality(model, top, pairs)
    assert len(frame) == 12 and frame["effect"].abs().is_monotonic_increasing
    every = torch.ones(circuit.graph.n_edges, dtype=torch.bool)
    for row in frame.itertuples():
        less = top.kept.clone()
        less[circuit.graph.index(row.source, row.reader)] = False
        m = ablated_metric(model, pairs, torch.stack([every, ~every, top.kept, less])).double().mean(1)
        assert row.effect == pytest.approx(float((m[3] - m[2]) / (m[0] - m[1]).abs()), abs=1e-4)
        assert row.low <= row.effect <= row.high


def test_incompleteness_is_the_distance_after_the_same_knockout() -> None:
    model, pairs = build(), some_pairs(6)
    top = eap(model, pairs).top(20)
    result = discovery.completeness(model, top, pairs, n_random=0, greedy_steps=1, greedy_candidates=20)
    every, none = torch.ones_like(top.kept), torch.zeros_like(top.kept)
    # the search saw every second pair, and what it found is measured on the others
    m = ablated_metric(model, pairs, torch.stack([every, none, top.kept, ~top.kept])).double()[:, 1::2].mean(1)
    assert result.knockouts.loc[0, "incompleteness"] == pytest.approx(
        float(abs((m[2] - m[0]) / (m[0] - m[1]))), abs=1e-5
    )
    last = result.knockouts.iloc[-1]
    assert last["kind"] == "circuit" and last["of_circuit"] == pytest.approx(0, abs=1e-5)
    assert last["of_model"] == pytest.approx(float((m[3] - m[1]) / (m[0] - m[1])), abs=1e-5)
    one_by_one = []
    for i in top.kept.nonzero().flatten().tolist():
        removed = torch.zeros_like(top.kept)
        removed[i] = True
        both = ablated_metric(model, pairs, torch.stack([top.kept & ~removed, ~removed])).double()
        one_by_one.append([float(d.mean().abs() / (m[0] - m[1]).abs()) for d in (both[0] - both[1]).view(-1, 2).T])
    _, measured = max(one_by_one)
    assert result.knockouts.loc[1, "incompleteness"] == pytest.approx(measured, abs=1e-5) and result.n_pairs == 3


def test_stability_is_one_for_equal_pairs_and_low_for_noise() -> None:
    graph = Graph.build(2, 2)
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, graph.n_edges, generator=generator)
    same = Circuit.of_effects(graph, row.repeat(20, 1), method="x", metric="m", details={})
    noise = Circuit.of_effects(
        graph, torch.randn(20, graph.n_edges, generator=generator), method="x", metric="m", details={}
    )
    steady, loose = discovery.stability(same, 10), discovery.stability(noise, 10)
    assert steady.jaccard == pytest.approx(1) and steady.interval == pytest.approx((1, 1))
    assert loose.jaccard < 0.8 and loose.interval[0] <= loose.jaccard <= loose.interval[1]
    assert float(loose.frequency.sum()) == pytest.approx(10)
    assert steady.to_frame()["frequency"].tolist() == [1.0] * 10 and "Jaccard" in steady._repr_html_()
    bare = Circuit(graph, row[0], torch.ones(graph.n_edges, dtype=torch.bool), "x", "m")
    with pytest.raises(BadInput, match="no scores per pair"):
        discovery.stability(bare, 10)
    with pytest.raises(BadInput, match="n_edges = 0"):
        discovery.stability(same, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=10))
def test_jaccard_is_shared_over_either(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    either = sum(x or y for x, y in pairs)
    expected = sum(x and y for x, y in pairs) / either if either else 1.0
    assert float(jaccard(a, b)) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_areas_are_scikit_learns(items: list[tuple[int, bool]], seed: int) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    true = np.array([flag for _, flag in items])
    assume(0 < true.sum() < len(true))
    scores = np.array([[float(value) for value, _ in items], np.random.default_rng(seed).normal(size=len(items))])
    auroc, precision = areas(scores, true)
    for row, a, p in zip(scores, auroc, precision, strict=True):
        assert a == pytest.approx(roc_auc_score(true, row)) and p == pytest.approx(average_precision_score(true, row))


def test_edge_accuracy_is_the_share_of_rightly_ordered_pairs_of_edges() -> None:
    noise = torch.randn(8, 61, generator=torch.Generator().manual_seed(3))
    circuit = Circuit.of_effects(Graph.build(2, 2), noise, method="x", metric="m", details={})
    truth = [circuit.graph.edges[i] for i in (0, 7, 20, 33)]
    got = discovery.edge_accuracy(circuit, truth)
    sizes = circuit.scores.abs()
    is_true = circuit.graph.mask(truth)
    above = (sizes[is_true][:, None] > sizes[~is_true]).double()
    assert got.auroc == pytest.approx(float(above.mean()), abs=1e-9)
    order = is_true[sizes.argsort(descending=True, stable=True)].double()
    precision = order.cumsum(0) / torch.arange(1, len(order) + 1)
    assert got.average_precision == pytest.approx(float(precision[order > 0].mean()), abs=1e-9)
    assert got.auroc_interval is not None and got.auroc_interval[0] <= got.auroc_interval[1]
    assert (got.n_true, got.n_edges) == (4, 61) and "AUROC" in got._repr_html_()
    merged = discovery.edge_accuracy(circuit, [("embed", "a0.h0.q"), ("embed", "a1.h1.k")], components=True)
    assert merged.n_true == 2 and merged.n_edges < 61
    with pytest.raises(BadInput, match="0 of 61 edges are true"):
        discovery.edge_accuracy(circuit, [])
