"""Verdicts on constructions that no family of reference models has."""

from __future__ import annotations

import pytest
from constructions import CONSTRUCTIONS

from circuits import mechanisms, reference


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_called_by_its_name(name: str) -> None:
    model, task, truth = CONSTRUCTIONS[name]()
    verdict = mechanisms.explain(model, task, budget="quick")
    label, _, mechanism = truth.partition("/")
    assert (verdict.label, verdict.mechanism) == (label, mechanism), verdict.why


def test_one_grid_of_ranges_is_no_algorithm() -> None:
    verdict = mechanisms.explain(*reference.build("range-lookup", n=30, grids=1)[:2], budget="quick")
    assert (verdict.label, verdict.mechanism) == ("heuristics", "range-lookup"), verdict.why
