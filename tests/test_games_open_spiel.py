"""The rules against OpenSpiel's at ten thousand random positions of each game: legal moves, next state, end, winner."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from circuits.tasks.games import Connect3, Nim, Othello
from circuits.tasks.games.solved import SolvedContest

pyspiel = pytest.importorskip(
    "pyspiel", reason="OpenSpiel is not installed: pip install 'objective-circuits[games-test]'"
)

POSITIONS = 10_000


def nim_board(state: Any) -> str:
    """What is left of each heap."""
    return "-".join(re.findall(r"\d+", str(state).split(":")[1]))


def connect_board(state: Any) -> str:
    """Rows parted by slashes, the top one first."""
    return "/".join(str(state).split())


def othello_board(state: Any) -> str:
    """Rows parted by slashes."""
    rows = [line.split()[1:9] for line in str(state).splitlines() if re.match(r"\d", line)]
    return "/".join("".join(row) for row in rows).replace("-", ".")


def nim_move(state: Any, action: int) -> str:
    """The heap's letter and the number taken."""
    pile, taken = map(int, re.findall(r"\d+", state.action_to_string(state.current_player(), action)))
    return f"{' abcde'[pile]}{taken}"


def connect_move(_: Any, action: int) -> str:
    """The column's letter."""
    return "abcd"[action]


def othello_move(_: Any, action: int) -> str:
    """The cell's name or pass."""
    return "pass" if action == 64 else f"{'abcdefgh'[action % 8]}{action // 8 + 1}"


def own_board(game: Nim | SolvedContest, state: torch.Tensor) -> str:
    """Our board as the functions above give theirs."""
    return game.describe(state).removeprefix("heaps ").replace(",", "").split()[0].lower()


CASES = [
    (Nim(), "nim", {"pile_sizes": "3;4;5", "is_misere": False}, nim_board, nim_move),
    (Nim((2, 5, 4, 1), misere=True), "nim", {"pile_sizes": "2;5;4;1", "is_misere": True}, nim_board, nim_move),
    (Connect3(), "connect_four", {"rows": 4, "columns": 4, "x_in_row": 3}, connect_board, connect_move),
    (Connect3(3, 4), "connect_four", {"rows": 3, "columns": 4, "x_in_row": 3}, connect_board, connect_move),
    (Othello(8), "othello", {}, othello_board, othello_move),
]


@pytest.mark.parametrize(("game", "name", "parameters", "board", "move"), CASES, ids=[str(case[0]) for case in CASES])
def test_open_spiel_plays_by_the_same_rules(
    game: Nim | SolvedContest,
    name: str,
    parameters: dict[str, object],
    board: Callable[[Any], str],
    move: Callable[[Any, int], str],
) -> None:
    theirs = pyspiel.load_game(name, parameters)
    generator = torch.Generator().manual_seed(0)
    compared = 0
    while compared < POSITIONS:
        sampled = game.sample(200, generator=generator)
        winners = game.winner(sampled.states.flatten(0, 1)).view(200, -1).tolist()
        rows = zip(sampled.tokens.tolist(), sampled.lengths.tolist(), sampled.legal.tolist(), strict=True)
        for i, (tokens, length, legal) in enumerate(rows):
            state = theirs.new_initial_state()
            for t in range(length + 1):
                actions = {move(state, action): action for action in state.legal_actions()}
                ours = {word for word, fine in zip(game.vocabulary, legal[t], strict=True) if fine}
                assert ours == (set(actions) or {"end"})
                assert own_board(game, sampled.states[i, t]) == board(state)
                assert state.is_terminal() == (ours == {"end"}) == (t == length)
                returns = state.returns()
                assert winners[i][t] == (returns.index(1.0) if state.is_terminal() and 1.0 in returns else -1)
                if t < length:
                    assert state.current_player() == int(sampled.states[i, t, -1])
                    state.apply_action(actions[game.vocabulary[tokens[t]]])
                compared += 1
    assert compared >= POSITIONS
