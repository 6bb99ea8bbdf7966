"""Whole-number addition and subtraction, one token per number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.tasks.arithmetic.one_token import OneTokenTask
from circuits.tasks.arithmetic.operand_square import check_integer, check_name
from circuits.tasks.base import Variable

LARGEST_N = 300
"""Operands up to 299, as in Nikankin et al. 2025 (arXiv 2410.21272), section 2.1."""


@dataclass(frozen=True)
class Addition(OneTokenTask):
    """``a b = c`` with c = a + b or a - b for whole numbers a, b below n.

    The token id of a number v >= 0 is v; for subtraction the tokens of -1, -2, ..., 1 - n follow; ``=`` is last.

    Attributes:
        n: number of operand values, up to 300.
        operation: ``+`` or ``-``.
        train_fraction: share of the pairs outside the block that is trained on.
        block: side of the square of operand pairs that is held out in the middle of the table; 0 for none.
        split_seed: seed of the random split.

    Raises:
        BadInput: n is out of range, the block is not smaller than the table, or a split would be empty.
        UnknownName: the operation is not one of the two.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), section 2.1 (one token per operand and answer, up to 299).
    """

    name: ClassVar[str] = "addition"

    n: int = 50
    operation: str = "+"
    train_fraction: float = 0.8
    block: int = 10
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_integer("n", self.n, 2, LARGEST_N, "larger numbers are too large for the vocabulary (limit 300)")
        check_name("operation", self.operation, ("+", "-"))
        self.check_split()

    @property
    def n_operand_values(self) -> int:
        """Each operand is an integer in [0, n)."""
        return self.n

    @property
    def period(self) -> None:
        """None: the arithmetic is not modular."""
        return None

    @property
    def answer_values(self) -> Int[Tensor, " n_answers"]:
        """The numbers 0 to 2n - 2 for ``+``, 1 - n to n - 1 for ``-``."""
        return torch.arange(2 * self.n - 1) if self.operation == "+" else torch.arange(1 - self.n, self.n)

    def answer(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The true sum or difference."""
        a, b = operands[:, 0], operands[:, 1]
        return a + b if self.operation == "+" else a - b

    def _carry(self, operands: Int[Tensor, "batch 2"], unit: int) -> Int[Tensor, " batch"]:
        """1 where the columns up to ``unit`` (1: units, 10: tens) carry into the next one, for ``-`` borrow from it."""
        a, b = operands[:, 0] % (10 * unit), operands[:, 1] % (10 * unit)
        return (a + b >= 10 * unit).long() if self.operation == "+" else (a < b).long()

    def _units_carry(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        return self._carry(operands, 1)

    def known_after_prompt(self, operands: Int[Tensor, "batch 2"]) -> dict[str, Int[Tensor, " batch"]]:
        """The answer's size and sign, its decimal digits, and the carry (borrow) out of the units and tens columns."""
        answer = self.answer(operands)
        size = answer.abs()
        digits = {"units digit": size % 10, "tens digit": size // 10 % 10, "hundreds digit": size // 100}
        name = "carry" if self.operation == "+" else "borrow"
        carries = {name: self._carry(operands, 1), f"{name} of the tens column": self._carry(operands, 10)}
        return {"magnitude": size, "negative": (answer < 0).long(), **carries, **digits}

    def joint_variables(self) -> tuple[Variable, ...]:
        """The carry (borrow) of the units column, where there is a tens column: swapped, it moves the answer by ten."""
        if self.n <= 10:
            return ()

        def swapped_answer(base: Int[Tensor, "batch 2"], source: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
            moved = self._units_carry(source) - self._units_carry(base)
            answer = self.answer(base) + (10 * moved if self.operation == "+" else -10 * moved)
            legal = (answer >= self.answer_values[0]) & (answer <= self.answer_values[-1])
            return torch.where(legal, answer, self.undefined)

        name = "carry" if self.operation == "+" else "borrow"
        return (Variable(f"{name} of the units column", None, self._units_carry, swapped_answer),)
