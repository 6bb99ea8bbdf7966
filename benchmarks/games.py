"""Games generated per second under uniform play, ours by the batch against OpenSpiel's one by one in the same run.

    python benchmarks/games.py [--json] [--repeats N] [--batch N]

Ours gives tokens, states and sets of legal tokens; OpenSpiel, from Python, gives the moves. CPU time of one thread
(``process_time``); the two take turns, and the ratio is the median of each turn's. Then what listing every state of
a game costs, what its Myhill-Nerode classes and the boundaries of 200 pairs of states cost, and the peak memory of the
process so far. Without OpenSpiel only ours is timed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from circuits.tasks.games import Connect3, Gridworld, Lattice, Nim, Othello
from circuits.tasks.games.automaton import automaton
from circuits.tasks.games.engine import Engine
from circuits.worldmodels import boundary, minimal_classes

CASES: tuple[tuple[Engine, str | None, dict[str, object]], ...] = (
    (Connect3(), "connect_four", {"rows": 4, "columns": 4, "x_in_row": 3}),
    (Nim(), "nim", {"pile_sizes": "3;4;5", "is_misere": False}),
    (Othello(8), "othello", {}),
    (Othello(4), None, {}),
    (Lattice(), None, {}),
    (Gridworld(), None, {}),
)


DEPTH = 5
"""Tokens of the longest continuation that tells two states apart."""


def per_second(play: Callable[[], int]) -> float:
    """Games that one call plays by the second."""
    start = time.process_time()
    played = play()
    return played / (time.process_time() - start)


def one_by_one(game: Any, seconds: float, draw: random.Random) -> int:
    """Play random games for about so long and return how many."""
    end = time.process_time() + seconds
    played = 0
    while time.process_time() < end:
        state = game.new_initial_state()
        while not state.is_terminal():
            state.apply_action(draw.choice(state.legal_actions()))
        played += 1
    return played


def measure(case: tuple[Engine, str | None, dict[str, object]], batch: int, repeats: int) -> dict[str, Any]:
    """The row of one game."""
    game, name, parameters = case
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    spiel = importlib.import_module("pyspiel") if name and importlib.util.find_spec("pyspiel") else None
    theirs = spiel.load_game(name, parameters) if spiel else None
    game.sample(batch, generator=generator)
    ours, others = [], []
    for _ in range(repeats):
        ours.append(per_second(lambda: len(game.sample(batch, generator=generator))))
        if theirs is not None:
            others.append(per_second(lambda: one_by_one(theirs, 0.5, draw)))
    row: dict[str, Any] = {"game": str(game), "games_per_second": statistics.median(ours)}
    if others:
        row["open_spiel"] = statistics.median(others)
        row["ratio"] = statistics.median(mine / other for mine, other in zip(ours, others, strict=True))
    if game.enumerable:
        automaton.cache_clear()
        start = time.process_time()
        row["states"], row["listing_seconds"] = len(automaton(game)), time.process_time() - start
        minimal_classes.cache_clear()
        start = time.process_time()
        row["classes"], row["classes_seconds"] = int(minimal_classes(game).max()) + 1, time.process_time() - start
        pairs = torch.randint(len(automaton(game)), (200, 2), generator=torch.Generator().manual_seed(0)).tolist()
        start = time.process_time()
        row["boundary"] = sum(len(boundary(game, first, second, DEPTH)[1]) for first, second in pairs)
        row["boundary_seconds"] = time.process_time() - start
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, arguments.batch, arguments.repeats) for case in CASES]
    # Kibibytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if arguments.json:
        print(json.dumps({"rows": rows, "peak_mib": peak}))
        return
    heads = f"{'states':>9}{'listed in':>11}{'classes':>9}{'in':>9}{'boundaries in':>15}"
    print(f"{'game':44}{'games/s':>12}{'OpenSpiel':>12}{'ratio':>8}{heads}")
    for row in rows:
        other, ratio = (
            f"{row[key]:.{digits}f}" if key in row else "-" for key, digits in (("open_spiel", 0), ("ratio", 1))
        )
        states = row.get("states", "-")
        listed = f"{row['listing_seconds']:.2f} s" if "listing_seconds" in row else "-"
        classes = row.get("classes", "-")
        found, told = (f"{row[k]:.2f} s" if k in row else "-" for k in ("classes_seconds", "boundary_seconds"))
        print(
            f"{row['game']:44}{row['games_per_second']:12.0f}{other:>12}{ratio:>8}{states:>9}{listed:>11}"
            f"{classes:>9}{found:>9}{told:>15}"
        )
    print(f"peak memory of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
