"""Tests of candidate algorithms: helices, variables, symmetries, description lengths and learned subspaces."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch
from conftest import LENS_4, needs_native_bridge
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import mechanisms, reference, tasks
from circuits.errors import UnsupportedModel
from circuits.mechanisms.das import reinitialised
from circuits.mechanisms.description_length import bits_of
from circuits.mechanisms.equivariance import explained_by, shift_from_answer, weighted_share
from circuits.mechanisms.helix import helix_features, number_names, piecewise_features, polynomial_features
from circuits.mechanisms.heuristics import MODULI
from circuits.mechanisms.least_squares import greedy_fit
from circuits.mechanisms.neuron_features import hinge_features, indicator_features
from circuits.mechanisms.neuron_forms import neuron_forms
from circuits.mechanisms.neuron_rules import marginal_sets, set_bits, wave_columns
from circuits.mechanisms.selection import forward_selection, matching_pursuit, regression
from circuits.mechanisms.variable_interchange import leading_means
from circuits.model import ModelConfig, Transformer

NEW = ("helix", "variable-interchange", "equivariance", "description-length")
BUILT = {
    "fourier-pizza": {"p": 29, "frequencies": 4},
    "number-line": {"n": 30},
    "columns": {"n": 30},
    "pair-memoriser": {"p": 13},
    "random-init": {"p": 13},
    "range-lookup": {"n": 20, "grids": 2},
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def built(name):
    model, task, _ = reference.build(name, seed=0, **BUILT[name])
    return model, task, mechanisms.read(model, task)


@functools.cache
def evidence(name, test):
    """A test's evidence on a built model, worked out once; the model is left as it was."""
    model, task, readings = built(name)
    before = [p.clone() for p in model.parameters()]
    found = mechanisms.TESTS[test](model, task, readings=readings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(len(point.fwd_hooks) for point in model.hook_dict.values())
    return found


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]))
def test_forward_selection_is_greedy_least_squares(seed, block):
    features, targets = noise(40, 4 * block, seed=seed).double(), noise(40, 3, seed=seed + 1).double()
    x, y = features - features.mean(0), targets - targets.mean(0)
    expected: list[int] = []
    for _ in range(4):
        left = {}
        for i in set(range(4)) - set(expected):
            columns = [j for k in (*expected, i) for j in range(k * block, (k + 1) * block)]
            left[i] = float((y - x[:, columns] @ torch.linalg.pinv(x[:, columns]) @ y).square().sum())
        expected.append(min(left, key=lambda i: left[i]))
    assert forward_selection(features, targets, block=block, most=4) == expected


def test_forward_selection_ends_where_nothing_is_left():
    features = noise(50, 6)
    features[:, 5] = 2 * features[:, 0]
    features[:, 4] = 0
    assert forward_selection(features, features[:, [1]] + 3, most=6) == [1]
    assert forward_selection(features, features[:, [1, 0]], most=6)[:2] in ([1, 0], [0, 1], [1, 5], [5, 1])


def test_regression_predicts_unseen_rows_and_survives_redundant_columns():
    x = noise(60, 3)
    y = x @ noise(3, 2, seed=1) + 4
    fit = torch.arange(60) < 20
    doubled = torch.cat([x, x, torch.ones(60, 1)], dim=1)
    assert torch.allclose(regression(doubled, y, fit), y, atol=1e-4)


def test_features_of_a_helix_a_polynomial_and_a_line():
    x = torch.arange(20).double()
    features = helix_features(x, [1 / 10, 1 / 4])
    assert torch.allclose(features[:, 0], (2 * math.pi * x / 10).cos()) and torch.equal(features[:, -1], x)
    assert torch.allclose(features[:, 3], (2 * math.pi * x / 4).sin())
    legendre = polynomial_features(x, 3)
    scaled = 2 * x / 19 - 1
    assert torch.allclose(legendre[:, 1], 1.5 * scaled**2 - 0.5)
    hinges = piecewise_features(x, 3)
    assert hinges.shape == (20, 3) and float(hinges[10, 1]) == pytest.approx(10 - 19 / 3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("modular-addition", {"p": 11}),
        ("modular-addition", {"p": 11, "operation": "-"}),
        ("modular-addition", {"p": 11, "operation": "*"}),
        ("addition", {"n": 9, "block": 2}),
        ("addition", {"n": 9, "operation": "-", "block": 2}),
    ],
)
def test_numbers_are_named_so_that_they_add_up(name, parameters):
    task = tasks.get(name, **parameters)
    n = task.n_operand_values
    operands = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    a, b, kept, modulus = number_names(task, operands)
    answers = task.answer(operands)
    groups: dict[int, set[int]] = {}
    for total, answer in zip((a + b)[kept].tolist(), answers[kept].tolist(), strict=True):
        groups.setdefault(int(total % modulus) if task.period else int(total), set()).add(answer)
    assert all(len(same) == 1 for same in groups.values())
    shift, rows, columns = shift_from_answer(task, operands)
    for row in rows.nonzero().flatten().tolist()[:: max(1, n)]:
        here = shift[row][columns]
        assert len(here.unique()) == int(columns.sum())
        zero = int(here[(task.answer_values[columns] == answers[row]).nonzero()[0]])
        assert zero == (0 if task.period else len(task.answer_values) - 1)


