"""What a model says: logits at the last positions, and whether completions decoded greedily are right."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.tasks.base import Batch, Role, Task


@functools.cache
def _takes_last(forward: Callable[..., Any]) -> bool:
    return "last" in inspect.signature(forward).parameters


def last_logits(model: Any, tokens: Int[Tensor, "batch pos"], last: int = 1) -> Float[Tensor, "batch last d_vocab_out"]:
    """Return the logits at the last positions; our own model computes no others in its last block.

    Hooks in that block of our own model see these positions alone, so that they have to count from the end.
    """
    if _takes_last(type(model).forward):
        logits: Tensor = model(tokens, last=last)
        return logits
    return model(tokens)[:, -last:]


def greedy_right(model: Any, task: Task, batch: Batch) -> Bool[Tensor, " batch"]:
    """Return whether greedy decoding of each whole completion is right, by the task's strict verifier.

    Of a causal model one forward tells the most: a completion whose every token is the most probable one behind the
    right ones is what greedy decoding gives. The others are decoded.
    """
    tokens = batch.tokens.to(next(model.parameters()).device).clone()
    first, rows = int((task.roles == Role.PROMPT).sum()), torch.arange(len(tokens), device=tokens.device)
    with torch.no_grad():
        if getattr(getattr(model, "cfg", None), "attention_dir", "causal") == "causal":
            said = last_logits(model, tokens[:, :-1], tokens.shape[1] - first).argmax(-1)
            rows = (said != tokens[:, first:]).any(1).nonzero().flatten()
            tokens[rows, first] = said[rows, 0]
            first += 1
        for position in range(first, tokens.shape[1] if len(rows) else first):
            tokens[rows, position] = last_logits(model, tokens[rows, :position])[:, -1].argmax(-1)
    return task.verify(tokens)
