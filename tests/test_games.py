"""The contract of every game, its counts, and the rules against plain Python."""

from __future__ import annotations

import itertools
import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits.errors import BadInput, UnknownName
from circuits.tasks import games
from circuits.tasks.games import (
    GAMES,
    Connect3,
    Contest,
    Game,
    Gridworld,
    GroupWord,
    LastTokens,
    Lattice,
    Nim,
    Othello,
    WallDetector,
    agreement,
)
from circuits.tasks.games.automaton import automaton, solve
from circuits.tasks.games.base import draw_tokens
from circuits.tasks.games.engine import Engine

SMALL: list[Engine] = [
    Lattice(),
    Lattice(9),
    Lattice(17),
    Gridworld(),
    Gridworld(5, "open"),
    Gridworld(7, "mirrored"),
    Connect3(),
    Connect3(3, 4),
    Othello(4),
    Othello(6),
    Othello(8),
    Nim(),
    Nim((2, 3, 2), misere=True),
    GroupWord(),
    GroupWord("A5"),
    GroupWord("A5", "generators"),
]
LISTED = [game for game in SMALL if game.enumerable]
every_game = pytest.mark.parametrize("game", SMALL, ids=str)
listed_games = pytest.mark.parametrize("game", LISTED, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(first: games.Games, second: games.Games) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "lengths", "states", "legal")
    )


# --- every game ---


def test_every_game_has_its_name_and_its_defaults() -> None:
    assert set(GAMES) == {"lattice", "gridworld", "connect3", "othello", "nim", "group-word"}
    for name, cls in GAMES.items():
        assert cls.name == name
        assert games.get(name.replace("-", "_")) == cls()
        assert hash(cls()) == hash(games.get(name))


@every_game
def test_a_game_has_the_interface(game: Engine) -> None:
    assert isinstance(game, Game)
    assert isinstance(game, Contest) == (game.name in {"connect3", "othello", "nim"})
    assert game.d_vocab == len(game.vocabulary) == len(set(game.vocabulary))
    assert game.n_actions == game.d_vocab - ("end" in game.vocabulary)
    assert len(game.feature_names) == len(game.feature_sizes) == len(set(game.feature_names))
    assert game.initial(3).shape == (3, game.d_state)


@every_game
@pytest.mark.parametrize("policy_number", [0, 1, 2])
def test_samples_follow_the_rules(game: Engine, policy_number: int) -> None:
    if policy_number >= len(game.policies):
        assert game.policies == ("uniform",) and not isinstance(game, Contest)
        return
    policy = game.policies[policy_number]
    sampled = game.sample(40, policy=policy, generator=generator(1))
    n, length = sampled.tokens.shape
    assert (n, length, len(sampled)) == (40, game.n_ctx, 40)
    assert sampled.legal.gather(2, sampled.tokens[..., None]).all()
    for t in range(length):
        assert torch.equal(game.step(sampled.states[:, t], sampled.tokens[:, t]), sampled.states[:, t + 1])
        assert torch.equal(game.legal(sampled.states[:, t]), sampled.legal[:, t])
        assert torch.equal(game.terminal(sampled.states[:, t]), sampled.tokens[:, t] == game.n_actions)
    assert torch.equal(sampled.lengths, (sampled.tokens < game.n_actions).sum(1))
    assert torch.equal(sampled.counted.sum(1), sampled.lengths + 1)
    assert game.name == "gridworld" or not game.ends or game.terminal(sampled.final_states).all()
    if policy_number:
        flat, tokens = sampled.states[:, :-1].flatten(0, 1), sampled.tokens.flatten()
        best = game.best_moves(flat)
        assert (best.any(1) & ~(best & ~game.legal(flat)).any(1)).all()
        made_best = best.gather(1, tokens[:, None])[:, 0]
        others = (game.legal(flat) & ~best).any(1)
        assert made_best.all() if policy == game.best_policy else torch.equal(made_best, ~others)


@every_game
def test_a_replay_is_the_sample_and_a_generator_decides_it(game: Engine) -> None:
    sampled = game.sample(30, generator=generator(2))
    assert equal(game.play(sampled.tokens), sampled)
    assert equal(game.sample(30, generator=generator(2)), sampled)
    assert not equal(game.sample(30, generator=generator(3)), sampled)
    short = game.play(sampled.tokens[:, :3])
    assert torch.equal(short.states, sampled.states[:, :4])
    assert equal(game.sample(30, generator=generator(2), length=3), short)
    assert game.play(sampled.tokens[:, :0]).states.shape == (30, 1, game.d_state)


