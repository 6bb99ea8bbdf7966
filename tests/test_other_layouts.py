"""A mechanism has the same name however its embedding lies, and wherever its code is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import with_repeats
from other_layouts import RenamedAnswers, behind_bos, code_made_by_a_layer, dense, digit_pairs

from circuits.mechanisms import applicable, digit_neurons, explain
from circuits.reference import Reference, build
from circuits.training import accuracies

LAYOUTS: dict[str, Callable[[], Reference]] = {
    "dense fourier": lambda: dense("fourier-pizza", p=29),
    "dense plain fourier": lambda: dense("fourier-plain", n=30),
    "dense number line": lambda: dense("number-line", n=30),
    "dense columns": lambda: dense("columns", n=40),
    "dense columns, last ten not full": lambda: dense("columns", n=45),
    "columns of digit pairs": digit_pairs,
    "fourier made by a layer": lambda: code_made_by_a_layer("fourier-pizza", p=29),
    "number line made by a layer": lambda: code_made_by_a_layer("number-line", n=30),
    "columns made by a layer": lambda: code_made_by_a_layer("columns", n=30),
    "range lookup made by a layer": lambda: code_made_by_a_layer("range-lookup", n=30),
    "dense range lookup": lambda: dense("range-lookup", n=30),
    "fourier behind another token": lambda: behind_bos(build("fourier-pizza", p=29)),
    "columns behind another token": lambda: behind_bos(build("columns", n=30)),
}


OF_EACH_KIND = {
    "dense fourier",
    "dense columns, last ten not full",
    "columns of digit pairs",
    "number line made by a layer",
    "columns behind another token",
}


@pytest.mark.parametrize("layout", with_repeats(LAYOUTS, OF_EACH_KIND))
def test_the_mechanism_keeps_its_name(layout: str) -> None:
    model, task, truth = LAYOUTS[layout]()
    assert min(accuracies(model, task).values()) >= 0.99
    verdict = explain(model, task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth, verdict.why


def test_where_the_code_is_made_is_found() -> None:
    model, task, _ = code_made_by_a_layer("columns", n=30)
    assert explain(model, task, budget="quick")["interchange"].details["site"] == "blocks.1.hook_resid_pre"


def test_neurons_that_work_on_columns_move_with_their_digits_and_ranges_do_not() -> None:
    model, task, _ = digit_pairs()
    found = digit_neurons(model, task)
    assert found.passed and found.control is not None and found.control <= 0.1
    assert found.details["digit_base"] == 10
    ranges = digit_neurons(*build("range-lookup", n=30)[:2])
    assert ranges.value < 0.8 and ranges.passed is False
    trained = digit_neurons(*build("banded", n=60)[:2])
    assert trained.value < 0.5


SMALL: dict[str, dict[str, int]] = {
    "fourier-pizza": {"p": 13, "frequencies": 2},
    "number-line": {"n": 13},
    "columns": {"n": 20},
    "range-lookup": {"n": 20, "grids": 3},
    "pair-memoriser": {"p": 7},
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    with_repeats(
        [(family, dtype) for family in SMALL for dtype in (torch.float64, torch.bfloat16)],
        {("fourier-pizza", torch.float64), ("columns", torch.bfloat16)},
    ),
)
def test_precision_does_not_matter(family: str, dtype: torch.dtype) -> None:
    model, task, truth = build(family, **SMALL[family])
    verdict = explain(model.to(dtype), task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth, verdict.why


@pytest.mark.parametrize("family", with_repeats(SMALL, {"fourier-pizza", "columns"}))
def test_the_size_of_activations_does_not_matter(family: str) -> None:
    model, task, truth = build(family, **SMALL[family])
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_in *= 1e-7
            block.mlp.b_in *= 1e-7
            block.mlp.W_out /= 1e-7
    verdict = explain(model, task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth, verdict.why


@pytest.mark.parametrize("dtype", with_repeats([torch.float32, torch.float64], {torch.float64}))
def test_every_test_runs_behind_another_token_and_in_any_precision(dtype: torch.dtype) -> None:
    model, task, truth = behind_bos(build("fourier-pizza", **SMALL["fourier-pizza"]))
    verdict = explain(model.to(dtype), task)
    assert f"{verdict.label}/{verdict.mechanism}" == truth and verdict.sub_label is not None
    assert {item.test for item in verdict.items} == set(applicable(task))


def test_what_no_test_of_sums_can_be_asked_about_gets_a_verdict_all_the_same() -> None:
    model, task, _ = build("range-lookup", **SMALL["range-lookup"])
    verdict = explain(model, RenamedAnswers(task), budget="quick")
    assert "spectral" not in verdict and "rectangles" in verdict
    assert verdict.label == "heuristics"
