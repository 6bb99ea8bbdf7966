"""A game of few states as a table: every state, and where every token leads from it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput

NOWHERE = -1
"""Where an illegal token leads."""


@runtime_checkable
class Rules(Hashable, Protocol):
    """What is asked of a game here: methods alone, so that no check of it asks for the number of states."""

    def initial(self, batch: int) -> Int[Tensor, "batch d_state"]:
        """The state before the first token, ``batch`` times."""
        ...

    def legal(self, states: Int[Tensor, "batch d_state"]) -> Bool[Tensor, "batch d_vocab"]:
        """Which tokens are legal."""
        ...

    def step(self, states: Int[Tensor, "batch d_state"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch d_state"]:
        """The state after each token."""
        ...

    def state_id(self, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
        """A number for each state that no other state has."""
        ...


@dataclass(frozen=True, eq=False)
class Automaton:
    """Every state that play can reach, in the order of a breadth-first search, and where each token leads.

    ``depths`` is the least number of tokens that reach a state. ``successors`` holds rows of ``states``, and
    ``NOWHERE`` where a token is illegal. ``sorted_ids`` and ``sorted_rows`` say which row has which id.
    """

    states: Int[Tensor, "n_states d_state"]
    depths: Int[Tensor, " n_states"]
    successors: Int[Tensor, "n_states d_vocab"]
    sorted_ids: Int[Tensor, " n_states"]
    sorted_rows: Int[Tensor, " n_states"]

    def __len__(self) -> int:
        return len(self.states)

    @property
    def legal(self) -> Bool[Tensor, "n_states d_vocab"]:
        """Which tokens are legal in each state."""
        return self.successors != NOWHERE

    def rows(self, ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The row of each state by its id; ``NOWHERE`` for a state that play cannot reach."""
        at = torch.searchsorted(self.sorted_ids, ids.contiguous()).clamp_max(len(self) - 1)
        return torch.where(self.sorted_ids[at] == ids, self.sorted_rows[at], NOWHERE)


@functools.lru_cache(maxsize=16)
def automaton(game: Rules) -> Automaton:
    """The table of a game; callers must not write to it."""
    frontier = game.initial(1)
    known = ids = game.state_id(frontier)
    found, found_ids, edges, offset = [frontier], [ids], [], 0
    while len(frontier):
        rows, tokens = game.legal(frontier).nonzero(as_tuple=True)
        reached = game.step(frontier[rows], tokens)
        reached_ids = game.state_id(reached)
        edges.append(torch.stack((rows + offset, tokens, reached_ids)))
        offset += len(frontier)
        first = _first_of_each(reached_ids)
        first = first[~torch.isin(reached_ids[first], known)]
        frontier, ids = reached[first], reached_ids[first]
        known = torch.cat((known, ids))
        found.append(frontier)
        found_ids.append(ids)
    depths = torch.cat([torch.full((len(level),), depth) for depth, level in enumerate(found)])
    sorted_ids, sorted_rows = torch.cat(found_ids).sort()
    sources, tokens, targets = torch.cat(edges, dim=1)
    successors = torch.full((len(known), game.legal(found[0]).shape[1]), NOWHERE)
    successors[sources, tokens] = sorted_rows[torch.searchsorted(sorted_ids, targets)]
    return Automaton(torch.cat(found), depths, successors, sorted_ids, sorted_rows)


def _first_of_each(ids: Int[Tensor, " batch"]) -> Int[Tensor, " different"]:
    """Where each different number stands first, in ascending order of the numbers."""
    ordered, rows = ids.sort(stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return rows[starts]


def count_sequences(table: Automaton, length: int) -> int:
    """Number of different sequences of so many tokens from the initial state.

    Source: dynamic programming over states: the ways on from a state are the sum of those from its successors.
    """
    successors = table.successors.numpy()
    sources, tokens = np.nonzero(successors != NOWHERE)
    targets = successors[sources, tokens]
    starts = np.searchsorted(sources, np.arange(len(successors)))
    # Python's integers, which cannot overflow: 60 moves at each of 24 positions are more than 64 bits hold.
    ways = np.ones(len(successors), dtype=object)
    for _ in range(length):
        ways = np.add.reduceat(ways[targets], starts)
    return int(ways[0])


def solve(
    table: Automaton, over: Bool[Tensor, " n_states"], outcome: Int[Tensor, " n_states"]
) -> Int[Tensor, " n_states"]:
    """What best play of two players who take turns gives the one whose turn it is, in every state.

    Args:
        table: of a game in which no state can come back.
        over: the states in which the game is over.
        outcome: what the game gives there the player whose turn it would be.

    Source: negamax by sweeps: after k of them every state from which at most k moves follow has its value.
    """
    children, legal = table.successors.clamp_min(0), table.legal
    values = torch.where(over, outcome, 0)
    while True:
        best = (-values[children]).masked_fill(~legal, -2).max(1).values
        new = torch.where(over, outcome, best)
        if torch.equal(new, values):
            return values
        values = new


def occupancy(table: Automaton, length: int) -> Float[Tensor, " n_states"]:
    """Share of the positions 1 to ``length`` that uniform play spends in each state."""
    sources, tokens = table.legal.nonzero(as_tuple=True)
    targets = table.successors[sources, tokens]
    chance = 1 / table.legal.sum(1).double()
    now = torch.zeros(len(table), dtype=torch.float64)
    now[0] = 1
    total = torch.zeros_like(now)
    for _ in range(length):
        now = torch.zeros_like(now).index_add_(0, targets, (now * chance)[sources])
        total += now
    return total / length


def reached_without(table: Automaton, barred: Bool[Tensor, " n_states"]) -> Bool[Tensor, " n_states"]:
    """The states that play can reach without entering a barred one; the initial state is not barred."""
    reached = torch.zeros(len(table), dtype=torch.bool)
    frontier = torch.zeros(1, dtype=torch.int64)
    while len(frontier):
        reached[frontier] = True
        onwards = table.successors[frontier].flatten()
        onwards = onwards[onwards != NOWHERE]
        frontier = onwards[~(reached | barred)[onwards]].unique()
    return reached


def rows_of(game: Rules, states: Int[Tensor, "batch d_state"]) -> Int[Tensor, " batch"]:
    """The row of each state in the game's table.

    Raises:
        BadInput: play cannot reach one of the states.
    """
    rows = automaton(game).rows(game.state_id(states).cpu())
    if bool((rows == NOWHERE).any()):
        where = int((rows == NOWHERE).nonzero()[0])
        raise BadInput(
            f"state {where}, {states[where].tolist()}, cannot be reached by play in {game}: "
            "its value is only known for states that can"
        )
    return rows
