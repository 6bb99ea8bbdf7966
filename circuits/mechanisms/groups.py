"""Operands and answers in the names of the group in which the answer is the operands' sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.mechanisms.readings import Readings, square
from circuits.tasks.base import Task


def operation_of(task: Task) -> str | None:
    """The operation between the operands, "+", "-" or "*", by the task's answers; None where it is none of these."""
    operands = square(task)
    a, b = operands.T
    answers = task.answer(operands)
    for name, result in (("+", a + b), ("-", a - b), ("*", a * b)):
        if torch.equal(answers, result % task.period if task.period else result):
            return name
    return None


def group_index(
    task: Task, operands: Int[Tensor, "rows 2"], *, circle: int | None = None
) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """Operands and answers renamed so that the answer is their sum modulo M: (a', b', kept rows, M).

    Subtraction negates the second operand; multiplication modulo p takes discrete logarithms (zero operands are
    dropped, M = p - 1); plain addition and subtraction use M = ``circle``, or the number of answers, so that nothing
    wraps around: any longer circle is as good, and a network may have chosen one (``functional_form.circle_length``).
    Returns None where the task has no such renaming.

    Source: Chughtai et al. 2023 (arXiv 2302.03025), section 2, for the group view of modular tasks.
    """
    operation = operation_of(task)
    a, b = operands[:, 0], operands[:, 1]
    kept = torch.ones_like(a, dtype=torch.bool)
    modulus = task.period or circle or len(task.answer_values)
    if operation == "+":
        return a, b, kept, modulus
    if operation == "-":
        return a, (-b) % modulus, kept, modulus
    if operation == "*" and task.period:
        logarithm = discrete_logarithm(task.period).to(a.device)
        kept = (a > 0) & (b > 0)
        return logarithm[a], logarithm[b], kept, task.period - 1
    return None


def discrete_logarithm(p: int) -> Int[Tensor, " p"]:
    """Logarithm modulo the prime p to its smallest primitive root; -1 for zero."""
    for root in range(1, p):
        powers = [1]
        for _ in range(p - 2):
            powers.append(powers[-1] * root % p)
        if len(set(powers)) == p - 1:
            table = torch.full((p,), -1)
            table[torch.tensor(powers)] = torch.arange(p - 1)
            return table
    raise BadInput(f"{p} is not prime: there is no primitive root")


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Readings in the names of the group in which the answer is the sum of the operands, modulo ``modulus``."""

    tokens: Int[Tensor, "rows pos"]
    operands: Int[Tensor, "rows 2"]
    a: Int[Tensor, " rows"]
    b: Int[Tensor, " rows"]
    split: Int[Tensor, " rows"]
    logits: Float[Tensor, "rows columns"]
    columns: Int[Tensor, " columns"]
    """Where each answer of the group stands in the task's ``answer_values``, in the order of ``names``."""
    names: Int[Tensor, " columns"]
    """The answers of the group, ascending: 0 to modulus - 1, or those of a longer circle that the task has."""
    kept: Bool[Tensor, " all"]
    modulus: int

    @property
    def total(self) -> Int[Tensor, " rows"]:
        """The answer, a + b."""
        return (self.a + self.b) % self.modulus

    @property
    def answer(self) -> Int[Tensor, " rows"]:
        """The column of the answer."""
        return torch.searchsorted(self.names, self.total)

    @property
    def distance(self) -> Int[Tensor, " rows"]:
        """The difference a - b."""
        return (self.a - self.b) % self.modulus


def group_operands(task: Task) -> Int[Tensor, " modulus"]:
    """Return the operand values in the order of the group, without those that it has no name for.

    Raises:
        BadInput: the operation has no group structure.
    """
    values = torch.arange(task.n_operand_values)
    renamed = group_index(task, torch.stack([values, torch.ones_like(values)], dim=1))
    if renamed is None:
        raise BadInput(f"{task.name} has no renaming of its operands under which the answer is their sum")
    index, _, kept, _ = renamed
    return values[kept][index[kept].argsort()]


def group_table(task: Task, readings: Readings, *, circle: int | None = None) -> GroupTable:
    """Return readings in the group's names, without the operands and answers that it has no name for.

    ``circle`` is that of ``group_index``.

    Raises:
        BadInput: the operation has no group structure.
    """
    renamed = group_index(task, readings.operands, circle=circle)
    if renamed is None:
        raise BadInput(f"{task.name} has no renaming of its operands under which the answer is their sum")
    a, b, kept, modulus = renamed
    answers = task.answer_values.to(a.device)
    names = answers % modulus
    columns = torch.arange(len(answers), device=a.device)
    if operation_of(task) == "*":  # zero has no logarithm
        columns = columns[answers > 0]
        names = discrete_logarithm(modulus + 1).to(a.device)[answers[columns]]
    order = names.argsort()
    names, columns = names[order], columns[order]
    return GroupTable(
        readings.tokens[kept],
        readings.operands[kept],
        a[kept],
        b[kept],
        readings.split[kept],
        readings.logits[kept][:, columns],
        columns,
        names,
        kept,
        modulus,
    )


def angle(index: Tensor, frequency: Tensor | int, modulus: int) -> Tensor:
    """2 pi * frequency * index / modulus, in radians."""
    return index.float() * (2 * math.pi * float(frequency) / modulus)
