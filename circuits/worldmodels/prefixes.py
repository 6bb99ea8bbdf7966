"""Prefixes of known state: where probes look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.games import Game, Games
from circuits.worldmodels.reading import NothingToMeasure


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Positions in sequences, with the state behind each.

    ``row`` and ``position`` say which: the prefix is ``games.tokens[row, : position + 1]``. ``state`` numbers the
    different states among them, ``legal_class`` their different sets of legal tokens.
    """

    game: Game
    games: Games
    row: Int[Tensor, " m"]
    position: Int[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> Int[Tensor, "m length"]:
        """The whole sequence of each prefix: a causal model does not see what follows it."""
        return self.games.tokens[self.row]

    @property
    def lengths(self) -> Int[Tensor, " m"]:
        """Number of tokens of each prefix."""
        return self.position + 1

    @property
    def states(self) -> Int[Tensor, "m d_state"]:
        """The state behind each prefix."""
        return self.games.states[self.row, self.position + 1]

    @property
    def legal(self) -> Bool[Tensor, "m d_vocab"]:
        """What is legal after each prefix."""
        return self.games.legal[self.row, self.position + 1]

    @property
    def features(self) -> Int[Tensor, "m n_features"]:
        """The parts of the state behind each prefix."""
        return self.game.state_features(self.states)

    @property
    def state(self) -> Int[Tensor, " m"]:
        """The same number for prefixes of the same state."""
        return self.states.unique(dim=0, return_inverse=True)[1]

    @property
    def legal_class(self) -> Int[Tensor, " m"]:
        """The same number for prefixes with the same legal tokens."""
        return self.legal.unique(dim=0, return_inverse=True)[1]

    def take(self, which: Tensor) -> Prefixes:
        """Return some of the prefixes, by index or mask."""
        return Prefixes(self.game, self.games, self.row[which], self.position[which])

    def at(self, activations: Tensor) -> Tensor:
        """Return rows of ``[sequence, position, ...]`` for each prefix."""
        return activations[self.row, self.position]

    def with_every_move(self) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"], Int[Tensor, "k length"]]:
        """Return, for each legal move after each prefix: which prefix, the move, and the sequence with it there."""
        which, moves = self.legal.nonzero(as_tuple=True)
        tokens = torch.cat((self.tokens[which], moves[:, None]), 1)
        tokens[torch.arange(len(which)), self.lengths[which]] = moves
        return which, moves, tokens[:, : self.game.n_ctx]

    def draw(self, n: int, generator: torch.Generator) -> Prefixes:
        """Return at most ``n`` of the prefixes, drawn without replacement."""
        return self.take(torch.randperm(len(self), generator=generator)[:n])


def sample_prefixes(
    game: Game, n: int, *, seed: int, policy: str | None = None, over: bool = False, length: int | None = None
) -> Prefixes:
    """Return every prefix of ``n`` sequences, without those of a game that is over (or, with ``over``, just over).

    Args:
        game: whose sequences.
        n: number of sequences.
        seed: of the draws.
        policy: who plays; None: uniform play.
        over: keep the prefixes that end a game.
        length: number of tokens of a sequence; None: the game's.

    Raises:
        UnknownName: the game has no such policy.
    """
    generator = torch.Generator().manual_seed(seed)
    games = game.sample(n, policy=policy or game.policies[0], generator=generator, length=length)
    states = games.states[:, 1:]
    keep = games.counted[:, 1:]
    if not over:
        keep = keep & ~game.terminal(states.flatten(0, 1)).view(keep.shape)
    row, position = keep.nonzero(as_tuple=True)
    return Prefixes(game, games, row, position)


def _codes(prefixes: Prefixes) -> Int[Tensor, " m"]:
    """A number for each prefix that others have if and only if they have its tokens."""
    code = torch.zeros(len(prefixes.games), dtype=torch.int64)
    codes = []
    for token in prefixes.games.tokens.unbind(1):
        code = code * 1_000_003 + token + 1  # wraps around in 64 bits: a collision is as likely as one in 10^19
        codes.append(code)
    return torch.stack(codes, 1)[prefixes.row, prefixes.position]


def half(prefixes: Prefixes, which: int) -> Prefixes:
    """Return the prefixes of one half (0 or 1) of all sequences of tokens, which no prefix of the other half has.

    To fit on one and test on the other: of short sequences many prefixes occur twice, in different sequences too.
    """
    mixed = _codes(prefixes) * 0x9E3779B97F4A7C1
    return prefixes.take(((mixed >> 40) & 1) == which)


def halves(fit: Prefixes, test: Prefixes, least: int) -> tuple[Prefixes, Prefixes]:
    """Return prefixes to fit on and others to test on, whose tokens none of the former has.

    Raises:
        NothingToMeasure: there are fewer than ``least`` of either.
    """
    fit, test = half(fit, 0), half(test, 1)
    if min(len(fit), len(test)) < least:
        raise NothingToMeasure(
            f"{fit.game}: {len(fit)} prefixes to fit on and {len(test)} others to test on, of {least}"
        )
    return fit, test


def that_go_on(prefixes: Prefixes) -> Prefixes:
    """Return the prefixes that have room for a move behind them.

    Raises:
        NothingToMeasure: none has.
    """
    return not_empty(prefixes.take((prefixes.lengths < prefixes.game.n_ctx).nonzero()[:, 0]))


def not_empty(prefixes: Prefixes) -> Prefixes:
    """Return the same prefixes.

    Raises:
        NothingToMeasure: there are none.
    """
    if not len(prefixes):
        raise NothingToMeasure(f"{prefixes.game}: no sequence goes on after its first move; take a longer one")
    return prefixes


def distinct(prefixes: Prefixes) -> Prefixes:
    """Return each different prefix once, the first sequence that has it."""
    ordered, order = _codes(prefixes).sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return prefixes.take(order[first].sort().values)


def follow(
    game: Game, states: Int[Tensor, "n d_state"], tokens: Int[Tensor, "n length"]
) -> tuple[Int[Tensor, "n positions d_state"], Bool[Tensor, "n length"]]:
    """Return the states before and after each token, and up to where all tokens so far are legal.

    Unlike ``play`` it goes on after an illegal token: with any legal one instead, so states mean nothing from there.
    """
    seen, alive = [states], []
    fine = torch.ones(len(states), dtype=torch.bool, device=states.device)
    for token in tokens.unbind(1):
        legal = game.legal(states)
        fine = fine & legal.gather(1, token[:, None])[:, 0]
        states = game.step(states, torch.where(fine, token, legal.long().argmax(1)))
        seen.append(states)
        alive.append(fine)
    return torch.stack(seen, 1), torch.stack(alive, 1) if alive else fine[:, None][:, :0]
