"""Parts of an operand's states that functions of the operand explain: waves, growth in a line, digits, classes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.mechanisms.groups import angle
from circuits.tasks.base import Variable

ROUNDS = 8
"""Of backfitting: the classes cross nearly evenly, so that a few do."""


def orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """Orthonormal basis of the span of some columns."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-5 * s.max().clamp_min(1e-30)]


def class_means(embedding: Float[Tensor, "n d"], values: Int[Tensor, " n"]) -> Float[Tensor, "d k"]:
    """Centred mean embedding of each class of operand values, one column a class."""
    means = [embedding[values == v].mean(0) for v in values.unique().tolist()]
    return (torch.stack(means) - embedding.mean(0)).T


def slope(embedding: Float[Tensor, "n d"]) -> Float[Tensor, "d 1"]:
    """Least-squares direction along which the embedding moves as the operand grows by one."""
    x = torch.arange(len(embedding), device=embedding.device, dtype=embedding.dtype)
    x = x - x.mean()
    return ((embedding - embedding.mean(0)).T @ x / x.square().sum())[:, None]


def frequency_directions(
    embedding: Float[Tensor, "n d"], index: Int[Tensor, " n"], kept: Bool[Tensor, " n"], frequency: int, modulus: int
) -> Float[Tensor, "d 2"]:
    """Directions of the embedding that carry cos and sin of one frequency of the operand."""
    w = angle(index[kept], frequency, modulus)
    return torch.stack([embedding[kept].T @ w.cos(), embedding[kept].T @ w.sin()], dim=1)


def part_of(states: Float[Tensor, "n d"], functions: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """The part of each value's state that is linear in some functions of the value, beside a constant.

    Least squares over the values and not a projection onto directions of the state: whatever reads the functions off
    linearly reads them off this part, however the directions lie to each other.
    """
    design = torch.cat([torch.ones_like(functions[:, :1]), functions], dim=1)
    effects = torch.linalg.pinv(design) @ states
    return functions @ effects[1:]


def variable_basis(variable: Variable, embedding: Tensor, n: int) -> Tensor | None:
    """Subspace for a one-operand variable: the means of its classes; None where every value is a class of its own."""
    operands = torch.arange(n)[:, None].expand(n, 2)
    values = variable.value(operands).to(embedding.device)
    if len(values.unique()) >= n:
        return None
    return orthonormal(class_means(embedding, values))


def class_parts(states: Float[Tensor, "n d"], classes: list[Int[Tensor, " n"]]) -> list[Float[Tensor, "n d"]]:
    """The parts of each value's state that several classifications of the values explain together.

    Least squares of a sum of one vector for each class: where the last tens lack some units, the means of one digit's
    classes would hold some of the other.
    """
    columns = [_one_hot(of.unique(return_inverse=True)[1]).to(states)[:, 1:] for of in classes]
    effects = torch.linalg.pinv(torch.cat([torch.ones_like(states[:, :1]), *columns], dim=1)) @ states
    return [x @ part for x, part in zip(columns, effects[1:].split([x.shape[1] for x in columns]), strict=True)]


def digit_components(states: Float[Tensor, "n d"], base: int) -> tuple[Tensor, Tensor]:
    """The parts of each value's state that its low and its high digit explain, written to some base."""
    x = torch.arange(len(states), device=states.device)
    low, high = class_parts(states, [x % base, x // base])
    return low, high


def digit_swapped(
    base: Int[Tensor, "*rows"], source: Int[Tensor, "*rows"], number: int, high: bool
) -> Int[Tensor, "*rows"]:
    """Operands with the low or the high digit of others, written to the base ``number``."""
    return source // number * number + base % number if high else base // number * number + source % number


def written_to(embedding: Float[Tensor, "n d"]) -> int | None:
    """The base in which the embedding is most nearly a sum of one part for each of two digits; None below 4 values.

    Compared by explained variance beyond the share that as many classes explain of unstructured embeddings.
    """
    n = len(embedding)
    x = torch.arange(n, device=embedding.device)
    centred = embedding - embedding.mean(0)
    scores = {}
    for number in range(2, n // 2 + 1):
        classes = torch.cat([_one_hot(x % number), _one_hot(x // number)], dim=1)
        q = orthonormal(classes - classes.mean(0))
        share = float((q.T @ centred).square().sum() / centred.square().sum().clamp_min(1e-30))
        scores[number] = share - q.shape[1] / (n - 1)
    return max(scores, key=lambda number: scores[number]) if scores else None


def _one_hot(values: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    return torch.nn.functional.one_hot(values).float()


def along(states: Float[Tensor, "n d"], part: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """What states hold along the directions that a part of them spans, whatever functions of the value it is.

    Where a code lies in directions of its own, this leaves alone what else the state holds of the value; ``part_of``
    moves of that what is linear in the same functions.
    """
    basis = orthonormal((part - part.mean(0)).T)
    return states @ basis @ basis.T


def waves(
    like: Tensor, index: Int[Tensor, " n"], kept: Bool[Tensor, " n"], frequencies: list[int], modulus: int
) -> Float[Tensor, "n k"]:
    """Cosine and sine of some frequencies of each operand value; zero where it has no place on the circle."""
    angles = torch.stack([angle(index, k, modulus) for k in frequencies], dim=1).to(like)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * kept[:, None].to(like)


def random_part(states: Float[Tensor, "n d"], rank: int, seed: int) -> Float[Tensor, "n d"]:
    """The part of states that some random functions of the value explain."""
    generator = torch.Generator().manual_seed(seed)
    return part_of(states, torch.randn(len(states), min(rank, len(states) - 1), generator=generator).to(states))


def two_way(
    states: Float[Tensor, "rows d"], first: Int[Tensor, " rows"], second: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "m d"]]:
    """Least squares of a sum of one vector for each class of two classifications, by turns.

    Source: backfitting: Buja, Hastie & Tibshirani 1989, Annals of Statistics 17 (2).
    """
    rest = states - states.mean(0)
    sums = [torch.zeros(int(of.max()) + 1, states.shape[1]).to(states) for of in (first, second)]
    counts = [torch.bincount(of).clamp_min(1)[:, None].to(states) for of in (first, second)]
    for _ in range(ROUNDS):
        for i, of in enumerate((first, second)):
            step = torch.zeros_like(sums[i]).index_add_(0, of, rest) / counts[i]
            sums[i] += step
            rest = rest - step[of]
    return sums[0], sums[1]