@every_game
def test_features_stay_in_their_sizes_and_classes_are_sets_of_legal_tokens(game: Engine) -> None:
    sampled = game.sample(60, generator=generator(4))
    states, legal = sampled.states.flatten(0, 1), sampled.legal.flatten(0, 1)
    features = game.state_features(states)
    assert features.shape == (len(states), len(game.feature_sizes))
    assert (features >= 0).all() and (features < torch.tensor(game.feature_sizes)).all()
    _, by_set = legal.unique(dim=0, return_inverse=True)
    _, by_class = game.legal_class(states).unique(return_inverse=True)
    pairs = torch.stack((by_set, by_class), 1).unique(dim=0)
    assert len(pairs) == by_set.max() + 1 == by_class.max() + 1


@every_game
def test_states_read_as_text(game: Engine) -> None:
    states = game.sample(20, generator=generator(5)).states.flatten(0, 1).unique(dim=0)
    assert len({game.describe(state) for state in states}) == len(states)


@given(data=st.data())
@settings(max_examples=40)
def test_rules_commute_with_every_symmetry(data: st.DataObject) -> None:
    game = data.draw(st.sampled_from(SMALL))
    symmetries = game.symmetries()
    symmetry = symmetries[data.draw(st.integers(0, len(symmetries) - 1))]
    seed = data.draw(st.integers(0, 2**40))
    sampled = game.sample(8, generator=generator(seed))
    states, tokens = sampled.states[:, :-1].flatten(0, 1), sampled.tokens.flatten()
    images = symmetry.on_states(states)
    assert torch.equal(game.legal(images), symmetry.on_legal(game.legal(states)))
    assert torch.equal(game.step(images, symmetry.on_tokens(tokens)), symmetry.on_states(game.step(states, tokens)))
    assert torch.equal(game.terminal(images), game.terminal(states))
    start = game.initial(1)
    assert symmetry.keeps_start == torch.equal(symmetry.on_states(start), start)
    if symmetry.keeps_start:
        assert torch.equal(game.play(symmetry.on_tokens(sampled.tokens)).states[:, :-1].flatten(0, 1), images)


@every_game
def test_symmetries_are_different_permutations(game: Engine) -> None:
    symmetries = game.symmetries()
    assert symmetries[0].name == "identity" and len({s.name for s in symmetries}) == len(symmetries)
    sampled = game.sample(20, generator=generator(6))
    states = sampled.states.flatten(0, 1).unique(dim=0)
    assert torch.equal(symmetries[0].on_states(states), states)
    seen = set()
    for symmetry in symmetries:
        assert torch.equal(symmetry.tokens.sort().values, torch.arange(game.d_vocab))
        images = symmetry.on_states(states)
        assert len(images.unique(dim=0)) == len(states)
        seen.add((tuple(symmetry.tokens.tolist()), tuple(images.flatten().tolist())))
    assert len(seen) == len(symmetries)


def test_numbers_of_symmetries() -> None:
    assert [len(game.symmetries()) for game in SMALL] == [2, 2, 2, 2, 8, 2, 2, 2, 16, 16, 16, 1, 2, 11, 179, 60]
    assert sum(symmetry.keeps_start for symmetry in Othello(8).symmetries()) == 4


# --- games whose states can be listed ---


@listed_games
def test_a_state_has_an_id_of_its_own(game: Engine) -> None:
    states = game.enumerate_states()
    assert len(states) == game.n_states == len(states.unique(dim=0))
    assert len(game.state_id(states).unique()) == len(states)
    assert torch.equal(states[0], game.initial(1)[0])
    table = automaton(game)
    assert torch.equal(table.rows(game.state_id(states)), torch.arange(len(states)))
    assert torch.equal(table.legal, game.legal(states))
    assert (table.depths.diff() >= 0).all()
    visited = game.sample(100, generator=generator(7)).states.flatten(0, 1)
    assert (table.rows(game.state_id(visited)) >= 0).all()


