"""Objectives: losses on a task's batches, and recipes made of them."""

from __future__ import annotations

import dataclasses

from circuits.errors import UnknownName
from circuits.objectives.answer import Answer
from circuits.objectives.banded import Banded
from circuits.objectives.base import Loss, Objective
from circuits.objectives.legal_set import LegalSet
from circuits.objectives.next_token import NextToken
from circuits.objectives.recipe import Recipe, Stage
from circuits.objectives.reinforce import Reinforce
from circuits.objectives.simulate import Simulate
from circuits.objectives.state import State
from circuits.objectives.value import Value

OBJECTIVES: dict[str, type] = {
    "next-token": NextToken,
    "answer": Answer,
    "value": Value,
    "banded": Banded,
    "reinforce": Reinforce,
    "legal-set": LegalSet,
    "state": State,
    "simulate": Simulate,
}
"""Every objective by its name."""

__all__ = [
    "OBJECTIVES",
    "Answer",
    "Banded",
    "LegalSet",
    "Loss",
    "NextToken",
    "Objective",
    "Recipe",
    "Reinforce",
    "Simulate",
    "Stage",
    "State",
    "Value",
    "get",
]


def get(name: str, **parameters: object) -> Objective:
    """Return the objective of that name with the given parameters (defaults elsewhere).

    Args:
        name: a key of ``OBJECTIVES``; underscores are accepted for hyphens.
        parameters: fields of the objective's dataclass.

    Raises:
        UnknownName: no objective has that name, or the objective has no such parameter.
        BadInput: a parameter has a value that cannot be used.
    """
    known = name.replace("_", "-")
    if known not in OBJECTIVES:
        raise UnknownName("objective", name, OBJECTIVES)
    fields = [field.name for field in dataclasses.fields(OBJECTIVES[known])]
    for parameter in parameters:
        if parameter not in fields:
            raise UnknownName(f"parameter of {known!r}", parameter, fields)
    return OBJECTIVES[known](**parameters)
