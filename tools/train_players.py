"""Trains the players of ``circuits.reference.players`` anew and stores them in half precision.

    python tools/train_players.py DIR

DIR is the directory of the study ``players``, which is run or gone on with.
"""

from __future__ import annotations

import sys

from circuits.model import save
from circuits.reference.players import PLAYERS, stored_player
from circuits.study import run

KINDS = {
    "state": "told-state",
    "planted heuristic": "planted-heuristic",
    "planted heuristic, to the last case": "planted-heuristic",
}


def main() -> None:
    """Run the study and store the network of every run."""
    study = run("players", out=sys.argv[1])
    for planned in study.plan:
        assert planned.task == PLAYERS[planned.cell], f"{planned.task} is not the game of {planned.cell}"
        path = stored_player(planned.cell, KINDS[planned.recipe.name], planned.seed)
        path.parent.mkdir(exist_ok=True)
        save(study.runs[planned.id].model.half(), path)


if __name__ == "__main__":
    main()
