"""Circles that plain addition is done on, the highest frequency of an even one, and measures on them."""

from __future__ import annotations

import math

import pytest
import torch
from constructions import decimal_periods, other_circle

from circuits import mechanisms, tasks
from circuits.mechanisms.functional_form import circle_length
from circuits.mechanisms.groups import group_table
from circuits.mechanisms.least_squares import greedy_fit
from circuits.mechanisms.neuron_features import indicator_features
from circuits.mechanisms.progress_measures import progress_measures, sum_components
from circuits.mechanisms.spectral import orthonormal_basis, project
from circuits.model import ModelConfig, Transformer
from circuits.reference import build


def grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    return a, b


def test_decimal_periods_get_the_circle_that_they_are_on() -> None:
    # on one of as many steps as there are sums a wave of period two ends a quarter of a cycle out of step
    model, task, _ = decimal_periods()
    readings = mechanisms.read(model, task)
    form = mechanisms.functional_form(model, task, readings=readings)
    assert form.details["circle"] == 100 and form.details["key_frequencies"] == [10, 20, 50]
    spectrum = mechanisms.spectral(model, task, readings=readings)
    assert spectrum.details["frequencies"] == [1, 10, 20, 50]
    assert spectrum.number("explained") > 0.999 and spectrum.passed


@pytest.mark.parametrize(
    ("name", "sizes"), [("fourier-plain", {"n": 25}), ("number-line", {"n": 25}), ("columns", {"n": 24})]
)
def test_no_longer_circle_where_none_is_better(name: str, sizes: dict[str, int]) -> None:
    model, task, _ = build(name, **sizes)
    assert circle_length(model, task, mechanisms.read(model, task), seed=0) is None


def test_measures_on_another_circle_are_of_that_circle() -> None:
    model, task, _ = other_circle()
    readings = mechanisms.read(model, task)
    found = mechanisms.spectral(model, task, readings=readings)
    assert found.number("modulus") == 71
    loss = torch.nn.functional.cross_entropy(readings.logits.double(), readings.labels)
    assert found.number("loss") == pytest.approx(float(loss))
    assert found.number("restricted_loss") < 0.1 < 3 < found.number("excluded_loss")
    # less than a turn has no Fourier components
    assert not any(key.startswith("gini") for key in found.details)
    keys = tuple(found.details["frequencies"])
    wrong = progress_measures(model, task, readings, keys)  # on the circle of 59, which is not the network's
    assert wrong["restricted_loss"] > 5 * found.number("restricted_loss")


@pytest.mark.parametrize("operation", ["+", "-"])
@pytest.mark.parametrize("circle", [None, 17, 24])
def test_columns_of_a_longer_circle_are_the_answers(operation: str, circle: int | None) -> None:
    task = tasks.get("addition", n=9, operation=operation, block=2)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8, d_mlp=8), seed=0)
    readings = mechanisms.read(model, task)
    group = group_table(task, readings, circle=circle)
    assert group.modulus == (circle or 17) and group.names.tolist() == sorted(group.names.tolist())
    assert group.names[group.answer].equal(group.total)
    right = readings.logits.gather(1, readings.labels[:, None])
    assert group.logits.gather(1, group.answer[:, None]).equal(right)


def test_the_highest_frequency_of_an_even_circle_adds_no_arbitrary_directions() -> None:
    a, b = grid(12)
    basis = orthonormal_basis(a, b, 6, 12)
    assert int((basis.square().sum(0) > 1e-6).sum()) == 1  # the parity of the sum
    parity = ((a + b) % 2).float()
    assert torch.allclose(basis @ (basis.T @ parity), parity - parity.mean(), atol=1e-5)
    noise = torch.randn(144, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(144, dtype=torch.long)
    assert project(noise, a, b, labels, (6,), 12).explained == pytest.approx(1 / 143, abs=0.01)
    other = orthonormal_basis(a, b, 5, 12)
    assert torch.allclose(other.T @ other, torch.eye(4), atol=1e-5)
    inside = sum_components(noise, (a + b) % 12, (6,), 12)
    wave = (math.pi * (a + b).double()).cos()[:, None]
    assert torch.allclose(inside, wave @ (wave.T @ noise.double()) / 144)


@pytest.mark.parametrize("modulus", [9, 11, 13, 15])
def test_residues_of_the_published_moduli_are_indicators(modulus: int) -> None:
    a, b = grid(40)
    fit = torch.rand(1600, generator=torch.Generator().manual_seed(0)) < 0.5
    neuron = ((a + b) % modulus == 4).float()
    features = indicator_features(torch.stack([a, b], dim=1), 40)
    assert float(greedy_fit(features, neuron[:, None], fit)[0]) > 0.99
