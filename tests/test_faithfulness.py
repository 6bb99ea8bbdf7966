"""The faithfulness curve: every size from what tells one from the next, the benchmark's numbers, an equal control."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from discovery_models import SHAPES, VARIANTS, at_answers, build, close, model_of, some_pairs
from torch import Tensor

from circuits.discovery import MIB_SHARES, Circuit, Graph, ablated_metric, eap, exact, faithfulness, logit_difference
from circuits.discovery import evaluate as evaluation
from circuits.discovery.evaluate import _prefixes, _pruned
from circuits.discovery.nested import nested_metric
from circuits.discovery.random_circuits import random_sizes
from circuits.errors import BadInput


def shuffled(graph: Graph, seed: int) -> torch.Tensor:
    """Sets of edges, the most first, each of which holds the next, in no order of the graph."""
    order = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(seed))
    return graph.connected(_prefixes(order, graph.n_edges, range(graph.n_edges + 1))).flip(0)


@pytest.mark.parametrize(("shape", "ablation"), [*((s, "corrupt") for s in SHAPES), *((s, "mean") for s in VARIANTS)])
def test_nested_circuits_are_what_they_are_one_by_one(shape: str, ablation: str) -> None:
    model, pairs = model_of(shape), some_pairs(6)
    keep = shuffled(Graph.from_model(model), seed=2)
    got = nested_metric(model, pairs, keep, logit_difference, ablation=ablation)
    assert got is not None
    assert close(got, ablated_metric(model, pairs, keep, ablation=ablation), 1e-4)
    assert nested_metric(model, pairs, keep, logit_difference, ablation="zero") is None


def test_half_precision_is_not_summed_up_step_by_step() -> None:
    model, pairs = build().to(torch.bfloat16), some_pairs()
    keep = shuffled(Graph.from_model(model), seed=1)
    assert nested_metric(model, pairs, keep, logit_difference) is None
    expected = faithfulness(build(), eap(build(), pairs), pairs, n_random=2)
    assert faithfulness(model, eap(build(), pairs), pairs, n_random=2).cpr == pytest.approx(expected.cpr, rel=0.2)


def test_sets_that_are_not_nested_are_refused_and_gaps_between_them_are_not() -> None:
    model, pairs = build(), some_pairs(5)
    keep = shuffled(Graph.from_model(model), seed=4)
    some = keep[[7, 20, 33, 60]]
    got = nested_metric(model, pairs, some, logit_difference)
    assert got is not None and close(got, ablated_metric(model, pairs, some), 1e-4)
    with pytest.raises(BadInput, match="not nested"):
        nested_metric(model, pairs, some.flip(0), logit_difference)


def test_every_size_is_the_default_where_it_is_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build(n_heads=4), some_pairs()
    circuit = eap(model, pairs)
    usual = faithfulness(model, circuit, pairs, n_random=2)
    n = usual.n_edges
    assert usual.curve.query("ranking == 'signed'")["n_edges"].tolist() == [*range(n + 1)]
    assert usual.sizes == "every size" and "every size" in usual._repr_html_()
    monkeypatch.setattr(evaluation, "EVERY_SIZE_UP_TO", n * len(pairs))
    assert faithfulness(model, circuit, pairs, n_random=2).sizes == "every size"
    monkeypatch.setattr(evaluation, "EVERY_SIZE_UP_TO", n * len(pairs) - 1)
    few = faithfulness(model, circuit, pairs, n_random=2)
    sizes = few.curve.query("ranking == 'signed'")["n_edges"].tolist()
    assert sizes[:2] == [0, 1] and sizes[-1] == n and len(sizes) <= 25
    assert few.sizes == f"{len(sizes)} sizes in geometric progression" in few.figure().layout.title.text
    both = usual.curve.merge(few.curve, on=["ranking", "n_edges"]).query("ranking != 'random'")
    assert len(both) == 2 * len(sizes) and both["metric_x"].tolist() == pytest.approx(
        both["metric_y"].tolist(), abs=1e-4
    )
    assert faithfulness(model, circuit, pairs, shares=[0.1, 0.5, 1], n_random=2).sizes == "3 given sizes"
    monkeypatch.setattr(evaluation, "EVERY_SIZE_UP_TO", n * len(pairs))
    monkeypatch.setattr(evaluation, "EVERY_EDGE_UP_TO", n - 1)  # which circuit has which edge is edges^2 numbers
    assert faithfulness(model, circuit, pairs, n_random=2).sizes == few.sizes


def test_circuits_are_pruned_a_few_sizes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph.build(2, 2)
    order, sizes = torch.randperm(61, generator=torch.Generator().manual_seed(0)), [*range(62)]
    whole = graph.connected(_prefixes(order, 61, sizes))
    rows: list[int] = []
    connected = Graph.connected
    monkeypatch.setattr(Graph, "connected", lambda self, kept: rows.append(len(kept)) or connected(self, kept))
    assert torch.equal(_pruned(graph, order, sizes, None), whole) and rows == [62]
    rows.clear()
    assert torch.equal(_pruned(graph, order, sizes, 40_000), whole) and max(rows) < 10 and sum(rows) == 62


def test_areas_of_both_rankings_and_over_the_sizes_of_the_control() -> None:
    model, pairs = build(n_heads=4), some_pairs(6)
    result = faithfulness(model, exact(model, pairs), pairs)
    frame, n = result.to_frame(), result.n_edges
    control = result.curve.query("ranking == 'random'")["n_edges"].tolist()
    assert len(control) == 9 and control[0] == 0 and control[-1] == n
    for name, ranking in (
        ("cpr", "signed"),
        ("cpr_absolute", "absolute"),
        ("cmd", "absolute"),
        ("cmd_signed", "signed"),
    ):
        f = result.curve[result.curve["ranking"] == ranking].set_index("n_edges")["faithfulness"]
        f = f if name.startswith("cpr") else (1 - f).abs()
        whole = float((f.to_numpy()[1:] + f.to_numpy()[:-1]).sum() / 2 / n)
        few = sum((f[b] + f[a]) / 2 * (b - a) / n for a, b in itertools.pairwise(control))
        row = frame.loc[name]
        assert row["ranking"] == ranking and row["value"] == getattr(result, name) == pytest.approx(whole)
        assert row["at_control"] == pytest.approx(few) and row["low"] <= row["value"] <= row["high"]
        assert row["random"] == getattr(result, f"{name[:3]}_random")
    assert (result.cpr_at_control, result.cmd_at_control) == (frame.at_control["cpr"], frame.at_control["cmd"])
    # what the coarser sum alone makes of the same curve
    assert abs(result.cmd_at_control - result.cmd) > 1e-3


def test_a_short_curve_has_its_control_at_every_size() -> None:
    model, pairs = build(), some_pairs()
    shares = [i / 24 for i in range(25)]
    result = faithfulness(model, eap(model, pairs), pairs, shares=shares, n_random=2)
    assert len(result.curve.query("ranking == 'random'")) == 25
    assert result.cpr_at_control == pytest.approx(result.cpr) and result.cmd_at_control == pytest.approx(result.cmd)
    longer = faithfulness(model, eap(model, pairs), pairs, shares=[i / 25 for i in range(26)], n_random=2)
    assert len(longer.curve.query("ranking == 'random'")) == 9


def test_a_model_that_runs_whole_has_the_same_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs)
    usual = faithfulness(model, circuit, pairs, n_random=2)
    monkeypatch.setattr(evaluation, "nested_metric", lambda *_, **__: None)
    whole = faithfulness(model, circuit, pairs, n_random=2)
    assert whole.curve["faithfulness"].tolist() == pytest.approx(usual.curve["faithfulness"].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "graph",
    [
        Graph.build(2, 2),
        Graph.build(2, 4, n_kv_heads=2, positions=False),
        Graph.build(2, 2, attn_only=True),
        Graph.build(2, 2, parallel=True),
        Graph.build(1, 2, neurons=3),
    ],
)
def test_random_circuits_have_every_size_and_no_loose_end(graph: Graph) -> None:
    allowed = torch.tensor([source != "pos_embed" for source, _ in graph.edges])
    sizes = range(int(allowed.sum()) + 1)
    drawn = random_sizes(graph, sizes, 2, allowed=allowed, seed=3)
    assert drawn.sum(-1).tolist() == [[*sizes]] * 2
    assert torch.equal(graph.connected(drawn), drawn) and not bool((drawn & ~allowed).any())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, random_sizes(graph, sizes, 2, allowed=allowed, seed=3))


def test_random_circuits_are_as_large_as_the_curve_says() -> None:
    model, pairs = build(), some_pairs()
    result = faithfulness(model, eap(model, pairs), pairs)
    control = result.curve[result.curve["ranking"] == "random"]
    assert control["n_connected"].tolist() == control["n_edges"].tolist() and len(control) == 9
    found = result.curve[result.curve["ranking"] != "random"]
    assert (found["n_connected"] <= found["n_edges"]).all()
    assert (found["n_connected"] < found["n_edges"]).any(), "the pairs do not show that found circuits are pruned"


class Benchmark:
    """The benchmark's evaluation, written from its description: its own graph, choice, pruning and areas."""

    def __init__(self, model: Any, circuit: Circuit) -> None:
        cfg, self.graph = model.cfg, circuit.graph
        parallel, mlps = bool(getattr(cfg, "parallel_attn_mlp", False)), not getattr(cfg, "attn_only", False)
        effects = dict(zip(circuit.graph.edges, circuit.scores.tolist(), strict=True))
        self.scores: dict[tuple[str, str, str], float] = {}
        stream = ["input"]
        for layer in range(cfg.n_layers):
            heads = [f"a{layer}.h{h}" for h in range(cfg.n_heads)]
            into = [(head, f".{kind}") for head in heads for kind in "qkv"]
            self.add(stream, into, effects)
            if mlps:
                self.add(stream if parallel else [*stream, *heads], [(f"m{layer}", "")], effects)
            stream += heads + ([f"m{layer}"] if mlps else [])
        self.add(stream, [("logits", "")], effects)

    def add(self, parents: list[str], into: list[tuple[str, str]], effects: dict[tuple[str, str], float]) -> None:
        for parent in parents:
            for child, kind in into:
                name = "embed" if parent == "input" else parent
                # there a large score says that the edge helps
                self.scores[parent, child, kind] = -effects[name, child + kind]

    def pruned(self, n: int, absolute: bool) -> set[tuple[str, str, str]]:
        value = {edge: abs(score) if absolute else score for edge, score in self.scores.items()}
        kept = set(sorted(value, key=lambda edge: value[edge], reverse=True)[:n])
        while True:
            children, parents = {c for _, c, _ in kept}, {p for p, _, _ in kept}
            left = {
                (p, c, k) for p, c, k in kept if (p == "input" or p in children) and (c == "logits" or c in parents)
            }
            if left == kept:
                return kept
            kept = left

    def metric(self, model: Any, pairs: Any, kept: set[tuple[str, str, str]], ablation: str) -> float:
        names = {("embed" if parent == "input" else parent, child + kind) for parent, child, kind in kept}
        mask = self.graph.mask(names) | torch.tensor([source == "pos_embed" for source, _ in self.graph.edges])
        return float(ablated_metric(model, pairs, mask[None], ablation=ablation)[0].double().mean())

    def areas(self, model: Any, pairs: Any, ablation: str) -> dict[str, Any]:
        baseline = float(at_answers(model(pairs.clean), pairs).double().mean())
        corrupted = self.metric(model, pairs, set(), ablation)
        out: dict[str, Any] = {}
        for absolute in (False, True):
            circuits = [self.pruned(int(share * len(self.scores)), absolute) for share in MIB_SHARES]
            f = [(self.metric(model, pairs, c, ablation) - corrupted) / (baseline - corrupted) for c in circuits]
            under = from_one = 0.0
            for i in range(len(f) - 1):
                width = MIB_SHARES[i + 1] - MIB_SHARES[i]
                from_one += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
                under += width * (f[i] + f[i + 1]) / 2
            out["cmd" if absolute else "cpr"] = from_one if absolute else under
            out[f"sizes {absolute}"] = [len(c) for c in circuits]
        return out


