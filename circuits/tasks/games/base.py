"""What a game is: moves with a known state behind every prefix, played by the batch.

A game is a frozen dataclass whose fields are its parameters. It never sees a model. States are rows of integers, moves
are tokens. Where a game can be over, the last token is ``end``: it is legal when the game is over, only then, and
changes nothing, so that every state has a legal token and sequences of unequal length stand in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput

if TYPE_CHECKING:
    from circuits.tasks.games.hold_out import HeldOut

END = "end"
"""The token of a game that is over; the last of the vocabulary."""

UNIFORM = "uniform"
ADVERSARIAL = "adversarial"
"""A policy that makes the moves that the best one never makes, wherever there are any."""


@dataclass(frozen=True, eq=False)
class Games:
    """Sequences with the state and the legal tokens before the first token and after each.

    ``tokens[:, t]`` leads from ``states[:, t]`` to ``states[:, t + 1]`` and is one of ``legal[:, t]``. ``lengths`` is
    the number of moves of each sequence; what follows is ``end`` alone.
    """

    tokens: Int[Tensor, "n length"]
    lengths: Int[Tensor, " n"]
    states: Int[Tensor, "n length+1 d_state"]
    legal: Bool[Tensor, "n length+1 d_vocab"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def counted(self) -> Bool[Tensor, "n positions"]:
        """True for the states of the game itself, its last one included; False where a finished game only waits."""
        positions = torch.arange(self.states.shape[1], device=self.lengths.device)
        return positions <= self.lengths[:, None]

    @property
    def final_states(self) -> Int[Tensor, "n d_state"]:
        """The state that each sequence ends in."""
        return self.states[:, -1]

    def take(self, rows: Tensor) -> Games:
        """Return some of the sequences, by index or mask."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Games:
        """Return the sequences on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Games:
        return Games(change(self.tokens), change(self.lengths), change(self.states), change(self.legal))


@dataclass(frozen=True, eq=False)
class Symmetry:
    """A renaming of tokens and states that the rules do not notice.

    Legality and transition commute with it: ``step(on_states(s), on_tokens(t))`` is ``on_states(step(s, t))``.
    ``keeps_start`` says whether the initial state is mapped to itself; where it is not, a game's image starts
    elsewhere.
    """

    name: str
    tokens: Int[Tensor, " d_vocab"]
    act: Callable[[Int[Tensor, "batch d_state"]], Int[Tensor, "batch d_state"]]
    keeps_start: bool

    def on_tokens(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The image of each token."""
        return self.tokens.to(tokens.device)[tokens]

    def on_states(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, "batch d_state"]:
        """The image of each state."""
        return self.act(states)

    def on_legal(self, legal: Bool[Tensor, "batch d_vocab"]) -> Bool[Tensor, "batch d_vocab"]:
        """The image of each set of tokens."""
        image = torch.empty_like(legal)
        image[:, self.tokens.to(legal.device)] = legal
        return image


@runtime_checkable
class Heuristic(Protocol):
    """A rule that plays legally, or nearly, from the tokens before, without the state."""

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        ...

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        ...


Policy: TypeAlias = Callable[
    [Int[Tensor, "n position"], Int[Tensor, "n d_state"], Bool[Tensor, "n d_vocab"]],
    Bool[Tensor, "n d_vocab"] | Float[Tensor, "n d_vocab"],
]
"""One's own policy: from the tokens so far, the states and the legal tokens to those to draw from, or to weights."""


