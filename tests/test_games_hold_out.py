"""Hold-out by state: exact where states can be listed, nothing cut off, overlap reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.errors import BadInput
from circuits.tasks.games import Connect3, Gridworld, GroupWord, Lattice, Nim, Othello, hold_out, state_overlap
from circuits.tasks.games.automaton import automaton, reached_without
from circuits.tasks.games.engine import Engine

LISTED: list[Engine] = [Lattice(9), Gridworld(), Connect3(3, 4), Nim(), GroupWord("A5"), GroupWord("A5", "generators")]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(game=st.sampled_from(LISTED), share=st.floats(0.01, 0.6), seed=st.integers(0, 2**40))
@settings(max_examples=25)
def test_the_share_is_exact_and_every_other_state_can_be_reached(game: Engine, share: float, seed: int) -> None:
    held = game.held_out_states(share, seed)
    table = automaton(game)
    assert held.states is not None
    assert len(held.states) == max(1, round(share * len(table))) == len(held.states.unique(dim=0))
    barred = held.contains(table.states)
    assert int(barred.sum()) == len(held.states) and not barred[0]
    assert held.contains(held.states).all()
    assert torch.equal(reached_without(table, barred), ~barred)
    again = hold_out(game, share, seed)
    assert again.states is not None and torch.equal(again.states, held.states)


def test_another_seed_holds_out_other_states() -> None:
    first, second = (Connect3(3, 4).held_out_states(0.05, seed).states for seed in (0, 1))
    assert first is not None and second is not None and not torch.equal(first, second)


@pytest.mark.parametrize("seed", range(6))
def test_of_a_path_only_the_end_can_be_held_out(seed: int) -> None:
    for share, expected in ((0.2, [[4]]), (0.4, [[3], [4]]), (0.8, [[1], [2], [3], [4]])):
        held = Lattice(5).held_out_states(share, seed)
        assert held.states is not None and held.states.tolist() == expected


def test_too_large_a_share_is_refused() -> None:
    with pytest.raises(BadInput, match=r"share = 0\.99: that is all 5 states of Lattice"):
        Lattice(5).held_out_states(0.99, 0)
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(BadInput, match="share"):
            Lattice(5).held_out_states(bad, 0)
    with pytest.raises(BadInput, match="seed = -1"):
        Lattice(5).held_out_states(0.2, -1)


@pytest.mark.parametrize("game", [Connect3(), Nim(), Gridworld(), Othello(4), Othello(6), Othello(8)], ids=str)
def test_no_training_sequence_passes_through_a_held_out_state(game: Engine) -> None:
    held = game.held_out_states(0.03, 1)
    games = game.sample(400, generator=generator(2))
    train, test = held.split(games)
    assert len(train) + len(test) == 400 and len(train) and len(test)
    assert not held.visits(train).any() and held.visits(test).any(1).all()
    assert not held.contains(train.states.flatten(0, 1)).any()
    visits = held.visits(test)
    assert torch.equal(visits, held.contains(test.states.flatten(0, 1)).view_as(visits) & test.counted)


@pytest.mark.parametrize("game", [Lattice(5), GroupWord("S3"), Nim(), Connect3(3, 4), Othello(8)], ids=str)
def test_training_sequences_can_be_drawn_around_held_out_states(game: Engine) -> None:
    held = game.held_out_states(0.2, 6)
    uniform, around = (
        len(held.split(game.sample(200, policy=policy, generator=generator(7)))[0])
        for policy in ("uniform", held.avoid)
    )
    assert around > uniform
    if isinstance(game, Lattice | GroupWord):
        assert uniform < 100 and around == 200


def test_the_overlap_counts_different_states() -> None:
    game = Nim()
    held = game.held_out_states(0.05, 3)
    train, test = held.split(game.sample(300, generator=generator(4)))
    overlap = state_overlap(train, test)
    of_train, of_test = ({tuple(s) for s in games.states.flatten(0, 1).tolist()} for games in (train, test))
    assert (overlap.train, overlap.test, overlap.shared) == (len(of_train), len(of_test), len(of_train & of_test))
    assert 0 < overlap.share == overlap.shared / overlap.test < 1
    assert held.states is not None and not of_train & {tuple(state) for state in held.states.tolist()}
    assert state_overlap(train, train.take(torch.zeros(0, dtype=torch.int64))).share == 0


@pytest.mark.parametrize("size", [6, 8])
def test_of_unlisted_states_about_the_share_is_held_out(size: int) -> None:
    game = Othello(size)
    states = game.sample(400, generator=generator(5)).states.flatten(0, 1).unique(dim=0)
    held, other = (game.held_out_states(0.1, seed) for seed in (0, 1))
    assert held.states is None
    inside = held.contains(states)
    # Six standard deviations of a binomial.
    assert abs(float(inside.double().mean()) - 0.1) < 6 * (0.09 / len(states)) ** 0.5
    assert not torch.equal(inside, other.contains(states))
    assert torch.equal(inside, hold_out(game, 0.1, 0).contains(states))
    assert not game.held_out_states(0.999, 0).contains(game.initial(1)).any()