def test_helix_says_yes_to_circles_no_to_names_and_names_a_line():
    circle, line = evidence("fourier-pizza", "helix"), evidence("number-line", "helix")
    assert circle.passed and circle.value > 0.95 and circle.control < 0.2
    assert circle.details["decimal"] is False and len(circle.details["periods"]) <= 4
    assert circle.details["answer_before_operands"] > 0.9 > circle.details["answer_before_result"]
    assert circle.details["answer_after_result"] > 0.9 > 0.2 > circle.details["answer_after_operands"]
    assert line.value > 0.95 and line.details["line"] > 0.95 and line.control > 0.95 and not line.passed
    assert evidence("pair-memoriser", "helix").value < 0.3 and not evidence("pair-memoriser", "helix").passed
    assert evidence("random-init", "helix").value == 0.0
    assert evidence("columns", "helix").value < circle.value


def test_helix_is_not_applicable_to_a_few_numbers():
    task = tasks.get("modular-addition", p=11)
    model = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=8, d_mlp=8), seed=0).eval()
    found = mechanisms.helix(model, task)
    assert math.isnan(found.value) and found.passed is None and "not applicable" in found.threshold


def test_every_declared_variable_is_swapped():
    for name in ("columns", "random-init"):
        task = built(name)[1]
        swapped = evidence(name, "variable-interchange").details["accuracies"]
        for variable in task.variables():
            assert f"{variable.name} @ before" in swapped and f"{variable.name} @ after" in swapped
        assert "line @ embedding" in swapped and "answer @ before" in swapped


def test_columns_hold_digits_of_both_operands_and_a_carry_and_a_line_does_not():
    columns, line = (evidence(name, "variable-interchange") for name in ("columns", "number-line"))
    assert columns.passed
    for digit in ("units", "tens"):
        assert columns.details["accuracies"][f"{digit} digit of b @ embedding"] > 0.95
        assert line.details["accuracies"][f"{digit} digit of b @ embedding"] < 0.4
    carry = "carry of the units column @ after"
    assert columns.details["accuracies"][carry] > 0.95 and columns.details["controls"][carry] < 0.1
    assert line.details["accuracies"][carry] < 0.1
    assert line.details["accuracies"]["line @ embedding"] > 0.95
    assert evidence("random-init", "variable-interchange").passed is False


def test_leading_means_keep_the_share_that_is_asked_for():
    values = torch.arange(300) % 3
    centres = torch.tensor([[10.0, 0, 0, 0], [0, 0, 0, 0], [0, 1.0, 0, 0]])
    states = centres[values] + 0.01 * noise(300, 4)
    assert leading_means(states, values).shape == (4, 1)
    assert leading_means(states, values, 0.9999).shape == (4, 2)


def test_what_is_a_function_of_the_key_is_explained_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(15, (80, 12), generator=generator)
    counted = torch.rand(80, 12, generator=generator) < 0.8
    planted = noise(15)[key] + noise(80, 1, seed=3)
    parts = explained_by(planted, key, counted)
    assert weighted_share(parts.numpy()) > 0.999
    assert weighted_share(explained_by(noise(80, 12, seed=4), key, counted).numpy()) < 0.1
    assert weighted_share(torch.zeros(3, 2).numpy()) == 0.0


def test_wrong_answers_follow_the_symmetry_of_an_algorithm_only():
    circle, pairs = evidence("fourier-pizza", "equivariance"), evidence("pair-memoriser", "equivariance")
    assert circle.value > 0.6 and abs(circle.control) < 0.2
    assert circle.details["unseen_pairs_only"] and circle.details["exchange"] > 0.99
    assert circle.details["neurons_renamed"] < 0.3
    assert evidence("number-line", "equivariance").value > 0.9
    assert pairs.value < 0.3
    assert evidence("random-init", "equivariance").value < 0.2
    assert circle.passed is None