@runtime_checkable
class Game(Hashable, Protocol):
    """The interface that objectives, training and probes rely on."""

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
    def n_actions(self) -> int:
        """Number of tokens that are moves: all but ``end``."""
        ...

    @property
    def n_ctx(self) -> int:
        """Number of tokens of the longest sequence."""
        ...

    @property
    def d_state(self) -> int:
        """Number of integers that a state is kept in."""
        ...

    @property
    def n_states(self) -> int | None:
        """Number of states that play can reach; None where they are too many to list."""
        ...

    @property
    def policies(self) -> tuple[str, ...]:
        """The names that ``sample`` accepts as ``policy``; the first is the default."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each of ``state_features`` is."""
        ...

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Number of values of each of ``state_features``, which count from 0."""
        ...

    def initial(self, batch: int, *, device: torch.device | str = "cpu") -> Int[Tensor, "batch d_state"]:
        """The state before the first token, ``batch`` times."""
        ...

    def legal(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """Which tokens are legal; at least one always is."""
        ...

    def step(self, states: Int[Tensor, "batch d_state"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch d_state"]:
        """The state after each token."""
        ...

    def terminal(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, " batch"]:
        """Whether the game is over."""
        ...

    def state_id(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """A number for each state that no other state of the game has."""
        ...

    def legal_class(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """A number for each state that it shares with exactly the states of the same legal tokens."""
        ...

    def state_features(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, "batch n_features"]:
        """The parts of each state that a probe reads."""
        ...

    def changed_features(
        self, before: Int[Tensor, "batch d_state"], after: Int[Tensor, "batch d_state"]
    ) -> Bool[Tensor, "batch n_features"]:
        """Which of ``state_features`` a move changed, apart from whose view they are in."""
        ...

    def describe(self, state: Int[Tensor, " d_state"]) -> str:
        """One state as a person reads it."""
        ...

    def state_of(self, features: Int[Tensor, "batch n_features"]) -> Int[Tensor, "batch d_state"]:
        """The state that each row of ``state_features`` belongs to, whether play can reach it or not."""
        ...

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """What each of ``outcome`` is."""
        ...

    def outcome(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """What came of sequences that ended in these states, as a place in ``outcome_names``."""
        ...

    def changed_rules(self) -> Game | None:
        """The same tokens under other rules, for tests of adaptation; None where there is no such variant."""
        ...

    def held(self) -> HeldOut | None:
        """The states that are kept from training; None where there are none."""
        ...

    def picture(self, state: Int[Tensor, " d_state"]) -> tuple[tuple[str, ...], ...]:
        """One state as rows of cells, each with what stands on it, from the top; for people to look at."""
        ...

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Every symmetry of the rules, the identity first."""
        ...

    def sample(
        self, n: int, *, policy: str | Policy = UNIFORM, generator: torch.Generator, length: int | None = None
    ) -> Games:
        """``n`` sequences of ``length`` tokens (``n_ctx`` by default) under a policy."""
        ...

    def play(self, tokens: Int[Tensor, "n length"]) -> Games:
        """The given sequences with their states."""
        ...

    def enumerate_states(self) -> Int[Tensor, "n_states d_state"]:
        """Every state that play can reach, breadth first."""
        ...

    def count_games(self, length: int | None = None) -> int:
        """Number of different sequences of ``length`` tokens: of complete games, where every game ends by then."""
        ...

    def planted_heuristic(self) -> Heuristic:
        """The cheapest rule that plays legally, or nearly, without the state."""
        ...


@runtime_checkable
class Contest(Game, Protocol):
    """A game of two players who take turns, a pass included."""

    def player(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Whose turn it is: 0 or 1."""
        ...

    def winner(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Who has won: 0, 1, or -1 for nobody, in a draw or as long as the game is not over."""
        ...

    def value(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """What best play of both gives the player whose turn it is: 1 a win, 0 a draw, -1 a loss."""
        ...

    def best_moves(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """The legal tokens after which the value is what it was; ``end`` where the game is over."""
        ...


def draw_tokens(choices: Tensor, generator: torch.Generator) -> Int[Tensor, " n"]:
    """One token of each row: uniform over those that are True, or with the given weights."""
    if choices.dtype != torch.bool:
        return torch.multinomial(choices, 1, generator=generator)[:, 0]
    ranks = choices.cumsum(1, dtype=torch.int16)
    # The remainder of so large a number is uniform but for one part in 2^55, and never the count itself.
    drawn = torch.randint(2**62, (len(choices),), generator=generator, device=choices.device) % ranks[:, -1]
    return (ranks <= drawn[:, None].short()).sum(1)


def any_legal(allowed: Bool[Tensor, "batch n_actions"]) -> Bool[Tensor, "batch 1"]:
    """Whether a row has a True."""
    # As bytes in half the time that ``any`` takes over booleans, and every move of every game is asked.
    return allowed.view(torch.uint8).amax(1, keepdim=True) > 0


def agreement(heuristic: Heuristic, games: Games) -> float:
    """Share of the counted positions at which a rule's set of legal tokens is exactly the true one."""
    exact = (heuristic(games.tokens) == games.legal).all(2)
    return float(exact[games.counted].double().mean())


def check_tokens(tokens: Int[Tensor, "n length"], d_vocab: int) -> None:
    """Check that tokens are of a vocabulary.

    Raises:
        BadInput: one is not.
    """
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < d_vocab:
        raise BadInput(f"tokens go from {int(tokens.min())} to {int(tokens.max())}: expected 0 to {d_vocab - 1}")


def counts_before(tokens: Int[Tensor, "n length"], d_vocab: int) -> Int[Tensor, "n positions d_vocab"]:
    """How often each token stands before each position, the one after the last included.

    Raises:
        BadInput: a token is not of the vocabulary.
    """
    check_tokens(tokens, d_vocab)
    counts = torch.zeros(len(tokens), tokens.shape[1] + 1, d_vocab, dtype=torch.int64, device=tokens.device)
    counts[:, 1:].scatter_(2, tokens[..., None], 1)
    return counts.cumsum(1)


def cell_names(rows: int, columns: int) -> tuple[str, ...]:
    """Names of the cells of a board, row by row: a1, b1, ..., a2, ..."""
    return tuple(f"{chr(ord('a') + column)}{row + 1}" for row in range(rows) for column in range(columns))
