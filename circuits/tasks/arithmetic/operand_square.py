"""What the arithmetic tasks share: checks of parameters and the splits of the operand square.

An operand square is the table of all pairs (a, b) with 0 <= a, b < n. Its splits are disjoint and cover it:
``block`` is a contiguous square in the middle, where every answer also has pairs outside; of the rest, a seeded
permutation gives ``train_fraction`` to ``train`` and what is left to ``random``.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.errors import BadInput, UnknownName


def check_integer(name: str, value: object, low: int, high: int, remedy: str = "") -> None:
    """Return nothing.

    Raises:
        BadInput: ``value`` is not a whole number in [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(f"{name} = {value!r}: expected a whole number from {low} to {high}")
    if not low <= value <= high:
        raise BadInput(f"{name} = {value}: expected {low} to {high}{'; ' + remedy if remedy else ''}")


def check_share(name: str, value: object, *, zero: bool = False, one: bool = False) -> None:
    """Return nothing.

    Raises:
        BadInput: ``value`` is not a number between 0 and 1 (the ends only where allowed).
    """
    expected = f"a number {'>= 0' if zero else '> 0'} and {'<= 1' if one else '< 1'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{name} = {value!r}: expected {expected}")
    if not ((value > 0 or (zero and value == 0)) and (value < 1 or (one and value == 1))):
        raise BadInput(f"{name} = {value}: expected {expected}")


def check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    """Return nothing.

    Raises:
        UnknownName: ``name`` is not among ``known``.
    """
    if name not in known:
        raise UnknownName(kind, name, known)


def check_seed(value: object) -> None:
    """Return nothing.

    Raises:
        BadInput: ``value`` is not a whole number that a generator takes as a seed.
    """
    check_integer("split_seed", value, 0, 2**63 - 1)


def check_operands(operands: Int[Tensor, "batch 2"], n: int) -> None:
    """Return nothing.

    Raises:
        BadInput: not a tensor of pairs of integers in [0, n).
    """
    if operands.ndim != 2 or operands.shape[1] != 2:
        raise BadInput(f"operands have shape {tuple(operands.shape)}: expected [batch, 2]")
    if len(operands) and (int(operands.min()) < 0 or int(operands.max()) >= n):
        low, high = int(operands.min()), int(operands.max())
        raise BadInput(f"operands range from {low} to {high}: expected 0 to {n - 1}")


def check_limit(limit: int | None) -> None:
    """Return nothing.

    Raises:
        BadInput: ``limit`` is negative.
    """
    if limit is not None and limit < 0:
        raise BadInput(f"limit = {limit}: expected None or a number >= 0")


def block_start(n: int, block: int) -> int:
    """First operand value of the held-out block, which stands in the middle of the square."""
    return (n - block) // 2


@functools.lru_cache(maxsize=64)
def split_square(n: int, train_fraction: float, block: int, split_seed: int) -> dict[str, Int[Tensor, " _"]]:
    """Cell numbers ``a * n + b`` of each split, ascending; callers must not write to them.

    Raises:
        BadInput: the block leaves no other rows, or a share leaves ``train`` or ``random`` empty.
    """
    if block >= n:
        raise BadInput(
            f"block = {block}: the table has {n} rows; expected 0 to {n - 1}, so that rows are left to train on"
        )
    start, cells = block_start(n, block), torch.arange(n * n)
    inside = torch.stack((cells // n, cells % n))
    in_block = ((inside >= start) & (inside < start + block)).all(dim=0)
    rest = cells[~in_block]
    n_train = round(train_fraction * len(rest))
    if not 0 < n_train < len(rest):
        raise BadInput(
            f"train_fraction = {train_fraction}: gives {n_train} of {len(rest)} pairs to training; "
            "expected at least one in training and one held out"
        )
    shuffled = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(split_seed))]
    train, random = shuffled[:n_train].sort().values, shuffled[n_train:].sort().values
    return {"train": train, "random": random, "block": cells[in_block]}


def draw(size: int, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """``n`` indices below ``size``: distinct where there are enough, else with replacement."""
    if n <= size:
        return torch.randperm(size, generator=generator)[:n]
    return torch.randint(size, (n,), generator=generator)
