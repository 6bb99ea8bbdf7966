"""Gradient symmetricity: do the logits depend on both operands in the same way?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import Readings, activations, device_of, hooked, operand_positions, read
from circuits.tasks.base import Task

ROWS = 100
PUBLISHED_SEED = 42
LARGEST_SHUFFLE = 2_000_000
"""Numbers that a shuffle in plain Python orders in about a second: all triples up to p = 125."""


def sampled_triples(n_operands: int, n_answers: int, *, seed: int = 0, rows: int = ROWS) -> Int[Tensor, "rows 3"]:
    """Return triples (a, b, c); with seed 0 and p values of each, those of the published figures.

    Source: repository fjzzq2002/pizza, eval-main.ipynb: the first hundred of all triples, in row-major order, shuffled
    by ``random.Random(42)``. Tables too large to shuffle are sampled.
    """
    size = n_operands**2 * n_answers
    generator = random.Random(PUBLISHED_SEED + seed)
    if size <= LARGEST_SHUFFLE:
        order = list(range(size))
        generator.shuffle(order)  # what a shuffle does depends on the length alone
        chosen = torch.tensor(order[:rows])
    else:
        chosen = torch.tensor(generator.sample(range(size), rows))
    c = chosen % n_answers
    pair = chosen // n_answers
    return torch.stack([pair // n_operands, pair % n_operands, c], dim=1)


def operand_gradients(model: Any, task: Task, triples: Int[Tensor, "rows 3"]) -> Float[Tensor, "rows 2 d_model"]:
    """Return the gradient of answer c's logit in the embeddings of a and of b, for each triple (a, b, c)."""
    device = device_of(model)
    tokens = task.encode(triples[:, :2]).inputs.to(device)
    answers = task.answer_tokens[triples[:, 2]].to(device)
    kept: list[Tensor] = []

    def leaf(activation: Tensor, hook: Any) -> Tensor:
        kept.append(activation.detach().requires_grad_())
        return kept[-1]

    hooks: list[tuple[str, Callable[..., Tensor]]] = [("hook_embed", leaf)]
    with torch.enable_grad(), hooked(model, hooks):
        logits = model(tokens)[:, -1].gather(1, answers[:, None])
        (gradient,) = torch.autograd.grad(logits.sum(), kept)
    return gradient[:, list(operand_positions(task))]


def attention_variation(model: Any, tokens: Int[Tensor, "rows pos"]) -> dict[str, float]:
    """Return, by layer, the standard deviation over inputs of the attention paid at the last position.

    It is the mean over heads and positions; 0 is attention that does not look at the operands. Layers without
    attention are left out.
    """
    names = {f"blocks.{i}.attn.hook_pattern": str(i) for i in range(model.cfg.n_layers)}
    there = [name for name in names if name in model.hook_dict]
    patterns = activations(model, tokens, there) if there else {}
    return {names[name]: float(pattern[:, :, -1].std(0).mean()) for name, pattern in patterns.items()}


def gradient_symmetricity(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Mean cosine between the gradients of a logit in the embeddings of the first and of the second operand.

    For Q_abc the logit of answer c on operands a and b, and E their embeddings, it is the mean over a hundred triples
    of cos(dQ_abc / dE_a, dQ_abc / dE_b). A network that adds the embeddings up before anything else (the pizza) is
    symmetric: 1. One that multiplies them by means of attention (the clock) has different gradients: the published
    clock has 0.33, the published pizza 0.99.

    The control asks for the gradient in the second operand of another pair, for the same answer: what remains is what
    the gradients share because they speak of one answer, not of one pair.

    It is a description, never a verdict: whether clock and pizza are two algorithms is contested (the disc of added
    vectors is in the first layer of both; "On the Geometry and Topology of Representations: the Manifolds of Modular
    Addition", ICLR 2026). ``details`` has the variation of attention, and the accuracy without which nothing
    should be read into the value.

    Formula: mean over (a, b, c) of cos(dQ_abc / dE_a, dQ_abc / dE_b).

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 4.1; repository fjzzq2002/pizza, eval-main.ipynb, for the
    sample.
    Fails when: the network has not learned the task: at initialisation it is 0.62 in the published models, and 0.95
    in one stopped early.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    triples = sampled_triples(task.n_operand_values, len(task.answer_values), seed=seed)
    gradients = operand_gradients(model, task, triples)
    other = torch.cat([triples[:, :2].roll(1, 0), triples[:, 2:]], dim=1)
    symmetric = cosine_similarity(gradients[:, 0].double(), gradients[:, 1].double(), dim=1)
    across = cosine_similarity(gradients[:, 0].double(), operand_gradients(model, task, other)[:, 1].double(), dim=1)
    return Evidence(
        test="gradient-symmetricity",
        value=float(symmetric.mean()),
        interval=bootstrap_interval(symmetric.cpu().numpy(), seed=seed),
        control=float(across.mean()),
        control_name="gradient in the second operand of another pair",
        threshold="none: near 1 in a pizza, far below in a clock",
        passed=None,
        details={
            "spread": float(symmetric.std(unbiased=False)),
            "accuracy": float(readings.right.float().mean()),
            "attention_variation": attention_variation(model, readings.tokens[:4096]),
        },
        source="Zhong et al. 2023, arXiv 2306.17844, section 4.1",
        seconds=time.perf_counter() - start,
    )
