"""The maths of the mechanism tests against brute force, and the rule on evidence with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.errors import BadInput, CorruptRun
from circuits.mechanisms import RULE, TESTS, Evidence, Verdict, decide
from circuits.mechanisms.groups import discrete_logarithm
from circuits.mechanisms.least_squares import block_fits, greedy_fit, r_squared
from circuits.mechanisms.neuron_features import hinge_features, wave_features, wave_fit
from circuits.mechanisms.operand_parts import class_means, orthonormal, slope
from circuits.mechanisms.rectangles import Sums, edge_grid, two_level_share
from circuits.mechanisms.spectral import frequency_basis, project


def best_rectangle(activation):
    r2, at = Sums.of(activation[None] - activation.mean(), torch.ones_like(activation)).best()
    return float(r2[0]), tuple(at[0].tolist())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 7))
def test_best_rectangle_equals_brute_force(seed, n):
    activation = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    r2, found = best_rectangle(activation)
    total = float((activation - activation.mean()).square().sum())
    best = 0.0
    for r0 in range(n):
        for r1 in range(r0 + 1, n + 1):
            for c0 in range(n):
                for c1 in range(c0 + 1, n + 1):
                    inside = torch.zeros(n, n, dtype=torch.bool)
                    inside[r0:r1, c0:c1] = True
                    if bool(inside.all()):
                        continue
                    fitted = torch.where(inside, activation[inside].mean(), activation[~inside].mean())
                    best = max(best, 1 - float((activation - fitted).square().sum()) / total)
    assert r2 == pytest.approx(best, abs=1e-4)
    r0, r1, c0, c1 = found
    assert 0 <= r0 < r1 <= n and 0 <= c0 < c1 <= n


def test_rectangle_recovers_a_planted_rectangle():
    activation = torch.zeros(30, 30)
    activation[10:20, 5:25] = 1.0
    r2, found = best_rectangle(activation)
    assert r2 == pytest.approx(1.0, abs=1e-4)
    assert found == (10, 20, 5, 25)


def test_constant_map_is_no_rectangle():
    assert best_rectangle(torch.ones(5, 5))[0] == 0.0


def test_two_levels_against_gradual():
    generator = torch.Generator().manual_seed(0)
    binary = (torch.rand(500, generator=generator) < 0.3).float()
    gradual = torch.rand(500, generator=generator)
    shares = two_level_share(torch.stack([binary, gradual, torch.zeros(500)], dim=1))
    assert shares[0] == pytest.approx(1.0, abs=1e-5)
    assert 0.7 < float(shares[1]) < 0.8  # a uniform variable: two levels explain exactly three quarters
    assert shares[2] == 0.0


def test_edge_grid_finds_width_and_offset():
    found = [(5, 15, 15, 25), (25, 35, 5, 45), (35, 45, 25, 35)]
    grid = edge_grid(found, 60)
    assert (grid["edge_width"], grid["edge_offset"], grid["edge_share"]) == (10, 5, 1.0)
    assert edge_grid(found * 3, 60)["edge_p"] < 0.01


def test_edges_at_random_lie_on_no_grid_however_many_grids_are_tried():
    generator = torch.Generator().manual_seed(0)
    p = []
    for _ in range(60):
        found = [tuple(row) for row in torch.randint(1, 60, (2, 4), generator=generator).tolist()]
        p.append(edge_grid(found, 60)["edge_p"])
    assert sum(value <= 0.05 for value in p) <= 8  # 60 draws at 5 %: 8 is beyond the 99th percentile


@given(st.sampled_from([3, 5, 7, 11, 13, 53]))
@settings(max_examples=6, deadline=None)
def test_discrete_logarithm_turns_products_into_sums(p):
    table = discrete_logarithm(p)
    for a in range(1, p):
        for b in range(1, p):
            assert int((table[a] + table[b]) % (p - 1)) == int(table[a * b % p])


def _grid(p):
    flat = torch.arange(p * p)
    return flat // p, flat % p


def test_wave_fit_finds_the_frequency_and_rejects_noise():
    p = 23
    a, b = _grid(p)
    wave = torch.cos(2 * math.pi * 5 * (a + b) / p) + 0.5
    noise = torch.rand(p * p, generator=torch.Generator().manual_seed(0))
    fit = torch.rand(p * p, generator=torch.Generator().manual_seed(1)) < 0.5
    scores, frequency = wave_fit(a, b, torch.stack([wave, noise], dim=1), p, fit)
    assert float(scores[0]) > 0.999 and int(frequency[0]) == 5
    assert float(scores[1]) < 0.1


def test_greedy_fit_recovers_a_hinge_and_not_noise():
    a, b = _grid(20)
    operands = torch.stack([a, b], dim=1)
    hinge = torch.relu((a + b).float() - 17)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(0))
    fit = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = greedy_fit(hinge_features(operands, 20), torch.stack([hinge, noise], dim=1), fit)
    assert float(scores[0]) > 0.99
    assert float(scores[1]) < 0.3


def test_block_fits_are_least_squares():
    a, b = _grid(13)
    generator = torch.Generator().manual_seed(0)
    neurons = torch.rand(169, 5, generator=generator)
    fit = torch.rand(169, generator=generator) < 0.6
    blocks = wave_features(a, b, torch.tensor([1, 4, 6]), 13)
    inside, outside = block_fits(blocks, neurons, fit)
    for k in range(3):
        weights = torch.linalg.lstsq(blocks[fit, k].double(), neurons[fit].double()).solution
        predicted = (blocks[:, k].double() @ weights).float()
        assert torch.allclose(inside[k], r_squared(neurons[fit], predicted[fit]), atol=1e-5)
        assert torch.allclose(outside[k], r_squared(neurons[~fit], predicted[~fit]), atol=1e-5)


def test_greedy_fit_is_matching_pursuit_step_by_step():
    a, b = _grid(9)
    generator = torch.Generator().manual_seed(0)
    features = hinge_features(torch.stack([a, b], dim=1), 9).double()
    neurons = torch.rand(81, 4, generator=generator)
    fit = torch.rand(81, generator=generator) < 0.6
    found = greedy_fit(features.float(), neurons, fit, terms=3)
    x = features[fit] - features[fit].mean(0)
    x = x / x.square().mean(0).sqrt().clamp_min(1e-6) * (x.square().mean(0).sqrt() > 1e-6)
    for column in range(4):
        y = neurons[:, column].double()
        chosen: list[int] = []
        predicted = y[fit].mean().expand(81)
        for _ in range(3):
            correlation = (x.T @ (y - predicted)[fit]).abs()
            correlation[chosen] = 0
            chosen.append(int(correlation.argmax()))
            design = torch.cat([torch.ones(81, 1), features[:, chosen]], dim=1)
            gram = design[fit].T @ design[fit]
            gram = gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
            predicted = design @ torch.linalg.solve(gram, design[fit].T @ y[fit])
        expected = r_squared(y[~fit, None], predicted[~fit, None])
        assert float(found[column]) == pytest.approx(float(expected[0]), abs=1e-4)


def test_r_squared_of_truth_mean_and_constant():
    y = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert r_squared(y, y).tolist() == [1.0, 0.0]
    assert float(r_squared(y, y.mean(0).expand(3, 2))[0]) == 0.0


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_projection_of_logits_made_of_one_frequency_is_everything(k, seed):
    p = 13
    a, b = _grid(p)
    weights = torch.randn(4, p, generator=torch.Generator().manual_seed(seed))
    logits = frequency_basis(a, b, k, p) @ weights
    labels = logits.argmax(-1)
    inside = project(logits, a, b, labels, (k,), p)
    assert inside.explained == pytest.approx(1.0, abs=1e-4)
    assert float(inside.restricted.float().mean()) > 0.99
    other = project(logits, a, b, labels, (k % 6 + 1,), p)
    assert other.explained < 0.2


def test_subspaces_hold_what_they_are_named_for():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    values = torch.arange(30)
    embedding = values[:, None].float() * direction + 3.0
    assert float((orthonormal(slope(embedding))[:, 0] @ direction).abs()) == pytest.approx(1.0, abs=1e-5)
    units = torch.randn(10, 16, generator=generator)
    embedding = units[values % 10]
    basis = orthonormal(class_means(embedding, values % 10))
    assert basis.shape[1] == 9
    centred = embedding - embedding.mean(0)
    assert torch.allclose(centred @ basis @ basis.T, centred, atol=1e-4)


def _evidence(test, value, passed=None, **details):
    return Evidence(test, value, (value, value), 0.0, "control", "threshold", passed, details)


def _items(
    train=1.0,
    random=1.0,
    unmirrored=None,
    *,
    gap=0.0,
    form=0.0,
    swap=0.0,
    line=0.0,
    slices=(1.0, True),
    rect=None,
    least=None,
    result=None,
    region=None,
    listed=None,
    rest=0.0,
):
    restricted, excluded = (1.0, 0.0) if form else (0.5, 0.9)
    items = [
        _evidence(
            "accuracy-gate", random, train=train, random=random, unmirrored=random if unmirrored is None else unmirrored
        ),
        _evidence("block-gap", gap),
        _evidence(
            "spectral", restricted - excluded, explained=0.95, restricted=restricted, excluded=excluded, n_frequencies=5
        ),
        _evidence(
            "functional-form",
            form,
            frequency=form,
            hinge=0.9 if line else 0.0,
            indicator=0.0,
            key_frequencies=[1, 2],
            frequency_least=form if least is None else least,
            hinge_least=(0.9 if line else 0.0) if least is None else least,
        ),
        _evidence("interchange", swap, frequencies=swap, frequencies_control=0.0, line=line),
        _evidence("slice-transfer", slices[0], slices[1]),
    ]
    if rect is not None:
        items.append(
            _evidence("rectangles", rect, rect >= 0.5, idealised=0.99, ablated=0.4, edge_share=0.9, edge_width=10)
        )
    if result is not None:
        items.append(_evidence("result-heuristics", result, result >= 0.75, layer=1, idealised=1.0, ablated=0.1))
    if region is not None:
        inside, outside, passed = region
        shares = {"area": 0.5, "inside": inside, "outside": outside, "control": 0.0}
        shares |= {"right_inside": 1.0, "right_outside": 1.0, "complement": rest}
        items.append(_evidence("region-interchange", inside - outside, passed, algorithm="fourier", **shares))
    if listed is not None:
        lost, known, overrules = listed
        passed = lost >= 0.75
        items.append(_evidence("pair-lookup", lost, passed, known_pairs=known, overrules=overrules, n_pair_neurons=9))
    return tuple(items)


@pytest.mark.parametrize(
    ("items", "label", "mechanism"),
    [
        (_items(train=0.3, random=0.02), "not-learned", None),
        (_items(random=0.49, unmirrored=0.01), "memorisation", "pairs"),
        (_items(form=0.95, swap=1.0), "algorithm", "fourier"),
        (_items(form=0.95, swap=1.0, gap=0.5), "mixed", "fourier"),
        (_items(form=0.95, swap=0.5), "undetermined", None),
        (_items(line=1.0), "algorithm", "number-line"),
        (_items(line=1.0, slices=(0.6, False)), "algorithm", "number-line"),
        (_items(line=1.0, least=0.0), "undetermined", None),
        (_items(line=1.0, least=0.0, result=0.9), "heuristics", "result-range-bag"),
        (_items(rect=0.8), "heuristics", "range-lookup"),
        (_items(train=0.92, random=0.91, form=0.95, swap=1.0), "algorithm", "fourier"),
        (_items(train=0.92, random=0.91), "not-learned", None),
        (_items(train=0.7, random=0.69, form=0.95, swap=1.0), "algorithm", "fourier"),
        (_items(train=0.7, random=0.69, rect=0.8), "heuristics", "range-lookup"),
        (_items(train=0.7, random=0.4, rect=0.8), "not-learned", None),
        (_items(random=0.88, rect=0.8), "heuristics", "range-lookup"),
        (_items(random=0.88, region=(0.98, 0.1, True)), "mixed", "fourier"),
        (_items(line=1.0, result=0.9), "heuristics", "result-range-bag"),
        (_items(form=0.95, swap=1.0, listed=(0.0, 0.1, 1.0)), "mixed", "fourier"),
        (_items(form=0.95, swap=1.0, listed=(0.9, 1.0, 0.1)), "undetermined", None),
        (_items(train=0.96, random=0.93, form=0.95, swap=1.0), "algorithm", "fourier"),
        (_items(train=1.0, random=0.93, form=0.95, swap=1.0), "mixed", "fourier"),
        (_items(region=(0.98, 0.1, True)), "mixed", "fourier"),
        (_items(region=(0.98, 0.1, True), rest=0.8), "undetermined", None),
        (_items(region=(0.98, 0.8, False)), "undetermined", None),
        (_items(listed=(1.0, 1.0, float("nan"))), "memorisation", "pairs"),
        (_items(listed=(0.0, 0.4, 1.0), line=0.8), "mixed", "number-line"),
        (_items(listed=(0.0, 0.4, 0.1), line=0.8), "undetermined", None),
        (_items(rect=0.8, form=0.95, swap=1.0), "undetermined", None),
        (_items(gap=0.5, slices=(0.5, False)), "heuristics", None),
        (_items(gap=0.5), "undetermined", None),
        (_items(random=0.8), "undetermined", None),
    ],
)
def test_rule(items, label, mechanism):
    verdict = decide(items)
    assert (verdict.label, verdict.mechanism) == (label, mechanism)
    assert verdict.why and verdict.rule


def test_slices_that_do_not_decide_do_not_count():
    assert decide(_items(gap=0.5, slices=(0.5, None))).label == "undetermined"


def test_evidence_for_and_against_is_told_apart():
    deciding = {"accuracy-gate": True, "spectral": True, "functional-form": True}
    items = tuple(replace(e, passed=deciding.get(e.test, e.passed)) for e in _items(form=0.95, swap=1.0, rect=0.2))
    verdict = decide(items)
    assert {said.split(" ")[0] for said in verdict.evidence_for} >= {"accuracy-gate", "spectral", "functional-form"}
    assert verdict.evidence_against == ()
    other = decide(tuple(replace(e, passed=False if e.test == "spectral" else e.passed) for e in _items(rect=0.8)))
    assert other.mechanism == "range-lookup" and not any("fourier" in said for said in other.evidence_for)
    conflict = decide(_items(form=0.95, swap=1.0, rect=0.8))
    assert "The evidence disagrees" in conflict.why and "rectangles" in conflict.why
    assert any("for range-lookup" in said for said in conflict.evidence_for)
    lookup = decide(_items(rect=0.8))
    assert any(said.startswith("rectangles 0.80") for said in lookup.evidence_for)
    assert not any("against fourier" in said for said in lookup.evidence_against)
    shown = conflict._repr_html_()
    assert "<li>" in shown and "For" in shown


def test_verdict_round_trip_and_damage(tmp_path):
    verdict = decide(_items(form=0.95, swap=1.0, gap=float("nan")))
    verdict.save(tmp_path)
    again = Verdict.load(tmp_path)
    assert again.to_json() == verdict.to_json()
    assert math.isnan(again["block-gap"].value)
    path = tmp_path / "verdict.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptRun, match="run the analysis again"):
        Verdict.load(tmp_path)


def test_verdict_refuses_an_unknown_label():
    with pytest.raises(BadInput, match="'genius'"):
        Verdict("genius", None, (), "", "1")


def test_verdict_shows_itself():
    verdict = decide(_items(form=0.95, swap=1.0))
    assert "<b>algorithm</b>" in verdict._repr_html_()
    assert set(verdict.evidence.index) == {e.test for e in verdict.items}
    assert "spectral" in verdict
    with pytest.raises(KeyError, match="rectangles"):
        verdict["rectangles"]


def test_every_test_is_documented():
    for name, test in TESTS.items():
        assert "Source:" in (test.__doc__ or ""), name
        assert "Fails when:" in (test.__doc__ or ""), name
    assert RULE.interchange > RULE.interchange_control
