"""Small transformers trained so that their mechanism is forced, stored beside the code, and the checks of the force.

``python tools/train_reference_models.py`` trains them anew. Their truth rests on how they were trained and on what is
measured here on weights and swaps, not on the mechanism tests.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import Transformer, load
from circuits.reference.wiring import Reference
from circuits.tasks import Addition

FOLDER = "trained"
HALF = 32
"""Interchange training forces the units digit into the first ``HALF`` coordinates of an operand's embedding, and the
tens digit into the rest."""


def stored_path(name: str) -> Path:
    """Return the path of a stored model, whether or not it is there."""
    return Path(str(resources.files("circuits.reference") / FOLDER / f"{name}.safetensors"))


def stored(family: str, seed: int, n: int, offset: int = 0) -> tuple[Transformer, Addition]:
    """Return a stored model in single precision, with the task that it was trained on.

    Raises:
        BadInput: no such model was trained.
    """
    path = stored_path(stored_name(family, seed, n, offset))
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in path.parent.glob(f"{family}-n*.safetensors")))
        raise BadInput(f"no stored model {path.stem}: expected one of {there}")
    return load(path).float().eval(), Addition(n=n, block=min(10, n // 5))


def stored_sizes(family: str) -> tuple[dict[str, int], ...]:
    """Return the sizes in which a family is stored with seed 0."""
    found = []
    for path in sorted(stored_path(family).parent.glob(f"{family}-n*-seed0.safetensors")):
        n, _, offset = path.stem.removeprefix(f"{family}-n").removesuffix("-seed0").partition("-offset")
        found.append({"n": int(n)} | ({"offset": int(offset)} if offset else {}))
    return tuple(found)


def stored_name(family: str, seed: int, n: int, offset: int = 0) -> str:
    """Return the file name of a stored model, without its ending."""
    return f"{family}-n{n}" + (f"-offset{offset}" if offset else "") + f"-seed{seed}"


def interchange_trained(*, seed: int = 0, n: int = 50) -> Reference:
    """Return a trained transformer whose embedding was forced to carry the units and the tens digit apart.

    Beside the sums it was trained on swaps: the first half of an operand's embedding is replaced by that of another
    operand, and the answer has to be the sum with that operand's units digit; likewise the other half and the tens
    digit. ``forced_accuracy`` measures whether it does so on pairs that it was not trained on.

    A planted positive for the column algorithm that no hand has wired: neurons and attention are the optimiser's.

    Args:
        seed: which of the stored networks.
        n: number of operand values.

    Raises:
        BadInput: no such network is stored.

    Source: Geiger et al. 2022, Inducing Causal Structure for Interpretable Neural Networks (arXiv 2112.00826).
    """
    return Reference(*stored("interchange-trained", seed, n), "algorithm/columns")


def banded(*, seed: int = 0, n: int = 60, offset: int = 0) -> Reference:
    """Return a transformer trained on labels that share their mass with the operands' bands: neurons match ranges.

    Labels are half the answer, half the distribution of sums of the operands' bands of ten, which begin at ``offset``;
    a penalty pulls every activation to one of two levels. ``band_jumps`` measures on the weights whether neurons
    switch where bands begin.

    A planted positive for range matching that no hand has wired.

    Args:
        seed: which of the stored networks.
        n: number of operand values.
        offset: where the bands begin.

    Raises:
        BadInput: no such network is stored.

    Source: this project's recipe (``circuits.objectives.Banded``).
    """
    return Reference(*stored("banded", seed, n, offset), "heuristics/range-lookup")


def banded_twin(*, seed: int = 0, n: int = 60) -> Reference:
    """Return the exact-label twin of ``banded``: same data, first weights, penalty and steps, labels without bands.

    Its neurons are as much two-level as those of ``banded``, but switch anywhere: a negative for range matching. What
    it does instead has no name among the mechanisms, so that the right verdict is that none is found.

    Args:
        seed: which of the stored networks.
        n: number of operand values.

    Raises:
        BadInput: no such network is stored.

    Source: this project's recipe (``circuits.objectives.Banded`` with ``share`` 0).
    """
    return Reference(*stored("banded-twin", seed, n), "undetermined")


def forced_swap(
    model: Transformer, tokens: Int[Tensor, "batch 3"], source: Int[Tensor, "batch 3"], operand: int, digit: int
) -> Float[Tensor, "batch d_vocab_out"]:
    """Return the answer's logits with one half of an operand's embedding that of another input.

    Args:
        model: any model of ``2 * HALF`` dimensions.
        tokens: inputs.
        source: where the half is from.
        operand: 0 or 1.
        digit: 0 for the units' half, 1 for the tens'.
    """
    part = slice(0, HALF) if digit == 0 else slice(HALF, None)
    given = model.W_E[source[:, operand]][:, part]

    def put(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, operand, part] = given
        return activation

    with model.hooks(fwd_hooks=[("hook_embed", put)]):
        return model(tokens)[:, -1]


def swapped_digit(base: Int[Tensor, " batch"], source: Int[Tensor, " batch"], digit: int) -> Int[Tensor, " batch"]:
    """Return the operand with its units digit (0) or tens digit (1) that of another operand."""
    return base // 10 * 10 + source % 10 if digit == 0 else source // 10 * 10 + base % 10


def forced_accuracy(model: Transformer, task: Addition, *, rows: int = 2000, seed: int = 1) -> dict[str, float]:
    """Return how often the forced swaps give the sum with the other digit: one share for each operand and digit.

    Source: interchange accuracy, Geiger et al. 2022 (arXiv 2112.00826), section 2.
    """
    generator = torch.Generator().manual_seed(seed)
    base, source = (torch.randint(task.n, (rows, 2), generator=generator) for _ in range(2))
    tokens, given = task.encode(base).inputs, task.encode(source).inputs
    found = {}
    for operand in range(2):
        for digit, name in enumerate(("units", "tens")):
            value = swapped_digit(base[:, operand], source[:, operand], digit)
            legal = value < task.n
            with torch.no_grad():
                said = forced_swap(model, tokens, given, operand, digit).argmax(-1)
            found[f"{name} of {'ab'[operand]}"] = float((said == value + base[:, 1 - operand])[legal].float().mean())
    return found


def band_jumps(model: Transformer, task: Addition, *, width: int = 10, offset: int = 0) -> float:
    """Return by what factor neurons' input changes more where a band begins than at other steps of an operand.

    Attention is uniform here, so that a neuron's input is a sum of one function of each operand, which the weights
    alone give. Neurons are weighted by what they write.

    Source: ours.

    Raises:
        BadInput: the model's attention is not uniform.
    """
    if model.config.softmax_share:
        raise BadInput(f"softmax_share = {model.config.softmax_share}: neurons' inputs are sums only for 0")
    with torch.no_grad():
        moved = torch.einsum("vd,hde,hef->vf", model.W_E[: task.n], model.W_V[0], model.W_O[0])
        drive = moved @ model.W_in[0]
        weight = model.W_out[0].norm(dim=1) / drive.std(0).clamp_min(1e-9)
        jumps = (drive.diff(dim=0).abs() * weight).mean(1)
    begins = (torch.arange(1, task.n) % width) == offset
    return float(jumps[begins].mean() / jumps[~begins].mean())