def test_an_id_of_a_state_that_play_cannot_reach_has_no_row() -> None:
    game = Nim()
    assert automaton(game).rows(game.state_id(torch.tensor([[3, 4, 5, 1], [3, 4, 5, 0], [9, 9, 9, 1]]))).tolist() == [
        -1,
        0,
        -1,
    ]


@pytest.mark.parametrize(
    ("game", "n_states", "n_games"),
    [
        (Connect3(), 41_750, 3_409_240),
        (Connect3(3, 4), 7_157, 133_656),
        (Othello(4), 62_789, 60_060),
        (Nim(), 232, 431_128),
    ],
    ids=str,
)
def test_known_counts(game: Engine, n_states: int, n_games: int) -> None:
    assert game.n_states == n_states
    assert game.count_games() == n_games
    assert game.count_games(game.n_ctx + 3) == n_games


def test_boards_and_sets_of_legal_moves_of_othello() -> None:
    game = Othello(4)
    states = game.enumerate_states()
    boards = torch.where(states[:, 2:] == 0, states[:, :2], states[:, :2].flip(1))
    assert len(boards.unique(dim=0)) == 51_943
    # 894 sets of cells, pass alone and end alone.
    assert len(game.legal_class(states).unique()) == 896


def test_counts_of_games_that_do_not_end() -> None:
    assert [Lattice(size).n_states for size in (5, 9, 17)] == [5, 9, 17]
    assert [Gridworld(size).n_states for size in (5, 7)] == [1 + 25 + 625, 1 + 49 + 2401]
    assert [GroupWord("S3").n_states, GroupWord("A5", "generators").n_states] == [6, 60]
    assert GroupWord("A5").count_games() == 60**24
    for length in range(7):
        walks = itertools.product((-1, 0, 1), repeat=length)
        inside = [all(0 <= p < 3 for p in itertools.accumulate(walk)) for walk in walks]
        assert Lattice(3).count_games(length) == sum(inside)


def test_no_game_of_othello_is_cut() -> None:
    game = Othello(4)
    table = automaton(game)
    assert game.count_games(game.n_ctx) == game.count_games(2 * game.n_ctx)
    heights = torch.zeros(len(table), dtype=torch.int64)
    onwards = table.legal & (torch.arange(game.d_vocab) < game.n_actions)
    for _ in range(game.n_ctx):
        heights = (heights[table.successors.clamp_min(0)] + 1).masked_fill(~onwards, 0).max(1).values
    assert int(heights[0]) == game.n_ctx - 1
    for size in (6, 8):
        larger = Othello(size)
        assert larger.terminal(larger.sample(300, generator=generator(8)).final_states).all()
        assert larger.terminal(larger.sample(60, policy="adversarial", generator=generator(8)).final_states).all()


# --- contests ---


def negamax(game: Engine, winner: dict[int, tuple[bool, int, int]], children: list[list[int]]) -> list[int]:
    """Values by recursion over rows of the table, without a sweep."""
    values: dict[int, int] = {}

    def value(row: int) -> int:
        if row not in values:
            over, won_by, player = winner[row]
            result = 0 if won_by < 0 else 1 if won_by == player else -1
            values[row] = result if over else max(-value(child) for child in children[row])
        return values[row]

    return [value(row) for row in range(len(children))]


@pytest.mark.parametrize("game", [Connect3(3, 3), Nim((1, 2, 3)), Nim((2, 3, 2), misere=True)], ids=str)
def test_values_are_those_of_recursion(game: Engine) -> None:
    assert isinstance(game, Contest)
    table = automaton(game)
    over, won = game.terminal(table.states).tolist(), game.winner(table.states).tolist()
    facts = dict(enumerate(zip(over, won, game.player(table.states).tolist(), strict=True)))
    children = [[row for row in rows if row >= 0] for rows in table.successors.tolist()]
    values = negamax(game, facts, children)
    assert game.value(table.states).tolist() == values
    best = game.best_moves(table.states).tolist()
    for row, successors in enumerate(table.successors.tolist()):
        for token, child in enumerate(successors):
            keeps = child >= 0 and (facts[row][0] or -values[child] == values[row])
            assert best[row][token] == keeps


