"""Myhill-Nerode classes of a game's states, and the shortest continuations that tell two states apart, exactly."""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.tasks.games.automaton import NOWHERE, Automaton, automaton

MOST_STRINGS = 4096
"""Interior strings that are followed at a time; where there are more, a random choice of them is."""


def table_of(game: Game) -> Automaton:
    """Return every state of a game and where each token leads.

    Raises:
        BadInput: the game has too many states.
    """
    if game.n_states is None:
        raise BadInput(f"{game} has too many states to list: take a smaller size")
    return automaton(game)


@functools.lru_cache(maxsize=16)
def minimal_classes(game: Game) -> NDArray[np.int64]:
    """Return the Myhill-Nerode class of every state, by row of the game's table: the same where legality never differs.

    Raises:
        BadInput: the game has too many states.

    Source: Moore 1956, "Gedanken-experiments on sequential machines": refine the partition by legal tokens with the
        classes of the successors until it is stable.
    """
    table = table_of(game)
    successors = table.successors.numpy()
    classes = _numbered(table.legal.numpy().astype(np.int64))
    while True:
        after = np.where(successors == NOWHERE, -1, classes[successors])
        finer = _numbered(np.concatenate([classes[:, None], after], 1))
        if finer.max() == classes.max():
            return finer
        classes = finer


def _numbered(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same number for equal rows."""
    number: NDArray[np.int64] = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return number


@functools.lru_cache(maxsize=4096)
def boundary(game: Game, first: int, second: int, depth: int) -> tuple[Int[Tensor, "m depth"], Int[Tensor, " m"]]:
    """Return the continuations that are legal after one state, and at their last token alone illegal after another.

    A breadth-first search of the product automaton; pairs of one class, behind which nothing differs, are left out.

    Args:
        game: whose states.
        first: row, in the game's table, of the state after which the continuations are legal.
        second: row of the state after which they are not.
        depth: longest continuation.

    Returns:
        The strings, filled with 0 behind their ends, and their lengths.

    Raises:
        BadInput: the game has too many states, or an argument is out of its range.

    Source: Vafa et al. 2024 (arXiv 2406.03689), definition 2.3 (the boundary MNB), enumerated as they do for maps.
    """
    successors = table_of(game).successors.numpy()
    check_integer("depth", depth, 1, 10**4)
    for name, row in (("first", first), ("second", second)):
        check_integer(name, row, 0, len(successors) - 1, "a row of the game's table")
    classes = minimal_classes(game)
    generator = np.random.default_rng(0)
    left, right = np.array([first]), np.array([second])
    strings = np.zeros((1, 0), dtype=np.int64)
    found, lengths = [], []
    for length in range(1, depth + 1):
        ways, others = successors[left], successors[right]
        rows, tokens = np.nonzero((ways != NOWHERE) & (others == NOWHERE))
        ended = np.concatenate([strings[rows], tokens[:, None]], 1)
        found.append(np.pad(ended, ((0, 0), (0, depth - length))))
        lengths.append(np.full(len(rows), length))
        inside = (ways != NOWHERE) & (others != NOWHERE)
        inside &= np.where(inside, classes[ways] != classes[others], False)
        rows, tokens = np.nonzero(inside)
        if len(rows) > MOST_STRINGS:
            chosen = np.sort(generator.choice(len(rows), MOST_STRINGS, replace=False))
            rows, tokens = rows[chosen], tokens[chosen]
        strings = np.concatenate([strings[rows], tokens[:, None]], 1)
        left, right = ways[rows, tokens], others[rows, tokens]
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(lengths))
