"""How a mechanism written down as small matrices becomes the weights of a transformer.

Every reference model has the same plan. The embedding holds a *code* of each operand (a few features chosen by the
construction) and, in other directions, a random identity vector of each token that nothing reads, so that the
embedding has full rank as in trained networks. Attention at ``=`` brings the codes together: added up by uniform
attention (``joined="sum"``), or side by side by two heads that each attend to one position (``joined="apart"``).
One MLP a layer reads what the step before wrote; the unembedding reads what the last MLP wrote. Each of these spaces
is a set of random orthonormal directions of the residual stream, and neurons stand in random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import ModelConfig, Transformer
from circuits.tasks import Task
from circuits.tasks.arithmetic.one_token import OneTokenTask

IDENTITY_NORM = 0.3
"""Length of a token's identity vector, as a share of the root mean square length of the (centred) code."""

IDENTITY_DIMENSIONS = 64
"""At most so many directions for identity vectors."""

SHARPNESS = 40.0
"""Attention score of the position that a head attends to; e**-40 is below what float32 resolves."""

NEVER = -50.0
"""Logit of tokens that are no answers, such as ``=``; right answers have logits of at least 0."""


class Reference(NamedTuple):
    """A model with its task and what is true of it by construction, such as ``algorithm/fourier``."""

    model: Transformer
    task: Task
    truth: str


@dataclass(frozen=True, eq=False)
class Neurons:
    """One MLP: ``relu(inputs @ w_in + b_in) @ w_out + b_out``, in the construction's own coordinates."""

    w_in: Float[Tensor, "inputs neurons"]
    b_in: Float[Tensor, " neurons"]
    w_out: Float[Tensor, "neurons outputs"]
    b_out: Float[Tensor, " outputs"] | None = None

    def shuffled(self, generator: torch.Generator) -> Neurons:
        """Return the same MLP with its neurons in random order."""
        order = torch.randperm(len(self.b_in), generator=generator)
        return Neurons(self.w_in[:, order], self.b_in[order], self.w_out[order], self.b_out)


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A construction, before it has directions in a residual stream.

    Attributes:
        code: features of each operand value.
        joined: ``sum`` (the MLP sees code(a) + code(b)) or ``apart`` (it sees code(a), then code(b)).
        mlps: one for each layer; each reads what the one before wrote.
        readout: from what the last MLP wrote to a logit for each of the task's answers.
        bias: added to the answers' logits.
        shortcut: from what attention wrote straight to the answers' logits.
    """

    code: Float[Tensor, "values features"]
    joined: str
    mlps: tuple[Neurons, ...]
    readout: Float[Tensor, "outputs answers"]
    bias: Float[Tensor, " answers"] | None = None
    shortcut: Float[Tensor, "inputs answers"] | None = None


def normal(*shape: int, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Return standard normal numbers in double precision."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_rotation(d: int, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Return a rotation or reflection drawn uniformly (Haar measure).

    Source: Mezzadri 2007 (arXiv math-ph/0609050), section 5: QR with the signs of R's diagonal taken out.
    """
    q, r = torch.linalg.qr(normal(d, d, generator=generator))
    return q * r.diagonal().sign()


def one_hot(values: Tensor, classes: int) -> Float[Tensor, "n classes"]:
    """Return the indicator of each class, in double precision."""
    return torch.nn.functional.one_hot(values, classes).double()


def conjunctions(
    left: Bool[Tensor, "neurons features"], right: Bool[Tensor, "neurons features"]
) -> tuple[Float[Tensor, "inputs neurons"], Float[Tensor, " neurons"]]:
    """Return input weights and biases of neurons that are 1 where one feature of a and one of b are on, else 0.

    relu(2 (x + y) - 3) is 1 for x = y = 1 and, with a margin of 1, zero when at most one of them is on.
    """
    w_in = 2 * torch.cat([left, right], dim=1).double().T
    return w_in, torch.full((w_in.shape[1],), -3.0, dtype=torch.float64)


