"""How far can legal play lead a network to illegal moves?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import (
    check_fits,
    device_of,
    game_probabilities,
    illegal_mass,
    mean_interval,
    n_layers,
    resid_post,
)
from circuits.worldmodels.detours import free_moves
from circuits.worldmodels.legal_actions import top_legal
from circuits.worldmodels.linear_probe import LinearProbe
from circuits.worldmodels.reading import NAN, Curve, Reading
from circuits.worldmodels.state_probe import probe_at

GAMES = 24
OPPONENTS = ("most-illegal", "most-probe-breaking", "random")


def adversarial(model: HookedModel, game: Game, *, n: int = GAMES, seed: int = 0) -> Reading:
    """Return how sound a network stays when an opponent makes the legal moves that lead it astray.

    ``most-illegal`` makes the legal move after which the network's probability of illegal tokens is highest;
    ``most-probe-breaking`` the one after which a linear probe reads the state worst. ``value`` is 1 minus the share of
    positions of the former's games at which the network's most probable token is illegal; ``details`` has that share
    under both opponents and random play, and ``ratio``: the latter opponent's over the former's. A state that is read
    and used makes the two alike; a ratio near 0 says that the probe reads something else than what decides the moves.

    Formula: 1 - mean over positions of 1[argmax p is illegal], under argmax_a sum_{b illegal} p(b | h a).

    Args:
        model: any hooked model that reads the game's tokens.
        game: what is played.
        n: number of games.
        seed: of first moves and ties.

    Raises:
        BadInput: the model does not fit the game, or ``n`` is less than 1.
        UnsupportedModel: the model is not causal.

    Source: Balogh and Jelasity 2026 (arXiv 2602.05903): adversaries IMO and BSO.
    Fails when: the opponent looks one move ahead alone; positions of so few games are not independent.
    """
    check_fits(model, game)
    check_integer("n", n, 1, 10**5)
    probe = probe_at(model, game, n_layers(model) - 1, seed=seed)
    found = {opponent: illegal_moves(model, game, opponent, probe, n, seed) for opponent in OPPONENTS}
    shares = {opponent: float(by_game.nanmean()) for opponent, by_game in found.items()}
    worst, breaking = shares["most-illegal"], shares["most-probe-breaking"]
    by_position = {name: games.nanmean(0) for name, games in found.items()}
    by_game = 1 - found["most-illegal"].nanmean(1)
    moves = tuple(range(1, len(by_position["random"]) + 1))
    return Reading(
        "adversarial",
        1 - worst,
        mean_interval(by_game[by_game.isfinite()].tolist()),
        details={
            **{f"illegal, {name}": share for name, share in shares.items()},
            "ratio": breaking / worst if worst else NAN,
        },
        controls={"random play": 1 - shares["random"]},
        curves={
            name: Curve("move", "most probable token illegal (share)", moves, tuple(values.tolist()))
            for name, values in by_position.items()
        },
        source="arXiv 2602.05903",
    )


def illegal_moves(
    model: HookedModel, game: Game, opponent: str, probe: LinearProbe, n: int, seed: int
) -> Float[Tensor, "n positions"]:
    """Return, by game and position, whether the network's most probable token is illegal; NaN where the game is over.

    Raises:
        BadInput: there is no such opponent.
    """
    if opponent not in OPPONENTS:
        raise BadInput(f"opponent = {opponent!r}: expected one of {', '.join(OPPONENTS)}")
    generator = torch.Generator().manual_seed(seed + 71)
    states, tokens = game.initial(n), torch.zeros(n, 0, dtype=torch.int64)
    seen = []
    for step in range(game.n_ctx):
        legal, over = game.legal(states), game.terminal(states)
        which, moves = legal.nonzero(as_tuple=True)
        reached = game.step(states[which], moves)
        probabilities, broken = _look(model, game, probe, torch.cat((tokens[which], moves[:, None]), 1), reached)
        wrong = illegal_mass(probabilities, game.legal(reached))
        harm = {"most-illegal": wrong, "most-probe-breaking": broken}.get(opponent, torch.zeros_like(wrong))
        if step < free_moves(game):
            harm = torch.zeros_like(wrong)
        scores = torch.full(legal.shape, -torch.inf)
        scores[which, moves] = harm + 1e-6 * torch.rand(len(harm), generator=generator)
        token = scores.argmax(1)
        row_of = torch.full(legal.shape, -1)
        row_of[which, moves] = torch.arange(len(which))
        own = row_of[torch.arange(n), token]
        states = reached[own]
        tokens = torch.cat((tokens, token[:, None]), 1)
        illegal = ~top_legal(probabilities[own], game.legal(states))
        # Whether the end of a game is noticed is asked once; what comes after it is not.
        seen.append(torch.where(over, torch.nan, illegal.float()))
    return torch.stack(seen[free_moves(game) - 1 :], 1)


def _look(
    model: HookedModel, game: Game, probe: LinearProbe, tokens: Tensor, states: Tensor
) -> tuple[Float[Tensor, "m d_vocab"], Float[Tensor, " m"]]:
    """The next-token probabilities behind whole sequences, and how badly the probe reads the states."""
    name = resid_post(n_layers(model) - 1)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens.to(device_of(model)), names_filter=[name])
    stream = cache[name][:, -1].float().cpu()
    return game_probabilities(logits[:, -1], game.d_vocab), probe.loss(stream, game.state_features(states))
