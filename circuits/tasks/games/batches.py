"""Sequences of a game to learn from, and to test on: which positions count depends on the states that are held out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.games.base import Game, Games
from circuits.tasks.games.hold_out import Overlap

AT_ONCE = 64
"""Batches that are played together: an engine takes hardly longer for 8,192 sequences than for 128."""

EVALUATED = 256
"""Sequences of an evaluation."""


@dataclass(frozen=True, eq=False)
class GameBatch:
    """Sequences as a model reads them; position t is what is known after token t.

    ``scored`` says at which positions labels count: those of the game itself, not where a finished one only waits. In
    training none counts from a held-out state on; in the test of unseen states none counts before.
    """

    games: Games
    scored: Bool[Tensor, "n length"]

    @property
    def inputs(self) -> Int[Tensor, "n length"]:
        """What the model reads."""
        return self.games.tokens

    @property
    def targets(self) -> Int[Tensor, "n moves"]:
        """The token that follows each position but the last."""
        return self.games.tokens[:, 1:]

    @property
    def states(self) -> Int[Tensor, "n length d_state"]:
        """The state at each position."""
        return self.games.states[:, 1:]

    @property
    def legal(self) -> Bool[Tensor, "n length d_vocab"]:
        """The legal tokens at each position."""
        return self.games.legal[:, 1:]

    def __len__(self) -> int:
        return len(self.games)

    def to(self, device: torch.device | str) -> GameBatch:
        """Return the batch on ``device``."""
        return GameBatch(self.games.to(device), self.scored.to(device))

    def take(self, rows: Tensor) -> GameBatch:
        """Return some of the sequences, by index or mask."""
        return GameBatch(self.games.take(rows), self.scored[rows])


def to_learn(game: Game, games: Games) -> GameBatch:
    """Return sequences to train on: they count up to the first held-out state that they reach."""
    return GameBatch(games, games.counted[:, 1:] & ~_after_held_out(game, games))


def to_test(game: Game, games: Games) -> GameBatch:
    """Return sequences to test on: they count from the first held-out state on, or all where none is held out."""
    if game.held() is None:
        return GameBatch(games, games.counted[:, 1:])
    return GameBatch(games, games.counted[:, 1:] & _after_held_out(game, games))


def _after_held_out(game: Game, games: Games) -> Bool[Tensor, "n length"]:
    """Where a sequence is in a held-out state or has been in one."""
    held = game.held()
    if held is None:
        return torch.zeros_like(games.counted[:, 1:])
    return held.visits(games)[:, 1:].cummax(1).values


def training_batch(game: Game, policy: str, n: int, *, seed: int, step: int) -> GameBatch:
    """Return the ``n`` sequences of one training step, which depend on nothing but the arguments.

    Raises:
        UnknownName: the game has no such policy.
    """
    chunk, place = divmod(step, AT_ONCE)
    batch = _chunk(game, policy, n, seed, chunk)
    return batch.take(torch.arange(place * n, (place + 1) * n))


@functools.lru_cache(maxsize=2)
def _chunk(game: Game, policy: str, n: int, seed: int, chunk: int) -> GameBatch:
    # Numbers apart for every seed and chunk, and from those of ``evaluation_batch``, which are small.
    generator = torch.Generator().manual_seed((seed + 1) * 0x9E3779B1 % 2**40 * 2**20 + chunk)
    return to_learn(game, game.sample(n * AT_ONCE, policy=policy, generator=generator))


@functools.lru_cache(maxsize=8)
def evaluation_batch(game: Game, policy: str, *, unseen: bool) -> GameBatch:
    """Return the sequences on which accuracy is measured, the same for every run.

    Args:
        game: where they come from.
        policy: who plays.
        unseen: positions behind held-out states, or any of fresh sequences where none is held out; else positions as
            in training.

    Raises:
        UnknownName: the game has no such policy.
    """
    generator = torch.Generator().manual_seed(int(unseen))
    if game.held() is None or not unseen:
        return (to_test if unseen else to_learn)(game, game.sample(EVALUATED, policy=policy, generator=generator))
    batch = to_test(game, game.sample(4 * EVALUATED, policy=policy, generator=generator))
    return batch.take(batch.scored.any(1).nonzero()[:EVALUATED, 0])


def overlap(train: GameBatch, test: GameBatch) -> Overlap:
    """Return how many different states, at the positions that count, two batches have, and how many they share."""
    of_train, of_test = (batch.states[batch.scored].unique(dim=0) for batch in (train, test))
    together = torch.cat((of_train, of_test)).unique(dim=0)
    return Overlap(len(of_train), len(of_test), len(of_train) + len(of_test) - len(together))
