"""Heuristics on the result: the planted bag is found by its name, and codes that only look like it are not."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference
from circuits.mechanisms.heuristics import MODULI
from circuits.mechanisms.result_heuristics import matched_kinds, matching, profiles


def test_ranges_and_residues_are_told_from_steps_and_single_results() -> None:
    number = torch.arange(40)
    patterns = {
        "range": (number >= 5) & (number < 25),
        "all but a range": (number < 5) | (number >= 25),
        "step": number >= 12,
        "all but two": number >= 2,
        "one result": number == 7,
        "two results": (number == 7) | (number == 8),
        "modulo 3": number % 3 == 1,
        "not modulo 2": number % 2 != 0,
        "modulo 13": number % 13 == 0,
        "modulo 15, of which there are two": number % 15 == 14,
        "two of modulo 15, and one more": (number % 15 == 14) | (number == 3),
        "random": torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.5,
    }
    inside, residue, end = (
        {name for name, yes in zip(patterns, kind.tolist(), strict=True) if yes}
        for kind in matched_kinds(torch.stack(list(patterns.values()), dim=1))
    )
    assert inside == {"range", "all but a range"}
    assert residue == {"modulo 3", "not modulo 2", "modulo 13"}
    assert end == {"step"}


def test_ranges_at_an_end_count_beside_others_and_not_alone() -> None:
    number = torch.arange(30)
    ends = [number < 10, number >= 12, number >= 20]
    others = [(number >= 5) & (number < 15), number % 4 == 1]
    on = torch.stack([*ends, *others], dim=1)
    clear, weight = torch.ones(5, dtype=torch.bool), torch.tensor([0.2, 0.2, 0.1, 0.25, 0.25])
    matches, counts = matching(on, clear, weight)
    assert matches.all() and counts == {"n_range": 1, "n_modulo": 1, "n_end": 3}
    steps_prevail = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2])
    assert matching(on, clear, steps_prevail)[0].tolist() == [False] * 3 + [True] * 2
    assert not matching(on[:, :3], clear[:3], weight[:3])[0].any(), "a magnitude code"
    assert matching(on, torch.arange(5) < 4, weight)[0].tolist() == [False] * 3 + [True, False], "what is not clear"


def test_moduli_are_those_published() -> None:
    assert set(MODULI) == {*range(2, 11)} | {*range(2, 10), 11, 13, 15}


def test_profiles_are_means_by_result() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    neurons = torch.tensor([[1.0, 0.0], [3.0, 1.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    found = profiles(labels, neurons, 3)
    assert found.mean[:, 0].tolist() == [2.0, 5.0, 0.0]
    residual = ((neurons - found.mean[labels]) ** 2).sum(0)
    total = ((neurons - neurons.mean(0)) ** 2).sum(0)
    assert torch.allclose(found.explained, 1 - residual / total)


@pytest.mark.parametrize("n", [12, 14])
def test_a_bag_of_a_small_table_is_found(n: int) -> None:
    model, task, _ = reference.build("result-range-bag", n=n, seed=1)
    evidence = mechanisms.result_heuristics(model, task)
    assert evidence.passed and evidence.details["n_end"] > evidence.details["n_range"]


@pytest.mark.parametrize("n", [20, 40])
def test_the_bag_is_called_by_its_name(n: int) -> None:
    model, task, truth = reference.build("result-range-bag", n=n, seed=2)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth
    evidence = verdict["result-heuristics"]
    assert evidence.details["layer"] == 1 and evidence.control is not None and evidence.control <= 0.1
    assert verdict["functional-form"].number("hinge_least") < 0.2 < verdict["functional-form"].number("hinge")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("number-line", {"n": 20}),
        ("columns", {"n": 30}),
        ("fourier-pizza", {"p": 31}),
        ("range-lookup", {"n": 30, "grids": 3}),
    ],
)
def test_other_codes_are_no_bag(name: str, sizes: dict[str, int]) -> None:
    model, task, _ = reference.build(name, seed=1, **sizes)
    assert mechanisms.result_heuristics(model, task).passed is False


@pytest.mark.parametrize(("name", "sizes"), [("fourier-plain", {"n": 50}), ("fourier-plain", {"n": 80})])
def test_frequencies_without_a_modulus_are_right_everywhere(name: str, sizes: dict[str, int]) -> None:
    model, task, truth = reference.build(name, seed=2, **sizes)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth
    assert verdict["accuracy-gate"].number("block") == 1.0


def test_a_hybrid_is_right_everywhere_and_mixed() -> None:
    model, task, _ = reference.build("hybrid", seed=0, p=31)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert verdict["accuracy-gate"].value == 1.0
    assert (verdict.label, verdict.mechanism) == ("mixed", "fourier"), verdict.why
    region = verdict["region-interchange"]
    assert region.number("inside") >= 0.95 and region.number("outside") <= 0.5