def test_bits_are_those_of_counting():
    # exceptions: log2 of the number of ways to choose 10 of 1000, by Stirling, and 3 bits each for what they are
    exact = math.log2(math.comb(1000, 10)) + 10 * 3
    assert float(bits_of(0.0, 0.01, 1000, 9)) == pytest.approx(exact, rel=0.05)
    assert float(bits_of(20.0, 0.0, 1000, 9)) == pytest.approx(20, abs=1e-3)
    assert (bits_of(1.0, torch.tensor([0.1, 0.2]).numpy(), 10, 3) > 1).all()


def test_marginals_find_planted_sets():
    maps = torch.zeros(3, 20, 20)
    maps[0, 3:9, 5:20] = 1
    maps[1] = 1
    maps[1, 10:14, 2:6] = 0
    maps[2, 3:9, 5:20] = 2
    maps[0] += 0.05 * noise(20, 20)
    maps[2, :, ::2] = 0
    first, second = marginal_sets(maps)
    assert [s.nonzero().flatten().tolist() for s in first] == [
        list(range(3, 9)),
        list(range(10, 14)),
        list(range(3, 9)),
    ]
    assert [s.nonzero().flatten().tolist() for s in second] == [
        list(range(5, 20)),
        list(range(2, 6)),
        list(range(5, 20, 2)),
    ]
    number = torch.arange(20)
    cheap, dear = math.log2(210 + sum(MODULI)), 20.0
    sets = torch.stack([(number >= 4) & (number < 9), number >= 4, number % 3 == 1, number % 3 != 1])
    assert set_bits(sets).tolist() == pytest.approx([cheap, cheap, cheap, dear])


@pytest.mark.parametrize("block", [1, 2])
def test_matching_pursuit_finds_each_targets_own_blocks(block):
    features = noise(80, 5 * block)
    weights = torch.zeros(5 * block, 2)
    weights[:block, 0], weights[3 * block : 4 * block, 0], weights[block : 2 * block, 1] = 2.0, 0.7, 1.0
    targets = features @ weights + 3
    fit = torch.arange(80) < 50
    predicted, chosen = matching_pursuit(features, targets, fit, block=block, terms=2)
    assert chosen.T.tolist()[0] == [0, 3] and int(chosen[0, 1]) == 1
    assert torch.allclose(predicted[1], targets, atol=1e-3)
    assert torch.allclose(predicted[0][:, 1], targets[:, 1], atol=1e-3)
    assert not torch.allclose(predicted[0][:, 0], targets[:, 0], atol=1e-1)


def test_a_wave_of_the_operands_is_one_rule():
    task = tasks.get("modular-addition", p=13)
    operands = torch.cartesian_prod(torch.arange(13), torch.arange(13))
    waves = wave_columns(task, operands)
    wave = (2 * math.pi * 4 * (operands.sum(1)).float() / 13 + 0.3).cos()
    assert forward_selection(waves, wave[:, None], block=8, most=6) == [3]


def test_few_rules_describe_an_algorithm_and_none_a_list_of_pairs():
    circle, pairs = evidence("fourier-pizza", "description-length"), evidence("pair-memoriser", "description-length")
    assert circle.details["cheapest"] == "frequencies" and circle.details["frequencies"] in (2, 3, 4)
    low, high = circle.interval
    assert low <= circle.value <= high and circle.value < 0.5 < circle.control
    line = evidence("number-line", "description-length")
    assert line.value < 0.1 and line.details["rules"]["hinges"] <= 12 and line.details["rules"]["frequencies"] is None
    lookup = evidence("range-lookup", "description-length").details["rules"]
    assert lookup["conjunctions"] is not None and lookup["hinges"] is None and lookup["frequencies"] is None
    assert evidence("columns", "description-length").details["cheapest"] == "digits"
    assert pairs.value > circle.value


def test_an_mlp_that_decides_nothing_needs_no_description():
    task = tasks.get("modular-addition", p=11)
    model = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=8, d_mlp=8), seed=0).eval()
    with torch.no_grad():
        model.blocks[0].mlp.W_out.zero_()
    found = mechanisms.description_length(model, task)
    assert math.isnan(found.value) and "not applicable" in found.threshold


