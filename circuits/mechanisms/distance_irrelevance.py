"""Distance irrelevance: is the logit of the right answer as large whatever the distance between the operands?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import group_index
from circuits.mechanisms.readings import Readings, read
from circuits.tasks.base import Task


def moments_by_distance(
    values: Float[Tensor, " rows"], distance: Int[Tensor, " rows"], modulus: int
) -> NDArray[np.float64]:
    """Return count, mean and mean square of centred values for each distance that occurs, one row each."""
    centred = (values.double() - values.double().mean()).cpu()
    distance = distance.cpu()
    count = torch.bincount(distance, minlength=modulus).double()
    there = count > 0
    sums = [torch.bincount(distance, weights=x, minlength=modulus) for x in (centred, centred.square())]
    rows: NDArray[np.float64] = torch.stack([count, *(s / count for s in sums)], dim=1)[there].numpy()
    return rows


def irrelevance(rows: NDArray[np.float64]) -> float:
    """Return the mean standard deviation within a distance as a share of the whole standard deviation.

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 4.2; repository fjzzq2002/pizza, eval-main.ipynb.
    """
    count, mean, square = rows.T
    within = np.sqrt(np.maximum(square - mean**2, 0)).mean()
    weight = count / count.sum()
    whole = (weight * square).sum() - (weight * mean).sum() ** 2
    return float(within / np.sqrt(max(whole, 1e-30)))


def distance_irrelevance(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of the spread of the right answer's logit that is left once the distance between the operands is fixed.

    With L[s, d] the logit of the right answer where a + b = s and a - b = d, it is the mean over d of the standard
    deviation over s of L[s, d], divided by the standard deviation of all of L. In a pizza the logits carry a factor
    ``|cos w(a - b) / 2|``, so that they depend on the distance: 0.17 in the published one. In a clock: 0.85.

    ``top_wrong`` is the same of the highest logit of a wrong answer, the variant that the published tables hold.
    The control deals the same logits out to the pairs at random. Whatever does not depend on the distance is near 1,
    noise too, so that a high value alone is no sign of a clock.

    It is a description, never a verdict (see gradient-symmetricity).

    Formula: mean over d of std_s L[s, d] / std of L[s, d] over all s and d.

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 4.2; repository fjzzq2002/pizza, eval-main.ipynb and, for
    ``top_wrong``, train-main.py.
    Fails when: the network has not learned the task: at initialisation it is 0.99.

    Raises:
        BadInput: the operation has no group structure.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    renamed = group_index(task, readings.operands)
    if renamed is None:
        raise BadInput(f"{task.name} has no renaming of its operands under which the answer is their sum")
    a, b, kept, modulus = renamed
    logits, labels = readings.logits[kept], readings.labels[kept][:, None]
    distance = (a - b)[kept] % modulus
    right = logits.gather(1, labels).squeeze(1)
    wrong = logits.scatter(1, labels, float("-inf")).amax(1)
    rows = moments_by_distance(right, distance, modulus)
    dealt = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(seed)).to(right.device)]
    return Evidence(
        test="distance-irrelevance",
        value=irrelevance(rows),
        interval=bootstrap_interval(rows, irrelevance, seed=seed),
        control=irrelevance(moments_by_distance(dealt, distance, modulus)),
        control_name="logits dealt out at random",
        threshold="none: low in a pizza, near 1 in a clock",
        passed=None,
        details={
            "top_wrong": irrelevance(moments_by_distance(wrong, distance, modulus)),
            "smallest_margin": float((right - wrong).min()),
            "accuracy": float(readings.right.float().mean()),
        },
        source="Zhong et al. 2023, arXiv 2306.17844, section 4.2",
        seconds=time.perf_counter() - start,
    )
