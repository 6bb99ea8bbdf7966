"""Nim: heaps from which two players take in turn, whose truth is an exclusive or."""

from __future__ import annotations

import functools
import itertools
import string
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games.base import Symmetry, counts_before
from circuits.tasks.games.engine import Engine

MOST_HEAPS = 5
LARGEST_HEAP = 9
MOST_STONES = 24


@dataclass(frozen=True)
class Nim(Engine):
    """Two players take any number of stones from one heap in turn; who takes the last wins, or loses if ``misere``.

    A move is the heap's letter and the number taken. A state is what is left of each heap and the player to move.
    Counted are pairs of heaps and player that play can reach, with both players where the heaps are empty: 232 for
    heaps of 3, 4 and 5, in 431,128 games, which differ when their moves do.

    Attributes:
        heaps: stones in each heap, one to five heaps of 1 to 9, together at most 24.
        misere: whether who takes the last stone loses.
        most: stones that a move may take; None: any number (moves that take more keep their tokens, and are illegal).

    Raises:
        BadInput: a heap or their number is out of range.

    Source: Bouton 1901 (Annals of Mathematics 3), whose theorem ``value`` is.
    """

    name: ClassVar[str] = "nim"
    best_policy: ClassVar[str | None] = "expert"

    heaps: tuple[int, ...] = (3, 4, 5)
    misere: bool = False
    most: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.heaps, str) or not isinstance(self.heaps, (tuple, list)):
            raise BadInput(f"heaps = {self.heaps!r}: expected the stones of each heap, such as (3, 4, 5)")
        # A list comes from TOML and JSON; the table of states is looked up by the game, which must have a hash.
        object.__setattr__(self, "heaps", tuple(self.heaps))
        check_integer("number of heaps", len(self.heaps), 1, MOST_HEAPS)
        for letter, heap in zip(string.ascii_lowercase, self.heaps, strict=False):
            check_integer(f"heap {letter}", heap, 1, LARGEST_HEAP)
        check_integer("number of stones", sum(self.heaps), 1, MOST_STONES, "take fewer or smaller heaps")
        if not isinstance(self.misere, bool):
            raise BadInput(f"misere = {self.misere!r}: expected true or false")
        if self.most is not None:
            check_integer("most", self.most, 1, LARGEST_HEAP)
            if self.misere:
                raise BadInput("misere = True with most: the theorem that gives values has no such case")

    @functools.cached_property
    def moves(self) -> tuple[str, ...]:
        """Heap by heap, what can be taken from it: a1, a2, ..., b1, ..."""
        return tuple(
            f"{string.ascii_lowercase[heap]}{taken}"
            for heap, stones in enumerate(self.heaps)
            for taken in range(1, stones + 1)
        )

    @functools.cached_property
    def _taken(self) -> Int[Tensor, "n_actions n_heaps"]:
        rows = [
            [taken if heap == place else 0 for place in range(len(self.heaps))]
            for heap, stones in enumerate(self.heaps)
            for taken in range(1, stones + 1)
        ]
        return torch.tensor(rows)

    @property
    def n_ctx(self) -> int:
        """Number of tokens of the longest sequence: the stones one by one, and ``end``."""
        return sum(self.heaps) + 1

    @property
    def start(self) -> tuple[int, ...]:
        """The full heaps, player 0 to move."""
        return (*self.heaps, 0)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The heaps, the player to move and the exclusive or of the heaps."""
        return (*(f"heap {letter}" for letter in string.ascii_lowercase[: len(self.heaps)]), "player", "xor")

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """What each feature can be, zero included."""
        return (*(stones + 1 for stones in self.heaps), 2, 1 << max(self.heaps).bit_length())

    def allowed(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch n_actions"]:
        """Taking no more than a heap has."""
        return self._enough(states[:, :-1])

    def _enough(self, left: Int[Tensor, "*batch n_heaps"]) -> Bool[Tensor, "*batch n_actions"]:
        """Whether the heaps have what each move takes."""
        taken, heap = self._taken.to(left.device).max(1)
        return (left[..., heap] >= taken) & (taken <= (self.most or LARGEST_HEAP))

    def move(self, states: Int[Tensor, "batch d_state"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch d_state"]:
        """What is left, the other player to move."""
        left = states[:, :-1] - self._taken.to(states.device)[tokens]
        return torch.cat((left, 1 - states[:, -1:]), 1)

    def player(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Whose turn it is: 0 or 1."""
        return states[:, -1]

    def winner(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Who has won: 0, 1, or -1 as long as there are stones."""
        took_last = 1 - states[:, -1]
        return torch.where((states[:, :-1] == 0).all(1), 1 - took_last if self.misere else took_last, -1)

    def value(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """What best play of both gives the player whose turn it is: 1 a win, -1 a loss.

        The player to move wins where the exclusive or of the heaps is not 0; in misère play, where no heap has more
        than one stone, where it is 0. Where a move takes at most k, heaps count modulo k + 1.

        Source: Bouton 1901; with a limit, Berlekamp, Conway and Guy 2001, "Winning ways", chapter 4.
        """
        return self._value(states[:, :-1])

    def _value(self, left: Int[Tensor, "*batch n_heaps"]) -> Int[Tensor, "*batch"]:
        wins = _xor(left if self.most is None else left % (self.most + 1)) != 0
        if self.misere:
            wins ^= (left <= 1).all(-1)
        return torch.where(wins, 1, -1)

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """Who wins, or nobody as long as there are stones."""
        return ("player 0 wins", "player 1 wins", "nobody wins")

    def outcome(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """The winner, 2 where there is none."""
        return self.winner(states) % 3

    def changed_rules(self) -> Nim | None:
        """A move takes at most two stones, or any number where it was limited; None where no heap has more."""
        if max(self.heaps) <= 2 or self.misere:
            return None
        return Nim(self.heaps, most=2 if self.most is None else None)

    def best_moves(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """The legal tokens after which the value is what it was; ``end`` where the game is over."""
        left = states[:, :-1]
        afterwards = (left[:, None] - self._taken.to(left.device)).clamp_min(0)
        keeps_value = -self._value(afterwards) == self._value(left)[:, None]
        legal = self.legal(states)
        return torch.cat((keeps_value & legal[:, :-1], legal[:, -1:]), 1)

    def state_id(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """The integers of the state as the digits of a number to the base of ten."""
        return (states * 10 ** torch.arange(self.d_state, device=states.device)).sum(1)

    def state_features(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, "batch n_features"]:
        """What is left of each heap, the player to move and the exclusive or of the heaps."""
        return torch.cat((states, _xor(states[:, :-1])[:, None]), 1)

    def state_of(self, features: Int[Tensor, "batch n_features"]) -> Int[Tensor, "batch d_state"]:
        """The heaps and the player; the exclusive or follows from them."""
        return features[:, :-1]

    def describe(self, state: Int[Tensor, " d_state"]) -> str:
        """What is left of each heap and who is to move."""
        *heaps, player = state.tolist()
        return f"heaps {'-'.join(map(str, heaps))}, player {player} to move"

    def picture(self, state: Int[Tensor, " d_state"]) -> tuple[tuple[str, ...], ...]:
        """A row for each heap, a mark for each stone that is left."""
        widest = max(self.heaps)
        return tuple(tuple("●" if stone < left else "" for stone in range(widest)) for left in state[:-1].tolist())

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Every exchange of heaps that began with as many stones, the identity first."""
        orders = itertools.permutations(range(len(self.heaps)))
        alike = (order for order in orders if all(self.heaps[i] == self.heaps[j] for i, j in enumerate(order)))
        return tuple(self._rearranged(order) for order in alike)

    def _rearranged(self, order: tuple[int, ...]) -> Symmetry:
        """Heap ``order[i]`` takes the place of heap i."""
        places = [*order, len(order)]
        letters = {string.ascii_lowercase[old]: string.ascii_lowercase[new] for new, old in enumerate(order)}
        tokens = [self.moves.index(letters[move[0]] + move[1:]) for move in self.moves]
        same = order == tuple(range(len(order)))
        name = "identity" if same else f"heaps in the order {''.join(string.ascii_lowercase[old] for old in order)}"
        return Symmetry(name, torch.tensor([*tokens, self.n_actions]), lambda states: states[:, places], True)

    def planted_heuristic(self) -> HeapCounter:
        """A counter for each heap, which knows neither whose turn it is nor who will win."""
        return HeapCounter(self)


def _xor(left: Int[Tensor, "*batch n_heaps"]) -> Int[Tensor, "*batch"]:
    return functools.reduce(torch.bitwise_xor, left.unbind(-1))


@dataclass(frozen=True)
class HeapCounter:
    """Legal is taking what a heap still has, and ``end`` once all are empty.

    It keeps what is left of each heap and not whose turn it is. It is right everywhere: of what a state has, legality
    needs all but the player.
    """

    game: Nim

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        return "what is left of each heap"

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        game = self.game
        counts = counts_before(tokens, game.d_vocab)[..., :-1]
        taken = (counts[..., None] * game._taken.to(tokens.device)).sum(2)
        enough = game._enough(torch.tensor(game.heaps, device=tokens.device) - taken)
        return torch.cat((enough, ~enough.any(2, keepdim=True)), 2)