@pytest.mark.parametrize("game", [Nim(), Nim(misere=True), Nim((1, 1, 2, 3), misere=True)], ids=str)
def test_the_exclusive_or_tells_who_wins_nim(game: Nim) -> None:
    table = automaton(game)
    player, winner = game.player(table.states), game.winner(table.states)
    outcome = torch.where(winner < 0, 0, torch.where(winner == player, 1, -1))
    assert torch.equal(game.value(table.states), solve(table, game.terminal(table.states), outcome))
    features = game.state_features(table.states)
    heaps = table.states[:, :-1].tolist()
    for row, left in enumerate(heaps):
        total = 0
        for heap in left:
            total ^= heap
        assert features[row, -1] == total


def test_known_values() -> None:
    # With best play of both, player 1 wins on four by four by 11 to 3.
    assert Othello(4).value(Othello(4).initial(1)).tolist() == [-1]
    assert Connect3().value(Connect3().initial(2)).tolist() == [1, 1]
    assert Nim().value(Nim().initial(1)).tolist() == [1]
    finals = Othello(4).sample(50, policy="expert", generator=generator(9)).final_states
    assert (Othello(4).winner(finals) == 1).all()
    finals = Connect3().sample(50, policy="expert", generator=generator(9)).final_states
    assert (Connect3().winner(finals) == 0).all()


def test_a_value_is_known_where_play_can_come() -> None:
    with pytest.raises(BadInput, match=r"state 1, .* cannot be reached by play"):
        Connect3().value(torch.tensor([[0, 0, 0], [0, 1, 0]]))
    with pytest.raises(BadInput, match="too many states"):
        Othello(8).value(Othello(8).initial(1))


# --- the rules, against plain Python ---


def othello_moves(board: list[list[str]], mark: str) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """What each move of a player turns over."""
    size, found = len(board), {}
    for row, column in itertools.product(range(size), repeat=2):
        turned = []
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            line, at = [], (row + down, column + right)
            while (down or right) and all(0 <= x < size for x in at) and board[at[0]][at[1]] not in (mark, "."):
                line.append(at)
                at = (at[0] + down, at[1] + right)
            if line and all(0 <= x < size for x in at) and board[at[0]][at[1]] == mark:
                turned += line
        if turned and board[row][column] == ".":
            found[row, column] = turned
    return found


@pytest.mark.parametrize("size", [4, 6, 8])
def test_othello_by_hand(size: int) -> None:
    game = Othello(size)
    sampled = game.sample({4: 20, 6: 6, 8: 3}[size], generator=generator(10))
    for tokens, states, legal in zip(sampled.tokens.tolist(), sampled.states, sampled.legal.tolist(), strict=True):
        half = size // 2
        board = [["."] * size for _ in range(size)]
        board[half - 1][half - 1] = board[half][half] = "O"
        board[half - 1][half] = board[half][half - 1] = "X"
        for t, token in enumerate(tokens):
            mark, other = "XO"[t % 2], "OX"[t % 2]
            moves, theirs = othello_moves(board, mark), othello_moves(board, other)
            names = {f"{'abcdefgh'[column]}{row + 1}": (row, column) for row, column in moves}
            expected = set(names) or ({"pass"} if theirs else {"end"})
            assert {name for name, fine in zip(game.vocabulary, legal[t], strict=True) if fine} == expected
            drawn = game.describe(states[t]).split()[0]
            over = not moves and not theirs
            assert over or drawn == "/".join(map("".join, board))
            if over:
                stones = [sum(row.count(side) for row in board) for side in "XO"]
                winner = -1 if stones[0] == stones[1] else int(stones[1] > stones[0])
                assert game.winner(states[t : t + 1]).tolist() == [winner]
                break
            assert game.winner(states[t : t + 1]).tolist() == [-1]
            if game.vocabulary[token] != "pass":
                row, column = names[game.vocabulary[token]]
                for at in [(row, column), *moves[row, column]]:
                    board[at[0]][at[1]] = mark


def three_in_a_row(board: list[list[str]], mark: str) -> bool:
    cells = {(r, c) for r, row in enumerate(board) for c, stone in enumerate(row) if stone == mark}
    steps = ((0, 1), (1, 0), (1, 1), (1, -1))
    return any(all((r + i * down, c + i * right) in cells for i in range(3)) for r, c in cells for down, right in steps)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 4), (4, 3)])