@pytest.mark.parametrize(
    ("shape", "ablation"),
    [
        ("layer-norm", "corrupt"),
        ("attention-only", "zero"),
        ("rms-gated-no-positions", "mean"),
        ("GPTNeoX", "corrupt"),
        ("GPT2", "mean"),
    ],
)
def test_the_benchmarks_areas_are_those_of_the_benchmark(shape: str, ablation: str) -> None:
    model, pairs = model_of(shape), some_pairs(6)
    circuit = exact(model, pairs)
    peer = Benchmark(model, circuit)
    with torch.no_grad():
        expected = peer.areas(model, pairs, ablation)
    result = faithfulness(model, circuit, pairs, shares=MIB_SHARES, ablation=ablation, n_random=2)
    assert result.n_edges == len(peer.scores) and result.sizes == "the ten sizes of MIB"
    assert result.cpr == pytest.approx(expected["cpr"], abs=1e-3)
    assert result.cmd == pytest.approx(expected["cmd"], abs=1e-3)
    for ranking, absolute in (("signed", False), ("absolute", True)):
        part = result.curve[result.curve["ranking"] == ranking]
        assert part["n_edges"].tolist() == [int(share * len(peer.scores)) for share in MIB_SHARES]
        assert part["n_connected"].tolist() == expected[f"sizes {absolute}"]


