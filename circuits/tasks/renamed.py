"""A task whose tokens bear other numbers: the same world, told in a shuffled vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.base import Batch, Pairs, Task


@dataclass(frozen=True)
class RenamedTokens:
    """A task with the token ids of another one permuted; whatever does not speak of tokens is that task's own.

    A network reads tokens through its embedding, so nothing about its mechanism changes with their numbers.

    Args:
        task: The task.
        order: ``order[t]`` is the new number of token ``t``.

    Raises:
        BadInput: ``order`` is not a permutation of the task's tokens.
    """

    name: ClassVar[str]
    """That of the task itself."""

    task: Task
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(self.task.d_vocab)):
            raise BadInput(
                f"order has {len(self.order)} entries: expected each of 0 to {self.task.d_vocab - 1} once, a new "
                f"number for every token of {self.task.name}"
            )

    def __getattr__(self, name: str) -> Any:
        """Return what the task itself has."""
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id."""
        by_token = dict(zip(self.order, self.task.vocabulary, strict=True))
        return tuple(by_token[token] for token in range(len(by_token)))

    @property
    def answer_tokens(self) -> Int[Tensor, " n_answers"]:
        """Token ids that can stand at an answer position, in order of ``answer_values``."""
        return self._new(self.task.answer_tokens)

    def encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        """Whole sequences for the given operands."""
        return self._renamed(self.task.encode(operands))

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        """All examples of a split in order, or ``limit`` of them drawn without replacement."""
        return self._renamed(self.task.examples(split, limit=limit, seed=seed))

    def sample(self, split: str, n: int, *, generator: torch.Generator) -> Batch:
        """``n`` examples of a split, drawn with replacement."""
        return self._renamed(self.task.sample(split, n, generator=generator))

    def verify(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, " batch"]:
        """Whether whole sequences are well formed and right, strictly."""
        return self.task.verify(self._old(tokens))

    def read_answer(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """The number that each sequence gives as its answer, ``undefined`` where it gives none."""
        return self.task.read_answer(self._old(tokens))

    def pairs(self, n: int, *, seed: int = 0, change: str | None = None) -> Pairs:
        """``n`` clean/corrupt pairs from the training split that change one variable."""
        pairs = self.task.pairs(n, seed=seed, change=change)
        tensors = (pairs.clean, pairs.corrupt, pairs.correct, pairs.wrong)
        clean, corrupt, correct, wrong = (self._new(tensor) for tensor in tensors)
        return Pairs(clean, corrupt, pairs.position, correct, wrong, pairs.changed)

    def _new(self, tokens: Tensor) -> Tensor:
        return torch.tensor(self.order, device=tokens.device)[tokens]

    def _old(self, tokens: Tensor) -> Tensor:
        return torch.tensor(self.order, device=tokens.device).argsort()[tokens]

    def _renamed(self, batch: Batch) -> Batch:
        return replace(batch, tokens=self._new(batch.tokens))
