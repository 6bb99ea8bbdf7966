"""The state after every move, and after several: read from the network, and rolled out in its residual stream."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits, interval_by_sequence, mean_interval, n_layers, residuals
from circuits.worldmodels.linear_probe import LinearProbe
from circuits.worldmodels.prefixes import Prefixes, sample_prefixes, that_go_on
from circuits.worldmodels.reading import NAN, Curve, Reading
from circuits.worldmodels.state_probe import probe_at

PREFIXES = 400
ROLLOUT = 6
RIDGE = 1e-2
FEWEST = 200
"""Transitions by a token from which a map is fitted; rarer tokens end a rollout."""


def next_state(model: HookedModel, game: Game, *, n: int = 200, seed: int = 0) -> Reading:
    """Return how well the state after every legal move can be read, on the features that the move changes.

    Every legal move is appended to prefixes of uniform play, each as often as any other; a linear probe of the last
    residual stream, fitted on ordinary play, reads the state behind it.

    Formula: mean over prefixes h, moves a in A(s) and features f with f(step(s, a)) != f(s) of
        1[argmax probe_f(resid(h a)) = f(step(s, a))].

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose states.
        n: number of sequences.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours, after Xing et al. 2025 (arXiv 2507.05169), s' ~ p(s' | s, a); changed cells as the "flipped" probe of
        Nanda, Lee and Wattenberg 2023 (arXiv 2309.00941).
    Fails when: a move changes features that the token alone tells: compare with an untrained network.
    """
    check_fits(model, game)
    layer = n_layers(model) - 1
    probe = probe_at(model, game, layer, seed=seed)
    pool = that_go_on(sample_prefixes(game, n, seed=seed + 41))
    pool = pool.draw(PREFIXES, torch.Generator().manual_seed(seed))
    which, moves, tokens = pool.with_every_move()
    stream = residuals(model, tokens, [layer])[layer][torch.arange(len(which)), pool.lengths[which]]
    reached = game.step(pool.states[which], moves)
    after, changed = game.state_features(reached), game.changed_features(pool.states[which], reached)
    right = (probe.predict(stream) == after) & changed
    some = changed.any(1)
    shares = right.sum(1)[some] / changed.sum(1)[some]
    return Reading(
        "next-state",
        float(shares.mean()),
        interval_by_sequence(shares, pool.row[which[some]]),
        details={"moves": float(some.sum())},
        source="arXiv 2507.05169",
    )


def latent_rollout(model: HookedModel, game: Game, *, n: int = 600, seed: int = 0) -> Reading:
    """Return how well the state can be rolled out in the residual stream, without the network reading the moves.

    For each token an affine map from the last residual stream before it to the one after it is fitted by ridge
    regression; the maps are applied one after another, and a linear probe reads the state. ``value`` is the accuracy
    over features after ``ROLLOUT`` moves, or as many as sequences go on for (``depth``); the curve has it by depth,
    beside that of a stream that is left as it was.

    Formula: h_{t+1} ~ A_a h_t + b_a; accuracy(k) = mean of 1[probe(A_{a_k} ... A_{a_1} h_t) = f(s_{t+k})].

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose states.
        n: number of sequences to fit on; a third as many test.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: the latent rollouts of next-latent training (NextLat, arXiv 2511.05963), fitted after training instead.
    Fails when: the effect of a move is not affine in the residual stream, as where pieces turn over; tokens are too
        rare to fit a map (``FEWEST``): rollouts end before them.
    """
    check_fits(model, game)
    check_integer("n", n, 3, 10**6)
    layer = n_layers(model) - 1
    probe = probe_at(model, game, layer, seed=seed)
    fit, test = (sample_prefixes(game, k, seed=seed + s, over=True) for k, s in ((n, 51), (n // 3, 53)))
    streams = [residuals(model, part.games.tokens, [layer])[layer] for part in (fit, test)]
    maps = _maps(fit, streams[0])
    accuracy, persistence = [], []
    still, moves = streams[1][:, :-1], test.games.tokens
    starts = torch.arange(moves.shape[1] - 1)
    alive = test.games.counted[:, 1:-1].clone()
    state = still
    per_start: Tensor = torch.zeros(0)
    for depth in range(1, ROLLOUT + 1):
        ends = starts + depth
        inside = ends < moves.shape[1]
        at = ends.clamp_max(moves.shape[1] - 1)
        token = moves[:, at]
        alive = alive & inside & test.games.counted[:, 1:][:, at] & torch.isin(token, torch.tensor(list(maps)))
        if int(alive.sum()) < 50:
            break
        moved = torch.zeros_like(state)
        for a, (matrix, bias) in maps.items():
            own = alive & (token == a)
            moved[own] = state[own] @ matrix + bias
        state = moved
        truth = game.state_features(test.games.states[:, 1:][:, at][alive])
        hits = (probe.predict(state[alive]) == truth).float().mean(1)
        accuracy.append(float(hits.mean()))
        persistence.append(_accuracy(probe, still[alive], truth))
        per_start = hits
    depths = tuple(float(d) for d in range(1, len(accuracy) + 1))
    return Reading(
        "latent-rollout",
        accuracy[-1] if accuracy else NAN,
        mean_interval(per_start.tolist()),
        details={"depth": float(len(accuracy)), "after one move": accuracy[0] if accuracy else NAN},
        controls={"stream left as it was": persistence[-1] if persistence else NAN},
        curves={
            "rolled out": Curve("moves ahead", "accuracy over features (share)", depths, tuple(accuracy)),
            "left as it was": Curve("moves ahead", "accuracy over features (share)", depths, tuple(persistence)),
        },
        source="arXiv 2511.05963",
    )


def _maps(fit: Prefixes, stream: Float[Tensor, "n length d_model"]) -> dict[int, tuple[Tensor, Tensor]]:
    """The affine map of each token that is frequent enough: matrix (applied from the right) and bias."""
    tokens, counted = fit.games.tokens[:, 1:], fit.games.counted[:, 2:]
    found = {}
    for token in range(fit.game.n_actions):
        where = (tokens == token) & counted
        if int(where.sum()) < FEWEST:
            continue
        x, y = stream[:, :-1][where].double(), stream[:, 1:][where].double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        penalty = RIDGE * x.square().sum(0).mean() * torch.eye(x.shape[1], dtype=torch.float64)
        matrix = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
        found[token] = (matrix.float(), (mean_y - mean_x @ matrix).float())
    return found


def _accuracy(probe: LinearProbe, stream: Float[Tensor, "m d_model"], truth: Int[Tensor, "m n_features"]) -> float:
    return float((probe.predict(stream) == truth).float().mean())
