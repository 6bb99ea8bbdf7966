"""Column addition: digits, sums and carries of the columns, and pairs of operands that differ in one of them.

Column 0 is the units column. Digits and columns are along the last dimension, units first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.base import Variable

Operands = Int[Tensor, "batch 2"]


def digits_of(numbers: Int[Tensor, "*shape"], n_digits: int) -> Int[Tensor, "*shape n_digits"]:
    """Decimal digits of numbers, units first."""
    powers = 10 ** torch.arange(n_digits, device=numbers.device)
    return numbers[..., None] // powers % 10


def number_of(digits: Int[Tensor, "*shape n_digits"]) -> Int[Tensor, "*shape"]:
    """The numbers with the given decimal digits, units first."""
    return (digits * 10 ** torch.arange(digits.shape[-1], device=digits.device)).sum(dim=-1)


def column_sums(operands: Operands, n_digits: int) -> Int[Tensor, "batch n_digits"]:
    """a_i + b_i of each column, without the carry in."""
    return digits_of(operands, n_digits).sum(dim=1)


def carries(operands: Operands, n_digits: int) -> Int[Tensor, "batch n_digits_plus_1"]:
    """The carry into each column 0 to n_digits; the first is 0 always, the last is the sum's leading digit."""
    powers = 10 ** torch.arange(n_digits + 1, device=operands.device)
    return (operands[..., None] % powers).sum(dim=1) // powers


def cascade_length(operands: Operands, n_digits: int) -> Int[Tensor, " batch"]:
    """The longest run of adjacent columns that sum to nine and take a carry in."""
    passes_on = (column_sums(operands, n_digits) == 9) & (carries(operands, n_digits)[:, :-1] == 1)
    run = longest = torch.zeros_like(operands[:, 0])
    for column in range(n_digits):
        run = torch.where(passes_on[:, column], run + 1, 0)
        longest = torch.maximum(longest, run)
    return longest


def carry_variable(n_digits: int, column: int) -> Variable:
    """The carry into a column; swapped, the columns from there on are added again."""

    def value(operands: Operands) -> Int[Tensor, " batch"]:
        return carries(operands, n_digits)[:, column]

    def swapped_answer(base: Operands, source: Operands) -> Int[Tensor, " batch"]:
        unit = 10**column
        below = base.sum(dim=1) % unit
        return ((base // unit).sum(dim=1) + value(source)) * unit + below

    return Variable(f"carry into column {column}", None, value, swapped_answer)


def base_sum_variable(n_digits: int, column: int) -> Variable:
    """A column's sum modulo ten, without the carry in; swapped, only that digit of the answer changes."""

    def value(operands: Operands) -> Int[Tensor, " batch"]:
        return column_sums(operands, n_digits)[:, column] % 10

    def swapped_answer(base: Operands, source: Operands) -> Int[Tensor, " batch"]:
        answer, unit = base.sum(dim=1), 10**column
        digit = (value(source) + carries(base, n_digits)[:, column]) % 10
        return answer + (digit - answer // unit % 10) * unit

    return Variable(f"base sum of column {column}", None, value, swapped_answer)


def carry_can_flip(n_digits: int, column: int) -> Callable[[Operands], Bool[Tensor, " batch"]]:
    """A test of operands: can the carry into the column flip without another carry or a lower digit changing?

    The column below must not sum to nine, nor may the column itself, which would hand the flip on.
    """

    def keep(operands: Operands) -> Bool[Tensor, " batch"]:
        return (column_sums(operands, n_digits)[:, column - 1 : column + 1] != 9).all(dim=1)

    return keep


def with_carry_flipped(operands: Operands, n_digits: int, column: int, generator: torch.Generator) -> Operands:
    """Operands with another digit pair below the column, whose sum is ten more or ten less.

    Expects operands that pass ``carry_can_flip``: sums 0 to 8 then become 10 to 18, and the reverse.
    """
    old = column_sums(operands, n_digits)[:, column - 1]
    return with_digit_pair(operands, column - 1, torch.where(old < 9, old + 10, old - 10), generator)


def with_base_sum_changed(operands: Operands, n_digits: int, column: int, generator: torch.Generator) -> Operands:
    """Operands with another digit pair in the column: another sum, uniform among those with the same carry out."""
    old, carry_in = column_sums(operands, n_digits)[:, column], carries(operands, n_digits)[:, column]
    carry_out = old + carry_in >= 10
    lowest = torch.where(carry_out, 10 - carry_in, 0)
    highest = torch.where(carry_out, 18, 9 - carry_in)
    count = highest - lowest + 1
    # A step of 1 to count - 1 around the range never returns to the old sum.
    step = 1 + below(count - 1, generator)
    return with_digit_pair(operands, column, lowest + (old - lowest + step) % count, generator)


def with_digit_pair(
    operands: Operands, column: int, sums: Int[Tensor, " batch"], generator: torch.Generator
) -> Operands:
    """Operands whose digits in one column are a uniform pair with the given sum."""
    lowest, highest = (sums - 9).clamp(min=0), sums.clamp(max=9)
    a = lowest + below(highest - lowest + 1, generator)
    new, unit = torch.stack((a, sums - a), dim=1), 10**column
    return operands + (new - operands // unit % 10) * unit


def below(bounds: Int[Tensor, " batch"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Uniform whole numbers from 0 to each bound, exclusive."""
    uniform = torch.rand(bounds.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (uniform * bounds).long()
