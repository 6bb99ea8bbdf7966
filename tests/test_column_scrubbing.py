"""Causal scrubbing of digit columns: what it says of wired columns, of lists, and against brute force."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference, tasks, training
from circuits.errors import BadInput
from circuits.mechanisms.columns import written_agrees
from circuits.mechanisms.least_squares import class_means
from circuits.mechanisms.rule import RULE
from circuits.model import Transformer


@pytest.mark.parametrize("reverse", [True, False])
def test_neurons_of_columns_are_those_of_other_sums_with_the_same_column(reverse: bool) -> None:
    model, task, _ = reference.build("digit-columns", digits=2, reverse=reverse, seed=1)
    evidence = mechanisms.column_scrubbing(model, task)
    assert evidence.passed and evidence.value >= 0.99 and evidence.details["own"] >= 0.9
    assert evidence.control is not None and evidence.control < 0.5


def test_the_share_of_a_column_is_the_classes_share_of_the_variance() -> None:
    # one decisive layer of one column: the last, where every sum of two digits is right
    model, task, _ = reference.build("digit-columns", digits=2, reverse=True, seed=1)
    operands = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    tokens, at = task.encode(operands).tokens, task.answer_position(1)
    kept = {}
    model.run_with_hooks(
        tokens[:, :at],
        fwd_hooks=[("blocks.1.mlp.hook_post", lambda value, hook: kept.update(post=value[:, -1].detach()))],
    )
    u, v = (operands // 10).T
    classes = 20 * u + 2 * v + ((operands % 10).sum(1) >= 10)
    within = kept["post"] - class_means(kept["post"], classes, 200)[classes]
    assert float(within.square().sum()) == pytest.approx(0, abs=1e-3 * float(kept["post"].var(0).sum()))
    assert mechanisms.column_scrubbing(model, task).details["own_1"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("reverse", [True, False])
def test_neurons_of_a_list_know_which_numbers_are_added(reverse: bool) -> None:
    model, task, truth = reference.build("digit-memoriser", train_fraction=0.05, reverse=reverse)
    evidence = mechanisms.column_scrubbing(model, task)
    assert not evidence.passed and abs(evidence.details["own"]) < 0.05
    verdict = mechanisms.explain(model, task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth, verdict.why


@pytest.mark.long
def test_a_list_of_every_sum_is_not_columns_though_its_heads_bring_one_digit_each() -> None:
    model, task, _ = reference.build("digit-memoriser", all_pairs=True)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert verdict["column-interchange"].passed and verdict["carry-cascade"].passed
    assert verdict["column-scrubbing"].details["own"] < RULE.column_listed
    assert verdict.label == "undetermined", verdict.why


@pytest.mark.parametrize("reverse", [True, False])
def test_a_memoriser_is_right_on_what_it_remembers_and_nowhere_else(reverse: bool) -> None:
    model, task, _ = reference.build("digit-memoriser", train_fraction=0.05, reverse=reverse, seed=2)
    found = training.accuracies(model, task)
    assert found["accuracy_train"] == 1 and found["accuracy_random"] < 0.05
    with pytest.raises(BadInput, match="digits = 3"):
        reference.build("digit-memoriser", digits=3)
    with pytest.raises(BadInput, match="8000"):
        reference.build("digit-memoriser", train_fraction=0.9)


def test_an_untrained_network_has_too_few_right_digits_or_no_columns() -> None:
    task = tasks.get("digit-addition", digits=2)
    evidence = mechanisms.column_scrubbing(Transformer(training.default_model(task), seed=0), task)
    assert not evidence.passed


def test_a_task_without_digit_columns_is_named() -> None:
    model, task, _ = reference.build("columns", n=20)
    with pytest.raises(BadInput, match="no digit columns"):
        mechanisms.column_scrubbing(model, task)


@pytest.mark.parametrize("kind", ["carry into", "base sum of"])
def test_swaps_agree_with_the_digits_that_are_written_before(kind: str) -> None:
    task = tasks.get("digit-addition", digits=3)
    named = {variable.name: variable for variable in task.variables()}
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randint(1000, (2, 4000, 2), generator=generator)
    agrees = written_agrees(task, named[f"{kind} column 1"], 1, base, source)
    for x, y, said in zip(base[:300].tolist(), source[:300].tolist(), agrees[:300].tolist(), strict=True):
        digits, below = (x, y) if kind == "carry into" else (y, x)
        column = sum(d // 10 % 10 for d in digits) + (sum(d % 10 for d in below) >= 10)
        outs = {column >= 10, sum(d % 100 for d in x) >= 100, sum(d % 100 for d in y) >= 100}
        assert said == (len(outs) == 1)
    units_first = tasks.get("digit-addition", digits=3, reverse=True)
    assert bool(written_agrees(units_first, named[f"{kind} column 1"], 1, base, source).all())