def test_answers_that_pass_by_the_neurons_are_not_explained_by_them(monkeypatch):
    model, task, _ = reference.build("number-line", n=12)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_out.zero_()
    monkeypatch.setattr(mechanisms, "worth_explaining", lambda gate: True)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert "no neuron matters to the answers" in verdict.why and len(verdict.items) == 2


@pytest.mark.parametrize("parameters", [{"operation": "-"}, {"operation": "*"}])
def test_new_tests_run_on_every_operation(parameters):
    task = tasks.get("modular-addition", p=17, **parameters)
    model = Transformer(ModelConfig(d_vocab=18, n_ctx=3, d_model=12, d_mlp=16), seed=0).eval()
    for name in NEW:
        found = mechanisms.TESTS[name](model, task)
        assert found.test == name and not found.passed


def test_neurons_of_the_difference_of_decades_and_of_sums_of_tens_are_of_their_family():
    n = 40
    operands = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    a, b = operands.T
    generator = torch.Generator().manual_seed(0)
    fit = torch.rand(n * n, generator=generator) < 0.5
    difference = torch.relu((a - b).float() - 7)
    assert float(greedy_fit(hinge_features(operands, n), difference[:, None], fit)[0]) > 0.99
    tens = ((a // 10 + b // 10) == 3).float()
    decade = ((a + b) // 10 == 4).float() + ((a - b).div(10, rounding_mode="floor") == -2).float()
    found = greedy_fit(indicator_features(operands, n), torch.stack([tens, decade], dim=1), fit, 2)
    assert (found > 0.99).all()


def test_a_wave_longer_than_the_operands_is_no_frequency():
    task = tasks.get("addition", n=30, block=6)
    operands = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    slow = (2 * math.pi * operands[:, 0].float() / 59).sin()
    fast = (2 * math.pi * 7 * operands.sum(1).float() / 59).cos()
    forms = neuron_forms(task, operands, torch.stack([slow, fast], dim=1), seed=0)
    assert int(forms.family[0]) != 0 and int(forms.family[1]) == 0 and int(forms.frequency[1]) == 7


@needs_native_bridge
@pytest.mark.parametrize("name", NEW)
def test_a_bridge_gets_the_same(name):
    model, task, _ = built("fourier-pizza")
    ours, theirs = evidence("fourier-pizza", name), mechanisms.TESTS[name](model.to_bridge(), task)
    assert theirs.value == pytest.approx(ours.value, abs=0.02)
    assert theirs.details.keys() == ours.details.keys()


needs_das = pytest.mark.skipif(not LENS_4, reason="TransformerLens has distributed alignment search since 4.3")


@needs_das
def test_das_finds_digits_and_neither_arbitrary_answers_nor_an_untrained_model():
    model, task, _ = reference.build("columns", seed=0, n=24)
    flags = [p.requires_grad for p in model.parameters()]
    found = mechanisms.das(model, task)
    assert found.passed and found.value > 0.95 and found.control < 0.2
    assert len(found.details["candidates"]) == 2 and found.details["best"] in found.details["candidates"]
    assert [p.requires_grad for p in model.parameters()] == flags
    again = mechanisms.das(model, task)
    assert again.value == found.value and again.control == found.control


@needs_das
def test_das_finds_nothing_in_an_untrained_model():
    model, task, _ = reference.build("random-init", seed=0, p=13)
    found = mechanisms.das(model, task)
    assert not found.passed


@needs_das
def test_das_leaves_a_model_in_training_as_it_is():
    model, task, _ = reference.build("random-init", seed=0, p=11)
    value = mechanisms.das(model, task).value
    model.train()
    again = mechanisms.das(model, task).value
    assert model.training and (again == value or value != value)


def test_das_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.tools.analysis.interchange", None)
    monkeypatch.setitem(sys.modules, "transformer_lens.tools.analysis", None)
    model, task, _ = reference.build("random-init", seed=0, p=11)
    with pytest.raises(UnsupportedModel, match=r"install transformer-lens>=4\.3"):
        mechanisms.das(model, task)


@needs_das
def test_untrained_copies_are_new_and_leave_the_model_alone():
    model = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=8, d_mlp=8), seed=0).eval()
    for one in (model, model.to_bridge()):
        before = [p.clone() for p in one.parameters()]
        fresh = reinitialised(one, seed=5)
        assert not fresh.training
        assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), one.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, one.parameters(), strict=True))
