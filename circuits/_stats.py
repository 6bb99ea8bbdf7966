"""Intervals of shares, means and other statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from circuits.errors import BadInput


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a share; (0, 1) where there are no trials.

    Source: Wilson 1927, JASA 22:209; the numbers of scipy.stats.binomtest, without the two seconds that scipy.stats
        takes to load.

    Raises:
        BadInput: ``successes`` is not in [0, n], or ``level`` is not in (0, 1).
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise BadInput(f"successes = {successes} of n = {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, centre - reach), min(1.0, centre + reach)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the percentile-bootstrap interval (low, high) of a statistic over resampled values.

    ``values`` are independent units along the first axis: numbers, or rows where the statistic needs several
    columns (then it is called as ``statistic(rows)`` on each resample; on numbers as ``statistic(sample, axis=-1)``).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; the numbers of
        scipy.stats.bootstrap, without the time that scipy.stats takes to load.

    Raises:
        BadInput: no values, a value that is not finite, or ``level`` not in (0, 1).
    """
    _check_level(level)
    data: NDArray[Any] = np.asarray(values, dtype=float)
    if data.ndim == 0 or len(data) == 0:
        raise BadInput(f"bootstrap_interval needs at least one value along the first axis, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise BadInput(f"bootstrap_interval got {(~np.isfinite(data)).sum()} values that are not finite; drop them")
    generator = np.random.default_rng(seed)
    if data.ndim > 1:
        draws = np.array([statistic(data[generator.integers(0, len(data), len(data))]) for _ in range(resamples)])
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)
    # resamples in groups, so that memory stays near a million numbers however many values there are
    size = max(1, 1_000_000 // len(data))
    found = [
        statistic(data[generator.integers(0, len(data), (min(size, resamples - start), len(data)))], axis=-1)
        for start in range(0, resamples, size)
    ]
    low, high = np.percentile(np.concatenate(found), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInput(f"level = {level}: expected a confidence level between 0 and 1, such as 0.95")


def resampling_counts(n: int, *, seed: int, resamples: int = 1000) -> NDArray[np.int64]:
    """Return how often each of ``n`` units is drawn in each bootstrap resample, as a [resamples, n] array.

    One product of it with per-unit values gives the bootstrap distribution of many means at once.

    Raises:
        BadInput: ``n`` or ``resamples`` is less than 1.
    """
    if n < 1 or resamples < 1:
        raise BadInput(f"n = {n}, resamples = {resamples}: expected at least one of each")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
