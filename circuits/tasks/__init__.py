"""Tasks: finite, verifiable worlds with a known true state behind every token."""

from __future__ import annotations

from typing import Any

from circuits.tasks import games
from circuits.tasks.arithmetic import Addition, DigitAddition, ModularAddition
from circuits.tasks.base import SPLITS, Batch, Pairs, Role, Task, Variable, from_table
from circuits.tasks.without_equals import WithoutEquals

TASKS: dict[str, type] = {
    "modular-addition": ModularAddition,
    "addition": Addition,
    "digit-addition": DigitAddition,
}
"""Every task by its name."""

__all__ = [
    "SPLITS",
    "TASKS",
    "Addition",
    "Batch",
    "DigitAddition",
    "ModularAddition",
    "Pairs",
    "Role",
    "Task",
    "Variable",
    "WithoutEquals",
    "games",
    "get",
]


def get(name: str, **parameters: object) -> Any:
    """Return the task or game of that name with the given parameters (defaults elsewhere).

    Args:
        name: a key of ``TASKS`` or ``GAMES``; underscores are accepted for hyphens.
        parameters: fields of the task's dataclass.

    Raises:
        UnknownName: no task has that name, or the task has no such parameter.
        BadInput: a parameter has a value that cannot be used.
    """
    return from_table("task", {**TASKS, **games.GAMES}, name, parameters)