def wire(task: OneTokenTask, mechanism: Mechanism, *, generator: torch.Generator) -> Transformer:
    """Return a transformer, in eval mode, that carries out a mechanism on a task with one answer token.

    Args:
        task: the task; its operand values index ``mechanism.code``.
        mechanism: what to carry out.
        generator: draws the directions, the identity vectors and the order of the neurons.
    """
    n, features = mechanism.code.shape
    apart = mechanism.joined == "apart"
    inputs = features * (2 if apart else 1)
    widths = {
        "code": features,
        "identity": min(n, IDENTITY_DIMENSIONS),
        "position": 3 if apart else 0,
        "joined": inputs,
        **{f"mlp {i}": mlp.w_out.shape[1] for i, mlp in enumerate(mechanism.mlps)},
        "constant": 1,
    }
    d_model = sum(widths.values())
    rows = random_rotation(d_model, generator).split(list(widths.values()))
    directions = dict(zip(widths, rows, strict=True))
    mlps = tuple(mlp.shuffled(generator) for mlp in mechanism.mlps)
    d_mlp = max(len(mlp.b_in) for mlp in mlps)
    config = ModelConfig(
        d_vocab=task.d_vocab,
        n_ctx=task.n_ctx,
        n_layers=len(mlps),
        d_model=d_model,
        n_heads=2 if apart else 1,
        d_head=features,
        d_mlp=d_mlp,
        positional=apart,
    )
    model = Transformer(config)
    state = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    state["embed.W_E"] = _embedding(task, mechanism.code, directions, generator)
    _attend(state, directions, features, apart)
    source = "joined"
    for layer, mlp in enumerate(mlps):
        part, used, target = f"blocks.{layer}.mlp", len(mlp.b_in), f"mlp {layer}"
        state[f"{part}.W_in"][:, :used] = directions[source].T @ mlp.w_in
        state[f"{part}.b_in"][:used] = mlp.b_in
        state[f"{part}.W_out"][:used] = mlp.w_out @ directions[target]
        if mlp.b_out is not None:
            state[f"{part}.b_out"] += mlp.b_out @ directions[target]
        source = target
    # The last MLP's bias puts a constant into the stream, and the unembedding reads the answers' biases off that:
    # a bridge has no bias there. Sharing their size between the two keeps float32's rounding small.
    constant = 1.0 if mechanism.bias is None else max(1.0, float(mechanism.bias.abs().max())) ** 0.5
    state[f"blocks.{len(mlps) - 1}.mlp.b_out"] += constant * directions["constant"][0]
    state["unembed.W_U"] = _unembedding(task, mechanism, directions["constant"][0] / constant, directions, source)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def _embedding(
    task: OneTokenTask, code: Tensor, directions: dict[str, Tensor], generator: torch.Generator
) -> Float[Tensor, "d_vocab d_model"]:
    """Codes of the operands, and an identity vector of every token but ``=``."""
    n = len(code)
    identity = normal(task.d_vocab - 1, len(directions["identity"]), generator=generator)
    size = (code - code.mean(0)).square().sum(1).mean().sqrt()
    identity = identity / identity.norm(dim=1, keepdim=True) * IDENTITY_NORM * size
    embedding = torch.zeros(task.d_vocab, directions["code"].shape[1], dtype=torch.float64)
    embedding[:-1] = identity @ directions["identity"]
    embedding[:n] += code @ directions["code"]
    return embedding


def _attend(state: dict[str, Tensor], directions: dict[str, Tensor], features: int, apart: bool) -> None:
    """Write the first layer's attention into ``state``; later layers' heads stay zero."""
    part = "blocks.0.attn"
    if not apart:
        # Scores of zero make softmax uniform over the three positions, so each operand arrives by a third.
        state[f"{part}.W_V"][0] = directions["code"].T
        state[f"{part}.W_O"][0] = 3 * directions["joined"]
        return
    position = directions["position"]
    state["pos_embed.W_pos"][:] = position
    gain = math.sqrt(SHARPNESS * math.sqrt(features))
    for head in range(2):
        state[f"{part}.W_Q"][head, :, 0] = gain * position[2]
        state[f"{part}.W_K"][head, :, 0] = gain * position[head]
        state[f"{part}.W_V"][head] = directions["code"].T
        state[f"{part}.W_O"][head] = directions["joined"][head * features : (head + 1) * features]


def _unembedding(
    task: OneTokenTask, mechanism: Mechanism, one: Tensor, directions: dict[str, Tensor], source: str
) -> Float[Tensor, "d_model d_vocab"]:
    """Readout, shortcut and biases (along ``one``, whose product with the stream is 1) as columns of tokens."""
    columns = directions[source].T @ mechanism.readout
    if mechanism.shortcut is not None:
        columns = columns + directions["joined"].T @ mechanism.shortcut
    if mechanism.bias is not None:
        columns = columns + one[:, None] * mechanism.bias
    unembedding = (NEVER * one[:, None]).repeat(1, task.d_vocab)
    unembedding[:, task.answer_tokens] = columns
    return unembedding


def table(task: Task) -> Int[Tensor, "pairs 2"]:
    """Return all operand pairs of a task, in row-major order."""
    values = torch.arange(task.n_operand_values)
    return torch.cartesian_prod(values, values)


def require_exact(model: Transformer, task: OneTokenTask, remedy: str) -> None:
    """Return nothing.

    Raises:
        BadInput: the model does not answer every pair of operands rightly; ``remedy`` says what to change.
    """
    batch = task.encode(table(task))
    wrong = 0
    with torch.no_grad():
        for inputs, answers in zip(batch.inputs.split(4096), batch.tokens[:, -1].split(4096), strict=True):
            wrong += int((model(inputs, last=1)[:, -1].argmax(-1) != answers).sum())
    if wrong:
        raise BadInput(f"this construction is wrong on {wrong} of {len(batch)} pairs: {remedy}")
