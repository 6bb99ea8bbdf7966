"""How fast does a network adapt to a changed rule?"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game, Games
from circuits.worldmodels.activations import (
    check_fits,
    device_of,
    exact_sets,
    interval_by_sequence,
    next_probabilities,
    uniform_over,
)
from circuits.worldmodels.prefixes import follow, sample_prefixes
from circuits.worldmodels.reading import NAN, Curve, Reading

EXAMPLES = (8, 32, 128)
STEPS = 20
LEARNING_RATE = 1e-3
TESTED = 150


def adaptation(
    model: HookedModel, game: Game, *, examples: tuple[int, ...] = EXAMPLES, steps: int = STEPS, seed: int = 0
) -> Reading:
    """Return how well a network plays by changed rules after a few games by them.

    A copy is fine-tuned on the legal moves of so many sequences of ``game.changed_rules()`` (the lattice with its wall
    elsewhere, mirrored walls, another number in a row, limited takes). ``value`` is the mean over numbers of examples
    of the share of exact sets of legal moves, at positions of new play where the old rules allow other moves; NaN where
    the game has no such variant.

    Formula: mean over n of mean over prefixes with A'(s') != A(s) of 1[{a : p(a) > 1 / (2 n(A'))} = A'].

    Args:
        model: a hooked model of one's own, which stays as it is: copies are trained.
        game: whose rules change.
        examples: numbers of sequences.
        steps: of AdamW on all of them at a time.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours: the behavioural counterpart of the inductive bias of Vafa et al. 2025 (arXiv 2507.06952).
    Fails when: the new rule is easier than the old one for any network: compare with untrained and state-supervised
        ones.
    """
    check_fits(model, game)
    if not examples:
        raise BadInput("examples is empty: expected numbers of sequences, as (8, 32, 128)")
    for number in examples:
        check_integer("examples", number, 1, 10**6)
    check_integer("steps", steps, 1, 10**6)
    changed = game.changed_rules()
    if changed is None:
        return Reading("adaptation", NAN, note=f"{game.name} has no variant with changed rules")
    generator = torch.Generator().manual_seed(seed + 81)
    train = changed.sample(max(examples), policy=changed.policies[0], generator=generator, length=game.n_ctx)
    test = sample_prefixes(changed, TESTED, seed=seed + 83, length=game.n_ctx)
    old_states, alive = follow(game, game.initial(len(test.games)), test.games.tokens)
    old = game.legal(old_states[:, 1:].flatten(0, 1)).view(*test.games.tokens.shape, -1)
    differs = (test.at(old) != test.legal).any(1) | ~test.at(alive)
    where = test.take(differs.nonzero()[:, 0])
    if len(where) < 20:
        note = f"the new rules differ at {len(where)} positions, of 20"
        return Reading("adaptation", NAN, details={"positions": float(len(where))}, note=note)
    scores, hits = [], []
    for n in (0, *examples):
        trained = model if n == 0 else _fine_tuned(model, changed, train.take(torch.arange(n)), steps)
        found = exact_sets(where.at(next_probabilities(trained, where.games.tokens, game)), where.legal)
        hits.append(found.float())
        scores.append(float(found.float().mean()))
    value = sum(scores[1:]) / len(examples)
    return Reading(
        "adaptation",
        value,
        interval_by_sequence(torch.stack(hits[1:]).mean(0), where.row),
        details={"before": scores[0], "positions": float(len(where))},
        curves={"exact sets": Curve("sequences by the new rules", "exact sets (share)", (0, *examples), tuple(scores))},
        source="arXiv 2507.06952",
    )


def _fine_tuned(model: HookedModel, game: Game, games: Games, steps: int) -> HookedModel:
    """A copy of the model, trained on the legal moves of some sequences."""
    trained = copy.deepcopy(model)
    weights = list(trained.parameters())  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95))
    device = device_of(trained)
    counted = games.counted[:, 1:].to(device)
    tokens = games.tokens.to(device)
    targets: Float[Tensor, "m d_vocab"] = uniform_over(games.legal[:, 1:]).to(device)[counted]
    for _ in range(steps):
        logits = trained(tokens)[counted][:, : game.d_vocab]
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return trained
