"""What the engines share: everything but the rules."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer, check_name, check_share
from circuits.tasks.games.automaton import automaton, count_sequences
from circuits.tasks.games.base import (
    ADVERSARIAL,
    END,
    UNIFORM,
    Games,
    Heuristic,
    Policy,
    Symmetry,
    any_legal,
    draw_tokens,
)
from circuits.tasks.games.hold_out import HeldOut, hold_out

MOST_TOKENS = 10_000
"""Longest sequence that is played."""

MOST_SEQUENCES = 2**31 - 1

Choice = Callable[[list[Tensor], Tensor, Tensor], Tensor]
"""From the tokens so far, the states and the legal tokens to the next tokens."""


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """Rules in, sequences out: the base class of the games' dataclasses.

    A subclass says what a state is, which moves it allows and where they lead. ``end`` is added here: it is legal
    exactly where no move is, unless the game never ends (``ends`` is False), and then there is no such token.

    Attributes:
        held_out: share of the states that are kept from training, and with them every prefix through one; 0: none.
        split_seed: which states these are.
    """

    held_out: float = field(default=0.0, repr=False)
    split_seed: int = field(default=0, repr=False)

    name: ClassVar[str]
    ends: ClassVar[bool] = True
    best_policy: ClassVar[str | None] = None
    """Name of the policy that draws from ``best_moves``; None where no move is better than another."""

    def __post_init__(self) -> None:
        check_share("held_out", self.held_out, zero=True)
        check_integer("split_seed", self.split_seed, 0, 2**63 - 1)

    def held(self) -> HeldOut | None:
        """The states that are kept from training; None where there are none.

        Raises:
            BadInput: ``held_out`` leaves no state but the initial one.
        """
        return self._held if self.held_out else None

    @functools.cached_property
    def _held(self) -> HeldOut:
        return self.held_out_states(self.held_out, self.split_seed)

    @property
    @abstractmethod
    def moves(self) -> tuple[str, ...]:
        """The names of the moves by token."""

    @property
    @abstractmethod
    def n_ctx(self) -> int:
        """Number of tokens of the longest sequence."""

    @property
    @abstractmethod
    def start(self) -> tuple[int, ...]:
        """The state before the first token."""

    @property
    @abstractmethod
    def feature_names(self) -> tuple[str, ...]:
        """What each of ``state_features`` is."""

    @property
    @abstractmethod
    def feature_sizes(self) -> tuple[int, ...]:
        """Number of values of each of ``state_features``, which count from 0."""

    @abstractmethod
    def allowed(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch n_actions"]:
        """Which moves are legal: none where the game is over."""

    @abstractmethod
    def move(self, states: Int[Tensor, "batch d_state"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch d_state"]:
        """The state after each move; anything, but no error, where the game is over already."""

    @abstractmethod
    def state_id(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """A number for each state that no other state of the game has."""

    @abstractmethod
    def state_features(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, "batch n_features"]:
        """The parts of each state that a probe reads."""

    def changed_features(
        self, before: Int[Tensor, "batch d_state"], after: Int[Tensor, "batch d_state"]
    ) -> Bool[Tensor, "batch n_features"]:
        """Which of ``state_features`` a move changed, apart from whose view they are in."""
        return self.state_features(before) != self.state_features(after)

    @abstractmethod
    def state_of(self, features: Int[Tensor, "batch n_features"]) -> Int[Tensor, "batch d_state"]:
        """The state that each row of ``state_features`` belongs to, whether play can reach it or not."""

    @property
    @abstractmethod
    def outcome_names(self) -> tuple[str, ...]:
        """What each of ``outcome`` is."""

    @abstractmethod
    def outcome(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """What came of sequences that ended in these states, as a place in ``outcome_names``."""

    @abstractmethod
    def describe(self, state: Int[Tensor, " d_state"]) -> str:
        """One state as a person reads it."""

    @abstractmethod
    def picture(self, state: Int[Tensor, " d_state"]) -> tuple[tuple[str, ...], ...]:
        """One state as rows of cells, each with what stands on it, from the top; for people to look at."""

    @abstractmethod
    def symmetries(self) -> tuple[Symmetry, ...]:
        """Every symmetry of the rules, the identity first."""

    @abstractmethod
    def planted_heuristic(self) -> Heuristic:
        """The cheapest rule that plays legally, or nearly, without the state."""

    def changed_rules(self) -> Engine | None:
        """The same tokens under other rules, for tests of adaptation; None where there is no such variant."""
        return None

    @property
    def enumerable(self) -> bool:
        """Whether the states that play can reach are few enough to list."""
        return True

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token strings by token id: the moves, then ``end`` where the game can be over."""
        return (*self.moves, END) if self.ends else self.moves

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return self.n_actions + self.ends

    @property
    def n_actions(self) -> int:
        """Number of tokens that are moves."""
        return len(self.moves)

    @property
    def d_state(self) -> int:
        """Number of integers that a state is kept in."""
        return len(self.start)

    @property
    def n_states(self) -> int | None:
        """Number of states that play can reach; None where they are too many to list."""
        return len(automaton(self)) if self.enumerable else None

    @property
    def policies(self) -> tuple[str, ...]:
        """The names that ``sample`` accepts as ``policy``."""
        return (UNIFORM,) if self.best_policy is None else (UNIFORM, self.best_policy, ADVERSARIAL)

    def initial(self, batch: int, *, device: torch.device | str = "cpu") -> Int[Tensor, "batch d_state"]:
        """The state before the first token, ``batch`` times."""
        return torch.tensor(self.start, device=device).repeat(batch, 1)

    def legal(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """Which tokens are legal; at least one always is."""
        allowed = self.allowed(states)
        return torch.cat((allowed, ~any_legal(allowed)), 1) if self.ends else allowed

    def terminal(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, " batch"]:
        """Whether the game is over."""
        return ~any_legal(self.allowed(states))[:, 0]

    def step(self, states: Int[Tensor, "batch d_state"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch d_state"]:
        """The state after each token.

        Raises:
            BadInput: a token is illegal, or the states are not of this game.
        """
        if states.ndim != 2 or states.shape[1] != self.d_state:
            raise BadInput(f"states have shape {tuple(states.shape)}: {self.name} expects [batch, {self.d_state}]")
        if tokens.shape != states.shape[:1]:
            raise BadInput(f"tokens have shape {tuple(tokens.shape)}: expected one for each of {len(states)} states")
        if tokens.is_floating_point() or states.is_floating_point():
            raise BadInput(
                f"{self.name} expects states and tokens in whole numbers, not {tokens.dtype}, {states.dtype}"
            )
        self._check_states(states)
        self._check_legal(states, tokens, self.legal(states), "row {row}")
        return self._after(states, tokens)

    def _check_states(self, states: Tensor) -> None:
        sizes = torch.tensor(self.feature_sizes, device=states.device)
        try:
            features = self.state_features(states)
            fine = ((features >= 0) & (features < sizes)).all(1)
        except IndexError:  # a table of places has no such place
            fine = torch.zeros(len(states), dtype=torch.bool)
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise BadInput(
                f"row {row}: {states[row].tolist()} is no state of {self}: expected one as initial(), step() or "
                f"enumerate_states() gives them"
            )

    def _after(self, states: Tensor, tokens: Tensor) -> Tensor:
        if not self.ends:
            return self.move(states, tokens)
        over = tokens == self.n_actions
        return torch.where(over[:, None], states, self.move(states, tokens.clamp_max(self.n_actions - 1)))

    def _check_legal(self, states: Tensor, tokens: Tensor, legal: Tensor, where: str) -> None:
        known = (tokens >= 0) & (tokens < self.d_vocab)
        fine = known & legal.gather(1, tokens.clamp(0, self.d_vocab - 1)[:, None])[:, 0]
        if bool(fine.all()):
            return
        row = int((~fine).nonzero()[0])
        token, place = int(tokens[row]), where.format(row=row)
        if not known[row]:
            raise BadInput(f"{place}: token {token} is not of {self.name}; expected 0 to {self.d_vocab - 1}")
        instead = ", ".join(self.vocabulary[other] for other in legal[row].nonzero().flatten().tolist())
        raise BadInput(
            f"{place}: move {self.vocabulary[token]!r} (token {token}) is illegal in state "
            f"{self.describe(states[row])!r}; legal are: {instead}"
        )

    def legal_class(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """The set of legal tokens in bits: the same number for exactly the states of the same legal tokens."""
        places = torch.arange(self.d_vocab, device=states.device)
        return (self.legal(states).long() << places).sum(1)

    def best_moves(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """The legal tokens that are as good as any."""
        return self.legal(states)

    def sample(
        self, n: int, *, policy: str | Policy = UNIFORM, generator: torch.Generator, length: int | None = None
    ) -> Games:
        """``n`` sequences of ``length`` tokens (``n_ctx`` by default) under a policy, on the generator's device.

        Args:
            n: Number of sequences.
            policy: ``uniform`` over the legal tokens; where the game has one, the best policy, uniform over its best
                moves; ``adversarial``, uniform over the moves that the best policy never makes, or over all where it
                makes all; or a function of one's own, whose choice is cut to the legal tokens.
            generator: Of all draws.
            length: Number of tokens. A game that is not over by then is cut.

        Raises:
            UnknownName: the game has no such policy.
            BadInput: a number is out of range, or a policy of one's own leaves no legal token.
        """
        check_integer("n", n, 1, MOST_SEQUENCES)
        length = self.n_ctx if length is None else length
        check_integer("length", length, 1, MOST_TOKENS)
        if isinstance(policy, str):
            check_name(f"policy of {self.name}", policy, self.policies)

        def choose(played: list[Tensor], states: Tensor, legal: Tensor) -> Tensor:
            return draw_tokens(self._choices(policy, played, states, legal), generator)

        return self._record(self.initial(n, device=generator.device), length, choose, stop=True)

    def _choices(self, policy: str | Policy, played: list[Tensor], states: Tensor, legal: Tensor) -> Tensor:
        if policy == UNIFORM:
            return legal
        if not isinstance(policy, str):
            return self._own_choices(policy, played, states, legal)
        best = self.best_moves(states)
        if policy == self.best_policy:
            return best
        others = legal & ~best
        return torch.where(others.any(1, keepdim=True), others, legal)

    def _own_choices(self, policy: Policy, played: list[Tensor], states: Tensor, legal: Tensor) -> Tensor:
        so_far = torch.stack(played, 1) if played else states.new_empty(len(states), 0)
        choices: Bool[Tensor, "n d_vocab"] | Float[Tensor, "n d_vocab"] = policy(so_far, states, legal)
        if choices.shape != legal.shape:
            raise BadInput(f"the policy gave shape {tuple(choices.shape)}: expected {tuple(legal.shape)}, as legal has")
        choices = choices & legal if choices.dtype == torch.bool else choices * legal
        empty = ~(choices > 0).any(1)
        if bool(empty.any()):
            state = self.describe(states[empty][0])
            raise BadInput(f"the policy leaves no legal token in state {state!r}: give one a weight above 0")
        return choices

    def play(self, tokens: Int[Tensor, "n length"]) -> Games:
        """The given sequences with their states; a game that is over goes on with ``end``.

        Raises:
            BadInput: a token is illegal; the message names the sequence, the position, the move and what was legal.
        """
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise BadInput(f"tokens are a {kind}: expected a tensor of whole numbers, [n, length]")
        if tokens.ndim != 2:
            raise BadInput(f"tokens have shape {tuple(tokens.shape)}: expected [n, length]")

        def choose(played: list[Tensor], states: Tensor, legal: Tensor) -> Tensor:
            position = len(played)
            self._check_legal(states, tokens[:, position], legal, f"sequence {{row}}, position {position}")
            return tokens[:, position]

        return self._record(self.initial(len(tokens), device=tokens.device), tokens.shape[1], choose)

    def _record(self, states: Tensor, length: int, choose: Choice, *, stop: bool = False) -> Games:
        """The sequences that ``choose`` makes; with ``stop`` it is not asked any more once all games are over."""
        seen, masks, played = [states], [self.legal(states)], list[Tensor]()
        while len(played) < length and not (stop and self.ends and bool(masks[-1][:, -1].all())):
            played.append(choose(played, states, masks[-1]))
            states = self._after(states, played[-1])
            seen.append(states)
            masks.append(self.legal(states))
        waiting = length - len(played)
        seen, masks = seen + seen[-1:] * waiting, masks + masks[-1:] * waiting
        played += [torch.full_like(states[:, 0], self.n_actions)] * waiting
        tokens = torch.stack(played, 1) if played else states.new_empty(len(states), 0)
        moves = (tokens < self.n_actions).sum(1)
        return Games(tokens, moves, torch.stack(seen, 1), torch.stack(masks, 1))

    def enumerate_states(self) -> Int[Tensor, "n_states d_state"]:
        """Every state that play can reach, breadth first.

        Raises:
            BadInput: there are too many.
        """
        self._check_enumerable()
        return automaton(self).states.clone()

    def count_games(self, length: int | None = None) -> int:
        """Number of different sequences of ``length`` tokens: of complete games, where every game ends by then.

        Raises:
            BadInput: there are too many states to count over, or ``length`` is out of range.
        """
        self._check_enumerable()
        length = self.n_ctx if length is None else length
        check_integer("length", length, 0, MOST_TOKENS)
        return count_sequences(automaton(self), length)

    def _check_enumerable(self) -> None:
        if not self.enumerable:
            raise BadInput(f"{self} has too many states to list: sample it, or take a smaller size")

    def held_out_states(self, share: float, seed: int) -> HeldOut:
        """A share of the states that are to be kept from training, drawn with a seed.

        See ``hold_out``, which this calls.

        Raises:
            BadInput: ``share`` or ``seed`` is out of range.
        """
        return hold_out(self, share, seed)
