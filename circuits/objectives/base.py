"""What an objective is: a loss on a task's batches, and what the losses share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits._decoding import last_logits
from circuits.errors import BadInput
from circuits.tasks import games
from circuits.tasks.base import Role, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True, eq=False)
class Loss:
    """What to minimise, and figures to log beside it (tensors are read only where they are logged)."""

    value: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""] | float] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """A loss on a task's batches: a frozen dataclass whose fields are its parameters.

    A task is a ``Task`` with its ``Batch``, or a ``Game`` with its ``GameBatch``; ``check`` says which it takes. An
    objective that reads more than the logits has ``head(task, d_model, *, generator) -> torch.nn.Module | None`` too:
    what it returns is trained beside the model, outside the hooked trunk, and ``loss`` then gets it as ``head``.
    """

    name: ClassVar[str]

    def check(self, task: Any) -> None:
        """Return nothing; raise ``BadInput`` where the objective is undefined for the task."""
        ...

    def loss(self, model: HookedModel, task: Any, batch: Any, *, generator: torch.Generator) -> Loss:
        """Return the loss on a batch; whatever is drawn at random is drawn from ``generator``."""
        ...


F = TypeVar("F", bound=Callable[..., Any])


def remember(function: F) -> F:
    """Return ``function`` with its last 64 results kept: for tables that depend on a task and parameters alone."""
    return cast(F, functools.lru_cache(maxsize=64)(function))


@remember
def completion(task: Task) -> slice | list[int]:
    """Return the positions of ``batch.inputs`` whose targets are scratchpad or answer, as an index."""
    at = (task.roles[1:] != Role.PROMPT).nonzero().flatten().tolist()
    last = len(task.roles) - 2
    return slice(at[0], last + 1) if at == list(range(at[0], last + 1)) else at


@remember
def has_one_token_answers(task: Task) -> bool:
    """Return whether a completion is one token, the last one of a sequence."""
    roles = task.roles
    return bool(roles[-1] == Role.ANSWER) and int((roles != Role.PROMPT).sum()) == 1


def check_has_answers(name: str, task: Task | games.Game) -> None:
    """Return nothing.

    Raises:
        BadInput: the task is a game, whose sequences have no prompt and no answer.
    """
    if games.is_game(task):
        raise BadInput(
            f"objective {name!r} needs a task with answers, and {task.name!r} is a game: use 'next-token', "
            "'legal-set', 'state', 'simulate' or 'value'"
        )


def check_is_game(name: str, task: Task | games.Game) -> None:
    """Return nothing.

    Raises:
        BadInput: the task is no game.
    """
    if not games.is_game(task):
        known = ", ".join(games.GAMES)
        raise BadInput(f"objective {name!r} needs a game, and {task.name!r} is none: games are {known}")


def check_one_token_answers(name: str, task: Task) -> None:
    """Return nothing.

    Raises:
        BadInput: the task is a game, or an answer of it is more than one token.
    """
    check_has_answers(name, task)
    if not has_one_token_answers(task):
        raise BadInput(
            f"objective {name!r} needs answers of one token, and {task.name!r} has longer completions: "
            "use 'answer' or 'next-token', or a task with one token per number"
        )


def check_number(name: str, value: object, low: float, high: float = float("inf"), *, above: bool = False) -> None:
    """Return nothing.

    Raises:
        BadInput: ``value`` is not a number from ``low`` (with ``above``: greater than it) to ``high``.
    """
    expected = f"expected a number {'>' if above else '>='} {low}" + ("" if high == float("inf") else f", <= {high}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{name} = {value!r}: {expected}")
    if not (low <= value <= high and value < float("inf")) or (above and value == low):
        raise BadInput(f"{name} = {value}: {expected}")


def answer_logits(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab_out"]:
    """Return the logits at the last position."""
    return last_logits(model, tokens)[:, -1]


@remember
def highest_completion_token(task: Task) -> int:
    """Return the highest token id that a completion can hold: any token may stand in a scratchpad."""
    if bool((task.roles == Role.SCRATCHPAD).any()):
        return len(task.vocabulary) - 1
    return int(task.answer_tokens.max())


def check_completions_fit(task: Task, d_vocab_out: int) -> None:
    """Return nothing.

    Raises:
        BadInput: a token that can stand in a completion is outside the model's output vocabulary.
    """
    highest = highest_completion_token(task)
    if highest >= d_vocab_out:
        raise BadInput(
            f"the model has {d_vocab_out} output tokens, and completions of {task.name!r} go up to token {highest}: "
            "raise d_vocab_out"
        )


@remember
def answer_index(task: Task, device: torch.device) -> Int[Tensor, " d_vocab"]:
    """Return for each token which of ``task.answer_tokens`` it is (0 for a token that is none)."""
    index = torch.zeros(len(task.vocabulary), dtype=torch.int64, device=device)
    tokens = task.answer_tokens.to(device)
    index[tokens] = torch.arange(len(tokens), device=device)
    return index


def onto_tokens(
    per_answer: Float[Tensor, "rows n_answers"], task: Task, d_vocab_out: int
) -> Float[Tensor, "rows d_vocab_out"]:
    """Return columns over the answers as columns over the output vocabulary, zero elsewhere.

    Raises:
        BadInput: an answer is outside the output vocabulary.
    """
    check_completions_fit(task, d_vocab_out)
    table = per_answer.new_zeros(per_answer.shape[0], d_vocab_out)
    table[:, task.answer_tokens.to(per_answer.device)] = per_answer
    return table
