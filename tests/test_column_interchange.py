"""Column interchange: heads that carry one variable pass, heads that carry everything do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuits import mechanisms, reference, tasks, training
from circuits.mechanisms.accuracy import greedy_right
from circuits.mechanisms.columns import draw_swaps, find_heads, inner_variables, source_outputs, swapped_share
from circuits.model import Transformer

BUILT = {digits: reference.build("digit-columns", seed=1, digits=digits) for digits in (1, 2, 4)}


@pytest.mark.parametrize("digits", sorted(BUILT))
def test_the_built_adder_is_right(digits: int) -> None:
    model, task, truth = BUILT[digits]
    assert truth == "algorithm/columns"
    for split in ("train", "random"):
        assert greedy_right(model, task, task.examples(split, limit=400)).all()
    nines = 10**digits - 1
    assert greedy_right(model, task, task.encode(torch.tensor([[nines, 1], [nines, nines], [0, 0]]))).all()


def test_its_heads_pass_and_it_is_called_by_its_name() -> None:
    model, task, _ = BUILT[4]
    evidence = mechanisms.column_interchange(model, task)
    assert evidence.passed and evidence.value == 1.0 and evidence.control == 0.0
    assert evidence.details["carry_into_column_2_heads"] == ["L0H1"]
    assert evidence.details["base_sum_of_column_2_heads"] == ["L0H0"]
    verdict = mechanisms.explain(model, task, budget="quick")
    assert (verdict.label, verdict.mechanism) == ("algorithm", "columns")


@pytest.mark.parametrize(
    ("digits", "reverse", "cascade"), [(2, True, True), (2, False, False), (3, True, False), (3, False, True)]
)
def test_every_way_to_carry_is_called_columns(digits: int, reverse: bool, cascade: bool) -> None:
    model, task, _ = reference.build("digit-columns", seed=2, digits=digits, reverse=reverse, cascade=cascade)
    batch = task.examples("random", limit=600)
    right = greedy_right(model, task, batch)
    assert torch.equal(right, (task.cascade_length(batch.operands) == 0) | torch.tensor(cascade))
    verdict = mechanisms.explain(model, task, budget="quick")
    assert (verdict.label, verdict.mechanism) == ("algorithm", "columns"), verdict.why


def test_the_prediction_is_neither_the_bases_nor_the_sources_digit() -> None:
    model, task, _ = BUILT[4]
    for variable, column in inner_variables(task):
        swaps = draw_swaps(model, task, variable, column, seed=1)
        assert len(swaps.predicted) == 400
        with torch.no_grad():
            for inputs in (swaps.base, swaps.source):
                assert not (model(inputs)[:, swaps.position].argmax(-1) == swaps.predicted).any()


def test_heads_that_carry_everything_fail() -> None:
    model, task, _ = BUILT[2]
    for variable, column in inner_variables(task):
        swaps = draw_swaps(model, task, variable, column, seed=1)
        source = source_outputs(model, swaps)
        assert swapped_share(model, swaps, source, ((0, 0), (0, 1)), with_previous=True).mean() < 0.05
        assert find_heads(model, task, variable, column, seed=0).control < 0.05


@pytest.mark.parametrize("reverse", [True, False])
def test_a_column_s_own_part_moves_its_digits_and_the_rest_its_carry(reverse: bool) -> None:
    model, task, _ = reference.build("digit-columns", seed=2, digits=3, reverse=reverse)
    found = mechanisms.column_parts(model, task)
    assert found.passed and found.value >= 0.95
    assert found.control is not None and found.control <= 0.1
    scrambled = Transformer(model.config, seed=3).eval()  # answers by chance
    assert not mechanisms.column_parts(scrambled, task).passed


def test_one_digit_has_no_inner_column() -> None:
    model, task, _ = BUILT[1]
    evidence = mechanisms.column_interchange(model, task)
    assert evidence.passed is None and evidence.value != evidence.value
    assert mechanisms.explain(model, task, budget="quick").label == "undetermined"


def test_an_untrained_network_has_no_columns() -> None:
    task: Any = tasks.get("digit-addition", digits=2)
    evidence = mechanisms.column_interchange(Transformer(training.default_model(task), seed=0), task)
    assert evidence.passed is None and evidence.value != evidence.value
    assert evidence.details["too_few_swaps"], "no answers are right, so that there is nothing to swap between"
