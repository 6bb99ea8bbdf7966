"""Simulation: the next state after the move taken, or after every move that could be taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.objectives.base import Loss, check_is_game, check_number
from circuits.objectives.heads import ActionHead, feature_losses, logits_and_residual, read_features
from circuits.objectives.next_token import next_token_loss
from circuits.tasks.base import Task
from circuits.tasks.games import Game, GameBatch

if TYPE_CHECKING:
    from circuits.model import HookedModel

ACTIONS = ("taken", "all")
WIDTH = 64
"""Hidden units of the head: enough to apply a move to a state that the trunk has, too few to keep one itself."""


@dataclass(frozen=True)
class Simulate:
    """Cross-entropy on the state that follows a move, given the prefix before it and the move, beside next tokens'.

    ``taken`` (factual) asks for the move of the sequence; ``all`` for every token: whether it is illegal and, where it
    is legal, what state it leads to. A head of one hidden layer reads the residual stream and the token. A state that
    is held out is no label. All actions have more labels than the one taken: compare at equal labels, too, which are
    logged as ``labels`` (one for each feature of a next state, and one for each token that may be illegal); the next
    tokens beside them are ``labels_beside``.

    Attributes:
        actions: ``taken`` or ``all``.
        next_token: weight of the next tokens' cross-entropy.
        share: of the positions that have labels, drawn anew for each batch: all moves at a share of the positions can
            have as many labels as the move taken at all of them.

    Source: Xing et al. 2025 (arXiv 2507.05169), s' ~ p(s' | s, a) over all actionable possibilities; that it be trained
        this way, with illegal moves told apart, is ours.
    """

    name: ClassVar[str] = "simulate"

    actions: str = "all"
    next_token: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.actions not in ACTIONS:
            raise BadInput(f"actions = {self.actions!r}: expected one of {', '.join(ACTIONS)}")
        check_number("next_token", self.next_token, 0)
        check_number("share", self.share, 0, 1, above=True)

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: the task is no game.
        """
        check_is_game(self.name, task)

    def head(self, task: Game, d_model: int, *, generator: torch.Generator) -> ActionHead:
        """Return the head: one output for each value of each feature, and two for illegal and legal."""
        return ActionHead(d_model, task.d_vocab, sum(task.feature_sizes), generator, width=WIDTH)

    def loss(
        self, model: HookedModel, task: Game, batch: GameBatch, *, generator: torch.Generator, head: ActionHead
    ) -> Loss:
        """Return the mean over positions and legal moves, and that over all tokens of whether they are legal.

        Logs the share of next states that are right.
        """
        logits, resid = logits_and_residual(model, batch.inputs)
        beside = self.next_token * next_token_loss(logits, batch) if self.next_token else 0.0
        scored = batch.scored
        if self.share < 1:
            drawn = torch.rand(scored.shape, generator=generator, device=scored.device)
            scored = scored & (drawn < self.share)
        if self.actions == "taken":
            counts = scored[:, :-1]
            tokens = batch.targets[counts][:, None]
            resid, states = resid[:, :-1][counts], batch.states[:, :-1][counts]
            legal = torch.ones_like(tokens, dtype=torch.bool)
        else:
            resid, states, legal = resid[scored], batch.states[scored], batch.legal[scored]
            tokens = torch.arange(task.d_vocab, device=resid.device).expand(len(resid), -1)
        rows, columns, features = next_features(task, states, tokens, legal)
        hidden = head.hidden(resid, tokens)
        wanted = head(hidden[rows, columns])
        simulated = feature_losses(wanted, task, features)
        right = (read_features(wanted.detach(), task) == features).all(1).float().mean()
        metrics: dict[str, torch.Tensor | float] = {"head_accuracy": right}
        if self.next_token:
            metrics["labels_beside"] = float(batch.scored[:, :-1].sum())
        if self.actions == "taken":
            metrics["labels"] = float(features.numel())
            return Loss(simulated.mean() + beside, metrics)
        legality = F.cross_entropy(head.legal(hidden).flatten(0, 1), legal.long().flatten())
        metrics["labels"] = float(features.numel() + legal.numel())
        return Loss(legality + simulated.mean() + beside, metrics)


def next_features(
    game: Game, states: Int[Tensor, "rows d_state"], tokens: Int[Tensor, "rows k"], legal: Bool[Tensor, "rows k"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, "m n_features"]]:
    """Return the rows and columns of the legal moves to states that are not held out, and those states' features."""
    rows, columns = legal.nonzero(as_tuple=True)
    reached = game.step(states[rows], tokens[rows, columns])
    held = game.held()
    if held is not None:
        seen = ~held.contains(reached)
        rows, columns, reached = rows[seen], columns[seen], reached[seen]
    return rows, columns, game.state_features(reached)