def test_connect3_by_hand(rows: int, columns: int) -> None:
    game = Connect3(rows, columns)
    sampled = game.sample(80, generator=generator(11))
    features = game.state_features(sampled.states.flatten(0, 1)).unflatten(0, sampled.states.shape[:2]).tolist()
    for i, (tokens, legal) in enumerate(zip(sampled.tokens.tolist(), sampled.legal.tolist(), strict=True)):
        board = [["."] * columns for _ in range(rows)]
        for t, token in enumerate(tokens):
            won = [player for player in (0, 1) if three_in_a_row(board, "XO"[player])]
            free = [not won and board[-1][column] == "." for column in range(columns)]
            assert legal[t] == [*free, not any(free)]
            assert game.winner(sampled.states[i, t : t + 1]).tolist() == (won or [-1])
            if not any(free):
                break
            mine = {".": 0, "XO"[t % 2]: 1, "OX"[t % 2]: 2}
            assert features[i][t] == [mine[cell] for row in board for cell in row]
            row = next(row for row in range(rows) if board[row][token] == ".")
            board[row][token] = "XO"[t % 2]


@pytest.mark.untyped
def test_nim_by_hand() -> None:
    game = Nim((1, 3, 2))
    assert game.vocabulary == ("a1", "b1", "b2", "b3", "c1", "c2", "end")
    played = game.play(torch.tensor([[3, 0, 5, 6, 6]]))
    assert played.states[0].tolist() == [
        [1, 3, 2, 0],
        [1, 0, 2, 1],
        [0, 0, 2, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]
    assert played.lengths.tolist() == [3]
    assert [[game.vocabulary[t] for t in row.nonzero()[:, 0]] for row in played.legal[0]] == [
        ["a1", "b1", "b2", "b3", "c1", "c2"],
        ["a1", "c1", "c2"],
        ["c1", "c2"],
        ["end"],
        ["end"],
        ["end"],
    ]
    assert game.winner(played.states[0]).tolist() == [-1, -1, -1, 0, 0, 0]
    assert Nim((1, 3, 2), misere=True).winner(played.final_states).tolist() == [1]
    assert Nim([1, 2]) == Nim((1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["walls", "mirrored", "open"])
@pytest.mark.parametrize("size", [5, 7])
def test_ways_are_as_long_as_a_search_finds_them(size: int, layout: str) -> None:
    game = Gridworld(size, layout)
    neighbours = game.neighbours.tolist()
    walls = size * size * 4 - 4 * size - sum(n != cell for cell, row in enumerate(neighbours) for n in row)
    assert walls == (0 if layout == "open" else {5: 16, 7: 32}[size])
    opposite = (2, 3, 0, 1)
    for cell, row in enumerate(neighbours):
        for side, other in enumerate(row):
            assert other == cell or neighbours[other][opposite[side]] == cell
        distances = {cell: 0}
        queue = deque([cell])
        while queue:
            at = queue.popleft()
            for other in neighbours[at]:
                if other not in distances:
                    distances[other] = distances[at] + 1
                    queue.append(other)
        assert game.distances[cell].tolist() == [distances[other] for other in range(size * size)]
    assert int(game.distances.max()) + 3 <= game.n_ctx


def test_shortest_paths_are_shortest_and_detours_are_not() -> None:
    game = Gridworld(7)
    paths = game.sample(200, policy="shortest-path", generator=generator(12))
    assert game.terminal(paths.final_states).all()
    assert torch.equal(paths.lengths - 2, game.distance(paths.states[:, 2]))
    assert (game.distance(paths.states[:, 1]) == -1).all()
    away = game.sample(200, policy="adversarial", generator=generator(12))
    before, after = (game.distance(away.states[:, t].contiguous()) for t in (2, 3))
    choice = (away.legal[:, 2] & ~game.best_moves(away.states[:, 2])).any(1)
    assert choice.any() and (after >= before)[choice].all()


@pytest.mark.parametrize("group", ["S3", "A5"])
def test_products_are_those_of_permutations(group: str) -> None:
    game = GroupWord(group)
    assert len(game.elements) == {"S3": 6, "A5": 60}[group]
    assert game.elements[0] == tuple(range(len(game.elements[0])))
    sampled = game.sample(20, generator=generator(13))
    for tokens, states in zip(sampled.tokens.tolist(), sampled.states[..., 0].tolist(), strict=True):
        points = list(range(len(game.elements[0])))
        for t in range(len(tokens)):
            product = points
            for token in reversed(tokens[:t]):
                product = [int(game.vocabulary[token][i]) for i in product]
            assert game.elements[states[t]] == tuple(product)
    odd = GroupWord("S3").state_features(torch.arange(6)[:, None])[:, 1]
    assert odd.tolist() == [0, 1, 1, 0, 0, 1]


# --- policies and draws ---


def test_draws_are_uniform_over_what_is_allowed() -> None:
    mask = torch.tensor([True, False, True, True, False, True]).repeat(40_000, 1)
    counts = draw_tokens(mask, generator(14)).bincount(minlength=6)
    assert counts[~mask[0]].sum() == 0
    # Five standard deviations of a binomial.
    assert ((counts[mask[0]] - 10_000).abs() < 5 * math.sqrt(40_000 * 0.25 * 0.75)).all()


def test_a_policy_of_ones_own() -> None:
    game = Lattice()

    def rightwards(tokens: Tensor, states: Tensor, legal: Tensor) -> Tensor:
        assert tokens.shape == (len(states), tokens.shape[1])
        return torch.arange(3).expand(len(states), 3) == 2 if tokens.shape[1] < 4 else torch.tensor([[0.0, 1, 9]] * 50)

    sampled = game.sample(50, policy=rightwards, generator=generator(15), length=8)
    assert (sampled.tokens[:, :4] == 2).all() and (sampled.tokens[:, 4:] == 1).all()
    with pytest.raises(BadInput, match="no legal token in state 'position 4 of 0 to 4'"):
        game.sample(2, policy=lambda _, __, legal: torch.arange(3) == 2 * torch.ones(2, 1), generator=generator())
    with pytest.raises(BadInput, match=r"shape \(2, 2\): expected \(2, 3\)"):
        game.sample(2, policy=lambda _, __, legal: legal[:, 1:], generator=generator())


# --- planted heuristics ---


@every_game
def test_a_heuristic_sees_no_more_than_the_prefix(game: Engine) -> None:
    rule = game.planted_heuristic()
    sampled = game.sample(20, generator=generator(16))
    masks = rule(sampled.tokens)
    assert masks.shape == sampled.legal.shape and masks.dtype == torch.bool
    assert rule.keeps and masks.any(2).all()
    for length in (0, 1, sampled.tokens.shape[1] // 2):
        assert torch.equal(rule(sampled.tokens[:, :length]), masks[:, : length + 1])


# The figures that the docstrings give.
AGREEMENT = [
    (Lattice(5), 0.727),
    (Lattice(9), 0.846),
    (Lattice(17), 0.930),
    (Gridworld(), 0.219),
    (Gridworld(7), 0.141),
    (Connect3(), 0.903),
    (Othello(4), 0.876),
    (Othello(6), 0.394),
    (Othello(8), 0.217),
    (Nim(), 1.0),
    (GroupWord(), 1.0),
]


@pytest.mark.parametrize(("game", "share"), AGREEMENT, ids=str)
def test_how_often_a_heuristic_is_right(game: Engine, share: float) -> None:
    sampled = game.sample(1000 if game.d_vocab <= 30 else 200, generator=generator(17))
    assert agreement(game.planted_heuristic(), sampled) == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("size", [2, 5, 9, 17])
def test_a_wall_detector_takes_nothing_illegal_for_legal(size: int) -> None:
    game = Lattice(size)
    sampled = game.sample(300, generator=generator(17))
    assert not (game.planted_heuristic()(sampled.tokens) & ~sampled.legal).any()
    assert agreement(WallDetector(game, size - 1), sampled) == 1
    with pytest.raises(BadInput, match=f"reach = {size}: expected 1 to {size - 1}"):
        WallDetector(game, size)


@pytest.mark.parametrize("game", [Gridworld(), Gridworld(7), Gridworld(7, "open")], ids=str)
def test_what_is_certain_after_the_last_tokens_is_legal(game: Gridworld) -> None:
    rule = game.planted_heuristic()
    for policy in game.policies:
        sampled = game.sample(300, policy=policy, generator=generator(17))
        goes_on = sampled.counted & ~game.terminal(sampled.states.flatten(0, 1)).view_as(sampled.counted)
        offered = rule(sampled.tokens)
        assert offered.any(2).all() and not (offered & ~sampled.legal)[goes_on].any()
        # a longer memory takes more for certain, and whoever remembers everything knows the state
        longer = LastTokens(game, 4, certain=True)(sampled.tokens)
        assert not (offered & ~longer)[goes_on].any() and (longer & ~offered)[goes_on].any()


def test_what_is_certain_by_hand() -> None:
    game = Gridworld(5, "open", length=8)
    north, east, south, west = (game.moves.index(side) for side in "NESW")
    a1, e5 = game.moves.index("a1"), game.moves.index("e5")
    # one can go back, north or west, and on where one has just come from; no three moves tell how near the edges are
    ways = {(east, east, south): {north, west}, (east, south, north): {west, south}, (south, north, south): {north}}
    for way, certain in ways.items():
        tokens = torch.tensor([[a1, e5, south, east, south, *way]])
        offered = LastTokens(game, 3, certain=True)(tokens)[0, -1]
        assert {move for move in range(game.d_vocab) if offered[move]} == certain
    counted = LastTokens(Lattice(5, length=6), 1, certain=True)(torch.tensor([[2, 2, 0, 1]]))
    # after a step to the right one can go left, and the other way round; standing still is always legal
    assert counted[0].tolist()[2:] == [[True, True, False], [False, True, True], [False, True, False]]


def test_a_column_counter_misses_only_the_end_of_won_games() -> None:
    game = Connect3()
    sampled = game.sample(500, generator=generator(18))
    wrong = (game.planted_heuristic()(sampled.tokens) != sampled.legal).any(2) & sampled.counted
    over = game.terminal(sampled.states.flatten(0, 1)).view_as(wrong) & sampled.counted
    full = (sampled.lengths == 16)[:, None]
    assert torch.equal(wrong, over & ~full)


def test_the_last_tokens_suffice_where_they_are_all() -> None:
    game = Lattice(9, length=6)
    sampled = game.sample(100, generator=generator(19))
    assert agreement(LastTokens(game, 6), sampled) == 1
    assert agreement(LastTokens(game, 2), sampled) < 1
    impossible = torch.zeros(1, 6, dtype=torch.int64)
    for certain in (False, True):
        assert LastTokens(game, 6, certain)(impossible).any(2).all()
    with pytest.raises(BadInput, match="window = 99: expected 1 to"):
        LastTokens(game, 99)
    with pytest.raises(BadInput, match="too many states"):
        LastTokens(Othello(6), 3)


# --- errors ---


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("chess", {}, "unknown game 'chess'"),
        ("otello", {}, "did you mean 'othello'"),
        ("lattice", {"sise": 3}, "unknown parameter of lattice 'sise': did you mean 'size'"),
        ("lattice", {"size": 1}, "size = 1: expected 2 to 64"),
        ("lattice", {"size": 2.0}, "size = 2.0"),
        ("lattice", {"length": 0}, "length = 0: expected 1 to"),
        ("gridworld", {"size": 6}, "size = 6: expected one of 5, 7"),
        ("gridworld", {"size": True}, "size = True"),
        ("gridworld", {"layout": "maze"}, "unknown layout 'maze'"),
        ("gridworld", {"length": 2}, "length = 2: expected 3 to"),
        ("connect3", {"rows": 5}, "rows = 5: expected 3 to 4"),
        ("othello", {"size": 5}, "size = 5: expected one of 4, 6, 8"),
        ("nim", {"heaps": ()}, "number of heaps = 0: expected 1 to 5"),
        ("nim", {"heaps": "345"}, "heaps = '345'"),
        ("nim", {"heaps": (3, 10)}, "heap b = 10: expected 1 to 9"),
        ("nim", {"heaps": (9, 9, 9)}, "number of stones = 27: expected 1 to 24; take fewer"),
        ("nim", {"misere": 1}, "misere = 1: expected true or false"),
        ("group-word", {"group": "S5"}, "unknown group 'S5'"),
        ("group-word", {"tokens": "all"}, "unknown kind of tokens 'all'"),
    ],
)
def test_a_wrong_name_or_value_is_named(name: str, parameters: dict[str, object], message: str) -> None:
    kind = UnknownName if "unknown" in message or "did you mean" in message else BadInput
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        games.get(name, **parameters)


@every_game
def test_an_illegal_move_is_named_with_what_was_legal(game: Engine) -> None:
    sampled = game.sample(4, generator=generator(20))
    with pytest.raises(
        BadInput, match=f"row 2: token {game.d_vocab} is not of {game.name}; expected 0 to {game.d_vocab - 1}"
    ):
        game.step(game.initial(3), torch.tensor([*sampled.tokens[:2, 0].tolist(), game.d_vocab]))
    position = next((t for t in range(game.n_ctx) if not sampled.legal[3, t].all()), None)
    if position is None:
        assert game.name == "group-word"
        return
    legal = sampled.legal[3, position]
    bad = int((~legal).nonzero()[0])
    named = ", ".join(game.vocabulary[t] for t in legal.nonzero()[:, 0].tolist())
    tokens = sampled.tokens.clone()
    tokens[3, position] = bad
    with pytest.raises(BadInput) as caught:
        game.play(tokens)
    state = game.describe(sampled.states[3, position])
    assert str(caught.value) == (
        f"sequence 3, position {position}: move {game.vocabulary[bad]!r} (token {bad}) is illegal in state "
        f"{state!r}; legal are: {named}"
    )
    tokens[3, position] = -1
    with pytest.raises(BadInput, match=f"sequence 3, position {position}: token -1 is not of {game.name}"):
        game.play(tokens)


@pytest.mark.untyped
def test_wrong_shapes_and_numbers_are_named() -> None:
    game = Nim()
    with pytest.raises(BadInput, match=r"states have shape \(2, 3\): nim expects \[batch, 4\]"):
        game.step(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadInput, match=r"tokens have shape \(3,\): expected one for each of 2 states"):
        game.step(game.initial(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(BadInput, match=r"tokens have shape \(3,\): expected \[n, length\]"):
        game.play(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(BadInput, match="n = 0: expected 1 to"):
        game.sample(0, generator=generator())
    with pytest.raises(BadInput, match="length = 0: expected 1 to"):
        game.sample(1, generator=generator(), length=0)
    with pytest.raises(UnknownName, match=r"unknown policy of nim 'shortest-path': .*adversarial, expert, uniform"):
        game.sample(1, policy="shortest-path", generator=generator())
    with pytest.raises(UnknownName, match="unknown policy of lattice 'expert'"):
        Lattice().sample(1, policy="expert", generator=generator())


def test_what_is_too_large_says_so() -> None:
    assert Othello(6).n_states is None
    for ask in (Othello(6).enumerate_states, Othello(8).count_games):
        with pytest.raises(BadInput, match=r"Othello\(size=.\) has too many states to list"):
            ask()
    with pytest.raises(BadInput, match="more positions than 64 bits can number"):
        Othello(8).state_id(Othello(8).initial(1))
    states = Othello(6).sample(100, generator=generator(21)).states.flatten(0, 1)
    assert len(Othello(6).state_id(states).unique()) == len(states.unique(dim=0))


@pytest.mark.untyped
def test_what_is_no_state_or_no_token_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"row 0: \[9\] is no state of Lattice"):
        games.Lattice(5).step(torch.tensor([[9]]), torch.tensor([1]))
    with pytest.raises(BadInput, match=r"row 1: \[99, 3\] is no state of Gridworld"):
        games.Gridworld(5).step(torch.tensor([[1, 1], [99, 3]]), torch.tensor([1, 1]))
    with pytest.raises(BadInput, match="tokens are a list: expected a tensor"):
        games.Lattice(5).play([[0, 1]])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"tokens are a torch\.float32: expected a tensor of whole numbers"):
        games.Lattice(5).play(torch.zeros(1, 2))
    with pytest.raises(BadInput, match="tokens go from 0 to 70: expected 0 to 12"):
        games.Nim().planted_heuristic()(torch.tensor([[0, 70]]))
    with pytest.raises(BadInput, match="game 3 is no name: expected one of lattice"):
        games.get(3)  # type: ignore[arg-type]
