"""Othello: stones between two of the other colour are turned over."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games.base import Symmetry, cell_names
from circuits.tasks.games.bitboard import Bitboard, square_images
from circuits.tasks.games.solved import SolvedContest

SIZES = (4, 6, 8)
MOST_PASSES = {4: 5, 6: 8, 8: 12}
"""On four by four the most that a game can have. On larger boards what none of 20,000 random games comes near, and
what one in 1,300 games of the expert on eight by eight goes beyond."""


@dataclass(frozen=True)
class Othello(SolvedContest):
    """Two players place stones in turn so that they enclose stones of the other in straight lines, which change owner.

    A player with no such move passes, which is a token of its own; when neither has one the game is over, and who has
    more stones wins. Player 0 begins. In the middle stand two stones of each, the first and the last of them (a row
    before the next) player 1's. Moves are the other cells, row by row, then ``pass``. A state is the stones of the
    player to move, those of the other, as bits (cell ``row * size + column``), and the player to move.

    Counted on four by four are the pairs of a board and the player to move that play can reach, with those where
    ``pass`` or ``end`` is all there is: 62,789, in 60,060 games, which differ when their tokens do.

    Attributes:
        size: 4, 6 or 8 cells a side.

    Raises:
        BadInput: there is no such size.

    Source: the rules of the World Othello Federation on smaller boards too; passes and the end as in OpenSpiel's
        ``othello``.
    """

    name: ClassVar[str] = "othello"

    size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or self.size not in SIZES:
            raise BadInput(f"size = {self.size!r}: expected one of {', '.join(map(str, SIZES))}")

    @property
    def enumerable(self) -> bool:
        """Whether the states that play can reach are few enough to list: on four by four they are."""
        return self.size == 4

    @functools.cached_property
    def board(self) -> Bitboard:
        """The cells."""
        return Bitboard(self.size, self.size)

    @functools.cached_property
    def _middle(self) -> tuple[int, int, int, int]:
        first = (self.size // 2 - 1) * (self.size + 1)
        return first, first + 1, first + self.size, first + self.size + 1

    @functools.cached_property
    def _playable(self) -> list[int]:
        return [cell for cell in range(self.board.n_cells) if cell not in self._middle]

    @functools.cached_property
    def moves(self) -> tuple[str, ...]:
        """The cells but the four in the middle, row by row, and ``pass``."""
        names = cell_names(self.size, self.size)
        return (*(names[cell] for cell in self._playable), "pass")

    @functools.cached_property
    def _placed(self) -> Int[Tensor, " n_actions"]:
        """The stone that each move places: none for ``pass``."""
        return torch.cat((self.board.bits[self._playable], torch.zeros(1, dtype=torch.int64)))

    @property
    def n_ctx(self) -> int:
        """Number of tokens of a sequence: a stone on every cell, the passes that there is room for, and ``end``."""
        return len(self._playable) + MOST_PASSES[self.size] + 1

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """Two stones of each player in the middle, player 0 to move."""
        first, second, third, fourth = self._middle
        return 1 << second | 1 << third, 1 << first | 1 << fourth, 0

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The cells."""
        return cell_names(self.size, self.size)

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Three for each cell: empty, own, the other's."""
        return (3,) * self.board.n_cells

    def allowed(self, states: Int[Tensor, "batch 3"]) -> Bool[Tensor, "batch n_actions"]:
        """The cells from which something is enclosed; where there is none, ``pass`` if the other player has one."""
        own, other, _ = states.unbind(1)
        cells = self.board.reaching(own, other)
        passes = cells == 0
        stuck = passes.nonzero()[:, 0]
        if len(stuck):
            passes[stuck] = self.board.reaching(other[stuck], own[stuck]) != 0
        placed = self._placed.to(states.device)[:-1]
        return torch.cat(((cells[:, None] & placed) != 0, passes[:, None]), 1)

    def move(self, states: Int[Tensor, "batch 3"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch 3"]:
        """The board with the stone placed and what it encloses turned over, seen by the other player."""
        return self.turned(states, tokens, self.size - 2)

    def turned(
        self, states: Int[Tensor, "batch 3"], tokens: Int[Tensor, " batch"], longest: int
    ) -> Int[Tensor, "batch 3"]:
        """What ``move`` gives, but that lines of more than ``longest`` stones stay as they are."""
        own, other, player = states.unbind(1)
        placed = self._placed.to(states.device)[tokens]
        turned = self.board.enclosed(placed, own, other, longest)
        return torch.stack((other & ~turned, own | placed | turned, 1 - player), 1)

    def winner(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, " batch"]:
        """Who has won: 0, 1, or -1 for nobody, in a draw or as long as the game is not over."""
        own, other = (self.board.cells(states[:, side]).sum(1) for side in (0, 1))
        player = states[:, 2]
        ahead = torch.where(own > other, player, torch.where(own < other, 1 - player, -1))
        return torch.where(self.terminal(states), ahead, -1)

    def best_moves(self, states: Int[Tensor, "batch 3"]) -> Bool[Tensor, "batch d_vocab"]:
        """The legal tokens that are as good as any.

        On four by four those after which the value of the solved game is what it was. On larger boards, which are not
        solved, those that leave the other player the fewest moves.

        Raises:
            BadInput: on four by four, play cannot reach a state.
        """
        return super().best_moves(states) if self.enumerable else self._least_mobile(states)

    def _least_mobile(self, states: Tensor) -> Tensor:
        legal = self.legal(states)
        rows, tokens = legal.nonzero(as_tuple=True)
        own, other, _ = self.step(states[rows], tokens).unbind(1)
        mobility = torch.full(legal.shape, self.board.n_cells, device=legal.device)
        mobility[rows, tokens] = self.board.cells(self.board.reaching(own, other)).sum(1)
        return legal & (mobility == mobility.min(1, keepdim=True).values)

    def state_id(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, " batch"]:
        """A number for each state that no other has.

        Raises:
            BadInput: on eight by eight, where there are more states than 64 bits can number.
        """
        return self.board.position_id(states)

    def state_features(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, "batch n_cells"]:
        """Each cell as the player to move sees it: 0 empty, 1 own, 2 the other's."""
        return self.board.features(states)

    def changed_features(
        self, before: Int[Tensor, "batch 3"], after: Int[Tensor, "batch 3"]
    ) -> Bool[Tensor, "batch n_cells"]:
        """Which cells a move changed: to the other player every stone is the other's, which changes nothing."""
        return self.board.changed(before, after)

    def state_of(self, features: Int[Tensor, "batch n_cells"]) -> Int[Tensor, "batch 3"]:
        """The stones; player 0 is to move where their number is even, which no pass has been counted in."""
        return self.board.from_features(features)

    def describe(self, state: Int[Tensor, " 3"]) -> str:
        """The board, row by row."""
        return self.board.draw(state)

    def picture(self, state: Int[Tensor, " 3"]) -> tuple[tuple[str, ...], ...]:
        """The board, X for the player who began."""
        return self.board.picture(state, last_row_first=False)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """The eight of the square, alone and with the players exchanged; four of them keep the start."""
        return tuple(
            self._symmetry(name, image, exchanged)
            for exchanged in (False, True)
            for name, image in square_images(self.size).items()
        )

    def _symmetry(self, name: str, image: Int[Tensor, " n_cells"], exchanged: bool) -> Symmetry:
        token_of = {cell: token for token, cell in enumerate(self._playable)}
        cells = [token_of[int(image[cell])] for cell in self._playable]
        tokens = torch.tensor([*cells, self.n_actions - 1, self.n_actions])

        def act(states: Tensor) -> Tensor:
            moved = self.board.moved(states, image)
            # Stones are the mover's or not: giving all of them to the other player changes only who moves.
            return torch.cat((moved[:, :2], 1 - moved[:, 2:]), 1) if exchanged else moved

        start = self.initial(1)
        name = f"{name}, players exchanged" if exchanged else name
        return Symmetry(name, tokens, act, bool((act(start) == start).all()))

    def planted_heuristic(self) -> ShortLines:
        """Local rules: a board of its own, on which only single stones between two of the other colour turn over."""
        return ShortLines(self, 1)


@dataclass(frozen=True)
class ShortLines:
    """Legal is what would be legal if lines of more than ``longest`` enclosed stones were not turned over.

    It keeps a board of its own, on which every stone changes owner by what stands next to it and no line is followed
    farther; on that board legality is the true rule. With single stones its set is exactly right at 88 %, 39 % and 22
    % of the positions of uniform play on 4, 6 and 8 cells a side, and a token drawn from it is illegal at 7 %, 17 %
    and 20 %.

    Attributes:
        game: the game.
        longest: length of the longest line that is turned over, from 1; two less than the size would be the true rule.

    Raises:
        BadInput: the length is out of range.

    Source: ours, after the local rules found in "OthelloGPT learned a bag of heuristics" (LessWrong, July 2024).
    """

    game: Othello
    longest: int

    def __post_init__(self) -> None:
        check_integer("longest", self.longest, 1, self.game.size - 2)

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        return f"a board on which at most {self.longest} stones in a line are turned over"

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        game = self.game
        states = game.initial(len(tokens), device=tokens.device)
        over = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        end = torch.arange(game.d_vocab, device=tokens.device) == game.n_actions
        legal = [game.legal(states)]
        for token in tokens.unbind(1):
            states = game.turned(states, token.clamp_max(game.n_actions - 1), self.longest)
            over = over | (token == game.n_actions)[:, None]
            legal.append(torch.where(over, end, game.legal(states)))
        return torch.stack(legal, 1)
