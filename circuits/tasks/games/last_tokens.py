"""Rules of legality that keep the last few tokens and nothing else: the best one, and the one that is never wrong."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games.automaton import NOWHERE, automaton, occupancy
from circuits.tasks.games.base import Game, check_tokens

LARGEST_WINDOW = 16

ROWS_AT_ONCE = 4096
"""Bounds the memory: a belief is kept over all states for each different run of tokens."""


@dataclass(frozen=True)
class LastTokens:
    """The most probable set of legal tokens given the last few tokens, under uniform play.

    It keeps the last ``window`` tokens and, as long as these are all that there are, that the sequence started there.
    Before its window it takes every state to be as likely as uniform play makes it over the positions of a sequence. No
    rule that keeps the same gives the exact set of legal tokens more often under uniform play, but for what the
    position says.

    With ``certain`` it is the tokens that are legal in every state that the same leaves possible, as long as the game
    goes on in one of them: what it takes for legal always is, but where a game is over that need not be, and it misses
    moves. Where no token is certain, it is the most probable set after all.

    Attributes:
        game: one whose states can be listed.
        window: number of tokens that are kept.
        certain: offer what is certain to be legal in place of what probably is.

    Raises:
        BadInput: the game has too many states, or the window is out of range.

    Source: ours: a Bayes filter over the states, started anew for each window. That an action can be taken in a belief
        if it can in each of its states is how planning without sight has it (Bonet and Geffner 2000, AIPS).
    """

    game: Game
    window: int
    certain: bool = False

    def __post_init__(self) -> None:
        if self.game.n_states is None:
            raise BadInput(f"{self.game} has too many states for a belief over all of them: take a smaller size")
        # Windows are told apart by a number of 63 bits.
        most = 1
        while self.game.d_vocab ** (most + 1) < 2**63 and most < LARGEST_WINDOW:
            most += 1
        check_integer("window", self.window, 1, most)

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        what = "the last token" if self.window == 1 else f"the last {self.window} tokens"
        return f"{what}, and offers what is legal whatever came before" if self.certain else what

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        check_tokens(tokens, self.game.d_vocab)
        window, there = self.window, tokens.cpu()
        legal = self._from_start(there[:, :window])
        if there.shape[1] > window:
            runs = there.unfold(1, window, 1)[:, 1:]
            powers = self.game.d_vocab ** torch.arange(window)
            codes, where = (runs * powers).sum(2).unique(return_inverse=True)
            parts = (codes[:, None] // powers % self.game.d_vocab).split(ROWS_AT_ONCE)
            legal = torch.cat((legal, torch.cat([self._after(part) for part in parts])[where]), 1)
        return legal.to(tokens.device)

    def _from_start(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """What is legal where all tokens are known; after a sequence that play cannot give, what most often is."""
        table = automaton(self.game)
        rows = torch.zeros(len(tokens), dtype=torch.int64)
        seen = [rows]
        for token in tokens.unbind(1):
            rows = torch.where(rows == NOWHERE, NOWHERE, table.successors[rows.clamp_min(0), token])
            seen.append(rows)
        visited = torch.stack(seen, 1)
        unknown = self._after(torch.zeros(1, 0, dtype=torch.int64))
        return torch.where((visited == NOWHERE)[..., None], unknown, table.legal[visited.clamp_min(0)])

    @functools.cached_property
    def _prior(self) -> Float[Tensor, " n_states"]:
        return occupancy(automaton(self.game), self.game.n_ctx)

    @functools.cached_property
    def _sets(self) -> tuple[Bool[Tensor, "sets d_vocab"], Int[Tensor, " n_states"]]:
        return automaton(self.game).legal.unique(dim=0, return_inverse=True)

    def _after(self, windows: Int[Tensor, "rows window"]) -> Bool[Tensor, "rows d_vocab"]:
        """What the rule takes for legal after each run of tokens that starts anywhere."""
        belief = self._belief(windows)
        sets, set_of = self._sets
        chances = torch.zeros(len(windows), len(sets), dtype=torch.float64).index_add_(1, set_of, belief)
        likeliest = sets[chances.argmax(1)]
        if not self.certain:
            return likeliest
        possible = chances > 0
        if self.game.n_actions < self.game.d_vocab:
            on = possible & ~sets[:, -1]
            possible = torch.where(on.any(1, keepdim=True), on, possible)
        certain = possible.double() @ (~sets).double() == 0
        return torch.where(certain.any(1, keepdim=True), certain, likeliest)

    def _belief(self, windows: Int[Tensor, "rows window"]) -> Float[Tensor, "rows n_states"]:
        """In proportion to how likely each state is after each run of tokens."""
        table = automaton(self.game)
        chance = 1 / table.legal.sum(1).double()
        belief = self._prior.repeat(len(windows), 1)
        for column in windows.unbind(1):
            for token in column.unique().tolist():
                rows = (column == token).nonzero()[:, 0]
                sources = table.legal[:, token].nonzero()[:, 0]
                likely = belief[rows[:, None], sources] * chance[sources]
                moved = torch.zeros(len(rows), len(table), dtype=torch.float64)
                belief[rows] = moved.index_add_(1, table.successors[sources, token], likely)
        # A sequence that play cannot give says nothing.
        return torch.where(belief.any(1, keepdim=True), belief, self._prior)
