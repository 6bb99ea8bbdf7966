"""What a task is: a finite, verifiable world with a known true state behind every token.

A task is a frozen dataclass whose fields are its parameters. It never sees a model.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput, UnknownName

SPLITS = ("train", "random", "block")
"""``train``; ``random``: held out at random; ``block``: a held-out contiguous block of the operand square."""


class Role(enum.IntEnum):
    """What a token of a sequence is for."""

    PROMPT = 0
    SCRATCHPAD = 1
    ANSWER = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as whole token sequences, prompt and completion.

    A model reads ``inputs`` (all tokens but the last) and predicts ``targets`` (all tokens but the first).
    """

    tokens: Int[Tensor, "batch length"]
    operands: Int[Tensor, "batch 2"]
    roles: Int[Tensor, " length"]

    @property
    def inputs(self) -> Int[Tensor, "batch pos"]:
        """What the model reads: every token but the last."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Int[Tensor, "batch pos"]:
        """What the model should predict at each position of ``inputs``."""
        return self.tokens[:, 1:]

    @property
    def answer_mask(self) -> Bool[Tensor, " pos"]:
        """True at the positions of ``inputs`` whose target is an answer token."""
        return self.roles[1:] == Role.ANSWER

    @property
    def completion_mask(self) -> Bool[Tensor, " pos"]:
        """True at the positions of ``inputs`` whose target is a scratchpad or answer token."""
        return self.roles[1:] != Role.PROMPT

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(self.tokens.to(device), self.operands.to(device), self.roles.to(device))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean and corrupt model inputs of equal length that differ in one chosen variable.

    ``correct`` is the token that the clean input calls for at ``position``, ``wrong`` the one that the
    corrupt input calls for there.
    """

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    position: Int[Tensor, " batch"]
    correct: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    changed: str

    def __len__(self) -> int:
        return self.clean.shape[0]

    def to(self, device: torch.device | str) -> Pairs:
        """Return the pairs on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def take(self, rows: Tensor) -> Pairs:
        """Return some of the pairs, by index or mask."""
        return self._each(lambda tensor: tensor[rows])

    def without(self, seen: Pairs) -> Pairs:
        """Return the pairs that are not among others, of equal length: what was found on those knows nothing of them.

        A pair is the same where its clean and its corrupt input are; that an input occurs in another pair is allowed.
        """
        known = {tuple(row) for row in torch.cat([seen.clean, seen.corrupt], 1).tolist()}
        rows = torch.cat([self.clean, self.corrupt], 1).tolist()
        new = torch.tensor([tuple(row) not in known for row in rows], dtype=torch.bool, device=self.clean.device)
        return self.take(new)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        tensors = (self.clean, self.corrupt, self.position, self.correct, self.wrong)
        clean, corrupt, position, correct, wrong = (change(tensor) for tensor in tensors)
        return Pairs(clean, corrupt, position, correct, wrong, self.changed)


@dataclass(frozen=True)
class Variable:
    """A candidate causal variable: a quantity that an algorithm for the task could compute inside.

    ``value(operands)`` is what it is on each input. ``swapped_answer(base, source)`` is the numeric answer
    that the algorithm gives on ``base`` when the variable alone takes the value it has on ``source``; it is the
    task's ``undefined`` where there is no such answer (an operand would leave its range), and analyzers skip it.
    ``operand`` names the one operand (0 or 1) that it is a function of, or is None for a joint quantity.
    """

    name: str
    operand: int | None
    value: Callable[[Int[Tensor, "batch 2"]], Int[Tensor, " batch"]]
    swapped_answer: Callable[[Int[Tensor, "batch 2"], Int[Tensor, "batch 2"]], Int[Tensor, " batch"]]


@runtime_checkable
class Task(Protocol):
    """The interface that objectives, training and analyzers rely on."""

    name: ClassVar[str]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id."""
        ...

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        ...

    @property
    def n_ctx(self) -> int:
        """Number of tokens that a model reads: one less than a whole sequence has."""
        ...

    @property
    def n_operand_values(self) -> int:
        """Each operand is an integer in [0, n_operand_values)."""
        ...

    @property
    def roles(self) -> Int[Tensor, " length"]:
        """The role of each token of a sequence (the same for every sequence of the task)."""
        ...

    @property
    def period(self) -> int | None:
        """The modulus p of modular arithmetic, else None."""
        ...

    @property
    def answer_tokens(self) -> Int[Tensor, " n_answers"]:
        """Token ids that can stand at an answer position, in order of ``answer_values``."""
        ...

    @property
    def answer_values(self) -> Int[Tensor, " n_answers"]:
        """The number that each of ``answer_tokens`` stands for, ascending."""
        ...

    @property
    def undefined(self) -> int:
        """The number that stands for "no answer"; never an answer (-1 where no answer is negative)."""
        ...

    @property
    def pair_changes(self) -> tuple[str, ...]:
        """The names that ``pairs`` accepts as ``change``; the first is the default."""
        ...

    def answer(self, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The true numeric result."""
        ...

    def distance(self) -> Float[Tensor, "n_answers n_answers"]:
        """Numeric distance between answers (around the circle where the task is modular)."""
        ...

    def encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        """Whole sequences for the given operands."""
        ...

    def split_size(self, split: str) -> int:
        """Number of operand pairs in a split."""
        ...

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        """All examples of a split in order, or ``limit`` of them drawn without replacement."""
        ...

    def sample(self, split: str, n: int, *, generator: torch.Generator) -> Batch:
        """``n`` examples of a split, drawn with replacement."""
        ...

    def state(self, operands: Int[Tensor, "batch 2"]) -> Mapping[str, Int[Tensor, "batch length"]]:
        """The true state behind each token, -1 where it is not yet determined."""
        ...

    def verify(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, " batch"]:
        """Whether whole sequences are well formed and right, strictly."""
        ...

    def read_answer(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """The number that each sequence gives as its answer, ``undefined`` where it gives none."""
        ...

    def variables(self) -> tuple[Variable, ...]:
        """Candidate causal variables for interchange interventions."""
        ...

    def pairs(self, n: int, *, seed: int = 0, change: str | None = None) -> Pairs:
        """``n`` clean/corrupt pairs from the training split that change one variable."""
        ...


def from_table(kind: str, table: Mapping[str, type], name: str, parameters: Mapping[str, object]) -> Any:
    """Return the dataclass that stands in a table by name, made with some of its fields; underscores are hyphens.

    Raises:
        UnknownName: the table has no such name, or the dataclass no such field.
        BadInput: a field has a value that cannot be used.
    """
    if not isinstance(name, str):
        raise BadInput(f"{kind} {name!r} is no name: expected one of {', '.join(table)}")
    key = name.replace("_", "-")
    if key not in table:
        raise UnknownName(kind, name, table)
    known = [field.name for field in dataclasses.fields(table[key])]
    for parameter in parameters:
        if parameter not in known:
            raise UnknownName(f"parameter of {key}", parameter, known)
    # TOML and JSON have lists alone
    return table[key](
        **{name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
    )
