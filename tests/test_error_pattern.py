"""Error patterns: the arithmetic of errors by brute force, and planted codes whose errors are known."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference
from circuits.mechanisms.error_pattern import Answers, border_distance, complexity, share_with_shuffled


def test_errors_on_a_circle_go_the_shorter_way() -> None:
    true, given = torch.tensor([0, 1, 52, 10, 30]), torch.tensor([52, 1, 2, 40, 10])
    operands = torch.zeros(5, 2, dtype=torch.long)
    assert Answers(operands, true, given, 53).off().tolist() == [-1, 0, 3, -23, -20]
    assert Answers(operands, true, given, None).off().tolist() == [52, 0, -50, 30, -20]
    assert Answers(operands, true, given, 53).wrong.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize(("width", "offset"), [(10, 0), (10, 5), (7, 3)])
def test_border_distance_counts_steps(width: int, offset: int) -> None:
    a = torch.arange(40)
    operands = torch.cartesian_prod(a, a)
    found = border_distance(operands, width, offset).view(40, 40)
    ends = [x for x in range(-width, 60) if (x - offset) % width in (0, width - 1)]
    for i in range(0, 40, 3):
        for j in range(0, 40, 7):
            expected = min(min(abs(x - e) for e in ends) for x in (i, j))
            assert float(found[i, j]) == expected


def test_complexity_of_sums_done_by_hand() -> None:
    operands = torch.tensor([[12, 34], [18, 34], [18, 84], [58, 43], [199, 801], [145, 855], [90, 9]])
    assert complexity(operands).tolist() == [0, 1, 2, 2, 3, 3, 0]


def test_shares_stand_beside_exchanged_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(100, (4000,), generator=generator)
    given = true + 10 * torch.randint(0, 4, (4000,), generator=generator)
    answers = Answers(torch.zeros(4000, 2, dtype=torch.long), true, given, None)
    share, (low, high), control = share_with_shuffled(answers, lambda off: off % 10 == 0, generator)
    assert share == 1.0 and low > 0.99 and high == pytest.approx(1.0)
    assert 0.07 < control < 0.13


def test_one_grid_of_ranges_is_a_band_off_near_its_borders() -> None:
    model, task, _ = reference.build("range-lookup", n=40, grids=1, offset=5)
    evidence = mechanisms.error_pattern(model, task)
    d = evidence.details
    assert d["errors_of"] == "the model" and evidence.value == 1.0 and evidence.control < 0.2
    assert (d["band_width"], d["band_offset"], d["band_is_the_models"]) == (10, 5, True)
    assert d["border_distance_interval"][1] < d["border_distance_control"]


def test_a_model_without_errors_is_ablated_and_a_number_line_is_off_by_a_little() -> None:
    model, task, _ = reference.build("number-line", n=30)
    evidence = mechanisms.error_pattern(model, task)
    d = evidence.details
    assert "held at their mean" in d["errors_of"] and d["n_errors"] >= 30
    assert not d["band_is_the_models"]
    assert d["off_by_one_or_two"] > d["off_by_one_or_two_control"] + 0.2


def test_carries_are_where_a_code_without_them_errs() -> None:
    model, task, _ = reference.build("columns", n=60)
    readings = mechanisms.read(model, task)
    wrong = complexity(readings.operands) > 0
    given = torch.where(wrong, readings.labels - 10, readings.labels).clamp_min(0)
    logits = torch.nn.functional.one_hot(given, readings.logits.shape[1]).float()
    without_carry = mechanisms.Readings(
        readings.operands,
        readings.tokens,
        readings.labels,
        readings.split,
        logits,
        readings.neurons,
        readings.importance,
        readings.layers,
    )
    d = mechanisms.error_pattern(model, task, readings=without_carry).details
    assert d["carry_excess"] == 1.0 and abs(d["carry_excess_control"]) < 0.2
    assert d["by_complexity"]["S0"] == 0.0 and d["by_complexity"]["S1"] == 1.0 == d["by_complexity"]["S2"]
    assert d["multiples_of_ten"] == 1.0
