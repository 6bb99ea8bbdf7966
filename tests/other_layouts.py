"""Mechanisms in layouts that no family of references has: dense embeddings, codes made by a layer, digit pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from circuits.model import ModelConfig, Transformer
from circuits.reference import Reference, build
from circuits.reference.wiring import Mechanism, Neurons, conjunctions, one_hot, wire
from circuits.tasks import Addition
from circuits.tasks.base import Batch

DOUBLE = torch.float64


def dense(name: str, *, seed: int = 0, **sizes: int) -> Reference:
    """A reference model whose embedding is random numbers; what reads the code reads it by a linear map of these."""
    model, task, truth = build(name, seed=seed, **sizes)
    n = task.n_operand_values
    state = {key: value.double() for key, value in model.state_dict().items()}
    old = state["embed.W_E"][:n]
    basis = torch.linalg.svd(old, full_matrices=False).Vh[: torch.linalg.matrix_rank(old)]
    new = torch.randn(n, len(basis), generator=torch.Generator().manual_seed(seed + 1), dtype=DOUBLE)
    assert len(basis) == n, "the map to the code is exact only where the embedding has a dimension for each operand"
    for name_of in ("W_V", "W_Q", "W_K"):
        for head, weight in enumerate(state[f"blocks.0.attn.{name_of}"]):
            outside = weight - basis.T @ basis @ weight
            state[f"blocks.0.attn.{name_of}"][head] = outside + basis.T @ torch.linalg.solve(new, old @ weight)
    state["embed.W_E"][:n] = new @ basis
    other = Transformer(model.config)
    other.load_state_dict({key: value.float() for key, value in state.items()})
    return Reference(other.eval(), task, truth)


def digit_pairs(n: int = 30) -> Reference:
    """Columns whose neurons each know one pair of units digits, or one pair of tens digits; the carry is a weight."""
    task, x, tens = Addition(n=n, block=5), torch.arange(n), (n + 9) // 10
    code = torch.cat([one_hot(x % 10, 10), one_hot(x // 10, tens)], dim=1)
    units = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    high = torch.cartesian_prod(torch.arange(tens), torch.arange(tens))
    left = torch.zeros(len(units) + len(high), 10 + tens, dtype=torch.bool)
    right = left.clone()
    left[: len(units), :10], right[: len(units), :10] = one_hot(units[:, 0], 10).bool(), one_hot(units[:, 1], 10).bool()
    left[len(units) :, 10:] = one_hot(high[:, 0], tens).bool()
    right[len(units) :, 10:] = one_hot(high[:, 1], tens).bool()
    w_in, b_in = conjunctions(left, right)
    # what the MLP writes: the units digit of the result, the sum of the tens, and the carry
    w_out = torch.zeros(len(left), 12, dtype=DOUBLE)
    w_out[: len(units), :10] = one_hot(units.sum(1) % 10, 10)
    w_out[: len(units), 11] = (units.sum(1) >= 10).double()
    w_out[len(units) :, 10] = high.sum(1).double()
    middle = tens - 0.5
    b_out = torch.zeros(12, dtype=DOUBLE)
    b_out[10] = -middle
    d, e = (task.answer_values // 10).double() - middle, one_hot(task.answer_values % 10, 10)
    readout = torch.cat([10 * e.T, 10 * d.expand(2, -1)])
    mechanism = Mechanism(code, "apart", (Neurons(w_in, b_in, w_out, b_out),), readout, bias=-5 * d.square())
    return Reference(wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task, "algorithm/columns")


def code_made_by_a_layer(name: str, *, seed: int = 0, **sizes: int) -> Reference:
    """A one-layer reference model behind a layer whose neurons each know one operand and write what is its code."""
    model, task, truth = build(name, seed=seed, **sizes)
    old = {key: value.double() for key, value in model.state_dict().items()}
    n, d, config = task.n_operand_values, model.config.d_model, model.config
    wide = ModelConfig(
        d_vocab=config.d_vocab,
        n_ctx=config.n_ctx,
        n_layers=2,
        d_model=d + n,
        n_heads=config.n_heads,
        d_head=config.d_head,
        d_mlp=max(config.d_mlp, n),
        positional=config.positional,
    )
    new = Transformer(wide)
    state = {key: torch.zeros_like(value, dtype=DOUBLE) for key, value in new.state_dict().items()}
    embedding = old["embed.W_E"]
    state["embed.W_E"][n:, :d] = embedding[n:]
    state["embed.W_E"][:n, d:] = torch.eye(n, dtype=DOUBLE)
    if config.positional:
        state["pos_embed.W_pos"][:, :d] = old["pos_embed.W_pos"]
    state["blocks.0.mlp.W_in"][d:, :n] = torch.eye(n, dtype=DOUBLE)
    state["blocks.0.mlp.W_out"][:n, :d] = embedding[:n]
    for part in ("W_Q", "W_K", "W_V"):
        state[f"blocks.1.attn.{part}"][:, :d] = old[f"blocks.0.attn.{part}"]
    state["blocks.1.attn.W_O"][:, :, :d] = old["blocks.0.attn.W_O"]
    state["blocks.1.mlp.W_in"][:d, : config.d_mlp] = old["blocks.0.mlp.W_in"]
    state["blocks.1.mlp.b_in"][: config.d_mlp] = old["blocks.0.mlp.b_in"]
    state["blocks.1.mlp.W_out"][: config.d_mlp, :d] = old["blocks.0.mlp.W_out"]
    state["blocks.1.mlp.b_out"][:d] = old["blocks.0.mlp.b_out"]
    state["unembed.W_U"][:d] = old["unembed.W_U"]
    new.load_state_dict({key: value.float() for key, value in state.items()})
    return Reference(new.eval(), task, truth)


@dataclass(frozen=True)
class BehindBos:
    """A one-token task whose prompts begin with a token of their own; what does not speak of tokens is the task's."""

    name: ClassVar[str] = "behind-bos"
    task: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("task", "operation"):  # nor does it say how it combines its operands
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*self.task.vocabulary, "<bos>")

    @property
    def d_vocab(self) -> int:
        return int(self.task.d_vocab) + 1

    @property
    def n_ctx(self) -> int:
        return int(self.task.n_ctx) + 1

    @property
    def roles(self) -> torch.Tensor:
        return torch.cat([self.task.roles[:1], self.task.roles])

    def encode(self, operands: torch.Tensor) -> Batch:
        return self._prefixed(self.task.encode(operands))

    def examples(self, split: str, *, limit: int | None = None, seed: int = 0) -> Batch:
        return self._prefixed(self.task.examples(split, limit=limit, seed=seed))

    def verify(self, tokens: torch.Tensor) -> torch.Tensor:
        right: torch.Tensor = self.task.verify(tokens[:, 1:])
        return right

    def read_answer(self, tokens: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.task.read_answer(tokens[:, 1:])
        return answer

    def _prefixed(self, batch: Batch) -> Batch:
        first = torch.full_like(batch.tokens[:, :1], int(self.task.d_vocab))
        return Batch(torch.cat([first, batch.tokens], dim=1), batch.operands, self.roles)


class RenamedAnswers:
    """Addition whose answers stand for other numbers: the same sequences, of no operation that has a name."""

    name = "renamed-answers"

    def __init__(self, task: Any) -> None:
        self.task = task
        self.names = torch.randperm(len(task.answer_values), generator=torch.Generator().manual_seed(0))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("task", "names", "operation"):
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def answer_tokens(self) -> torch.Tensor:
        tokens: torch.Tensor = self.task.answer_tokens[self.names.argsort()]
        return tokens

    def answer(self, operands: torch.Tensor) -> torch.Tensor:
        return self.names[self.task.answer(operands)]


def behind_bos(reference: Reference) -> Reference:
    """The same network one position later, behind a token that says nothing."""
    model, task, truth = reference
    state = model.state_dict()
    other = Transformer(replace(model.config, d_vocab=model.config.d_vocab + 1, n_ctx=model.config.n_ctx + 1))
    zero = torch.zeros_like(state["embed.W_E"][:1])
    state["embed.W_E"] = torch.cat([state["embed.W_E"], zero])
    if "pos_embed.W_pos" in state:
        state["pos_embed.W_pos"] = torch.cat([zero, state["pos_embed.W_pos"]])
    else:  # which looks at all positions alike, and now at one more
        state["blocks.0.attn.W_V"] = state["blocks.0.attn.W_V"] * other.config.n_ctx / model.config.n_ctx
    other.load_state_dict(state)
    return Reference(other.eval(), BehindBos(task), truth)
