"""Different ways to one state, by search: long games have them, and random play hardly ever meets one twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.games import Game
from circuits.worldmodels.prefixes import Prefixes

MOST_STATES = 400_000
"""States after as many moves, at which the search gives up."""
MOST_ENDS = 400
"""States whose ways are listed."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The states after so many moves, in how many ways each is reached, and by which move from which one before."""

    states: Int[Tensor, "n d_state"]
    ways: Int[Tensor, " n"]
    source: Int[Tensor, " edges"]
    token: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]


def transpositions(game: Game, least: int, *, generator: torch.Generator) -> Prefixes | None:
    """Return every prefix of states that ``least`` or more different prefixes reach after the same number of moves.

    It is the least number of moves after which there are two such states with the same legal tokens, and two more with
    others, the game not being over; None where there is no such number, or too many states before it.

    Args:
        game: any game, whether its states can be listed or not.
        least: number of prefixes of a state.
        generator: of the draw of states, where there are more than ``MOST_ENDS``.

    Source: breadth-first search of positions with transpositions, as in programs that play.
    """
    start = game.initial(1)
    none = start.new_empty(0)
    layers = [Layer(start, torch.ones_like(start[:, 0]), none, none, none)]
    while len(layers) <= game.n_ctx and len(layers[-1].states) <= MOST_STATES:
        layers.append(_next(game, layers[-1]))
        if not len(layers[-1].states):
            return None
        many = (layers[-1].ways >= least) & ~game.terminal(layers[-1].states)
        if _of_two_classes(game.legal(layers[-1].states[many])):
            rows = many.nonzero()[:, 0]
            return _listed(game, layers, rows[torch.randperm(len(rows), generator=generator)[:MOST_ENDS]])
    return None


def _next(game: Game, layer: Layer) -> Layer:
    source, token = game.legal(layer.states).nonzero(as_tuple=True)
    on = token < game.n_actions
    source, token = source[on], token[on]
    states, target = game.step(layer.states[source], token).unique(dim=0, return_inverse=True)
    ways = torch.zeros(len(states), dtype=torch.int64).index_add_(0, target, layer.ways[source])
    return Layer(states, ways, source, token, target)


def _of_two_classes(legal: Bool[Tensor, "n d_vocab"]) -> bool:
    """Whether two sets of legal tokens are those of two states or more each."""
    sizes = legal.unique(dim=0, return_counts=True)[1]
    return int((sizes > 1).sum()) > 1


def _listed(game: Game, layers: list[Layer], rows: Int[Tensor, " ends"]) -> Prefixes:
    """Every way to some states of the last layer, state by state."""
    end = at = rows
    ways: list[Tensor] = []
    for layer in reversed(layers[1:]):
        order = layer.target.sort(stable=True).indices
        counts = torch.bincount(layer.target, minlength=len(layer.states))
        first = counts.cumsum(0) - counts
        branches = counts[at]
        path = torch.arange(len(at)).repeat_interleave(branches)
        number = torch.arange(len(path)) - (branches.cumsum(0) - branches)[path]
        edge = order[first[at[path]] + number]
        end, at = end[path], layer.source[edge]
        ways = [layer.token[edge], *(token[path] for token in ways)]
    order = end.sort(stable=True).indices
    games = game.play(torch.stack(ways, 1)[order])
    return Prefixes(game, games, torch.arange(len(games)), torch.full((len(games),), len(ways) - 1))
