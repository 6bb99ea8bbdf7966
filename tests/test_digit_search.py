"""Digits in a learned subspace: found where training forced them, and nowhere where they mean nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.mechanisms import SEARCHING, applicable, digit_search, explain
from circuits.mechanisms.digit_search import exchanges, halves
from circuits.reference import build, transform
from circuits.tasks import Addition, ModularAddition


@given(st.integers(6, 40), st.integers(2, 12), st.integers(0, 100))
def test_exchanges_are_of_written_digits_and_of_values_that_there_are(n: int, number: int, seed: int) -> None:
    names = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found = exchanges(names, number)
    written = {(a, s): int(names[a]) // number * number + int(names[s]) % number for a in range(n) for s in range(n)}
    expected = {key: value for key, value in written.items() if value < n and value != int(names[key[0]])}
    got = dict(
        zip(zip(found.base.tolist(), found.source.tolist(), strict=True), names[found.mixed].tolist(), strict=True)
    )
    assert got == expected


def test_what_is_judged_was_not_learned_from_in_either_direction() -> None:
    seen, judged = halves(exchanges(torch.arange(30), 10), 30, seed=0)
    pairs = [{frozenset(pair) for pair in zip(h.base.tolist(), h.source.tolist(), strict=True)} for h in (seen, judged)]
    assert not pairs[0] & pairs[1]
    assert len(seen) > len(judged) > 100


@pytest.mark.parametrize("turned", [False, True])
def test_forced_digits_are_found_and_renamed_ones_are_not(turned: bool) -> None:
    model, task, truth = build("interchange-trained", n=40)
    verdict = explain(transform(model, "rotation", seed=1) if turned else model, task, budget="quick")
    found = verdict["digit-search"]
    assert verdict["interchange"].number("units_digit_of_a") < 0.95  # the means are not all that is read of a digit
    assert found.value >= 0.95
    assert found.control is not None
    assert found.control <= 0.2
    assert found.number("digit_base") == 10
    assert f"{verdict.label}/{verdict.mechanism}" == truth
    assert verdict.thresholds["digit_search"] == 0.95


def test_a_network_without_digits_has_none_in_any_subspace() -> None:
    model, task, _ = build("banded-twin", n=40)
    assert digit_search(model, task).value < 0.6


def test_the_search_is_left_out_where_the_verdict_stands_and_where_answers_wrap_around() -> None:
    model, task, _ = build("number-line", n=30)
    assert not {e.test for e in explain(model, task, budget="quick").items} & set(SEARCHING)
    assert set(SEARCHING) <= set(applicable(Addition(n=30)))
    assert not set(SEARCHING) & set(applicable(ModularAddition(p=13)))


def test_the_search_leaves_no_gradients_and_no_hooks() -> None:
    model, task, _ = build("columns", n=20)
    found = digit_search(model, task)
    assert found.value >= 0.95
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
