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
    last_probabilities,
    mean_interval,
    next_probabilities,
    top_sets,
)
from circuits.worldmodels.prefixes import Prefixes, sample_prefixes
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
    tokens are the N legal ones), ``auroc`` of legal against illegal tokens, ``illegal_mass``, and the recall of the
    set of legal moves that is recalled worst (``worst_recall``).

    Formula: exact = mean over prefixes of 1[{a : p(a) > 1 / (2 |A|)} = A].

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
    chosen = sample_prefixes(game, n, seed=seed + 21, policy=policy).draw(PREFIXES, torch.Generator().manual_seed(seed))
    probabilities = chosen.at(next_probabilities(model, chosen.games.tokens, game))
    legal = chosen.legal
    exact = exact_sets(probabilities, legal)
    accepted = {epsilon: probabilities > epsilon for epsilon in EPSILONS}
    details = {
        "top_legal": float(top_legal(probabilities, legal).float().mean()),
        "top_set": float((top_sets(probabilities, legal.sum(1)) == legal).all(1).float().mean()),
        "illegal_mass": float((probabilities * ~legal).sum(1).mean()),
        "auroc": _auroc(probabilities, legal),
        "worst_recall": _worst_recall(probabilities, chosen),
    }
    for epsilon, taken in accepted.items():
        details[f"precision at {epsilon:g}"] = float((taken & legal).sum() / taken.sum().clamp_min(1))
        details[f"recall at {epsilon:g}"] = float((taken & legal).sum() / legal.sum())
        details[f"exact at {epsilon:g}"] = float((taken == legal).all(1).float().mean())
    return Reading(
        "legal-actions",
        float(exact.float().mean()),
        mean_interval(exact.float().tolist()),
        details=details,
        controls={"any token": float(legal.all(1).float().mean())},
        source="arXiv 2210.13382, section 4",
    )


def fan_out(model: HookedModel, game: Game, *, policy: str | None = None, n: int = SEQUENCES, seed: int = 0) -> Reading:
    """Return how well the moves after every move are known, not only after those that play makes.

    Every legal move is appended to each prefix. ``value`` is 1 minus the off-policy gap: the share of exact sets of
    legal moves weighted as the policy moves, less the share over all moves alike, where that is positive. ``details``
    has both shares and the gap.

    Formula: gap = max(0, E_{a ~ policy}[exact(h a)] - E_{a ~ uniform over A}[exact(h a)]).

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose moves.
        policy: who plays in training; None: uniform play, against which moves that play makes rarely count half.
        n: number of sequences.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours, after Xing et al. 2025 (arXiv 2507.05169): a world model simulates all actions.
    Fails when: the policy is uniform: there is then no other play to be off, and the gap is what noise makes it. A
        network that knows nothing anywhere has no gap.
    """
    check_fits(model, game)
    policy = policy or game.policies[0]
    pool = sample_prefixes(game, n, seed=seed + 23, policy=policy)
    pool = pool.take((pool.lengths < game.n_ctx).nonzero()[:, 0]).draw(400, torch.Generator().manual_seed(seed))
    which, moves = pool.legal.nonzero(as_tuple=True)
    tokens = torch.cat((pool.tokens[which], moves[:, None]), 1)
    tokens[torch.arange(len(which)), pool.lengths[which]] = moves
    tokens = tokens[:, : game.n_ctx]
    states = game.step(pool.states[which], moves)
    going_on = ~game.terminal(states)
    legal = game.legal(states)
    exact = exact_sets(last_probabilities(model, tokens, pool.lengths[which] + 1, game), legal) & going_on
    chances = _policy_chances(game, policy, pool)[which, moves]
    alike = 1 / pool.legal.sum(1)[which].double()
    shares = []
    for weights in (chances, alike):
        kept = weights * going_on
        shares.append(float((kept * exact).sum() / kept.sum().clamp_min(1e-12)))
    gap = max(0.0, shares[0] - shares[1])
    per_prefix = torch.zeros(len(pool), dtype=torch.float64)
    per_prefix.index_add_(0, which, (alike - chances) * exact * going_on)
    return Reading(
        "fan-out",
        1 - gap,
        mean_interval((1 + per_prefix).clamp_max(1).tolist()),
        details={"on_policy": shares[0], "off_policy": shares[1], "off_policy_gap": gap},
        source="arXiv 2507.05169",
    )


def top_legal(probabilities: Float[Tensor, "m d_vocab"], legal: Bool[Tensor, "m d_vocab"]) -> Bool[Tensor, " m"]:
    """Return where the most probable token is legal."""
    return legal.gather(1, probabilities.argmax(1, keepdim=True))[:, 0]


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


def _worst_recall(probabilities: Tensor, prefixes: Prefixes) -> float:
    hits = (exact_sets(probabilities, prefixes.legal)).double()
    classes = prefixes.legal_class
    totals = torch.zeros(int(classes.max()) + 1, dtype=torch.float64).index_add_(0, classes, hits)
    counts = torch.bincount(classes)
    often = counts >= 20
    return float((totals[often] / counts[often]).min()) if bool(often.any()) else float("nan")
