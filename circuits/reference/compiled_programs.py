"""Programs compiled to the weights of a transformer, whose true edges stand in the weights.

Nothing is compiled here: the weights are files beside this one, made by ``tools/compile_programs.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput, UnknownName
from circuits.model import Transformer, from_transformer_lens
from circuits.reference.weight_edges import active_edges, weight_edges
from circuits.tasks.base import Pairs

PROGRAMS = {
    "count": "how many of the tokens are an a",
    "frac-prevs": "the share of the tokens so far that are an x",
    "hist": "how often this token occurs",
    "length": "the number of tokens",
    "pair-balance": "the share of opening minus that of closing brackets so far",
    "reverse": "the tokens in reverse",
    "shuffle-dyck": "whether the brackets are balanced",
    "sort": "the tokens sorted",
    "sort-unique": "the tokens sorted, where no two are alike",
}
"""What each program computes at every position."""
SAMPLES = 4096
FOLDER = "compiled"


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program: a model that reads a start token and then the program's tokens."""

    model: Transformer
    tokens: tuple[Any, ...]
    """What the program reads, in the order of ``token_ids``."""
    token_ids: tuple[int, ...]
    bos_id: int
    length: int
    """Most tokens after the start token."""
    output_values: tuple[Any, ...] | None
    """What each logit stands for; None where the first logit is the number that the program computes."""

    def encode(self, inputs: Sequence[Sequence[Any]]) -> Int[Tensor, "batch pos"]:
        """Return the model's input for some of the program's inputs, all of one length."""
        ids = dict(zip(self.tokens, self.token_ids, strict=True))
        return torch.tensor([[self.bos_id, *(ids[token] for token in row)] for row in inputs])

    def __call__(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return what the model says at every position after the start token."""
        with torch.no_grad():
            logits = self.model(self.encode(inputs))[:, 1:]
        if self.output_values is None:
            return [[float(value) for value in row] for row in logits[..., 0]]
        return [[self.output_values[i] for i in row] for row in logits.argmax(-1).tolist()]


def load_program(name: str) -> Program:
    """Return a compiled program from the file that comes with the package.

    Args:
        name: A key of ``PROGRAMS``.

    Source: Lindner et al. 2023, Tracr, arXiv 2301.05062; google-deepmind/tracr, ``tracr/compiler/lib.py``.

    Raises:
        UnknownName: no such program.
    """
    if name not in PROGRAMS:
        raise UnknownName("compiled program", name, PROGRAMS)
    return read_program(name)


def read_program(name: str) -> Program:
    """Return a compiled program from its file, additions too, which are no entries of ``PROGRAMS``."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with resources.as_file(resources.files("circuits.reference") / FOLDER / f"{name}.safetensors") as path:
        weights = load_file(path)
        with safe_open(path, framework="pt") as stored:
            about = json.loads(stored.metadata()["program"])
    model = from_transformer_lens(weights, act_fn="relu", normalization=None, causal=about["causal"]).eval()
    values = about["output_values"]
    return Program(
        model,
        tuple(about["tokens"]),
        tuple(about["token_ids"]),
        about["bos_id"],
        about["length"],
        None if values is None else tuple(values),
    )


def compiled_program(
    name: str, *, n_pairs: int = 64, seed: int = 0
) -> tuple[Transformer, Pairs, frozenset[tuple[str, str]], frozenset[tuple[str, str]], bool, dict[str, Any]]:
    """Return a compiled program's model, pairs that change its output, and its true edges.

    Clean and corrupt inputs are drawn at random, with a position at which the program's outputs differ; where the
    output is a number, the clean input is that of the larger one. Two random inputs of one length hardly ever make
    ``shuffle-dyck`` differ, so its clean inputs are balanced; and no two make ``length`` differ: its pairs differ in
    their tokens alone, and no edge is active.

    Args:
        name: A key of ``PROGRAMS``.
        n_pairs: Number of pairs.
        seed: Of the pairs.
    """
    if n_pairs < 1:
        raise BadInput(f"n_pairs = {n_pairs}: expected at least 1")
    program = load_program(name)
    generator = torch.Generator().manual_seed(seed)
    pairs = _pairs(name, program, n_pairs, generator)
    edges = weight_edges(program.model)
    details = {"made": "compiled", "computes": PROGRAMS[name], "length": program.length}
    return program.model, pairs, edges, active_edges(program.model, pairs, edges), False, details


def _pairs(name: str, program: Program, n_pairs: int, generator: torch.Generator) -> Pairs:
    clean, corrupt = (_inputs(name, program, generator, clean=which) for which in (True, False))
    with torch.no_grad():
        ends = [_answers(program, tokens) for tokens in (clean, corrupt)]
    gap = ends[0] - ends[1]
    if program.output_values is None:
        # the metric is the first logit minus a second that is always zero
        swap = gap.amax(1) < 1e-3
        clean, corrupt = torch.where(swap[:, None], corrupt, clean), torch.where(swap[:, None], clean, corrupt)
        gap = torch.where(swap[:, None], -gap, gap)
        differ = gap > 1e-3
    else:
        differ = (gap != 0) if name != "length" else torch.ones_like(gap, dtype=torch.bool)
    differ[:, 0] = False
    rows = differ.any(1).nonzero().flatten()[:n_pairs]
    position = torch.multinomial(differ[rows].double(), 1, generator=generator).flatten()
    if program.output_values is None:
        correct, wrong = torch.zeros_like(position), torch.ones_like(position)
    else:
        every = torch.arange(len(rows))
        correct, wrong = (end[rows][every, position].long() for end in ends)
        wrong = torch.where(wrong == correct, (correct + 1) % len(program.output_values), wrong)
    return Pairs(clean[rows], corrupt[rows], position, correct, wrong, "every token")


def _inputs(name: str, program: Program, generator: torch.Generator, *, clean: bool) -> Int[Tensor, "batch pos"]:
    ids = torch.tensor(program.token_ids)
    n = len(ids)
    if name == "sort-unique":
        drawn = torch.rand(SAMPLES, n, generator=generator).argsort(1)[:, : program.length]
    else:
        drawn = torch.randint(n, (SAMPLES, program.length), generator=generator)
    if name == "shuffle-dyck":
        steps = (1 - 2 * drawn).cumsum(1)
        balanced = (steps[:, -1] == 0) & (steps >= 0).all(1)
        drawn = drawn[balanced if clean else ~balanced][: SAMPLES // 16]
    return torch.cat([torch.full((len(drawn), 1), program.bos_id), ids[drawn]], 1)


def _answers(program: Program, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    logits = program.model(tokens)
    return logits[..., 0] if program.output_values is None else logits.argmax(-1).float()
