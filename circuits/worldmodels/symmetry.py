"""Is what a network does the same under the game's symmetries?"""

from __future__ import annotations

import torch

from circuits.model import HookedModel
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits, interval_by_sequence, next_probabilities, total_variation
from circuits.worldmodels.prefixes import sample_prefixes
from circuits.worldmodels.reading import NAN, Reading

SEQUENCES = 200


def symmetry(model: HookedModel, game: Game, *, n: int = SEQUENCES, seed: int = 0) -> Reading:
    """Return how alike a network's distributions are on sequences and on their images under the game's symmetries.

    ``value`` is 1 minus the mean total variation between the image of the distribution and the distribution after the
    image; the control is the same between sequences that have nothing to do with each other. NaN where no symmetry but
    the identity keeps the start.

    Formula: 1 - mean over prefixes h and symmetries g of TV(g p(h), p(g h)).

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose symmetries.
        n: number of sequences.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: ours: a heuristic of one place is not found in another, as neuron L1N421 of OthelloGPT ("OthelloGPT learned
        a bag of heuristics", LessWrong, July 2024).
    Fails when: the network has learned each image by itself, which is as symmetric and no rule; distributions are
        nearly uniform.
    """
    check_fits(model, game)
    prefixes = sample_prefixes(game, n, seed=seed + 101)
    tokens = prefixes.games.tokens
    plain = next_probabilities(model, tokens, game)
    changes, strangers = [], []
    for image in game.symmetries()[1:]:
        if not image.keeps_start:
            continue
        after = next_probabilities(model, image.on_tokens(tokens), game)
        moved = torch.empty_like(plain)
        moved[..., image.tokens] = plain
        changes.append(prefixes.at(total_variation(moved, after)))
        strangers.append(prefixes.at(total_variation(moved, after.roll(1, 0))))
    if not changes:
        return Reading("symmetry", NAN)
    mean = torch.stack(changes).mean(0)
    return Reading(
        "symmetry",
        float(1 - mean.mean()),
        interval_by_sequence(1 - mean, prefixes.row),
        details={"symmetries": float(len(changes))},
        controls={"other sequences": float(1 - torch.stack(strangers).mean())},
        source="LessWrong, July 2024",
    )
