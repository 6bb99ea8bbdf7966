"""Which moves does a network take for legal: all of them, and those alone?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.model import HookedModel
from circuits.tasks.games import Game
from circuits.worldmodels.activations import (
    check_fits,
    exact_sets,
    illegal_mass,
    interval_by_sequence,
    last_probabilities,
    next_probabilities,
    top_sets,
)
from circuits.worldmodels.prefixes import Prefixes, sample_prefixes, that_go_on
from circuits.worldmodels.reading import Reading

SEQUENCES = 200
PREFIXES = 3000
EPSILONS = (0.001, 0.01, 0.05)


def legal_actions(
    model: HookedModel, game: Game, *, policy: str | None = None, n: int = SEQUENCES, seed: int = 0
) -> Reading:
    """Return how often exactly the legal moves are possible to a network, over prefixes of play.

    ``value`` is ``exact_legal_set``: exactly the legal tokens have more than half of the probability that each would
    have if the legal ones shared it evenly. ``details`` has the share whose most probable token is legal
    (``top_legal``), precision and recall at fixed thresholds, and threshold-free: ``top_set`` (the N most probable
    tokens are the N legal ones), ``auroc`` of legal against illegal tokens, ``illegal_mass`` where the game goes on
    and where it has just ended, and ``worst_set``: the share of exact sets where the set of legal tokens is the one
    that is known worst.

    Formula: exact = mean over prefixes of 1[{a : p(a) > 1 / (2 n(A))} = A], n the number of tokens.

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose moves.
        policy: who plays the prefixes; None: uniform play.
        n: number of sequences.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: top-N errors of Li et al. 2023 (arXiv 2210.13382), section 4; precision and recall over all actions instead
        of the sampled one, Xing et al. 2025 (arXiv 2507.05169); the threshold relative to the number of moves is ours.
    Fails when: play has a preference among legal moves: a legal move that is never made is rightly improbable. Knowing
        what is legal is not knowing the state.
    """
    check_fits(model, game)
    pool = sample_prefixes(game, n, seed=seed + 21, policy=policy, over=True)
    chosen = pool.draw(PREFIXES, torch.Generator().manual_seed(seed))
    probabilities = chosen.at(next_probabilities(model, chosen.games.tokens, game))
    legal = chosen.legal
    exact = exact_sets(probabilities, legal)
    goes_on = ~game.terminal(chosen.states)
    accepted = {epsilon: probabilities > epsilon for epsilon in EPSILONS}
    details = {
        "top_legal": float(top_legal(probabilities, legal).float().mean()),
        "top_set": float((top_sets(probabilities, legal.sum(1)) == legal).all(1).float().mean()),
        "illegal_mass": float(illegal_mass(probabilities, legal)[goes_on].mean()),
        "illegal_mass at the end": float(illegal_mass(probabilities, legal)[~goes_on].mean()),
        "auroc": _auroc(probabilities, legal),
        "worst_set": _worst_set(probabilities, chosen),
    }
    for epsilon, taken in accepted.items():
        details[f"precision at {epsilon:g}"] = float((taken & legal).sum() / taken.sum().clamp_min(1))
        details[f"recall at {epsilon:g}"] = float((taken & legal).sum() / legal.sum())
        details[f"exact at {epsilon:g}"] = float((taken == legal).all(1).float().mean())
    return Reading(
        "legal-actions",
        float(exact.float().mean()),
        interval_by_sequence(exact.float(), chosen.row),
        details=details,
        controls={"any token": float(legal.all(1).float().mean())},
        source="arXiv 2210.13382, section 4",
    )


def fan_out(model: HookedModel, game: Game, *, policy: str | None = None, n: int = SEQUENCES, seed: int = 0) -> Reading:
    """Return how well the network plays after every move, not only after those that it has seen made.

    Every legal move is appended to prefixes of the policy. ``value`` is 1 minus the off-policy gap: the share of
    positions at which the most probable token is legal after moves as the policy makes them, less the lower of the
    same after all moves alike and after the legal move that the network itself takes to be least likely. ``details``
    has all of them.

    Formula: gap = max(0, on - min(alike, unlikely)), each the mean over prefixes h of 1[argmax p(h a) is legal], for a
        drawn by the policy, evenly from A(h), and as argmin of p(a | h) over A(h).

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose moves.
        policy: who plays in training; None: uniform play.
        n: number of sequences.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours, after Xing et al. 2025 (arXiv 2507.05169): a world model simulates all actions. The least likely move
        is the policy AD of Balogh and Jelasity 2026 (arXiv 2602.05903).
    Fails when: most tokens are legal anyway; a network that knows nothing anywhere has no gap.
    """
    check_fits(model, game)
    policy = policy or game.policies[0]
    pool = that_go_on(sample_prefixes(game, n, seed=seed + 23, policy=policy))
    pool = pool.draw(400, torch.Generator().manual_seed(seed))
    which, moves, tokens = pool.with_every_move()
    legal = game.legal(game.step(pool.states[which], moves))
    fine = top_legal(last_probabilities(model, tokens, pool.lengths[which] + 1, game), legal).double()
    own = last_probabilities(model, pool.tokens, pool.lengths, game)
    unlikely = own.masked_fill(~pool.legal, torch.inf).argmin(1)
    found = {}
    for name, chances in {
        "on_policy": _policy_chances(game, policy, pool),
        "all_moves": pool.legal / pool.legal.sum(1, keepdim=True),
        "least_likely": torch.nn.functional.one_hot(unlikely, game.d_vocab),
    }.items():
        found[name] = torch.zeros(len(pool), dtype=torch.float64).index_add_(
            0, which, chances.double()[which, moves] * fine
        )
    means = {name: float(by_prefix.mean()) for name, by_prefix in found.items()}
    worse = min(("all_moves", "least_likely"), key=lambda name: means[name])
    gap = max(0.0, means["on_policy"] - means[worse])
    low, high = interval_by_sequence(found["on_policy"] - found[worse], pool.row)
    return Reading(
        "fan-out",
        1 - gap,
        (1 - max(0.0, high), 1 - max(0.0, low)),
        details={**means, "off_policy_gap": gap},
        source="arXiv 2507.05169; arXiv 2602.05903",
    )


def top_legal(probabilities: Float[Tensor, "m d_vocab"], legal: Bool[Tensor, "m d_vocab"]) -> Bool[Tensor, " m"]:
    """Return where the most probable token is legal; tokens that the game has not count as one."""
    most, token = probabilities.max(1, keepdim=True)
    return (legal.gather(1, token) & (most >= 1 - probabilities.sum(1, keepdim=True)))[:, 0]


def _policy_chances(game: Game, policy: str, prefixes: Prefixes) -> Float[Tensor, "m d_vocab"]:
    if policy == game.policies[0]:
        chosen = prefixes.legal
    else:
        best = game.best_moves(prefixes.states)  # type: ignore[attr-defined]
        worst = prefixes.legal & ~best
        chosen = best if policy == game.policies[1] else torch.where(worst.any(1, True), worst, prefixes.legal)
    return chosen.double() / chosen.sum(1, keepdim=True)


def _auroc(probabilities: Tensor, legal: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    if bool(legal.all()) or not bool(legal.any()):
        return float("nan")
    return float(roc_auc_score(legal.flatten().numpy(), probabilities.flatten().double().numpy()))


def _worst_set(probabilities: Tensor, prefixes: Prefixes) -> float:
    hits = (exact_sets(probabilities, prefixes.legal)).double()
    classes = prefixes.legal_class
    totals = torch.zeros(int(classes.max()) + 1, dtype=torch.float64).index_add_(0, classes, hits)
    counts = torch.bincount(classes)
    often = counts >= 20
    return float((totals[often] / counts[often]).min()) if bool(often.any()) else float("nan")
