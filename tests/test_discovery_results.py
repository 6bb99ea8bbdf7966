"""Circuits and faithfulness curves as results: views, intervals, areas, figures, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from discovery_models import at_answers, build, close, planted, some_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import discovery
from circuits.discovery import MIB_SHARES, Circuit, Faithfulness, Graph, eap, faithfulness
from circuits.discovery.curves import Curve, summarise
from circuits.errors import BadInput, CorruptRun, IncompatibleRun


def some_circuit(n: int = 12) -> Circuit:
    return eap(build(), some_pairs(n))


def test_top_threshold_and_pruned_keep_what_they_say() -> None:
    circuit = some_circuit()
    sizes = circuit.scores.abs()
    top = circuit.top(7)
    assert top.n_kept == 7 == len(top.edges)
    assert float(sizes[top.kept].min()) >= float(sizes[~top.kept].max())
    signed = circuit.top(7, absolute=False)
    assert float(circuit.scores[signed.kept].max()) <= float(circuit.scores[~signed.kept].min())
    cut = float(sizes.median())
    assert torch.equal(circuit.threshold(cut).kept, sizes >= cut)
    assert torch.equal(top.pruned().kept, circuit.graph.connected(top.kept))
    assert torch.equal(top.pruned().scores, circuit.scores) and top.pruned().per_example is circuit.per_example
    assert circuit.n_kept == circuit.graph.n_edges and circuit.top(0).edges == ()
    with pytest.raises(BadInput, match="n = 62: expected 0 to 61"):
        circuit.top(62)


def test_scores_are_means_over_pairs_with_intervals_that_hold_them() -> None:
    circuit = some_circuit()
    assert circuit.per_example is not None
    assert close(circuit.scores, circuit.per_example.mean(0), 1e-6)
    low, high = circuit.interval(resamples=2000)
    assert bool(((low <= circuit.scores + 1e-7) & (circuit.scores <= high + 1e-7)).all())
    deviation = circuit.per_example.std(0, correction=0) / len(circuit.per_example) ** 0.5
    wide = deviation > 1e-3
    assert close(((high - low) / deviation)[wide].mean(), torch.tensor(2 * 1.96), 0.15)
    narrow_low, narrow_high = circuit.interval(level=0.5, resamples=2000)
    assert bool((low <= narrow_low + 1e-7).all()) and bool((narrow_high <= high + 1e-7).all())


def test_table_and_networkx_hold_every_kept_edge() -> None:
    circuit = some_circuit().top(9)
    frame = circuit.to_frame()
    assert list(frame.columns) == ["source", "reader", "score", "low", "high", "kept"]
    assert frame["score"].abs().is_monotonic_decreasing and frame["kept"].tolist() == [True] * 9 + [False] * 52
    for edge, row in frame.iterrows():
        assert circuit.graph.edges[int(str(edge))] == (row["source"], row["reader"])
        assert float(circuit.scores[int(str(edge))]) == pytest.approx(row["score"])
    graph = circuit.to_networkx()
    assert {(u, d["reader"]) for u, _, d in graph.edges(data=True)} == set(circuit.edges)
    assert "<table" in circuit._repr_html_() and "9 of 61 edges" in circuit._repr_html_()


def test_a_circuit_survives_its_files(tmp_path: Path) -> None:
    circuit = some_circuit().top(5)
    loaded = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert loaded.graph == circuit.graph and loaded.method == "eap" and loaded.metric == "logit_difference"
    assert loaded.details == dict(circuit.details) == {"pairs": 12, "changed": "second token"}
    for name in ("scores", "kept", "per_example"):
        assert torch.equal(getattr(loaded, name), getattr(circuit, name))


def test_damaged_circuit_files_are_refused(tmp_path: Path) -> None:
    some_circuit().save(tmp_path)
    data = (tmp_path / "circuit.safetensors").read_bytes()
    (tmp_path / "circuit.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptRun, match="altered"):
        Circuit.load(tmp_path)
    stored = json.loads((tmp_path / "circuit.json").read_text())
    (tmp_path / "circuit.json").write_text(json.dumps(stored | {"schema": 99}))
    with pytest.raises(IncompatibleRun, match="schema 99"):
        Circuit.load(tmp_path)
    (tmp_path / "circuit.safetensors").write_bytes(data)
    (tmp_path / "circuit.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "method"}))
    with pytest.raises(CorruptRun, match="method"):
        Circuit.load(tmp_path)
    with pytest.raises(CorruptRun, match="cannot read"):
        Circuit.load(tmp_path / "nowhere")


def test_the_curve_is_the_share_of_the_gap_that_each_circuit_recovers() -> None:
    model, pairs = build(), some_pairs(12)
    circuit = eap(model, pairs)
    result = faithfulness(model, circuit, pairs, positions=True)
    with torch.no_grad():
        full, empty = (float(at_answers(model(t), pairs).mean()) for t in (pairs.clean, pairs.corrupt))
    assert result.metric_full == pytest.approx(full, rel=1e-4)
    assert result.metric_empty == pytest.approx(empty, rel=1e-4)
    for ranking, absolute in (("signed", False), ("absolute", True)):
        part = result.curve[result.curve["ranking"] == ranking]
        assert part["n_edges"].tolist() == list(range(62))
        kept = torch.stack([circuit.top(n, absolute=absolute).kept for n in (0, 9, 30, 61)])
        metric = discovery.ablated_metric(model, pairs, kept).mean(1).numpy()
        f = part["faithfulness"].to_numpy()
        assert f[[0, 9, 30, 61]] == pytest.approx((metric - empty) / (full - empty), abs=1e-3)
        assert (part["low"] <= part["faithfulness"] + 1e-9).all()
        area = f if ranking == "signed" else np.abs(1 - f)
        by_hand = float(((area[1:] + area[:-1]) / 2).sum() / 61)
        assert (result.cpr if ranking == "signed" else result.cmd) == pytest.approx(by_hand)


def test_pruning_dangling_edges_changes_nothing_under_corruption() -> None:
    model, pairs = build(), some_pairs()
    kept = torch.rand(6, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(5)) < 0.25
    connected = Graph.from_model(model).connected(kept)
    assert bool((connected != kept).any())
    whole, pruned = (discovery.ablated_metric(model, pairs, k) for k in (kept, connected))
    assert close(pruned, whole, 1e-4)


def test_benchmark_shares_give_its_sizes_and_area() -> None:
    model, pairs = planted(), some_pairs(8, pos=3, d_vocab=4)
    circuit = eap(model, pairs)
    result = faithfulness(model, circuit, pairs, shares=MIB_SHARES)
    part = result.curve[result.curve["ranking"] == "signed"]
    assert part["share"].tolist() == list(MIB_SHARES)
    assert part["n_edges"].tolist() == [int(share * result.n_edges) for share in MIB_SHARES]
    f, x = part["faithfulness"].to_numpy(), part["share"].to_numpy()
    assert result.cpr == pytest.approx(sum((x[i + 1] - x[i]) * (f[i] + f[i + 1]) / 2 for i in range(9)))


def one_curve(table: np.ndarray, sizes: list[int]) -> Faithfulness:
    x = [size / sizes[-1] for size in sizes]
    curves = [Curve("signed", x, sizes), Curve("absolute", x, sizes), Curve("random", [0.0, 1.0], [0, 1])]
    ends = table[[0, -1]]
    whole = np.concatenate([ends, table, table, ends])
    names: dict[str, Any] = {"method": "m", "metric": "d", "ablation": "corrupt", "sizes": "every size"}
    return summarise(whole, curves, [0] * len(whole), n_edges=sizes[-1], seed=0, **names)


@given(values=st.lists(st.floats(-2, 2), min_size=3, max_size=6), shift=st.floats(-5, 5), scale=st.floats(0.1, 9))
@settings(max_examples=30)
def test_areas_do_not_depend_on_the_metrics_zero_or_unit(values: list[float], shift: float, scale: float) -> None:
    f = np.array([0.0, *values, 1.0])
    noise = np.random.default_rng(0).normal(0, 0.01, (1, 30))
    table = f[:, None] + noise
    plain, moved = (one_curve(t, list(range(len(f)))) for t in (table, scale * table + shift))
    expected = float(((f[1:] + f[:-1]) / 2).sum() / (len(f) - 1))
    assert plain.cpr == pytest.approx(expected) and moved.cpr == pytest.approx(expected)
    assert moved.cmd == pytest.approx(plain.cmd) and plain.cmd >= abs(1 - plain.cpr) - 1e-9
    assert plain.cpr_interval[0] <= plain.cpr + 1e-9 and plain.cpr <= plain.cpr_interval[1] + 1e-9


def test_a_circuit_without_a_gap_or_of_another_graph_is_refused() -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs)
    with pytest.raises(BadInput, match="another graph"):
        faithfulness(build(n_layers=1), circuit, pairs)
    with pytest.raises(BadInput, match="no gap for a circuit to recover"):
        faithfulness(model, circuit, pairs, metric=lambda logits, pairs: 0 * logits[:, 0] + 3)
    with pytest.raises(BadInput, match="not finite on 4 of 4 pairs"):
        faithfulness(model, circuit, pairs, metric=lambda logits, pairs: logits[:, 0] / 0)
    for shares in ([0.5], [0.5, 0.2], [0.0, 1.5]):
        with pytest.raises(BadInput, match="ascending numbers from 0 to 1"):
            faithfulness(model, circuit, pairs, shares=shares)
    with pytest.raises(BadInput, match="n_random = 1"):
        faithfulness(model, circuit, pairs, n_random=1)


def test_a_faithfulness_curve_survives_its_file(tmp_path: Path) -> None:
    model, pairs = build(), some_pairs()
    result = faithfulness(model, eap(model, pairs), pairs, ablation="mean", seed=2)
    loaded = Faithfulness.load(result.save(tmp_path))
    assert loaded.curve.equals(result.curve)
    assert loaded.to_frame().equals(result.to_frame()) and loaded.ablation == "mean"
    assert "CPR" in result._repr_html_()
    path = tmp_path / "faithfulness.json"
    stored = json.loads(path.read_text())
    new = {name for name in stored if name.endswith("_at_control") or name[:5] in ("cpr_a", "cmd_s")}
    assert len(new) == 6
    path.write_text(json.dumps({name: value for name, value in stored.items() if name not in new} | {"schema": 2}))
    earlier = Faithfulness.load(tmp_path)
    for name in ("cpr_absolute", "cmd_signed", "cpr_at_control", "cmd_at_control"):
        assert getattr(earlier, name) == pytest.approx(getattr(result, name))
    assert np.isnan(earlier.cmd_signed_interval).all() and earlier.cmd_interval == result.cmd_interval
    for change, error in (({"schema": 0}, IncompatibleRun), ({"cpr2": 1}, CorruptRun), ({"curve": 3}, CorruptRun)):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(error):
            Faithfulness.load(tmp_path)


def test_the_same_seed_gives_the_same_curve() -> None:
    model, pairs = build(), some_pairs()
    circuit = eap(model, pairs)
    first, second = (faithfulness(model, circuit, pairs, seed=1) for _ in range(2))
    assert first.curve.equals(second.curve) and first.to_frame().equals(second.to_frame())
    other = faithfulness(model, circuit, pairs, seed=2)
    assert other.cpr == first.cpr and other.cpr_random != first.cpr_random


def test_the_circuits_figure_shows_the_largest_edges_with_scores_and_intervals() -> None:
    circuit = some_circuit()
    figure = circuit.figure(top=10)
    edges = [trace for trace in figure.data if trace.text is not None and "→" in trace.text[0]]
    shown = {tuple(trace.text[0].split("<br>")[0].split(" → ")) for trace in edges}
    assert shown == set(circuit.top(10).edges) and len(edges) == 10
    assert all("interval" in trace.text[0] for trace in edges)
    widths = [trace.line.width for trace in edges]
    assert widths == sorted(widths) and widths[-1] == 8
    colours = {trace.line.color: "score -" in trace.text[0] for trace in edges}
    assert len(colours) == 2 and all(colours[t.line.color] == ("score -" in t.text[0]) for t in edges)
    assert all(trace.y[0] < trace.y[-1] for trace in edges)
    assert "10 largest" in figure.layout.title.text and figure.layout.yaxis.title.text
    assert {"corrupting it lowers the metric", "into a query"} <= {trace.name for trace in figure.data}
    assert circuit.top(0).figure().data


def test_scores_without_a_sign_are_drawn_in_no_colour_of_one() -> None:
    figure = discovery.acdc(build(), some_pairs(4), tau=0.01).figure()
    edges = [trace for trace in figure.data if trace.text is not None and "→" in trace.text[0]]
    assert len(edges) > 1 and len({trace.line.color for trace in edges}) == 1
    names = {trace.name for trace in figure.data if trace.name}
    assert not any("raises the metric" in name for name in names) and any("no sign" in name for name in names)
    colours = {trace.line.color for trace in some_circuit().figure().data if trace.name and "metric" in trace.name}
    assert not colours & {trace.line.color for trace in edges}


def test_the_curves_figure_shows_both_rankings_the_control_and_the_areas() -> None:
    model, pairs = build(), some_pairs()
    result = faithfulness(model, eap(model, pairs), pairs)
    figure = result.figure()
    names = {trace.name for trace in figure.data if trace.name}
    assert names == {"ranked by signed score (CPR)", "ranked by size (CMD)", "random circuits, 8 draws", "whole model"}
    assert f"CPR {result.cpr:.2f}" in figure.layout.title.text
    assert "share of 46" in figure.layout.xaxis.title.text and "recovered" in figure.layout.yaxis.title.text


def test_the_figure_of_stability_has_every_edge_that_a_resample_found() -> None:
    found = discovery.stability(some_circuit(), 10, resamples=50)
    figure, frame = found.figure(), found.to_frame()
    kept, other = figure.data
    assert len(kept.x) == int(frame["kept"].sum()) == 10 and len(kept.x) + len(other.x) == len(frame)
    assert sorted([*kept.x, *other.x]) == list(range(1, len(frame) + 1))
    assert dict(zip([*kept.x, *other.x], [*kept.y, *other.y], strict=True)) == dict(enumerate(frame["frequency"], 1))
    assert f"Jaccard {found.jaccard:.2f}" in figure.layout.title.text and figure.layout.yaxis.title.text


def test_small_results_have_a_table() -> None:
    model, pairs = build(), some_pairs(6)
    effect = discovery.path_patching(model, pairs, path=("embed", "a0.h1.v", "logits"))
    assert effect.to_frame()["effect"].mean() == pytest.approx(effect.score, abs=1e-6)
    assert "embed → a0.h1.v → logits" in effect._repr_html_() and "6 pairs" in effect._repr_html_()
    circuit = eap(model, pairs)
    accuracy = discovery.edge_accuracy(circuit, circuit.graph.edges[::3])
    frame = accuracy.to_frame()
    assert (
        frame.loc["auroc", "value"] == accuracy.auroc
        and frame.loc["average_precision", "low"] <= accuracy.average_precision
    )
    bare = discovery.edge_accuracy(replace(circuit, per_example=None), circuit.graph.edges[::3]).to_frame()
    assert bare[["low", "high"]].isna().all(axis=None)


def test_a_deep_models_figure_has_rows_for_what_it_shows_only() -> None:
    model = build("layer-norm", n_layers=6)
    circuit = eap(model, some_pairs(4))
    ends = [circuit.graph.index("embed", "logits"), circuit.graph.index("a0.h1", "m5")]
    scores = torch.zeros_like(circuit.scores)
    scores[ends] = 1.0
    two = replace(circuit, scores=scores, per_example=None).figure()
    assert two.layout.yaxis.ticktext == ("embeddings", "layer 0 heads", "layer 5 MLP", "logits")
    assert two.layout.yaxis.tickvals == (0, 1, 2, 3)
    assert circuit.figure(top=200).layout.height > two.layout.height


def test_the_curves_figure_can_tell_small_circuits_apart() -> None:
    model = build("layer-norm")
    result = faithfulness(model, eap(model, some_pairs(4)), some_pairs(4))
    axis = result.figure(log=True).layout.xaxis
    assert axis.type == "log" and 10 ** axis.range[0] == pytest.approx(1 / result.n_edges)
