"""Trained reference models: what their training forced is measured on weights and swaps, without the battery."""

from __future__ import annotations

import pytest
import torch

from circuits.errors import BadInput
from circuits.reference import build, trained, transform
from circuits.reference.trained import band_jumps, forced_accuracy, swapped_digit
from circuits.study.calibration import SIZES
from circuits.training import accuracies

BANDS = pytest.mark.skipif(
    len(trained.stored_sizes("banded")) < 2 or not trained.stored_sizes("banded-twin"),
    reason="networks not stored: tools/train_reference_models.py trains them",
)
FORCED = [(family, size) for family in ("interchange-trained", "banded", "banded-twin") for size in SIZES[family]]


@pytest.mark.parametrize(("family", "size"), FORCED)
def test_stored_networks_know_their_training_pairs(family: str, size: dict[str, int]) -> None:
    model, task, _ = build(family, **size)
    assert model.W_E.dtype == torch.float32
    assert accuracies(model, task)["accuracy_train"] >= 0.99


@pytest.mark.parametrize("size", SIZES["interchange-trained"])
def test_each_half_of_the_embedding_carries_its_digit(size: dict[str, int]) -> None:
    model, task, truth = build("interchange-trained", **size)
    assert truth == "algorithm/columns"
    assert min(forced_accuracy(model, task).values()) >= 0.97


def test_a_network_that_was_not_trained_to_it_has_no_such_halves() -> None:
    model, task, _ = build("interchange-trained", n=50)
    turned = transform(model, "rotation", seed=1)
    assert max(forced_accuracy(turned, task).values()) < 0.5


@BANDS
def test_neurons_switch_where_bands_begin_and_the_twin_s_do_not() -> None:
    straight, task, truth = build("banded", n=60)
    shifted, twin = build("banded", n=60, offset=5).model, build("banded-twin", n=60).model
    assert truth == "heuristics/range-lookup"
    assert band_jumps(straight, task, offset=0) > 1.3 > 1.1 > band_jumps(straight, task, offset=5)
    assert band_jumps(shifted, task, offset=5) > 1.3 > 1.1 > band_jumps(shifted, task, offset=0)
    assert all(0.8 < band_jumps(twin, task, offset=offset) < 1.15 for offset in (0, 5))


def test_swapped_digits() -> None:
    base, source = torch.tensor([47, 3]), torch.tensor([12, 58])
    assert swapped_digit(base, source, 0).tolist() == [42, 8]
    assert swapped_digit(base, source, 1).tolist() == [17, 53]


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(BadInput, match="no stored model interchange-trained-n50-seed7: expected one of"):
        build("interchange-trained", seed=7)
    model, task, _ = build("interchange-trained", n=50)
    with pytest.raises(BadInput, match="softmax_share"):
        band_jumps(model, task)
    assert trained.stored_name("banded", 0, 60, 5) == "banded-n60-offset5-seed0"
