"""Interchange by region and lookup of pairs: the parts that they are made of, and what they say of built models."""

from __future__ import annotations

import pytest
import torch
from constructions import waves_where, whole_table

from circuits.mechanisms import pair_lookup, region_interchange
from circuits.mechanisms.operand_parts import (
    digit_components,
    digit_swapped,
    orthonormal,
    part_of,
    random_part,
    written_to,
)
from circuits.mechanisms.pair_lookup import knows_pairs
from circuits.mechanisms.region_interchange import Tried, find_region
from circuits.reference import build


def swaps(n: int, rows: int, seed: int, inside: object) -> Tried:
    generator = torch.Generator().manual_seed(seed)
    base, source = (torch.randint(n, (rows, 2), generator=generator) for _ in range(2))
    moved = torch.stack([source[:, 0], base[:, 1]], dim=1)
    return Tried(base, moved, inside(base) & inside(moved))  # type: ignore[operator]


@pytest.mark.parametrize(
    "inside",
    [
        lambda pairs: (pairs < 20).all(1),
        lambda pairs: pairs.sum(1) < 30,
        lambda pairs: (pairs[:, 0] - pairs[:, 1]).abs() < 12,
        lambda pairs: torch.isin(pairs[:, 0], torch.tensor([0, 3, 4, 7, 9, 11, 15, 16, 20, 22, 25, 26, 28, 30])),
    ],
    ids=["square", "small sums", "near the diagonal", "scattered values"],
)
def test_regions_of_any_border_are_found(inside: object) -> None:
    n = 31
    region = find_region(swaps(n, 2000, 0, inside), swaps(n, 2000, 1, inside), n, seed=0)
    assert region is not None
    judged = swaps(n, 2000, 2, inside)
    within = region.contains(judged.base) & region.contains(judged.moved)
    assert judged.holds[within].float().mean() > 0.93
    assert judged.holds[~within].float().mean() < 0.4


def test_no_region_where_swaps_hold_by_chance() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (swaps(31, 2000, seed, lambda pairs: torch.ones(len(pairs), dtype=torch.bool)) for seed in (0, 1))
    random = [Tried(t.base, t.moved, torch.rand(len(t.base), generator=generator) < 0.5) for t in (first, second)]
    assert find_region(random[0], random[1], 31, seed=0) is None


def test_a_built_region_is_found_and_measured() -> None:
    model, task, _ = build("hybrid", p=31)
    evidence = region_interchange(model, task)
    assert evidence.passed and evidence.details["algorithm"] == "fourier"
    assert evidence.details["area"] == pytest.approx((22 / 31) ** 2, abs=0.1)


def test_no_region_in_what_is_alike_everywhere() -> None:
    for name, sizes in (("fourier-pizza", {"p": 29, "frequencies": 5}), ("range-lookup", {"n": 30})):
        model, task, _ = build(name, **sizes)
        assert region_interchange(model, task).passed is False


def test_a_list_over_an_algorithm_decides_and_is_not_missed() -> None:
    model, task, _ = waves_where(lambda a, b: (a < 15) & (b < 15), p=23, frequencies=4)
    evidence = pair_lookup(model, task)
    assert evidence.value < 0.2 and evidence.number("overrules") > 0.9
    assert evidence.number("known_pairs") == pytest.approx(1 - (15 / 23) ** 2, abs=0.05)


def test_neurons_of_one_pair_are_told_from_others() -> None:
    n = 9
    a, b = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    one = ((a == 2) & (b == 5)).float()
    mirrored = (((a == 2) & (b == 5)) | ((a == 5) & (b == 2))).float()
    # neurons that read a sum of both operands cannot tell the doubles of their pair from it
    doubled = (mirrored.bool() | ((a == b) & ((a == 2) | (a == 5)))).float()
    row, square, constant = (a == 2).float(), ((a < 3) & (b < 3)).float(), torch.zeros(n * n)
    knows = knows_pairs(torch.stack([a, b], dim=1), torch.stack([one, mirrored, doubled, row, square, constant], dim=1))
    assert knows.sum(0).tolist() == [1, 2, 4, 0, 0, 0]
    assert bool(knows[2 * n + 5, 0]) and bool(knows[5 * n + 2, 1])


def test_a_list_of_pairs_is_lost_with_its_neurons_and_an_algorithm_is_not() -> None:
    model, task, _ = build("pair-memoriser", p=23, symmetric=True)
    assert pair_lookup(model, task).value > 0.9
    model, task, _ = whole_table(17)
    evidence = pair_lookup(model, task)
    assert evidence.passed and evidence.value > 0.9 and (evidence.control or 0) < 0.05
    for name, sizes in (("fourier-pizza", {"p": 29, "frequencies": 5}), ("columns", {"n": 30})):
        model, task, _ = build(name, **sizes)
        assert pair_lookup(model, task).value < 0.05


def test_parts_are_what_functions_of_the_operand_explain_however_directions_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(12, 20, generator=generator)
    functions = torch.randn(12, 3, generator=generator)
    read_off = torch.linalg.pinv(embedding) @ functions  # a linear map that reads the functions off the embedding
    part = part_of(embedding, functions)
    differ = functions - functions.mean(0)
    assert torch.allclose(part @ read_off - (part @ read_off).mean(0), differ, atol=1e-4)
    assert orthonormal((part - part.mean(0)).T).shape[1] == 3
    random = random_part(embedding, 4, 1)
    assert orthonormal((random - random.mean(0)).T).shape[1] == 4
    assert torch.equal(random, random_part(embedding, 4, 1))
    assert orthonormal((random_part(embedding, 20, 1) - 0).T).shape[1] <= 11


def test_digits_are_told_apart_where_the_last_ten_is_not_full() -> None:
    x = torch.arange(45)
    low, high = torch.randn(10, 30, generator=torch.Generator().manual_seed(1)), torch.randn(5, 30)
    parts = digit_components(low[x % 10] + high[x // 10], 10)
    for part, true in zip(parts, (low[x % 10], high[x // 10]), strict=True):
        assert torch.allclose(part - part[0], true - true[0], atol=1e-4)


@pytest.mark.parametrize("base", [6, 8, 10, 13])
def test_the_base_of_an_embedding_is_found(base: int) -> None:
    x = torch.arange(40)
    code = torch.cat([torch.nn.functional.one_hot(x % base), torch.nn.functional.one_hot(x // base)], dim=1).float()
    noise = 0.1 * torch.randn(40, code.shape[1], generator=torch.Generator().manual_seed(0))
    assert written_to(code + noise) == base
    a, b = torch.tensor([3 * base + 2]), torch.tensor([base + 5])
    assert digit_swapped(a, b, base, False).item() == 3 * base + 5
    assert digit_swapped(a, b, base, True).item() == base + 2
