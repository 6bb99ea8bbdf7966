"""Whole-number addition with one token per digit, as in column addition at school."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic import columns
from circuits.tasks.arithmetic.digit_splits import DigitSplits
from circuits.tasks.arithmetic.operand_square import check_integer, check_name, check_operands, check_share
from circuits.tasks.base import Batch, Pairs, Role, Variable

PLUS, EQUALS, SEPARATOR = 10, 11, 12


@dataclass(frozen=True)
class DigitAddition(DigitSplits):
    """``d..d+d..d=`` and the sum, a token per digit, the operands' most significant digits first.

    The sum has ``digits + 1`` digits, most significant first unless ``reverse``. With ``scratchpad`` the carries
    out of the columns, units first, and a separator stand between ``=`` and the sum. Column 0 is the units column.
    Tokens: 0-9 are digits, 10 is ``+``, 11 is ``=``, 12 is the separator ``;`` (only with the scratchpad).

    Attributes:
        digits: digits of each operand, 1 to 8.
        reverse: whether the sum is written units first.
        scratchpad: whether the carries are written out before the sum.
        train_fraction: share of the pairs outside the block that is trained on.
        block: side of the held-out block as a share of the operand range; 0 for none.
        nine_share: share of the sampled training examples in which digit pairs are made to sum to nine.
        split_seed: seed of the random split.

    Raises:
        BadInput: a parameter is out of range.

    Source: Quirke and Barez 2024 (arXiv 2310.13121) for the columns and the share of nines; Nanda et al. 2023
        (arXiv 2301.05217; repository progress-measures-paper) for the plain format and its token ids; Lee et al.
        2023 (arXiv 2307.03381) for the reversed sum and the scratchpad.
    """

    name: ClassVar[str] = "digit-addition"

    digits: int = 3
    reverse: bool = False
    scratchpad: bool = False
    train_fraction: float = 0.8
    block: float = 0.1
    nine_share: float = 0.4
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_integer("digits", self.digits, 1, 8, "numbers of more digits do not fit the split's integer arithmetic")
        for name in ("reverse", "scratchpad"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} = {getattr(self, name)!r}: expected true or false")
        check_share("nine_share", self.nine_share, zero=True, one=True)
        self.check_split()

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id."""
        return (*"0123456789+=", *(";" if self.scratchpad else ""))

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return 13 if self.scratchpad else 12

    @property
    def length(self) -> int:
        """Number of tokens of a whole sequence."""
        return 3 * self.digits + 3 + (self.digits + 1 if self.scratchpad else 0)

    @property
    def n_ctx(self) -> int:
        """Number of tokens that a model reads."""
        return self.length - 1

    @property
    def roles(self) -> Int[Tensor, " length"]:
        """The role of each token of a sequence."""
        scratchpad = [Role.SCRATCHPAD] * (self.digits + 1 if self.scratchpad else 0)
        return torch.tensor([Role.PROMPT] * (2 * self.digits + 2) + scratchpad + [Role.ANSWER] * (self.digits + 1))

    @property
    def period(self) -> None:
        """None: the arithmetic is not modular."""
        return None

    @property
    def undefined(self) -> int:
        """The number that stands for "no answer": -1."""
        return -1

    @property
    def answer_tokens(self) -> Int[Tensor, " n_answers"]:
        """The ten digits."""
        return torch.arange(10)

    @property
    def answer_values(self) -> Int[Tensor, " n_answers"]:
        """What the ten digits stand for."""
        return torch.arange(10)

    def distance(self) -> Float[Tensor, "n_answers n_answers"]:
        """Numeric distance between two digits at one position."""
        return (torch.arange(10)[:, None] - torch.arange(10)).abs().float()

    def answer(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The true sum."""
        return operands.sum(dim=1)

    def answer_position(self, column: int) -> int:
        """Position in a whole sequence of the sum's digit of one column."""
        return self.length - self.digits - 1 + (column if self.reverse else self.digits - column)

    def scratchpad_position(self, column: int) -> int:
        """Position in a whole sequence of the written carry out of one column (only with the scratchpad)."""
        return 2 * self.digits + 2 + column

    def encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        """Whole sequences for the given operands.

        Raises:
            BadInput: an operand is out of range.
        """
        check_operands(operands, self.n_operand_values)
        return self._encode(operands)

    def _encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        plus = torch.full_like(operands[:, :1], PLUS)
        equals = torch.full_like(plus, EQUALS)
        a, b = columns.digits_of(operands, self.digits).flip(-1).unbind(dim=1)
        parts = [a, plus, b, equals]
        if self.scratchpad:
            parts += [columns.carries(operands, self.digits)[:, 1:], torch.full_like(plus, SEPARATOR)]
        total = columns.digits_of(self.answer(operands), self.digits + 1)
        parts.append(total if self.reverse else total.flip(-1))
        return Batch(torch.cat(parts, dim=1), operands, self.roles.to(operands.device))

    def read_answer(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """The number that each sequence gives as its answer, -1 where that is not all digits."""
        if tokens.shape[1] != self.length:
            return torch.full_like(tokens[:, 0], self.undefined)
        written = tokens[:, -self.digits - 1 :]
        least_first = written if self.reverse else written.flip(-1)
        legal = ((written >= 0) & (written < 10)).all(dim=1)
        return torch.where(legal, columns.number_of(least_first), self.undefined)

    def verify(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, " batch"]:
        """Whether whole sequences are well formed and right: prompt, scratchpad and every digit of the sum."""
        if tokens.shape[1] != self.length:
            return torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        d = self.digits
        written = torch.stack((tokens[:, :d], tokens[:, d + 1 : 2 * d + 1]), dim=1).flip(-1)
        # A token that is no digit differs from itself clamped.
        right = self._encode(columns.number_of(written.clamp(0, 9))).tokens
        return (tokens == right).all(dim=1)

    def cascade_length(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The longest run of adjacent columns that sum to nine and take a carry in; 0 where there is none.

        Source: Quirke and Barez 2024 (arXiv 2310.13121); repository quanta_maths, maths_complexity.py, whose class
            S0 is no carry, S1 is a carry and length 0 here, S2, S3, ... lengths 1, 2, ... here.
        """
        return columns.cascade_length(operands, self.digits)

    def state(self, operands: Int[Tensor, "batch 2"]) -> Mapping[str, Int[Tensor, "batch length"]]:
        """The true state behind each token, -1 where it is not determined by the tokens so far.

        ``column`` and ``digit`` are the token's own column and value; ``carry in`` and ``carry out`` are its
        column's, on the tokens of the scratchpad and the sum. ``sum of column i`` (a_i + b_i, without the carry)
        and ``carry into column i`` are known from some token on.
        """
        check_operands(operands, self.n_operand_values)
        d, device = self.digits, operands.device
        column = torch.full((self.length,), -1, device=device)
        for i in range(d):
            column[d - 1 - i] = column[2 * d - i] = i
            if self.scratchpad:
                column[self.scratchpad_position(i)] = i
        for i in range(d + 1):
            column[self.answer_position(i)] = i
        tokens = self._encode(operands).tokens
        unknown = torch.full_like(tokens, -1)
        completed = (column >= 0) & (torch.arange(self.length, device=device) > 2 * d + 1)
        carries = columns.carries(operands, d)
        # The overflow column carries nothing out.
        carries_out = torch.nn.functional.pad(carries[:, 1:], (0, 1))
        at = column.clamp(min=0)
        return {
            "column": column.expand_as(tokens),
            "digit": torch.where(column >= 0, tokens, unknown),
            "carry in": torch.where(completed, carries[:, at], unknown),
            "carry out": torch.where(completed, carries_out[:, at], unknown),
            **self._column_states(operands),
        }

    def _column_states(self, operands: Int[Tensor, "batch 2"]) -> dict[str, Int[Tensor, "batch length"]]:
        """Sums and carries of the columns, each from the token on that settles it.

        Digits still to come could be anything, so a column's sum lies between two bounds. Carries grow with the
        sums: one is settled where the lowest and the highest sums give the same.
        """
        d, device = self.digits, operands.device
        position, column = torch.arange(self.length, device=device)[:, None], torch.arange(d, device=device)
        seen = torch.stack((position >= d - 1 - column, position >= 2 * d - column))
        digits = columns.digits_of(operands, d)[:, :, None]
        lowest = torch.where(seen, digits, 0).sum(dim=1)
        highest = torch.where(seen, digits, 9).sum(dim=1)
        states = {f"sum of column {i}": _settled(lowest[..., i], highest[..., i]) for i in range(d)}
        carry_low = carry_high = torch.zeros_like(lowest[..., 0])
        for i in range(d):
            carry_low, carry_high = (lowest[..., i] + carry_low) // 10, (highest[..., i] + carry_high) // 10
            states[f"carry into column {i + 1}"] = _settled(carry_low, carry_high)
        return states

    def variables(self) -> tuple[Variable, ...]:
        """Candidate causal variables: the carry into each column, and each column's sum modulo ten.

        With another carry into column i, that column and all above it are added again, and those below stay. With
        another sum modulo ten, only the sum's digit of that column changes: the carry out of a column is a
        variable of its own (Quirke and Barez 2024, arXiv 2310.13121: Base Add against Make Carry and Use Sum 9).
        """
        carries = (columns.carry_variable(self.digits, i) for i in range(1, self.digits + 1))
        return (*carries, *(columns.base_sum_variable(self.digits, i) for i in range(self.digits)))

    @property
    def pair_changes(self) -> tuple[str, ...]:
        """What ``pairs`` can change: one carry, or the digits of one column."""
        carries = (f"carry into column {i}" for i in range(1, self.digits + 1))
        return (*carries, *(f"digits of column {i}" for i in range(self.digits)))

    def pairs(self, n: int, *, seed: int = 0, change: str | None = None) -> Pairs:
        """``n`` pairs whose corrupt input has other digits in one column, and that change one variable.

        ``carry into column i``: the digit pair of column i - 1 sums to ten more or ten less, so that this carry
        flips and the digit below it stays; column i does not sum to nine, so that no carry above it flips.
        ``digits of column i``: another digit pair with another sum modulo ten and the same carry out.
        Either way the sums differ in the digit of column i alone, so the tokens before that digit are the same
        but for the changed operands, and it is what ``position`` predicts. With the scratchpad the changed
        carry would be read off an earlier token, so there ``position`` predicts the scratchpad's own carry.

        The clean inputs are drawn from the training split without the share of nines.

        Raises:
            UnknownName: ``change`` is not one of ``pair_changes``.
        """
        change = change or self.pair_changes[0]
        check_name("change", change, self.pair_changes)
        check_integer("n", n, 1, 2**31 - 1)
        check_integer("seed", seed, 0, 2**63 - 1)
        generator = torch.Generator().manual_seed(seed)
        kind, column = change.rsplit(" ", 1)[0], int(change.rsplit(" ", 1)[1])
        if kind == "carry into column":
            clean = self._draw("train", n, generator, nine_share=0.0, keep=columns.carry_can_flip(self.digits, column))
            corrupt = columns.with_carry_flipped(clean, self.digits, column, generator)
        else:
            clean = self._draw("train", n, generator, nine_share=0.0)
            corrupt = columns.with_base_sum_changed(clean, self.digits, column, generator)
        carries = kind == "carry into column" and self.scratchpad
        target = self.scratchpad_position(column - 1) if carries else self.answer_position(column)
        clean_batch, corrupt_batch = self._encode(clean), self._encode(corrupt)
        return Pairs(
            clean=clean_batch.inputs,
            corrupt=corrupt_batch.inputs,
            position=torch.full((n,), target - 1),
            correct=clean_batch.tokens[:, target],
            wrong=corrupt_batch.tokens[:, target],
            changed=change,
        )


def _settled(lowest: Int[Tensor, "batch length"], highest: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    return torch.where(lowest == highest, lowest, -1)
