"""The bench of discovery methods: its rows are what the single calls give, and a second start computes nothing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from circuits import cli, discovery
from circuits.errors import BadInput, UnknownName
from circuits.reference import known_circuits
from circuits.study.discovery_bench import MAIN, SHOWN, DiscoveryBench, run_bench


def test_rows_are_what_the_single_calls_give(tmp_path: Path) -> None:
    names = ["program-hist", "linear", "program-length"]
    result = run_bench(tmp_path, circuits=names, methods=["eap", "exact"], n_pairs=16, seeds=[0], progress=False)
    table = result.table.set_index(["circuit", "method"])
    assert len(table) == 6
    known = known_circuits.build("program-hist", n_pairs=16)
    circuit = discovery.exact(known.model, known.pairs)
    row = table.loc[("program-hist", "exact")]
    truth = discovery.edge_accuracy(circuit, known.active)
    assert row["active_auroc"] == truth.auroc == 1 and row["active_precision"] == truth.average_precision
    assert truth.auroc_interval == (row["active_auroc_low"], row["active_auroc_high"])
    others = known_circuits.build("program-hist", n_pairs=64, seed=1000).pairs.without(known.pairs)
    others = others.take(torch.arange(16))
    assert row["n_held_out"] == 16 and 0 <= row["seen_inputs"] < 1
    curve = discovery.faithfulness(known.model, circuit, others)
    assert row["cpr"] == pytest.approx(curve.cpr) and row["cmd_at_control"] == pytest.approx(curve.cmd_at_control)
    assert row["stability"] == discovery.stability(circuit, len(known.active)).jaccard
    assert row["forwards"] > 1 and row["seconds"] > 0
    assert table.loc[("program-length", "eap"), "status"] == "no edge is active under these pairs"
    assert table.loc[("linear", "eap"), "active_precision"] == 1
    summary = result.summary()
    assert set(summary["kind"]) == {"program", "linear"} and len(summary) == 4
    stored = pd.read_parquet(tmp_path / "discovery.parquet")
    pd.testing.assert_frame_equal(stored, result.table, check_dtype=False)
    assert len(pd.read_csv(tmp_path / "discovery.csv")) == 6 and "AUROC" in result._repr_html_()


def test_a_second_start_computes_nothing_and_other_requests_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"circuits": ["linear"], "methods": ["eap"], "seeds": [3], "progress": False}
    first = run_bench(tmp_path, n_pairs=8, **options)
    calls: list[str] = []
    build = known_circuits.build
    monkeypatch.setattr(known_circuits, "build", lambda name, **kw: calls.append(name) or build(name, **kw))
    pd.testing.assert_frame_equal(run_bench(tmp_path, n_pairs=8, **options).table, first.table)
    assert not calls
    assert run_bench(tmp_path, n_pairs=9, **options).table["n_pairs"].tolist() == [9] and calls
    (tmp_path / "cells" / "linear--eap--3.json").write_text("{")
    calls.clear()
    assert run_bench(tmp_path, n_pairs=9, **options).table["status"].tolist() == ["done"] and calls


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown known circuit 'linea': did you mean 'linear'"):
        run_bench(tmp_path, circuits=["linea"])
    with pytest.raises(UnknownName, match="unknown discovery method 'eep'"):
        run_bench(tmp_path, methods=["eep"])
    with pytest.raises(BadInput, match="n_pairs = 1"):
        run_bench(tmp_path, n_pairs=1)
    with pytest.raises(BadInput, match=r"seeds = \[1, 1\]"):
        run_bench(tmp_path, seeds=[1, 1])


def test_the_command_prints_the_summary_or_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "discovery", "--out", str(tmp_path), "--circuits", "linear", "--methods", "eap", "exact"]
    command += ["--seeds", "0"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "AUROC, active" in printed and "exact ahead by" in printed
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["eap", "exact"] and rows[0]["active_auroc"] == 1
    assert cli.main(["bench", "training", "--out", str(tmp_path)]) == 2
    assert "unknown subject of a bench 'training'" in capsys.readouterr().err


def test_means_are_over_seeds_first_and_differences_are_paired_by_circuit(tmp_path: Path) -> None:
    rows = [
        ("program-a", "exact", 0, 1.0), ("program-a", "exact", 1, 0.8), ("program-a", "eap", 0, 0.5),
        ("program-a", "eap", 1, 0.7), ("program-b", "exact", 0, 0.6), ("program-b", "eap", 0, 0.6),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["circuit", "method", "seed", MAIN])
    others = {column: 0.5 for column in SHOWN if column != MAIN}
    bench = DiscoveryBench(table.assign(kind="program", status="done", **others), tmp_path)
    means = bench.summary().set_index("method")["AP, active"]
    assert means.to_dict() == pytest.approx({"exact": (0.9 + 0.6) / 2, "eap": (0.6 + 0.6) / 2})
    row = bench.differences().iloc[0]
    assert (row["method"], row["circuits"], row["better"], row["worse"]) == ("eap", 2, 1, 0)
    assert row["exact ahead by"] == pytest.approx(0.15) and (row["low"], row["high"]) == pytest.approx((0.0, 0.3))
    with pytest.raises(UnknownName, match="acdc"):
        bench.differences("acdc")


def test_every_mean_is_shown_with_its_interval(tmp_path: Path) -> None:
    base = {column: 0.5 for column in SHOWN}
    rows = [
        {**base, "circuit": f"program-{name}", "method": method, MAIN: value, "stability": stability}
        for name, method, value, stability in (
            ("a", "exact", 1.0, 0.9), ("b", "exact", 0.9, 0.7), ("a", "eap", 0.4, None), ("b", "eap", 0.9, None),
        )
    ]  # fmt: skip
    bench = DiscoveryBench(pd.DataFrame(rows).assign(kind="program", status="done", seed=0), tmp_path)
    summary = bench.summary().set_index("method")
    assert summary.loc["exact", "AP, active"] == pytest.approx(0.95)
    assert (summary.loc["eap", "AP, active low"], summary.loc["eap", "AP, active high"]) == pytest.approx((0.4, 0.9))
    assert summary.loc["exact", "stability low"] == pytest.approx(0.7) and pd.isna(summary.loc["eap", "stability"])
    shown = bench.shown().set_index("method")
    assert shown.loc["eap", "AP, active"] == "0.65 [0.40, 0.90]" and shown.loc["eap", "stability"] == "-"
    assert shown.loc["exact", "cost (forwards)"] == "0.5" and shown.columns.tolist()[2:] == list(SHOWN.values())
    row = bench.differences().iloc[0]
    assert row["better on"] == "a 0.60" and row["better"] == 1


def test_gradient_rules_are_rows_of_their_own(tmp_path: Path) -> None:
    names = ["eap", "eap+gim", "eap+relp"]
    table = run_bench(tmp_path, circuits=["interchange-sum"], methods=names, n_pairs=8, seeds=[0], progress=False).table
    assert table["status"].tolist() == ["done"] * 3 and table["method"].tolist() == names
    known = known_circuits.build("interchange-sum", n_pairs=8)
    for name, rules in zip(names, (None, "gim", "relp"), strict=True):
        circuit = discovery.eap(known.model, known.pairs, rules=rules)
        expected = discovery.edge_accuracy(circuit, known.active, components=True).average_precision
        assert table.set_index("method").loc[name, "active_precision"] == pytest.approx(expected)
    assert table["cpr"].nunique() == 3
    with pytest.raises(UnknownName, match="unknown discovery method"):
        run_bench(tmp_path, methods=["exact+gim"])


def test_methods_that_draw_get_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []

    def drawn(model: object, pairs: object, *, seed: int = 0) -> discovery.Circuit:
        got.append(seed)
        return discovery.eap(model, pairs)

    monkeypatch.setitem(discovery.METHODS, "edge-pruning", drawn)
    run_bench(tmp_path, circuits=["linear"], methods=["edge-pruning"], n_pairs=4, seeds=[5, 7], progress=False)
    assert got == [5, 7]


def test_stability_is_of_what_the_truth_counts(tmp_path: Path) -> None:
    names = ["eap", "hisp"]
    table = run_bench(tmp_path, circuits=["interchange-sum"], methods=names, n_pairs=8, seeds=[0], progress=False).table
    known = known_circuits.build("interchange-sum", n_pairs=8)
    assert known.components
    for name, row in table.set_index("method").iterrows():
        circuit = discovery.attribute(known.model, known.pairs, method=str(name))
        n = discovery.edge_accuracy(circuit, known.active, components=True).n_true
        assert row["n_judged"] == n < len(known.active)
        assert row["stability"] == discovery.stability(circuit.merged(), n).jaccard
    assert table["seed_stability"].isna().all()


def test_stability_over_seeds_is_of_methods_without_scores_per_pair_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(model: object, pairs: object, *, seed: int = 0) -> discovery.Circuit:
        circuit = discovery.eap(model, pairs)
        scores = torch.rand(circuit.graph.n_edges, generator=torch.Generator().manual_seed(seed))
        return discovery.Circuit(circuit.graph, scores, circuit.kept, "drawn", "m", signed=False)

    monkeypatch.setitem(discovery.METHODS, "edge-pruning", drawn)
    options = {"circuits": ["linear"], "methods": ["edge-pruning"], "n_pairs": 4, "progress": False}
    table = run_bench(tmp_path, seeds=[0, 1, 2], **options).table
    tops = []
    for seed in (0, 1, 2):
        known = known_circuits.build("linear", n_pairs=4, seed=seed)
        tops.append(drawn(known.model, known.pairs, seed=seed).top(int(table["n_judged"].min())).kept)
    shares = [
        float((a & b).sum() / (a | b).sum()) for a, b in ((tops[0], tops[1]), (tops[0], tops[2]), (tops[1], tops[2]))
    ]
    assert table["seed_stability"].tolist() == pytest.approx([sum(shares) / 3] * 3) and "stability" not in table
    # the best edges are stored: another start computes nothing, and a single seed has nothing to compare
    monkeypatch.setattr(known_circuits, "build", None)
    assert run_bench(tmp_path, seeds=[0, 1, 2], **options).table["seed_stability"].tolist() == pytest.approx(
        table["seed_stability"].tolist()
    )
    assert run_bench(tmp_path, seeds=[1], **options).table["seed_stability"].isna().all()


def test_all_methods_are_compared_under_the_same_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[str] = []

    def sampled(model: object, pairs: object, *, ablation: str = "optimal", seed: int = 0) -> discovery.Circuit:
        got.append(ablation)
        return discovery.eap(model, pairs)

    monkeypatch.setitem(discovery.METHODS, "uniform-gradient-sampling", sampled)
    names = ["uniform-gradient-sampling", "uniform-gradient-sampling+optimal"]
    table = run_bench(tmp_path, circuits=["linear"], methods=names, n_pairs=4, seeds=[0], progress=False).table
    assert got == ["corrupt", "optimal"] and table["method"].tolist() == names
    others = {name: inspect.signature(f).parameters.get("ablation") for name, f in discovery.METHODS.items()}
    assert all(p is None or p.default == "corrupt" for name, p in others.items() if name not in names)
