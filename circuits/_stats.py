"""Intervals, thin over scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from circuits.errors import BadInput


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a share; (0, 1) where there are no trials.

    Source: Wilson 1927, JASA 22:209; scipy.stats.binomtest.

    Raises:
        BadInput: ``successes`` is not in [0, n], or ``level`` is not in (0, 1).
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise BadInput(f"successes = {successes} of n = {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # half a second to import: only where it is used

    interval = binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


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

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; scipy.stats.bootstrap.

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
    if len(data) == 1:  # scipy refuses it; every resample is the one value
        value = float(statistic(data, axis=-1))
        return value, value
    from scipy.stats import bootstrap

    # resamples in groups, so that memory stays near a million numbers however many values there are
    result = bootstrap(
        (data,),
        statistic,
        n_resamples=resamples,
        batch=max(1, 1_000_000 // len(data)),
        vectorized=True,
        axis=-1,
        confidence_level=level,
        method="percentile",
        rng=generator,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


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
