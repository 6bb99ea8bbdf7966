"""Circuits put together, compared, merged to whole components, and exchanged with the MIB leaderboard."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from discovery_models import build, close, hugging_face, planted, some_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import discovery
from circuits.discovery import Circuit, Graph, compare, eap, exact, faithfulness, load_mib, save_mib
from circuits.errors import BadInput, CorruptRun


def two() -> tuple[Circuit, Circuit]:
    model, pairs = build(), some_pairs()
    return eap(model, pairs).top(20), exact(model, pairs).top(25)


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
@settings(max_examples=30)
def test_circuits_are_put_together_as_sets_of_edges(first: set[int], second: set[int]) -> None:
    whole = eap(build(), some_pairs(2))

    def of(numbers: set[int]) -> Circuit:
        kept = torch.zeros(61, dtype=torch.bool)
        kept[list(numbers)] = True
        return replace(whole, kept=kept)

    def numbers(circuit: Circuit) -> set[int]:
        return set(circuit.kept.nonzero().flatten().tolist())

    a, b = of(first), of(second)
    assert numbers(a & b) == first & second and numbers(a | b) == first | second
    assert numbers(a - b) == first - second and numbers(a.complement()) == set(range(61)) - first
    assert torch.equal((a & b).scores, whole.scores)
    row = compare({"a": a, "b": b}).table.iloc[0]
    assert row["n_shared"] == len(first & second)
    assert row["jaccard"] == pytest.approx(len(first & second) / len(first | second) if first | second else 1)
    assert row["rank_correlation"] == pytest.approx(1)


def test_circuits_of_other_models_have_nothing_in_common() -> None:
    first, _ = two()
    with pytest.raises(BadInput, match="circuits of 61 and 42 edges of different graphs"):
        first & eap(planted(), some_pairs(4, 3, 4))
    with pytest.raises(BadInput, match="1 circuits: expected at least two"):
        compare({"only": first})


def test_a_comparison_is_shown() -> None:
    first, second = two()
    result = compare({"eap": first, "exact": second, "none": first.top(0)})
    assert len(result.table) == 3 and set(result.edges()["eap kept"]) == {True, False}
    assert len(result.edges()) == (first | second).n_kept
    figure = result.figure()
    assert figure.data[0].z[0][0] == 1 and figure.data[0].z[0][2] == 0
    assert figure.data[0].z[0][1] == figure.data[0].z[1][0] == pytest.approx(result.table["jaccard"][0])
    assert "rank_correlation" in result._repr_html_()
    assert result.table["jaccard_random"][0] == pytest.approx((20 * 25 / 61) / (45 - 20 * 25 / 61))


def test_random_circuits_share_what_the_table_says() -> None:
    base, generator = eap(build(), some_pairs(2)), torch.Generator().manual_seed(0)

    def draw(n: int) -> Circuit:
        kept = torch.zeros(61, dtype=torch.bool)
        kept[torch.randperm(61, generator=generator)[:n]] = True
        return replace(base, kept=kept)

    rows = [compare({"a": draw(20), "b": draw(30)}).table.iloc[0] for _ in range(200)]
    mean = sum(row["jaccard"] for row in rows) / 200
    assert mean == pytest.approx(rows[0]["jaccard_random"], abs=0.02)


def into(circuit: Circuit, head: str) -> list[tuple[str, str]]:
    """The edges from the token embedding into what a head is computed from."""
    source = circuit.graph.sources.index(head)
    readers = [r for r, fed in zip(circuit.graph.readers, circuit.graph.feeds, strict=True) if source in fed]
    return [("embed", reader) for reader in readers]


@pytest.mark.parametrize("shape", ["ours", "Llama", "GPTNeoX"])
def test_merged_edges_are_the_sum_of_what_enters_a_component(shape: str) -> None:
    model = build() if shape == "ours" else hugging_face(shape)
    circuit = eap(model, some_pairs(4)).top(15)
    whole = circuit.merged()
    assert set(whole.graph.readers) == {*whole.graph.sources, "logits"} - {"embed", "pos_embed"}
    group = 2 if shape == "Llama" else 1
    for source, reader in whole.graph.edges:
        parts = [(source, reader)]
        if reader.startswith("a"):
            layer, head = reader.split(".")
            key = f"{layer}.kv{int(head[1:]) // group}" if group > 1 else reader
            parts = [(source, f"{reader}.q"), (source, f"{key}.k"), (source, f"{key}.v")]
        numbers = [circuit.graph.index(*part) for part in parts]
        i = whole.graph.index(source, reader)
        assert float(whole.scores[i]) == pytest.approx(float(circuit.scores[numbers].sum()), abs=1e-6)
        assert bool(whole.kept[i]) == bool(circuit.kept[numbers].any())
    assert whole.per_example is not None and close(whole.per_example.mean(0), whole.scores, 1e-5)
    assert len(whole.figure(top=10).data) > 3 and whole.pruned().n_kept <= whole.n_kept
    bare = replace(circuit, scores=circuit.scores.abs(), signed=False, per_example=None).merged()
    assert float(bare.scores.max()) == pytest.approx(float(circuit.scores.abs().max()))
    assert circuit.per_example is not None
    effects = circuit.per_example.abs()
    sizes = replace(circuit, scores=effects.mean(0), signed=False, per_example=effects).merged()
    i, parts = sizes.graph.index("embed", "a0.h1"), [circuit.graph.index(*edge) for edge in into(circuit, "a0.h1")]
    assert sizes.per_example is not None and torch.equal(sizes.per_example[:, i], effects[:, parts].amax(1))
    assert close(sizes.per_example.mean(0), sizes.scores, 1e-6)
    with pytest.raises(BadInput, match="of another graph"):
        faithfulness(model, whole, some_pairs(4))


@pytest.mark.parametrize("variant", ["layer-norm", "attention-only", "rms-gated-no-positions"])
def test_a_circuit_goes_to_the_leaderboard_and_comes_back(variant: str, tmp_path: Path) -> None:
    model, pairs = build(variant), some_pairs()
    circuit = eap(model, pairs).top(20)
    again = load_mib(save_mib(circuit, tmp_path / "c.json", d_model=8), Graph.from_model(model))
    named = [i for i, (source, _) in enumerate(circuit.graph.edges) if source != "pos_embed"]
    assert torch.equal(again.kept[named], circuit.kept[named]) and close(
        again.scores[named], circuit.scores[named], 1e-6
    )
    ranks = [[i for i in c.ranking(absolute=False).tolist() if i in named] for c in (circuit, again)]
    assert ranks[0] == ranks[1]


def test_the_file_is_as_the_leaderboard_reads_it(tmp_path: Path) -> None:
    circuit = eap(build(), some_pairs()).top(20)
    stored = json.loads(save_mib(circuit, tmp_path / "c.json", d_model=8).read_text())
    assert stored["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    # two layers of two heads and an MLP: U = 1 + 2 * 3 sources, each edge of the published graph once
    assert len(stored["edges"]) == 6 * 1 + 3 + 6 * 4 + 6 + 7
    best = max(stored["edges"], key=lambda name: stored["edges"][name]["score"])
    source, reader = circuit.graph.edges[int(circuit.scores.argmin())]
    assert best == f"{source.replace('embed', 'input')}->{reader}" or "<" in best
    assert stored["edges"]["input->a0.h1<q>"]["score"] == pytest.approx(
        -float(circuit.scores[circuit.graph.index("embed", "a0.h1.q")])
    )
    assert set(stored["nodes"]) == {"input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"}
    used = {end for name, edge in stored["edges"].items() if edge["in_graph"] for end in name.split("<")[0].split("->")}
    assert used <= {name for name, node in stored["nodes"].items() if node["in_graph"]}
    parallel = eap(hugging_face("GPTNeoX"), some_pairs(2))
    assert json.loads(save_mib(parallel, tmp_path / "p.json", d_model=8).read_text())["cfg"]["parallel_attn_mlp"]


def test_shared_keys_and_values_stand_once_for_each_query_head(tmp_path: Path) -> None:
    model = hugging_face("Llama")
    circuit = eap(model, some_pairs(2)).top(9)
    path = save_mib(circuit, tmp_path / "c.json", d_model=8)
    again = load_mib(path, circuit.graph)
    assert torch.equal(again.kept, circuit.kept) and close(again.scores, circuit.scores, 1e-6)
    stored = json.loads(path.read_text())
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    assert group > 1 and not any(".kv" in name for name in stored["edges"])
    whole = -float(circuit.scores[circuit.graph.index("embed", "a0.kv0.k")])
    for head in range(group):
        assert stored["edges"][f"input->a0.h{head}<k>"]["score"] == pytest.approx(whole / group)
    used = {end for name, edge in stored["edges"].items() if edge["in_graph"] for end in name.split("<")[0].split("->")}
    assert used <= {name for name, node in stored["nodes"].items() if node["in_graph"]}


def test_files_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    circuit = eap(build(), some_pairs(2))
    path = save_mib(circuit, tmp_path / "c.json", d_model=8)
    with pytest.raises(BadInput, match="is not in this model's graph"):
        load_mib(path, Graph.build(1, 2))
    with pytest.raises(BadInput, match="is not in the file"):
        load_mib(path, Graph.build(3, 2))
    (tmp_path / "d.json").write_text(json.dumps({"nodes": {}}))
    with pytest.raises(CorruptRun, match="holds no 'edges'"):
        load_mib(tmp_path / "d.json", circuit.graph)
    stored: dict[str, Any] = json.loads(path.read_text())
    stored["edges"]["m0->logits"] = 3
    (tmp_path / "e.json").write_text(json.dumps(stored))
    with pytest.raises(CorruptRun, match="no in_graph for edge m0->logits"):
        load_mib(tmp_path / "e.json", circuit.graph)


def test_circuits_that_the_leaderboard_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, pairs = build(), some_pairs(2)
    for circuit, match in (
        (eap(model, pairs, neurons=True), "sources are neurons"),
        (eap(model, pairs).merged(), "a0.h0 is read as a whole"),
    ):
        with pytest.raises(BadInput, match=match):
            save_mib(circuit, tmp_path / "c.json", d_model=8)
        assert not (tmp_path / "c.json").exists()
    path = save_mib(eap(model, pairs), tmp_path / "whole.json", d_model=8)
    with pytest.raises(BadInput, match="sources are neurons"):
        load_mib(path, Graph.from_model(model, neurons=True))


def test_every_size_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build(), some_pairs(4)
    circuit = eap(model, pairs)
    usual = faithfulness(model, circuit, pairs)
    monkeypatch.setattr("circuits.discovery.evaluate.EVERY_SIZE_UP_TO", 10)
    assert len(faithfulness(model, circuit, pairs).curve) < len(usual.curve)
    every = faithfulness(model, circuit, pairs, shares="every")
    assert every.curve.equals(usual.curve) and every.curve.query("ranking == 'signed'")["n_edges"].tolist() == [
        *range(47)
    ]
    with pytest.raises(BadInput, match="shares = 'all': expected 'every'"):
        faithfulness(model, circuit, pairs, shares="all")
    assert discovery.compare is compare
