"""Hold-out by state: what was never on the way of any training sequence.

Holding out sequences is no hold-out where different sequences meet: the held-out ones pass through the states of the
others. Here some states are held out, and with them every sequence that passes through one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer, check_share
from circuits.tasks.games.automaton import Automaton, automaton, reached_without
from circuits.tasks.games.base import Game, Games


@dataclass(frozen=True, eq=False)
class HeldOut:
    """States that no training sequence may pass through.

    ``states`` lists them; it is None where a game has too many states to list, and ``contains`` alone says which are
    held out.
    """

    game: Game
    share: float
    seed: int
    states: Int[Tensor, "held d_state"] | None
    contains: Callable[[Int[Tensor, "batch d_state"]], Bool[Tensor, " batch"]]

    def visits(self, games: Games) -> Bool[Tensor, "n positions"]:
        """Where sequences are in a held-out state."""
        visited = self.contains(games.states.flatten(0, 1)).unflatten(0, games.states.shape[:2])
        return visited & games.counted

    def avoid(
        self, tokens: Int[Tensor, "n position"], states: Int[Tensor, "n d_state"], legal: Bool[Tensor, "n d_vocab"]
    ) -> Bool[Tensor, "n d_vocab"]:
        """A policy for ``sample``: every legal token that leads to no held-out state; all of them where each does.

        Where games are long or states few, hardly any sequence of uniform play is one to train on. This gives many, in
        other shares: what is left of uniform play favours states from which the held-out ones are far.
        """
        rows, moves = legal.nonzero(as_tuple=True)
        enters = self.contains(self.game.step(states[rows], moves))
        choices = legal.clone()
        choices[rows[enters], moves[enters]] = False
        return torch.where(choices.any(1, keepdim=True), choices, legal)

    def split(self, games: Games) -> tuple[Games, Games]:
        """The sequences that pass through no held-out state, to train on, and those that pass through one."""
        through = self.visits(games).any(1)
        return games.take(~through), games.take(through)


@dataclass(frozen=True)
class Overlap:
    """How many different states two sets of sequences pass through, and how many of them are the same."""

    train: int
    test: int
    shared: int

    @property
    def share(self) -> float:
        """Share of the states of the test sequences that training sequences pass through too."""
        return self.shared / self.test if self.test else 0.0


def state_overlap(train: Games, test: Games) -> Overlap:
    """The states that two sets of sequences share; those in which finished games wait count once, like all others."""
    of_train, of_test = (games.states.flatten(0, 1).unique(dim=0) for games in (train, test))
    together = torch.cat((of_train, of_test)).unique(dim=0)
    return Overlap(len(of_train), len(of_test), len(of_train) + len(of_test) - len(together))


def hold_out(game: Game, share: float, seed: int) -> HeldOut:
    """A share of the states of a game, drawn with a seed, without the initial one.

    Where the states can be listed, the number is exact (at least one). It counts those that play can only reach through
    others that are held out, which no training sequence can visit either: of the lattice it is always the end that is
    farther from the start. Where there are too many, each state is held out or not by a mix of its bits, and the
    share is what that comes to.

    Raises:
        BadInput: ``share`` is not between 0 and 1 or leaves no state but the initial one, or ``seed`` is no seed.
    """
    check_share("share", share)
    check_integer("seed", seed, 0, 2**63 - 1)
    if game.n_states is None:
        return HeldOut(game, share, seed, None, _mixed(game, share, seed))
    table = automaton(game)
    size = max(1, round(share * len(table)))
    if size > len(table) - 1:
        raise BadInput(f"share = {share}: that is all {len(table)} states of {game}; leave some to train on")
    held = _drawn(table, size, seed)
    ids = table.sorted_ids[held[table.sorted_rows]]

    def contains(states: Tensor) -> Tensor:
        return torch.isin(game.state_id(states), ids.to(states.device))

    return HeldOut(game, share, seed, table.states[held], contains)


def _drawn(table: Automaton, size: int, seed: int) -> Bool[Tensor, " n_states"]:
    """So many states, drawn at random, among them all that cannot be reached without the others."""
    order = torch.randperm(len(table) - 1, generator=torch.Generator().manual_seed(seed)) + 1
    held = torch.zeros(len(table), dtype=torch.bool)
    step = size
    while (missing := size - int(held.sum())) > 0:
        step = min(step, missing)
        barred = held.clone()
        barred[order[:step]] = True
        out_of_reach = ~reached_without(table, barred)
        if int(out_of_reach.sum()) <= size:
            held, step = out_of_reach, 2 * step
            order = order[~held[order]]
        elif step > 1:
            step //= 2
        else:
            # It cuts too many off. There is always one that cuts off none: a leaf of a tree of ways to the others.
            order = order.roll(-1)
    return held


def _mixed(game: Game, share: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Whether a state is held out, from its bits and a seed.

    Source: the finaliser of SplitMix64 (Steele et al. 2014, figure 15), once for each integer of the state.
    """
    start = game.initial(1)

    def contains(states: Tensor) -> Tensor:
        mixed = torch.full_like(states[:, 0], seed)
        for column in states.unbind(1):
            mixed = _mix(mixed + column)
        low_bits = mixed & (2**53 - 1)
        return (low_bits < int(share * 2**53)) & (states != start.to(states.device)).any(1)

    return contains


def _mix(bits: Tensor) -> Tensor:
    # Products wrap around in 64 bits, as they should; right shifts must not copy the sign.
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & 2**33 - 1)
