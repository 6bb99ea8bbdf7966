"""Verdicts on constructions that no family of reference models has."""

from __future__ import annotations

import pytest
from conftest import with_repeats
from constructions import CONSTRUCTIONS

from circuits import mechanisms, reference

OF_EACH_KIND = {
    "frequencies of another circle",
    "frequencies, then decoders",
    "a line that wraps",
    "columns without cascade",
    "uneven ranges",
    "a list of all pairs",
    "a list of all pairs of digits",
    "frequencies for small sums",
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
