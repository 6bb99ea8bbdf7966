"""Games: finite worlds of moves with a known state behind every prefix, in engines that play them by the batch."""

from __future__ import annotations

from typing_extensions import TypeIs

from circuits.tasks.base import from_table
from circuits.tasks.games.base import Contest, Game, Games, Heuristic, Policy, Symmetry, agreement
from circuits.tasks.games.batches import GameBatch, evaluation_batch, overlap, training_batch
from circuits.tasks.games.connect3 import Connect3
from circuits.tasks.games.gridworld import Gridworld
from circuits.tasks.games.group_word import GroupWord
from circuits.tasks.games.hold_out import HeldOut, Overlap, hold_out, state_overlap
from circuits.tasks.games.last_tokens import LastTokens
from circuits.tasks.games.lattice import Lattice, WallDetector
from circuits.tasks.games.nim import Nim
from circuits.tasks.games.othello import Othello

GAMES: dict[str, type] = {
    "lattice": Lattice,
    "gridworld": Gridworld,
    "connect3": Connect3,
    "othello": Othello,
    "nim": Nim,
    "group-word": GroupWord,
}
"""Every game by its name."""

__all__ = [
    "GAMES",
    "Connect3",
    "Contest",
    "Game",
    "GameBatch",
    "Games",
    "Gridworld",
    "GroupWord",
    "HeldOut",
    "Heuristic",
    "LastTokens",
    "Lattice",
    "Nim",
    "Othello",
    "Overlap",
    "Policy",
    "Symmetry",
    "WallDetector",
    "agreement",
    "evaluation_batch",
    "get",
    "hold_out",
    "is_game",
    "overlap",
    "state_overlap",
    "training_batch",
]


def is_game(task: object) -> TypeIs[Game]:
    """Return whether a task is a game; that it has the rest of the interface is not looked at."""
    return hasattr(type(task), "planted_heuristic")


def get(name: str, **parameters: object) -> Game:
    """Return the game of that name with the given parameters (defaults elsewhere).

    Args:
        name: a key of ``GAMES``; underscores are accepted for hyphens.
        parameters: fields of the game's dataclass.

    Raises:
        UnknownName: no game has that name, or the game has no such parameter.
        BadInput: a parameter has a value that cannot be used.
    """
    game: Game = from_table("game", GAMES, name, parameters)
    return game
