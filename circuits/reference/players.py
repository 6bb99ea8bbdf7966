"""Small transformers that play a game, known to have been told its state or not, and stored beside the code.

``python tools/train_players.py`` trains them anew, by the study ``players``. Each game has three that were trained to
read out the state beside next tokens, and three that were trained on nothing but the sets of moves that the game's
planted heuristic takes for legal.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from circuits.errors import BadInput, UnknownName
from circuits.model import Transformer, load
from circuits.tasks.games import Connect3, Game, Gridworld, Lattice, Nim

PLAYERS: dict[str, Game] = {
    "lattice": Lattice(5, 16),
    "gridworld": Gridworld(5, length=12),
    "connect3": Connect3(3, 4),
    "nim": Nim((2, 3, 3)),
}
"""The game, in the size that is stored, by its name."""
KINDS = ("told-state", "planted-heuristic")
SEEDS = (0, 1, 2)
FOLDER = "players"


def stored_player(game: str, kind: str, seed: int) -> Path:
    """Return the path of a stored player, whether or not it is there."""
    return Path(str(resources.files("circuits.reference") / FOLDER / f"{game}-{kind}-seed{seed}.safetensors"))


def player(game: str, kind: str, *, seed: int = 0) -> tuple[Transformer, Game]:
    """Return a stored player in single precision, with the game that it plays.

    Args:
        game: a key of ``PLAYERS``.
        kind: ``told-state`` or ``planted-heuristic``.
        seed: 0, 1 or 2.

    Raises:
        UnknownName: there is no such game or kind.
        BadInput: there is no such seed.
    """
    for what, name, known in (("game", game, tuple(PLAYERS)), ("kind of player", kind, KINDS)):
        if name not in known:
            raise UnknownName(what, name, known)
    if seed not in SEEDS:
        raise BadInput(f"seed = {seed!r}: expected one of {', '.join(map(str, SEEDS))}")
    return load(stored_player(game, kind, seed)).float().eval(), PLAYERS[game]
