"""Scores and ablations of edges by token position."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from discovery_models import at_answers, build, close, hugging_face, model_of, shapes, some_pairs

from circuits import discovery
from circuits.discovery import Circuit, Graph, ablated_metric, eap, exact
from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput


@shapes
def test_an_edge_ablated_at_every_position_is_ablated(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    n_edges = Graph.from_model(model).n_edges
    keep = torch.rand(4, n_edges, generator=torch.Generator().manual_seed(0)) < 0.6
    whole = ablated_metric(model, pairs, keep)
    assert close(ablated_metric(model, pairs, keep[:, None].expand(-1, 4, -1)), whole, 1e-4)
    some = keep[:, None].repeat(1, 4, 1)
    some[:, 1] = True
    assert not close(ablated_metric(model, pairs, some), whole, 1e-2)


@shapes
def test_first_order_scores_by_position_are_slopes_of_the_ablation(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    circuit = eap(model, pairs, by_position=True)
    assert circuit.by_position is not None
    assert close(circuit.by_position.sum(0), circuit.scores, 1e-4)
    assert close(circuit.scores, eap(model, pairs).scores, 1e-4)
    sites = sites_of(model)
    keep = torch.ones(1, 4, sites.graph.n_edges, requires_grad=True)
    logits = ablated_logits(model, sites, pairs.clean, replacement(model, sites, pairs, "corrupt"), keep)[0]
    (slope,) = torch.autograd.grad(at_answers(logits, pairs).mean(), keep)
    assert close(circuit.by_position, -slope[0], 1e-3)


@pytest.mark.parametrize("shape", ["layer-norm", "bidirectional-half-uniform", "Llama"])
def test_exact_scores_by_position_ablate_one_edge_at_one_position(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    circuit = exact(model, pairs, by_position=True)
    assert circuit.by_position is not None and close(circuit.scores, exact(model, pairs).scores, 1e-5)
    n_edges = circuit.graph.n_edges
    keep = torch.ones(4 * n_edges, 4, n_edges, dtype=torch.bool)
    every = torch.arange(4 * n_edges)
    keep[every, every // n_edges, every % n_edges] = False
    with torch.no_grad():
        base = at_answers(model(pairs.clean), pairs)
    expected = (ablated_metric(model, pairs, keep) - base).mean(1).view(4, n_edges)
    assert float((circuit.by_position - expected).abs().max()) < 1e-5 + 1e-4 * float(expected.abs().max())


def test_every_first_order_method_has_positions_and_they_are_kept_on_disk(tmp_path: Path) -> None:
    model, pairs = hugging_face("GPT2"), some_pairs(3)
    for method in ("eap", "eap-ig-inputs", "clean-corrupted"):
        circuit = discovery.attribute(model, pairs, method=method, by_position=True)
        again = Circuit.load(circuit.save(tmp_path / method))
        assert circuit.by_position is not None and again.by_position is not None
        assert torch.equal(again.by_position, circuit.by_position) and close(
            circuit.by_position.sum(0), circuit.scores, 1e-4
        )
    assert Circuit.load(eap(model, pairs).save(tmp_path / "none")).by_position is None


def test_a_position_has_a_circuit_of_its_own_with_intervals() -> None:
    model, pairs = build(), some_pairs(6)
    for circuit in (eap(model, pairs, by_position=True), exact(model, pairs, by_position=True)):
        assert circuit.by_position is not None and circuit.per_position is not None
        here = circuit.at_position(1)
        assert close(here.scores, circuit.by_position[1], 1e-6) and here.details["position"] == 1
        low, high = here.interval()
        assert bool((low <= here.scores + 1e-6).all()) and bool((here.scores <= high + 1e-6).all())
        assert here.top(5).n_kept == 5 and here.by_position is None
        assert circuit.merged().by_position is not None
        assert close(circuit.merged().at_position(2).scores, circuit.at_position(2).merged().scores, 1e-5)
    for position in (-1, 4):
        with pytest.raises(BadInput, match=f"position = {position}: expected 0 to 3"):
            circuit.at_position(position)
    with pytest.raises(BadInput, match="no scores by position"):
        eap(model, pairs).at_position(0)


def test_the_largest_edges_at_single_positions_are_a_set_that_can_be_ablated() -> None:
    model, pairs = build(), some_pairs(6)
    circuit = exact(model, pairs, by_position=True)
    assert circuit.by_position is not None
    kept = circuit.top_by_position(7)
    assert int(kept.sum()) == 7 and float(circuit.by_position.abs()[kept].min()) >= float(
        circuit.by_position.abs()[~kept].max()
    )
    # leaving out the one largest edge at its position has the effect that patching found
    best = circuit.top_by_position(1)
    metric = discovery.ablated_metric(model, pairs, torch.stack([~best, torch.ones_like(best)]))
    assert float((metric[0] - metric[1]).mean()) == pytest.approx(float(circuit.by_position[best]), rel=1e-3)
    with pytest.raises(BadInput, match="n = 999999"):
        circuit.top_by_position(999_999)


def test_positions_are_drawn() -> None:
    circuit = eap(build(), some_pairs(), by_position=True).top(30)
    figure = circuit.positions_figure(top=12)
    assert len(figure.data[0].z) == 12 == len(figure.data[0].y) and len(figure.data[0].z[0]) == 4
    assert circuit.by_position is not None
    best = int((circuit.by_position.abs().amax(0) * circuit.kept).argmax())
    assert figure.data[0].y[-1] == " → ".join(circuit.graph.edges[best])
    assert list(figure.data[0].z[-1]) == pytest.approx(circuit.by_position[:, best].tolist())
    assert figure.layout.xaxis.title.text == "position"
    with pytest.raises(BadInput, match="kept no scores by position"):
        eap(build(), some_pairs()).positions_figure()
    with pytest.raises(BadInput, match=r"keep has shape \(1, 3, 61\)"):
        ablated_metric(build(), some_pairs(), torch.ones(1, 3, 61, dtype=torch.bool))
