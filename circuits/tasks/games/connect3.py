"""Connect three: stones dropped into columns, three in a row win."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games.base import Symmetry, cell_names, counts_before
from circuits.tasks.games.bitboard import Bitboard
from circuits.tasks.games.solved import SolvedContest


@dataclass(frozen=True)
class Connect3(SolvedContest):
    """Two players drop stones in turn; who first has three in a row, in any direction, wins; a full board is a draw.

    A move is the column. A state is the stones of the player to move, those of the other, as bits (cell ``row *
    columns + column``, row 0 at the bottom), and the player to move. Counted are all boards that play can reach, the
    empty one, won ones and full ones included: 41,750 on four by four, in 3,409,240 games; 7,157 and 133,656 on three
    rows of four.

    Attributes:
        rows: 3 or 4.
        columns: 3 or 4.
        in_a_row: stones in a row that win, 3 or 4 (connect four's number on so small a board: a change of the rules).

    Raises:
        BadInput: a parameter is out of range.

    Source: connect four on a smaller board. The value of each state is by negamax over all of them.
    """

    name: ClassVar[str] = "connect3"

    rows: int = 4
    columns: int = 4
    in_a_row: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("rows", self.rows, 3, 4)
        check_integer("columns", self.columns, 3, 4)
        check_integer("in_a_row", self.in_a_row, 3, 4)

    @functools.cached_property
    def board(self) -> Bitboard:
        """The cells."""
        return Bitboard(self.rows, self.columns)

    @functools.cached_property
    def moves(self) -> tuple[str, ...]:
        """The columns, from left to right."""
        return tuple(string.ascii_lowercase[: self.columns])

    @property
    def n_ctx(self) -> int:
        """Number of tokens of the longest sequence: a full board and ``end``."""
        return self.board.n_cells + 1

    @property
    def start(self) -> tuple[int, ...]:
        """The empty board, player 0 to move."""
        return (0, 0, 0)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The cells."""
        return cell_names(self.rows, self.columns)

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Three for each cell: empty, own, the other's."""
        return (3,) * self.board.n_cells

    @functools.cached_property
    def _columns(self) -> Int[Tensor, " columns"]:
        return self.board.bits.view(self.rows, self.columns).sum(0)

    def _landing(self, states: Tensor) -> Tensor:
        """The lowest empty cell of every column that has one."""
        taken = states[:, 0] | states[:, 1]
        bottom = (1 << self.columns) - 1
        return ~taken & (taken << self.columns | bottom) & (1 << self.board.n_cells) - 1

    def _won(self, states: Tensor) -> Tensor:
        return self.board.has_run(states[:, 0], self.in_a_row) | self.board.has_run(states[:, 1], self.in_a_row)

    def allowed(self, states: Int[Tensor, "batch 3"]) -> Bool[Tensor, "batch n_actions"]:
        """The columns with an empty cell, none once somebody has won."""
        free = (self._landing(states)[:, None] & self._columns.to(states.device)) != 0
        return free & ~self._won(states)[:, None]

    def move(self, states: Int[Tensor, "batch 3"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch 3"]:
        """The board with the stone in, seen by the other player."""
        own, other, player = states.unbind(1)
        placed = self._landing(states) & self._columns.to(states.device)[tokens]
        return torch.stack((other, own | placed, 1 - player), 1)

    def winner(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, " batch"]:
        """Who has won: 0, 1, or -1 for nobody, in a draw or as long as the game is not over."""
        own, other, player = states.unbind(1)
        lost = self.board.has_run(other, self.in_a_row)
        won = self.board.has_run(own, self.in_a_row)
        return torch.where(lost, 1 - player, torch.where(won, player, -1))

    def state_id(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, " batch"]:
        """The bits of the state side by side."""
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
        """The stones; player 0 is to move where both have as many."""
        return self.board.from_features(features)

    def changed_rules(self) -> Connect3:
        """Another number of stones in a row wins: 4 instead of 3, or 3 instead of 4."""
        return Connect3(self.rows, self.columns, 7 - self.in_a_row)

    def describe(self, state: Int[Tensor, " 3"]) -> str:
        """The board, top row first."""
        return self.board.draw(state, last_row_first=True)

    def picture(self, state: Int[Tensor, " 3"]) -> tuple[tuple[str, ...], ...]:
        """The board, top row first, X for the player who began."""
        return self.board.picture(state, last_row_first=True)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """The identity and the mirror image."""
        mirror = torch.arange(self.board.n_cells).view(self.rows, self.columns).flip(1).flatten()
        tokens = torch.arange(self.d_vocab)
        mirrored = torch.cat((tokens[: self.columns].flip(0), tokens[self.columns :]))
        return (
            Symmetry("identity", tokens, lambda states: states, True),
            Symmetry("mirrored", mirrored, lambda states: self.board.moved(states, mirror), True),
        )

    def planted_heuristic(self) -> ColumnCounter:
        """A column counter, which does not know whose the stones are."""
        return ColumnCounter(self)


@dataclass(frozen=True)
class ColumnCounter:
    """Legal is every column that is not full, and ``end`` on a full board or after ``end``.

    It keeps the number of stones in each column, and not whose they are, so it cannot see that somebody has won: it is
    wrong at the last position of won games, and right everywhere else, at 90 % of the positions of uniform play.
    """

    game: Connect3

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        return "the number of stones in each column"

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        counts = counts_before(tokens, self.game.d_vocab)
        columns, ends = counts[..., :-1], counts[..., -1:]
        free = (columns < self.game.rows) & (ends == 0)
        return torch.cat((free, ~free.any(2, keepdim=True)), 2)
