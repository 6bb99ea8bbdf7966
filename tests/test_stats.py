"""Intervals: coverage, known values, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits._stats import bootstrap_interval, resampling_counts, wilson_interval
from circuits.errors import BadInput


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_is_scipys(n: int, share: float) -> None:
    from scipy.stats import binomtest

    k = round(share * n)
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_is_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(4).normal(size=60)
    expected = bootstrap((values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(9))
    low, high = expected.confidence_interval
    assert bootstrap_interval(values, seed=9, resamples=500) == pytest.approx((low, high))


def test_wilson_without_trials_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(BadInput, match="0 <= successes <= n"):
        wilson_interval(k, n)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(3.0, 1.0, 60), seed=trial, resamples=400)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 198


def test_bootstrap_is_reproducible_and_widens_with_the_level() -> None:
    values = np.random.default_rng(1).exponential(size=80)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    narrow, wide = bootstrap_interval(values, seed=3, level=0.5), bootstrap_interval(values, seed=3, level=0.99)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_bootstrap_over_rows_resamples_them_whole() -> None:
    numerator = np.random.default_rng(2).uniform(1, 2, 50)
    rows = np.stack([numerator, 2 * numerator], 1)
    low, high = bootstrap_interval(rows, lambda r: r[:, 0].sum() / r[:, 1].sum(), seed=0, resamples=100)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_bootstrap_of_one_value_and_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([4.0], seed=0) == (4.0, 4.0)
    assert bootstrap_interval(np.full(10, 2.5), seed=0) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], 3.0])
def test_bootstrap_refuses_what_it_cannot_resample(values: object) -> None:
    with pytest.raises(BadInput):
        bootstrap_interval(values, seed=0)


def test_counts_resample_whole_samples_evenly() -> None:
    counts = resampling_counts(7, seed=0, resamples=4000)
    assert counts.shape == (4000, 7)
    assert (counts.sum(1) == 7).all()
    assert np.abs(counts.mean(0) - 1).max() < 0.06
    assert (counts == resampling_counts(7, seed=0, resamples=4000)).all()
    with pytest.raises(BadInput):
        resampling_counts(0, seed=0)
