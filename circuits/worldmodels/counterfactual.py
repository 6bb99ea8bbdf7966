"""What does a network make of a past that was otherwise?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import (
    check_fits,
    interval_by_sequence,
    next_probabilities,
    total_variation,
    uniform_over,
)
from circuits.worldmodels.prefixes import follow
from circuits.worldmodels.reading import NAN, Curve, Reading

SEQUENCES = 600
FEWEST = 20
"""Positions from which on there is a statistic."""
RECENT = 2
"""Tokens, the edited one among them, after which a position counts: at first the edit is among the last tokens."""


def counterfactual(model: HookedModel, game: Game, *, n: int = SEQUENCES, seed: int = 0) -> Reading:
    """Return how often the moves follow the edited past where it makes a difference.

    One move of a sequence is replaced by another legal one such that later moves stay legal. ``value`` is ``follow``:
    of the later positions (two tokens on and more) at which other moves are legal than before the edit, the share at
    which the network's distribution is nearer to the edited state's legal moves; the curve has it by distance. The
    control is an edit that changes nothing: two neighbouring moves (of one player) change places and lead to the same
    state; ``commuting_change`` is the total variation between the distributions before and after, beside that of edits
    that do make a difference (``edit_change``).

    Formula: follow = mean of 1[TV(p(h'), U(A(s'))) < TV(p(h'), U(A(s)))], over positions with A(s') != A(s).

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose moves.
        n: number of sequences that are edited.
        seed: of sequences and edits.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours; edits of a move as Vafa et al. 2024 (arXiv 2406.03689) change routes, section 5.
    Fails when: a rule without the state follows the edit as well, as one that counts does; no edit leaves later moves
        legal and changes what else is (NaN).
    """
    check_fits(model, game)
    check_integer("n", n, 1, 10**6)
    generator = torch.Generator().manual_seed(seed + 31)
    games = game.sample(n, policy=game.policies[0], generator=generator)
    tokens, counted = games.tokens, games.counted[:, 1:]
    at = (torch.rand(n, generator=generator) * (games.lengths - 1).clamp_min(1) / 2).long()
    rows = torch.arange(n)
    other = games.legal[rows, at].clone()
    other[rows, tokens[rows, at]] = False
    if game.n_actions < game.d_vocab:
        other[:, game.n_actions] = False
    possible = other.any(1)
    other[~possible] = True
    edited = tokens.clone()
    edited[rows, at] = torch.multinomial(other.float(), 1, generator=generator)[:, 0]
    states, alive = follow(game, games.states[:, 0], edited)
    # right behind the edited move it is the last token, and a rule of the last tokens does as well
    later = torch.arange(tokens.shape[1]) >= at[:, None] + RECENT
    legal = game.legal(states[:, 1:].flatten(0, 1)).view(*tokens.shape, -1)
    where = later & alive & counted & possible[:, None] & (legal != games.legal[:, 1:]).any(2)
    before, after = (next_probabilities(model, part, game) for part in (tokens, edited))
    new, old = (total_variation(after, uniform_over(sets)) for sets in (legal, games.legal[:, 1:]))
    follows = (new < old)[where].float()
    distance = (torch.arange(tokens.shape[1]) - at[:, None] + 1)[where]
    far = [k for k in distance.unique().tolist() if int((distance == k).sum()) >= FEWEST]
    enough = len(follows) >= FEWEST
    interval = interval_by_sequence(follows, where.nonzero()[:, 0]) if enough else (NAN, NAN)
    commuting, pairs = _commuting_change(model, game, games.states, tokens, counted, generator)
    return Reading(
        "counterfactual",
        float(follows.mean()) if enough else NAN,
        interval,
        details={
            "positions": float(len(follows)),
            "commuting_change": commuting,
            "commuting_edits": float(pairs),
            "edit_change": float(total_variation(before, after)[where].mean()) if len(follows) else NAN,
        },
        curves={
            "follows": Curve(
                "tokens since the edited move",
                "positions that follow the edit (share)",
                tuple(map(float, far)),
                tuple(float(follows[distance == k].mean()) for k in far),
            )
        },
        source="arXiv 2406.03689, section 5",
        note="" if enough else f"edits leave {len(follows)} positions that differ, of {FEWEST}",
    )


def _commuting_change(
    model: HookedModel,
    game: Game,
    states: Int[Tensor, "n positions d_state"],
    tokens: Int[Tensor, "n length"],
    counted: Bool[Tensor, "n length"],
    generator: torch.Generator,
) -> tuple[float, int]:
    """Mean total variation between distributions before and after two moves changed places that lead to one state."""
    n, length = tokens.shape
    rows = torch.arange(n)
    apart = 2 if hasattr(type(game), "player") else 1  # the moves of one player, where two take turns
    if length <= apart:
        return NAN, 0
    swapped, chosen = tokens.clone(), torch.full((n,), -1)
    for _ in range(8):
        at = torch.randint(length - apart, (n,), generator=generator)
        end = at + apart
        tried = tokens.clone()
        tried[rows, at], tried[rows, end] = tokens[rows, end], tokens[rows, at]
        reached, alive = follow(game, states[:, 0], tried)
        same = alive[rows, end] & (reached[rows, end + 1] == states[rows, end + 1]).all(1) & counted[rows, end]
        new = same & (chosen < 0) & (tokens[rows, at] != tokens[rows, end])
        swapped[new], chosen[new] = tried[new], end[new]
    found = (chosen >= 0).nonzero()[:, 0]
    if not len(found):
        return NAN, 0
    before, after = (next_probabilities(model, part[found], game) for part in (tokens, swapped))
    later = (torch.arange(length) >= chosen[found, None]) & counted[found]
    return float(total_variation(before, after)[later].mean()), len(found)
