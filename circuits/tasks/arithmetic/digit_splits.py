"""Splits of an operand square that is too large to enumerate: membership by a hash of the pair."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_limit, check_name, check_seed, check_share
from circuits.tasks.base import SPLITS, Batch

ENUMERABLE = 10**6
"""Largest number of pairs that is enumerated: all pairs of three digits."""
NINE_PROBABILITY = 0.5
"""How often a digit pair of an example of the share of nines is made to sum to nine: carries must start somewhere."""
SMALLEST_SHARE = 0.001
"""Smallest share of the square that rejection sampling draws a split from in reasonable time."""
MOST_EMPTY_ROUNDS = 100
"""Rounds of rejection sampling without a single hit, after which a tiny split is taken to have none."""

Operands = Int[Tensor, "batch 2"]


def splitmix64(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A well-mixed 64-bit number for each input, by wrapping int64 arithmetic.

    Source: Vigna, splitmix64.c (the reference implementation), after Steele, Lea and Flood 2014, "Fast splittable
        pseudorandom number generators".
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift_right(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class DigitSplits(ABC):
    """Base of the digit tasks: which split an operand pair is in, and how examples of a split are drawn.

    The block is a contiguous range of both operands in the middle of their range. Every other pair is in
    ``train`` or ``random`` by a hash of the pair and ``split_seed``.
    """

    digits: int
    train_fraction: float
    block: float
    nine_share: float
    split_seed: int

    @abstractmethod
    def _encode(self, operands: Operands) -> Batch:
        """Whole sequences for operands known to be in range."""

    @property
    def n_operand_values(self) -> int:
        """Each operand is an integer in [0, 10 ** digits)."""
        return 10**self.digits

    @property
    def block_range(self) -> range:
        """Operand values of the held-out block; it holds the pairs with both operands in here."""
        size = round(self.block * self.n_operand_values)
        start = (self.n_operand_values - size) // 2
        return range(start, start + size)

    def check_split(self) -> None:
        """Return nothing.

        Raises:
            BadInput: the parameters of the splits cannot be used.
        """
        check_share("train_fraction", self.train_fraction)
        check_share("block", self.block, zero=True)
        check_seed(self.split_seed)
        if self.block and not len(self.block_range):
            raise BadInput(f"block = {self.block}: is less than one of {self.n_operand_values} operand values")
        outside = 1 - (len(self.block_range) / self.n_operand_values) ** 2
        for share in (self.train_fraction, 1 - self.train_fraction):
            if share * outside < SMALLEST_SHARE:
                raise BadInput(
                    f"train_fraction = {self.train_fraction} with block = {self.block}: leaves one of train and random "
                    f"with {share * outside:.2g} of the pairs; expected at least {SMALLEST_SHARE}"
                )
        # Larger squares than two digits' have at least a thousand pairs in either.
        if self.digits <= 2 and not (self.split_size("train") and self.split_size("random")):
            raise BadInput(f"train_fraction = {self.train_fraction}: leaves train or random without a pair")

    def in_split(self, operands: Operands, split: str) -> Bool[Tensor, " batch"]:
        """Whether each operand pair belongs to the split.

        Raises:
            UnknownName: no such split.
        """
        check_name("split", split, SPLITS)
        block = self.block_range
        in_block = ((operands >= block.start) & (operands < block.stop)).all(dim=1)
        if split == "block":
            return in_block
        seed = splitmix64(torch.tensor(self.split_seed, device=operands.device))
        word = splitmix64(seed ^ (operands[:, 0] * self.n_operand_values + operands[:, 1]))
        # 53 bits, so that the threshold is the exact product in float64.
        trained = _shift_right(word, 11) < int(self.train_fraction * 2**53)
        return ~in_block & (trained if split == "train" else ~trained)

    def split_size(self, split: str) -> int:
        """Number of operand pairs in a split: exact up to three digits and for the block, else the expected number."""
        check_name("split", split, SPLITS)
        block = len(self.block_range) ** 2
        if split == "block":
            return block
        if self.n_operand_values**2 <= ENUMERABLE:
            return len(_enumerate(self, split))
        trained = round((self.n_operand_values**2 - block) * self.train_fraction)
        return trained if split == "train" else self.n_operand_values**2 - block - trained

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        """All examples of a split in order, or ``limit`` distinct ones drawn uniformly.

        Raises:
            BadInput: the split is too large for all of it, or for as much of it as asked for.
        """
        check_limit(limit)
        size = self.split_size(split)
        generator = torch.Generator().manual_seed(seed)
        if self.n_operand_values**2 <= ENUMERABLE or (split == "block" and size <= ENUMERABLE):
            operands = _enumerate(self, split)
            if limit is not None and limit < size:
                operands = operands[torch.randperm(size, generator=generator)[:limit]]
            return self._encode(operands)
        if limit is None or limit > min(size // 2, ENUMERABLE):
            raise BadInput(
                f"limit = {limit}: split {split!r} of {self} has {size:,} pairs; "
                f"expected a limit of at most {min(size // 2, ENUMERABLE):,}"
            )
        operands = torch.empty(0, 2, dtype=torch.long)
        while len(operands) < limit:
            more = self._draw(split, limit - len(operands), generator, nine_share=0.0)
            operands = _distinct(torch.cat((operands, more)), self.n_operand_values)
        return self._encode(operands)

    def sample(self, split: str, n: int, *, generator: torch.Generator) -> Batch:
        """``n`` examples of a split, drawn with replacement, on the generator's device.

        Training examples include the share of nines; held-out ones are uniform.
        """
        nine_share = self.nine_share if split == "train" else 0.0
        return self._encode(self._draw(split, n, generator, nine_share=nine_share))

    def _draw(
        self,
        split: str,
        n: int,
        generator: torch.Generator,
        *,
        nine_share: float,
        keep: Callable[[Operands], Bool[Tensor, " batch"]] | None = None,
    ) -> Operands:
        """``n`` operand pairs of a split that pass ``keep``, by rejection."""
        check_name("split", split, SPLITS)
        block = self.block_range
        if split == "block" and not len(block):
            raise BadInput(f"split 'block' of {self} is empty: give the task a block > 0 to draw from it")
        low, high = (block.start, block.stop) if split == "block" else (0, self.n_operand_values)
        share = {"train": self.train_fraction, "random": 1 - self.train_fraction, "block": 1.0}[split]
        drawn = torch.empty(0, 2, dtype=torch.long, device=generator.device)
        rounds = 0
        while len(drawn) < n:
            if rounds == MOST_EMPTY_ROUNDS and not len(drawn):
                raise BadInput(f"split {split!r} of {self} has no suitable pair: raise train_fraction or digits")
            rounds += 1
            # Enough for most draws to need one round.
            size = int(1.2 * (n - len(drawn)) / share) + 32
            new = torch.randint(low, high, (size, 2), generator=generator, device=generator.device)
            if nine_share:
                new = self._with_nines(new, nine_share, generator)
            wanted = self.in_split(new, split)
            if keep is not None:
                wanted &= keep(new)
            drawn = torch.cat((drawn, new[wanted]))
        return drawn[:n]

    def _with_nines(self, operands: Operands, share: float, generator: torch.Generator) -> Operands:
        """Operands of which a share has, in about half of the columns, b's digit set to nine minus a's.

        Source: Quirke and Barez 2024 (arXiv 2310.13121); repository quanta_maths, maths_data_generator.py.
        """
        device = generator.device
        powers = 10 ** torch.arange(self.digits, device=device)
        a, b = (operands[:, i, None] // powers % 10 for i in (0, 1))
        chosen = torch.rand(len(operands), 1, generator=generator, device=device) < share
        chosen = chosen & (torch.rand(a.shape, generator=generator, device=device) < NINE_PROBABILITY)
        b = torch.where(chosen, 9 - a, b)
        return torch.stack((operands[:, 0], (b * powers).sum(dim=1)), dim=1)


@functools.lru_cache(maxsize=16)
def _enumerate(task: DigitSplits, split: str) -> Operands:
    """All operand pairs of a split, in order; callers must not write to them."""
    values = task.block_range if split == "block" else range(task.n_operand_values)
    numbers = torch.arange(values.start, values.stop)
    operands = torch.cartesian_prod(numbers, numbers).reshape(-1, 2)
    return operands[task.in_split(operands, split)]


def _distinct(operands: Operands, n: int) -> Int[Tensor, "distinct 2"]:
    """Operands without repetitions, in order of first occurrence."""
    _, inverse = torch.unique(operands[:, 0] * n + operands[:, 1], return_inverse=True)
    order = torch.arange(len(inverse))
    first = torch.full((int(inverse.max()) + 1,), len(inverse)).scatter_reduce(0, inverse, order, reduce="amin")
    return operands[first.sort().values]