def test_edges_from_positions_count_where_they_are_asked_for() -> None:
    model, pairs = build(), some_pairs()
    circuit = exact(model, pairs, ablation="zero")
    without, with_them = (
        faithfulness(model, circuit, pairs, ablation="zero", positions=on, n_random=2) for on in (False, True)
    )
    graph = circuit.graph
    assert with_them.n_edges == graph.n_edges == without.n_edges + 15
    positions = torch.tensor([source == "pos_embed" for source, _ in graph.edges])
    empty = ablated_metric(model, pairs, torch.stack([positions, positions & False]), ablation="zero").mean(1)
    assert without.metric_empty == pytest.approx(float(empty[0]), abs=1e-4)
    assert with_them.metric_empty == pytest.approx(float(empty[1]), abs=1e-4)
    assert abs(float(empty[0] - empty[1])) > 1e-2


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_the_model_as_it_was(fails: bool) -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs)
    seen: list[int] = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = 0

    def metric(logits: Tensor, pairs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls > 30:
            raise ValueError("the caller's own")
        return logit_difference(logits, pairs)

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(len(x)))]):
        if fails:
            with pytest.raises(ValueError, match="the caller's own"):
                faithfulness(model, circuit, pairs, metric=metric)
        else:
            faithfulness(model, circuit, pairs, metric=metric)
        hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert hooks == {"blocks.0.hook_resid_pre": 1} and seen
