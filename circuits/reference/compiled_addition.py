"""Addition compiled from a RASP program: a list of all pairs, which nobody's hand has wired."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

import torch

from circuits.errors import BadInput
from circuits.model import Transformer
from circuits.reference.compiled_programs import FOLDER, read_program
from circuits.reference.nuisances import transform
from circuits.reference.wiring import Reference
from circuits.tasks import Addition


def compiled_addition(*, seed: int = 0, n: int = 8) -> Reference:
    """Return the network that Tracr makes of the program ``SequenceMap(a + b)``: right on every pair.

    Two heads bring the first and the second number to the answer's position, and the MLP has a neuron for each pair of
    numbers: a function of two categorical variables is compiled to its table. The start token that compiled programs
    read is left out, as no head looks at it.

    A planted positive for a lookup of all pairs by a compiler.

    Args:
        seed: draws the directions (a program has no random part).
        n: number of operand values; one of those that are stored.

    Raises:
        BadInput: no such program is stored.

    Source: Lindner et al. 2023, Tracr, arXiv 2301.05062; compiled by ``tools/compile_programs.py``.
    """
    if n not in compiled_sizes():
        there = ", ".join(map(str, compiled_sizes()))
        raise BadInput(f"n = {n!r}: additions are compiled for {there}")
    program = read_program(f"addition-{n}")
    task = Addition(n=n, block=2)
    old = program.model.state_dict()
    config = replace(program.model.config, d_vocab=task.d_vocab, d_vocab_out=None, n_ctx=task.n_ctx)
    model = Transformer(config)
    state = {name: value for name, value in old.items() if not name.startswith(("embed", "pos_embed", "unembed"))}
    tokens = old["embed.W_E"][list(program.token_ids)]
    state["embed.W_E"] = torch.zeros(task.d_vocab, config.d_model)
    state["embed.W_E"][:n], state["embed.W_E"][-1] = tokens[:n], tokens[n]
    state["pos_embed.W_pos"] = old["pos_embed.W_pos"][1 : 1 + task.n_ctx]
    unembedding = torch.zeros(config.d_model, task.d_vocab)
    unembedding[:, : 2 * n - 1] = old["unembed.W_U"]
    state["unembed.W_U"] = unembedding
    model.load_state_dict(state)
    return Reference(transform(model.eval(), "rotation", seed=seed), task, "memorisation/pairs")


def compiled_sizes() -> tuple[int, ...]:
    """Return the numbers of operand values that additions are compiled for."""
    folder = resources.files("circuits.reference") / FOLDER
    names = (path.name for path in folder.iterdir() if path.name.startswith("addition-"))
    return tuple(sorted(int(name.removeprefix("addition-").removesuffix(".safetensors")) for name in names))
