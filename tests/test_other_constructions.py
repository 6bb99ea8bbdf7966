"""Verdicts on constructions that no family of reference models has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import with_repeats
from constructions import CONSTRUCTIONS, listed_along_a_line, listed_by_hashed_digits

from circuits import mechanisms, reference
from circuits.mechanisms import causal_scrubbing
from circuits.mechanisms.readings import split_of
from circuits.tasks import Addition

OF_EACH_KIND = {
    "frequencies of another circle",
    "frequencies, then decoders",
    "a line that wraps",
    "columns without cascade",
    "uneven ranges",
    "a list of all pairs",
    "a list of all pairs of digits",
    "frequencies for small sums",
    "frequencies in some rows, off in others",
    "neurons that read all frequencies",
    "ranges and residue tables",
    "columns behind norms",
    "a line with GELU behind norms",
}


@pytest.mark.parametrize("name", with_repeats(CONSTRUCTIONS, OF_EACH_KIND))
def test_is_called_by_its_name(name: str) -> None:
    model, task, truth = CONSTRUCTIONS[name]()
    verdict = mechanisms.explain(model, task, budget="quick")
    label, _, mechanism = truth.partition("/")
    assert (verdict.label, verdict.mechanism) == (label, mechanism), verdict.why


def test_one_grid_of_ranges_is_no_algorithm() -> None:
    verdict = mechanisms.explain(*reference.build("range-lookup", n=30, grids=1)[:2], budget="quick")
    assert (verdict.label, verdict.mechanism) == ("heuristics", "range-lookup"), verdict.why


@pytest.mark.parametrize("listed", [listed_along_a_line, listed_by_hashed_digits])
def test_a_list_is_no_algorithm_for_being_written_as_one_number(listed: Callable[[], reference.Reference]) -> None:
    model, task, _ = listed()
    verdict = mechanisms.explain(model, task, budget="quick")
    assert verdict["accuracy-gate"].number("train") == 1 and verdict.label == "undetermined", verdict.why
    scrubbed = verdict["causal-scrubbing"]
    assert max(scrubbed.value, scrubbed.number("columns")) < 0.2


def test_a_list_of_training_pairs_along_a_line_is_a_list() -> None:
    task = Addition(n=16, block=0)
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    model, task, _ = listed_along_a_line(16, split_of(task, pairs) == 0)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert (verdict.label, verdict.mechanism) == ("memorisation", "pairs"), verdict.why


@pytest.mark.parametrize(
    ("name", "sizes", "by"), [("number-line", {"n": 20}, "line"), ("columns", {"n": 30}, "columns")]
)
def test_an_algorithm_survives_neurons_from_inputs_that_it_cannot_tell_apart(
    name: str, sizes: dict[str, int], by: str
) -> None:
    model, task, _ = reference.build(name, **sizes)
    evidence = causal_scrubbing(model, task)
    assert evidence.number(by) > 0.99 and (evidence.control or 0) < 0.2
    if name == "columns":
        assert evidence.number("line") < 0.5
