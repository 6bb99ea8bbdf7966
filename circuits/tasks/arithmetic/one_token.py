"""What the tasks with one token per operand and for the answer share: everything but the arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import (
    check_integer,
    check_limit,
    check_name,
    check_operands,
    check_seed,
    check_share,
    draw,
    split_square,
)
from circuits.tasks.base import SPLITS, Batch, Pairs, Role, Variable

DIGIT_NAMES = ("units", "tens", "hundreds")


class OneTokenTask(ABC):
    """A task whose sequences are ``a b = c``: the base class of its dataclass.

    Every pair of operands is enumerated, so a split's size is exact. Where a quantity has no value (a swapped
    digit that leaves the operand range, a sequence whose last token is no answer) it is ``undefined``.
    """

    name: ClassVar[str]
    train_fraction: float
    block: int
    split_seed: int

    @property
    @abstractmethod
    def n_operand_values(self) -> int:
        """Each operand is an integer in [0, n_operand_values)."""

    @property
    @abstractmethod
    def period(self) -> int | None:
        """The modulus where the arithmetic is modular, else None."""

    @property
    @abstractmethod
    def answer_values(self) -> Int[Tensor, " n_answers"]:
        """The number that each of ``answer_tokens`` stands for, ascending."""

    @abstractmethod
    def answer(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The true numeric result."""

    @abstractmethod
    def known_after_prompt(self, operands: Int[Tensor, "batch 2"]) -> dict[str, Int[Tensor, " batch"]]:
        """Quantities >= 0 of the true state that both operands determine."""

    def joint_variables(self) -> tuple[Variable, ...]:
        """Candidate causal variables that depend on both operands."""
        return ()

    def check_split(self) -> None:
        """Return nothing.

        Raises:
            BadInput: the parameters of the splits cannot be used.
        """
        n = self.n_operand_values
        check_share("train_fraction", self.train_fraction)
        check_integer("block", self.block, 0, n - 1, f"the table has {n} rows, and some must be left to train on")
        check_seed(self.split_seed)
        split_square(n, self.train_fraction, self.block, self.split_seed)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id."""
        by_token = dict(zip(self.answer_tokens.tolist(), self.answer_values.tolist(), strict=True))
        return (*(str(by_token[token]) for token in range(len(by_token))), "=")

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return len(self.answer_values) + 1

    @property
    def n_ctx(self) -> int:
        """Number of tokens that a model reads."""
        return 3

    @property
    def roles(self) -> Int[Tensor, " length"]:
        """The role of each token of a sequence."""
        return torch.tensor([Role.PROMPT, Role.PROMPT, Role.PROMPT, Role.ANSWER])

    @property
    def undefined(self) -> int:
        """The number that stands for "no answer": one less than the smallest answer (-1 where none is negative)."""
        return int(self.answer_values[0]) - 1

    @property
    def answer_tokens(self) -> Int[Tensor, " n_answers"]:
        """Token ids that can stand at the answer position, in order of ``answer_values``."""
        return self.token_of(self.answer_values)

    def token_of(self, values: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Token ids of numbers: a number >= 0 is its own token; -1, -2, ... follow the largest number."""
        return torch.where(values >= 0, values, int(self.answer_values[-1]) - values)

    def distance(self) -> Float[Tensor, "n_answers n_answers"]:
        """Numeric distance between answers (around the circle where the task is modular)."""
        values = self.answer_values.float()
        apart = (values[:, None] - values[None, :]).abs()
        return apart if self.period is None else torch.minimum(apart, self.period - apart)

    def encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        """Whole sequences for the given operands.

        Raises:
            BadInput: an operand is out of range.
        """
        check_operands(operands, self.n_operand_values)
        return self._encode(operands)

    def _encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        equals = torch.full_like(operands[:, 0], self.d_vocab - 1)
        answers = self.token_of(self.answer(operands))
        tokens = torch.stack((operands[:, 0], operands[:, 1], equals, answers), dim=1)
        return Batch(tokens, operands, self.roles.to(operands.device))

    def _cells(self, split: str) -> Int[Tensor, " size"]:
        check_name("split", split, SPLITS)
        return split_square(self.n_operand_values, self.train_fraction, self.block, self.split_seed)[split]

    def _operands(self, cells: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"]:
        return torch.stack((cells // self.n_operand_values, cells % self.n_operand_values), dim=1)

    def split_size(self, split: str) -> int:
        """Number of operand pairs in a split."""
        return len(self._cells(split))

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        """All examples of a split in order, or ``limit`` of them drawn without replacement."""
        check_limit(limit)
        cells = self._cells(split)
        if limit is not None and limit < len(cells):
            cells = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:limit]]
        return self._encode(self._operands(cells))

    def sample(self, split: str, n: int, *, generator: torch.Generator) -> Batch:
        """``n`` examples of a split, drawn with replacement, on the generator's device.

        Raises:
            BadInput: the split is empty.
        """
        cells = self._cells(split).to(generator.device)
        if not len(cells):
            raise BadInput(f"split {split!r} of {self} is empty: give the task a block >= 1 to draw from it")
        drawn = torch.randint(len(cells), (n,), generator=generator, device=generator.device)
        return self._encode(self._operands(cells[drawn]))

    def state(self, operands: Int[Tensor, "batch 2"]) -> Mapping[str, Int[Tensor, "batch length"]]:
        """The true state behind each token: ``a`` from its token on, the rest from ``b``'s on, -1 before."""
        check_operands(operands, self.n_operand_values)
        known = {"a": (operands[:, 0], 0), "b": (operands[:, 1], 1)}
        known |= {name: (value, 1) for name, value in self.known_after_prompt(operands).items()}
        position = torch.arange(4, device=operands.device)
        return {name: torch.where(position >= first, value[:, None], -1) for name, (value, first) in known.items()}

    def read_answer(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """The number that each sequence gives as its answer, ``undefined`` where it gives none."""
        if tokens.shape[1] != 4:
            return torch.full_like(tokens[:, 0], self.undefined)
        by_token = torch.full((self.d_vocab,), self.undefined, device=tokens.device)
        by_token[self.answer_tokens.to(tokens.device)] = self.answer_values.to(tokens.device)
        last = tokens[:, 3]
        legal = (last >= 0) & (last < self.d_vocab)
        return torch.where(legal, by_token[last.clamp(0, self.d_vocab - 1)], self.undefined)

    def verify(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, " batch"]:
        """Whether whole sequences are well formed and right: both operands in range, ``=``, the true answer."""
        if tokens.shape[1] != 4:
            return torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        # An operand out of range differs from itself clamped.
        right = self._encode(tokens[:, :2].clamp(0, self.n_operand_values - 1)).tokens
        return (tokens == right).all(dim=1)

    def variables(self) -> tuple[Variable, ...]:
        """Candidate causal variables for interchange: each operand's value, its decimal digits, and joint ones.

        A swapped digit that takes the operand out of range, or an answer out of range, is ``undefined``.
        """
        singles = []
        for operand in (0, 1):
            singles.append(self._value_variable(operand))
            if self.n_operand_values > 10:
                places = len(str(self.n_operand_values - 1))
                singles += [self._digit_variable(operand, place) for place in range(places)]
        return (*singles, *self.joint_variables())

    def _value_variable(self, operand: int) -> Variable:
        def value(operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
            return operands[:, operand]

        def swapped_answer(base: Int[Tensor, "batch 2"], source: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
            mixed = base.clone()
            mixed[:, operand] = source[:, operand]
            return self.answer(mixed)

        return Variable(f"value of {'ab'[operand]}", operand, value, swapped_answer)

    def _digit_variable(self, operand: int, place: int) -> Variable:
        def value(operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
            return operands[:, operand] // 10**place % 10

        def swapped_answer(base: Int[Tensor, "batch 2"], source: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
            mixed = base.clone()
            mixed[:, operand] += 10**place * (value(source) - value(base))
            in_range = mixed[:, operand] < self.n_operand_values
            return torch.where(in_range, self.answer(mixed), self.undefined)

        return Variable(f"{DIGIT_NAMES[place]} digit of {'ab'[operand]}", operand, value, swapped_answer)

    @property
    def pair_changes(self) -> tuple[str, ...]:
        """What ``pairs`` can change: operand ``a`` or ``b``, or one decimal digit of an operand."""
        return ("a", "b", *(v.name for v in self.variables() if "digit of" in v.name))

    def pairs(self, n: int, *, seed: int = 0, change: str | None = None) -> Pairs:
        """``n`` pairs whose corrupt input has another value of one operand (``a`` by default) and another answer.

        With a digit as ``change``, the corrupt operand differs in that digit alone. The clean inputs are distinct
        examples of the training split (repeated only when it has fewer than ``n``).

        Raises:
            UnknownName: ``change`` is not one of ``pair_changes``.
            BadInput: no training example has a change of that kind that changes the answer.
        """
        change = change or self.pair_changes[0]
        check_name("change", change, self.pair_changes)
        check_integer("n", n, 1, 2**31 - 1)
        check_integer("seed", seed, 0, 2**63 - 1)
        generator = torch.Generator().manual_seed(seed)
        all_operands = self._operands(self._cells("train"))
        operand = "ab".index(change[-1])
        # An answer depends on an operand injectively or, times zero, not at all: a few values tell which.
        usable = self._other_values(all_operands, operand, change, most=9)[1].any(1)
        if not bool(usable.any()):
            raise BadInput(f"{self} has no training example whose answer depends on {change}: raise train_fraction")
        clean = all_operands[usable.nonzero().flatten()[draw(int(usable.sum()), n, generator)]]
        values, possible = self._other_values(clean, operand, change)
        corrupt = clean.clone()
        corrupt[:, operand] = values.gather(1, torch.multinomial(possible.float(), 1, generator=generator))[:, 0]
        clean_batch, corrupt_batch = self._encode(clean), self._encode(corrupt)
        return Pairs(
            clean=clean_batch.inputs,
            corrupt=corrupt_batch.inputs,
            position=torch.full((n,), 2),
            correct=clean_batch.tokens[:, 3],
            wrong=corrupt_batch.tokens[:, 3],
            changed=change,
        )

    def _other_values(
        self, operands: Int[Tensor, "batch 2"], operand: int, change: str, *, most: int | None = None
    ) -> tuple[Int[Tensor, "batch options"], Bool[Tensor, "batch options"]]:
        """Other values of an operand, at most so many, and which of them are in range and change the answer."""
        n = self.n_operand_values
        own = operands[:, operand, None]
        if " " in change:
            unit = 10 ** DIGIT_NAMES.index(change.split(" ")[0])
            values = own + unit * (torch.arange(10) - own // unit % 10)
        else:
            values = (own + torch.arange(1, n)[:most]) % n
        mixed = operands[:, None].repeat(1, values.shape[1], 1)
        mixed[:, :, operand] = values.clamp_max(n - 1)
        answers = self.answer(mixed.flatten(0, 1)).unflatten(0, values.shape)
        return values, (values < n) & (answers != self.answer(operands)[:, None])
