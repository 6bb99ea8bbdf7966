"""A task whose prompts end with the second operand, as in networks that read no equals sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.base import Batch, Pairs, Task

EQUALS_POSITION = 2


@dataclass(frozen=True)
class WithoutEquals:
    """A task of the form ``a b = c`` told as ``a b c``; whatever does not speak of tokens is that task's own.

    The answer is read at the second operand. The equals sign is the last token of such a task, so no other
    token changes its number.

    Args:
        task: The task, with one token for each operand and one for the answer.

    Raises:
        BadInput: the task's sequences are not ``a b = c`` with ``=`` as the last token.

    Source: the format of Zhong et al. 2023 (arXiv 2306.17844; repository fjzzq2002/pizza, ``eqn_sign`` false).
    """

    name: ClassVar[str]
    """That of the task itself."""

    task: Task

    def __post_init__(self) -> None:
        if len(self.task.roles) != 4 or self.task.vocabulary[-1] != "=":
            raise BadInput(f"{self.task.name} is not of the form 'a b = c': there is no equals sign to leave out")

    def __getattr__(self, name: str) -> Any:
        """Return what the task itself has."""
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id."""
        return self.task.vocabulary[:-1]

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return self.task.d_vocab - 1

    @property
    def n_ctx(self) -> int:
        """Number of tokens that a model reads."""
        return 2

    @property
    def roles(self) -> Int[Tensor, " length"]:
        """The role of each token of a sequence."""
        return _without(self.task.roles[None])[0]

    def encode(self, operands: Int[Tensor, "batch 2"]) -> Batch:
        """Whole sequences for the given operands."""
        return _shortened(self.task.encode(operands))

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        """All examples of a split in order, or ``limit`` of them drawn without replacement."""
        return _shortened(self.task.examples(split, limit=limit, seed=seed))

    def sample(self, split: str, n: int, *, generator: torch.Generator) -> Batch:
        """``n`` examples of a split, drawn with replacement."""
        return _shortened(self.task.sample(split, n, generator=generator))

    def state(self, operands: Int[Tensor, "batch 2"]) -> Mapping[str, Int[Tensor, "batch length"]]:
        """The true state behind each token, -1 where it is not yet determined."""
        return {name: _without(value) for name, value in self.task.state(operands).items()}

    def verify(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, " batch"]:
        """Whether whole sequences are well formed and right, strictly."""
        return self.task.verify(self._with_equals(tokens))

    def read_answer(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """The number that each sequence gives as its answer, ``undefined`` where it gives none."""
        return self.task.read_answer(self._with_equals(tokens))

    def pairs(self, n: int, *, seed: int = 0, change: str | None = None) -> Pairs:
        """``n`` clean/corrupt pairs from the training split that change one variable."""
        pairs = self.task.pairs(n, seed=seed, change=change)
        return replace(pairs, clean=_without(pairs.clean), corrupt=_without(pairs.corrupt), position=pairs.position - 1)

    def _with_equals(self, tokens: Tensor) -> Tensor:
        equals = torch.full_like(tokens[:, :1], self.task.d_vocab - 1)
        return torch.cat([tokens[:, :EQUALS_POSITION], equals, tokens[:, EQUALS_POSITION:]], dim=1)


def _without(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :EQUALS_POSITION], tokens[:, EQUALS_POSITION + 1 :]], dim=1)


def _shortened(batch: Batch) -> Batch:
    return replace(batch, tokens=_without(batch.tokens), roles=_without(batch.roles[None])[0])
