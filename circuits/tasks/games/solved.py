"""Contests that are solved by going through all their states."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.games.automaton import automaton, rows_of, solve
from circuits.tasks.games.engine import Engine


class SolvedContest(Engine):
    """Base class of the dataclass of a game of two players who take turns: the value of every state, from its table.

    The last integer of a state is the player whose turn it is, 0 or 1.
    """

    best_policy: ClassVar[str | None] = "expert"

    @abstractmethod
    def winner(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Who has won: 0, 1, or -1 for nobody, in a draw or as long as the game is not over."""

    def player(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """Whose turn it is: 0 or 1."""
        return states[:, -1]

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """Who wins, or nobody."""
        return ("player 0 wins", "player 1 wins", "nobody wins")

    def outcome(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """The winner, 2 where there is none."""
        return self.winner(states) % 3

    def value(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """What best play of both gives the player whose turn it is: 1 a win, 0 a draw, -1 a loss.

        Raises:
            BadInput: play cannot reach a state, or there are too many states to solve the game.
        """
        self._check_enumerable()
        return _values(self).to(states.device)[rows_of(self, states).to(states.device)]

    def best_moves(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """The legal tokens after which the value is what it was; ``end`` where the game is over.

        Raises:
            BadInput: play cannot reach a state, or there are too many states to solve the game.
        """
        self._check_enumerable()
        rows = rows_of(self, states)
        table, values = automaton(self), _values(self)
        children = table.successors[rows]
        keeps_value = -values[children.clamp_min(0)] == values[rows][:, None]
        keeps_value[:, -1] = True
        return (keeps_value & table.legal[rows]).to(states.device)


@functools.lru_cache(maxsize=16)
def _values(game: SolvedContest) -> Int[Tensor, " n_states"]:
    states = automaton(game).states
    winner, player = game.winner(states), game.player(states)
    outcome = torch.where(winner < 0, 0, torch.where(winner == player, 1, -1))
    return solve(automaton(game), game.terminal(states), outcome)
