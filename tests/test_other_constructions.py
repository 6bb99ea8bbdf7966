"""Verdicts on constructions that no family of reference models has."""

from __future__ import annotations

import pytest
from constructions import CONSTRUCTIONS

from circuits import mechanisms


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_called_by_its_name(name: str) -> None:
    model, task, truth = CONSTRUCTIONS[name]()
    verdict = mechanisms.explain(model, task, budget="quick")
    label, _, mechanism = truth.partition("/")
    assert (verdict.label, verdict.mechanism) == (label, mechanism), verdict.why
