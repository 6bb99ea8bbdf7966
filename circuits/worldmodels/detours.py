"""Does a network stay on legal ways when it is led astray?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits, mean_interval, next_probabilities
from circuits.worldmodels.reading import Curve, Reading

RATES = (0.0, 0.01, 0.1, 0.5, 0.75)
KINDS = ("random", "second", "least-likely")
REPORTED = 0.1
GAMES = 60


def detours(
    model: HookedModel,
    game: Game,
    *,
    rates: tuple[float, ...] = RATES,
    kind: str = "random",
    n: int = GAMES,
    seed: int = 0,
) -> Reading:
    """Return the share of games that a network plays to the end legally although some of its moves are replaced.

    It makes its most probable move; with the probability of a rate another legal move is made instead: a random one,
    its second choice among the legal ones, or the one that it takes to be least likely. The first move (in gridworld
    start and goal) is drawn at random. A game ends when it is over or at the game's length. ``value`` is at the rate
    0.1; the curve has all rates.

    Formula: mean over games of 1[every move that the network made itself was legal].

    Args:
        model: any hooked model that reads the game's tokens.
        game: what is played.
        rates: probabilities of a replacement.
        kind: ``random``, ``second`` or ``least-likely``.
        n: games at each rate.
        seed: of first moves and replacements.

    Raises:
        BadInput: the model does not fit the game, a rate is no probability, or there is no such kind.
        UnsupportedModel: the model is not causal.

    Source: Vafa et al. 2024 (arXiv 2406.03689), section 4.2 (detours 0, 1, 10, 50 and 75 %).
    Fails when: most moves are legal anyway; the most probable moves keep to a corner of the game.
    """
    check_fits(model, game)
    if kind not in KINDS:
        raise BadInput(f"kind = {kind!r}: expected one of {', '.join(KINDS)}")
    if not rates:
        raise BadInput("rates is empty: expected probabilities of a replacement, as (0.0, 0.1)")
    check_integer("n", n, 1, 10**6)
    for rate in rates:
        if not 0 <= rate <= 1:
            raise BadInput(f"rate {rate}: expected a probability")
    found = {rate: played_legally(model, game, rate, kind, n, seed) for rate in rates}
    shares = {rate: float(fine.float().mean()) for rate, fine in found.items()}
    reported = min(rates, key=lambda rate: abs(rate - REPORTED))
    return Reading(
        "detours",
        shares[reported],
        mean_interval(found[reported].float().tolist()),
        details={f"at {rate:g}": share for rate, share in shares.items()},
        curves={
            kind: Curve(
                "replaced moves (share)", "games without an illegal move (share)", rates, tuple(shares.values())
            )
        },
        source="arXiv 2406.03689, section 4.2",
    )


def played_legally(model: HookedModel, game: Game, rate: float, kind: str, n: int, seed: int) -> Bool[Tensor, " n"]:
    """Return which games had no illegal move of the network's own."""
    generator = torch.Generator().manual_seed(seed + 61)
    states, fine = game.initial(n), torch.ones(n, dtype=torch.bool)
    tokens = torch.zeros(n, 0, dtype=torch.int64)
    free = free_moves(game)
    for step in range(game.n_ctx):
        legal, over = game.legal(states), game.terminal(states)
        drawn = torch.multinomial(legal.float(), 1, generator=generator)[:, 0]
        if step < free:
            token = drawn
        else:
            probabilities = next_probabilities(model, tokens, game)[:, -1]
            own = probabilities.argmax(1)
            # Whether the end of a game is noticed is asked once; what comes after it is not.
            waits = tokens[:, -1] == game.n_actions if game.n_actions < game.d_vocab else torch.zeros_like(over)
            fine = fine & (waits | legal.gather(1, own[:, None])[:, 0])
            replaced = torch.rand(n, generator=generator) < rate
            instead = _instead(kind, probabilities, own, legal, generator)
            token = torch.where(replaced | ~legal.gather(1, own[:, None])[:, 0], instead, own)
        token = torch.where(over, drawn, token)  # a game that is over only waits
        tokens = torch.cat((tokens, token[:, None]), 1)
        states = game.step(states, token)
    return fine


def free_moves(game: Game) -> int:
    """Return how many first tokens choose the situation and are no moves in it: two in gridworld, else one."""
    return 2 if game.name == "gridworld" else 1


def _instead(
    kind: str,
    probabilities: Float[Tensor, "n d_vocab"],
    own: Int[Tensor, " n"],
    legal: Bool[Tensor, "n d_vocab"],
    generator: torch.Generator,
) -> Int[Tensor, " n"]:
    """A legal move other than the network's own, or that where there is no other."""
    others = legal.clone()
    others[torch.arange(len(own)), own] = False
    others = torch.where(others.any(1, keepdim=True), others, legal)
    if kind == "random":
        return torch.multinomial(others.float(), 1, generator=generator)[:, 0]
    if kind == "second":
        return probabilities.masked_fill(~others, -1).argmax(1)
    return probabilities.masked_fill(~others, 2).argmin(1)
