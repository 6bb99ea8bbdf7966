"""Networks that know exactly what we say: the state of a game, or only what is legal next."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from circuits.tasks.games import Game
from circuits.tasks.games.automaton import automaton


class Block(nn.Module):
    """A block that leaves the stream as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(self, resid: Tensor) -> Tensor:
        return self.hook_resid_post(self.hook_resid_pre(resid))


class Oracle(HookedRootModule):
    """The residual stream is one-hot in what ``codes`` says of each state; the legal tokens are even.

    Args:
        game: one whose states can be listed.
        codes: a number for each state of the game's table: the state itself, or something that states share.
    """

    def __init__(self, game: Game, codes: Int[Tensor, " n_states"]) -> None:
        super().__init__()
        table = automaton(game)
        n_codes = int(codes.max()) + 1
        votes = torch.zeros(n_codes, game.d_vocab).index_add_(0, codes, table.legal.float())
        shares = votes / torch.bincount(codes, minlength=n_codes)[:, None]
        self.register_buffer("successors", table.successors)
        self.register_buffer("codes", codes)
        self.W_U = nn.Parameter(torch.where(shares > 0.5, 12.0, 0.0))
        self.blocks = nn.ModuleList([Block()])
        self.cfg = SimpleNamespace(
            n_layers=1, d_model=n_codes, d_vocab=game.d_vocab, n_ctx=game.n_ctx, attn_only=True, attention_dir="causal"
        )
        self.setup()

    def known(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What is known behind each token, one-hot."""
        rows = torch.zeros(len(tokens), dtype=torch.int64)
        seen = []
        for token in tokens.unbind(1):
            rows = self.successors[rows.clamp_min(0), token]
            seen.append(rows.clamp_min(0))
        return torch.nn.functional.one_hot(self.codes[torch.stack(seen, 1)], self.cfg.d_model).float()

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.blocks[0](self.known(tokens)) @ self.W_U


def knows_state(game: Game) -> Oracle:
    """A network that holds the state."""
    return Oracle(game, torch.arange(len(automaton(game))))


def knows_legality(game: Game) -> Oracle:
    """A network that holds the set of legal tokens and nothing else."""
    return Oracle(game, automaton(game).legal.unique(dim=0, return_inverse=True)[1])


class NeuronOracle(Oracle):
    """The same with the state in the neurons of an MLP, one neuron for each."""

    def __init__(self, game: Game, codes: Int[Tensor, " n_states"]) -> None:
        super().__init__(game, codes)
        self.cfg.attn_only = False
        block = self.blocks[0]
        block.mlp = nn.Module()
        block.mlp.hook_post = HookPoint()
        self.setup()

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.blocks[0](self.blocks[0].mlp.hook_post(self.known(tokens))) @ self.W_U


def knows_state_by_neurons(game: Game) -> NeuronOracle:
    """A network whose neurons are the states."""
    return NeuronOracle(game, torch.arange(len(automaton(game))))
