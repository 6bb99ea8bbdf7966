"""Arithmetic modulo a prime, one token per number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.one_token import OneTokenTask
from circuits.tasks.arithmetic.operand_square import check_integer, check_name

LARGEST_P = 997
"""Keeps the table under a million pairs."""


@dataclass(frozen=True)
class ModularAddition(OneTokenTask):
    """``a b = c`` with c = a + b, a - b or a * b modulo a prime p.

    The token id of a number is the number; ``=`` is token p.

    Attributes:
        p: the prime modulus, up to 997.
        operation: ``+``, ``-`` or ``*``.
        train_fraction: share of the pairs outside the block that is trained on.
        block: side of the square of operand pairs that is held out in the middle of the table; 0 for none.
        split_seed: seed of the random split.

    Raises:
        BadInput: p is not prime, or a split would be empty.
        UnknownName: the operation is not one of the three.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 3 (p = 113, 30 % of the pairs); Power et al. 2022
        (arXiv 2201.02177), appendix A.1 for the other operations.
    """

    name: ClassVar[str] = "modular-addition"

    p: int = 53
    operation: str = "+"
    train_fraction: float = 0.5
    block: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_integer("p", self.p, 2, LARGEST_P)
        if not _is_prime(self.p):
            below = next(q for q in range(self.p, 1, -1) if _is_prime(q))
            above = next(q for q in range(self.p, 2 * self.p) if _is_prime(q))
            raise BadInput(f"p = {self.p} is not prime: expected a prime; the nearest are {below} and {above}")
        check_name("operation", self.operation, ("+", "-", "*"))
        self.check_split()

    @property
    def n_operand_values(self) -> int:
        """Each operand is an integer in [0, p)."""
        return self.p

    @property
    def period(self) -> int:
        """The modulus p."""
        return self.p

    @property
    def answer_values(self) -> Int[Tensor, " n_answers"]:
        """The numbers 0 to p - 1."""
        return torch.arange(self.p)

    def answer(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The true result, in [0, p)."""
        return self._unreduced(operands) % self.p

    def _unreduced(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        a, b = operands[:, 0], operands[:, 1]
        if self.operation == "+":
            return a + b
        return a - b if self.operation == "-" else a * b

    def known_after_prompt(self, operands: Int[Tensor, "batch 2"]) -> dict[str, Int[Tensor, " batch"]]:
        """The answer, and how often p was taken off (added, for ``-``) to bring the result into range."""
        raw = self._unreduced(operands)
        return {"answer": raw % self.p, "reductions": (raw // self.p).abs()}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % q for q in range(2, int(n**0.5) + 1))
