"""Slices: lookups have neurons for each slice and algorithms have not; which neurons count, and the interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import mechanisms, reference
from circuits.mechanisms.slice_transfer import _importance_on, own_and_cross, resampled_ratios, slices


@pytest.mark.parametrize(("sizes", "most"), [({"n": 40}, 0.6), ({"n": 40, "grids": 2, "offset": 3}, 0.6)])
def test_a_lookup_of_ranges_has_other_neurons_for_other_slices(sizes: dict[str, int], most: float) -> None:
    model, task, _ = reference.build("range-lookup", seed=1, **sizes)
    evidence = mechanisms.slice_transfer(model, task)
    assert evidence.value < most and evidence.passed is False
    assert evidence.details["operand_size"] < 0.8, "what is silent on a quadrant is not kept for it"
    assert evidence.interval[0] < evidence.value < evidence.interval[1] < evidence.value + 0.1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("number-line", {"n": 40}),
        ("columns", {"n": 40}),
        ("fourier-clock", {"p": 53}),
        ("interchange-trained", {"n": 40}),
    ],
)
def test_an_algorithm_has_not(name: str, sizes: dict[str, int]) -> None:
    model, task, _ = reference.build(name, **sizes)
    evidence = mechanisms.slice_transfer(model, task)
    assert evidence.value > 0.85 and evidence.passed is not False
    assert evidence.interval[0] <= evidence.value + 0.01 and evidence.interval[1] >= evidence.value - 0.01


def test_neurons_that_do_the_same_for_a_whole_slice_come_last() -> None:
    model, task, _ = reference.build("range-lookup", n=40)
    readings = mechanisms.read(model, task)
    for rows in slices(readings, task)["operand"]:
        silent = readings.neurons[rows].std(0) < 1e-6
        importance = _importance_on(readings, rows)
        assert silent.sum() > 20 and importance[silent].amax() < 1e-6 * importance.amax()
        assert importance[~silent].amin() > importance[silent].amax()


def test_own_and_cross_are_means_of_the_diagonal_and_the_rest() -> None:
    tables = np.random.default_rng(0).random((5, 4, 4))
    own, cross = own_and_cross(tables)
    for i, table in enumerate(tables):
        off = [table[j, k] for j in range(4) for k in range(4) if j != k]
        assert own[i] == pytest.approx(np.mean([table[j, j] for j in range(4)]))
        assert cross[i] == pytest.approx(np.mean(off))


def test_a_row_is_redrawn_for_all_neurons_at_once_and_within_its_slice() -> None:
    generator = np.random.default_rng(1)
    alike = [np.repeat(generator.random((1, size)) < 0.6, 3, axis=0) for size in (50, 80, 30)]
    assert np.allclose(resampled_ratios(alike, seed=0), 1.0), "each row is right by all neurons or by none"
    certain = [np.stack([np.full(40, i == j) for i in range(2)]) for j in range(2)]
    assert np.allclose(resampled_ratios(certain, seed=0), 0.0)


def test_the_interval_is_as_wide_as_fresh_rows_vary() -> None:
    generator = np.random.default_rng(2)
    rates = np.array([[0.9, 0.5, 0.4], [0.6, 0.8, 0.5], [0.5, 0.6, 0.9]])

    def rows() -> list[np.ndarray]:
        return [generator.random((3, 100)) < rates[:, [j]] for j in range(3)]

    fresh = []
    for _ in range(400):
        own, cross = own_and_cross(np.stack([r.mean(1) for r in rows()], axis=1)[None])
        fresh.append(float(cross[0] / own[0]))
    widths = [np.std(resampled_ratios(rows(), seed=seed)) for seed in range(5)]
    assert np.mean(widths) == pytest.approx(np.std(fresh), rel=0.2)


def test_slices_share_the_square_out() -> None:
    readings = mechanisms.read(*reference.build("number-line", n=20)[:2])
    for groups in slices(readings, reference.build("number-line", n=20).task).values():
        assert sorted(torch.cat(groups).tolist()) == list(range(400))
