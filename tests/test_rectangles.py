"""Rectangles that are the code, with their edges on the planted bands, and rectangles that are a fake."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import mechanisms, reference
from circuits.mechanisms.rectangles import Sums, judged_rows, two_level_share
from circuits.model import Transformer
from circuits.reference.range_lookup import range_index
from circuits.reference.wiring import Mechanism, Neurons, one_hot, wire
from circuits.tasks import Addition

RIPPLE = 1e-2


def fake_ranges(n: int, width: int) -> tuple[Transformer, Addition]:
    """Rectangles of two ranges whose plateau is not flat: it rises by ``RIPPLE`` times a + b, and that is the answer.

    relu(2 [a in R] + 2 [b in R'] - 3 + r (a + b)) is 1 + r s inside its cell and, for a small r, zero outside. The
    cells' sum is 1 + r s wherever it is, and the logit of c is 2 c s - c^2, which is largest at c = s: which cell is
    on says nothing.
    """
    task = Addition(n=n, block=2)
    ranges = one_hot(range_index(n, width, 0), n // width)
    code = torch.cat([ranges, torch.arange(n)[:, None].double()], dim=1)
    cells = torch.cartesian_prod(torch.arange(n // width), torch.arange(n // width))
    parts = [torch.cat([2 * one_hot(c, n // width), torch.full((len(c), 1), RIPPLE)], dim=1) for c in cells.T]
    results = torch.arange(2 * n - 1).double()
    neurons = Neurons(
        torch.cat(parts, dim=1).T,
        torch.full((len(cells),), -3.0, dtype=torch.float64),
        (2 * results / RIPPLE).repeat(len(cells), 1),
    )
    identity = torch.eye(2 * n - 1, dtype=torch.float64)
    mechanism = Mechanism(code, "apart", (neurons,), identity, bias=-(results**2) - 2 * results / RIPPLE)
    return wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task


def test_a_crisp_picture_whose_ripple_is_the_code_is_a_fake() -> None:
    model, task = fake_ranges(30, 10)
    evidence = mechanisms.rectangles(model, task)
    assert evidence.details["accuracy"] > 0.99, "it adds"
    assert evidence.value > 0.95 and evidence.control == 0.0, "it looks like ranges"
    assert evidence.details["crisp"] > 0.95, "with two levels"
    assert evidence.details["edge_share"] == 1.0 and evidence.details["edge_width"] == 10
    assert evidence.details["ablated"] < 0.1, "and it needs these neurons"
    assert evidence.details["idealised"] < 0.15, "each cell says its mean"
    assert evidence.passed is False
    verdict = mechanisms.explain(model, task, budget="quick")
    assert verdict.mechanism != "range-lookup"


@pytest.mark.parametrize("offset", [0, 5])
def test_edges_lie_on_the_planted_bands_and_move_with_them(offset: int) -> None:
    model, task, _ = reference.build("range-lookup", n=30, grids=1, offset=offset, seed=1)
    evidence = mechanisms.rectangles(model, task)
    d = evidence.details
    assert (d["edge_width"], d["edge_offset"], d["edge_share"]) == (10, offset, 1.0)
    assert d["edge_chance"] < 0.6 and d["edge_p"] == pytest.approx(0.001)
    assert d["idealised"] >= d["accuracy"] - 0.05 and evidence.passed is True


@pytest.mark.parametrize(("n", "sizes"), [(80, {}), (100, {"grids": 2}), (140, {"grids": 1})])
def test_digits_that_matter_most_do_not_hide_the_ranges(n: int, sizes: dict[str, int]) -> None:
    model, task, _ = reference.build("range-lookup", n=n, **sizes)
    readings = mechanisms.read(model, task)
    if n > 128:
        assert len(readings.operands) < n * n, "the table is read in part"
    evidence = mechanisms.rectangles(model, task, readings=readings)
    assert evidence.passed is True and evidence.value > 0.6 and evidence.control == 0.0
    neurons = readings.neurons.shape[1]
    assert neurons - 100 - 2 <= evidence.details["n_rectangles"] <= neurons - 100, "all cells of the grids, no digits"
    assert evidence.details["share_of_all"] == pytest.approx(0.68, abs=0.05)


def unordered_cells(n: int, width: int) -> tuple[Transformer, Addition]:
    """Sums by uniform attention, hence the same for (b, a): a cell of two ranges is on for R x R' and for R' x R.

    Each range has a number, and no two pairs of ranges have the same sum of numbers. The first layer's hinges at both
    scalars, that sum and the sum of units, become one indicator a value; the second layer's neurons are these
    indicators, and vote 2 c times the part of a + b that they stand for. With -c^2 that is largest at c = a + b.
    """
    task = Addition(n=n, block=2)
    marks = torch.tensor([0, 1, 4, 9, 15])[: n // width]
    pairs = list(itertools.combinations_with_replacement(range(len(marks)), 2))
    x = torch.arange(n)
    code = torch.stack([marks[x // width], x % width], dim=1).double()
    values = [torch.tensor([int(marks[i] + marks[j]) for i, j in pairs]), torch.arange(2 * width - 1)]
    size = sum(map(len, values))
    w_in, b_in, w_out, first = [], [], [], 0
    for scalar, at in enumerate(values):
        for value in at.tolist():
            for step, slope in ((-1, 1.0), (0, -2.0), (1, 1.0)):
                w_in.append(torch.eye(2, dtype=torch.float64)[scalar])
                b_in.append(-float(value + step))
                w_out.append(slope * one_hot(torch.tensor([first]), size)[0])
            first += 1
    line = Neurons(torch.stack(w_in).T, torch.tensor(b_in, dtype=torch.float64), torch.stack(w_out))
    parts = torch.tensor([width * (i + j) for i, j in pairs] + list(range(2 * width - 1))).double()
    results = torch.arange(2 * n - 1).double()
    cells = Neurons(
        torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 2 * parts[:, None] * results
    )
    mechanism = Mechanism(code, "sum", (line, cells), torch.eye(2 * n - 1, dtype=torch.float64), bias=-(results**2))
    return wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task


def test_a_cell_and_its_mirror_image_are_one_shape_where_a_is_not_told_from_b() -> None:
    model, task = unordered_cells(40, 10)
    evidence = mechanisms.rectangles(model, task)
    d = evidence.details
    assert d["accuracy"] == 1.0
    # of the ten unordered pairs of four ranges four are squares; nothing is voted by the pair of lowest ranges
    assert (d["layer"], d["n_rectangles"], d["n_mirrored"]) == (1, 10, 6)
    assert evidence.value > 0.6 and evidence.control == 0.0
    assert d["idealised"] == 1.0 and d["ablated"] < 0.3 and evidence.passed is True
    assert (d["edge_width"], d["edge_offset"], d["edge_share"]) == (10, 0, 1.0)


def shape(n: int, *rectangles: tuple[int, int, int, int]) -> torch.Tensor:
    on = torch.zeros(n, n)
    for r0, r1, c0, c1 in rectangles:
        on[r0:r1, c0:c1] = 1.0
    return on


def sums_of(maps: torch.Tensor) -> Sums:
    return Sums.of(maps - maps.mean((1, 2), keepdim=True), torch.ones_like(maps[0]))


@pytest.mark.parametrize("n", [12, 40])
def test_mirrored_rectangles_are_found_and_staircases_are_none(n: int) -> None:
    low, high = n // 6, n // 2
    planted = shape(n, (1, low, high, n - 1), (high, n - 1, 1, low))
    a, b = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T.reshape(2, n, n)
    stairs = (a + b < n // 2).float()
    square = shape(n, (1, low, 1, low), (1, low, high, n), (high, n, 1, low), (high, n, high, n))
    maps = torch.stack([planted, stairs, square])
    alone = sums_of(maps).best()[0]
    r2, found = sums_of(maps).best(mirrored=True)
    assert r2[0] == pytest.approx(1.0, abs=1e-4) and alone[0] < 0.6
    assert sorted(found[0].reshape(2, 2).tolist()) == [[1, low], [high, n - 1]]
    assert r2[1] < 0.8, "a step of a + b"
    assert r2[2] < 0.8, "all pairs of values in either range"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_moving_edges_finds_the_best_rectangle_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 24
    low = torch.randint(0, n - 8, (6, 2), generator=generator)
    high = low + torch.randint(2, 9, (6, 2), generator=generator)
    maps = torch.stack([shape(n, (int(i), int(k), int(j), int(m))) for (i, j), (k, m) in zip(low, high, strict=True)])
    maps = maps + 0.15 * torch.randn(6, n, n, generator=generator)
    sums = sums_of(maps)
    r2, at = sums.best()
    exact, best = sums.of_coarse(torch.arange(n + 1), False)
    followed = exact > 0.5
    assert torch.equal(at[followed], best[followed])
    assert torch.allclose(r2[followed], exact[followed], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_best_two_levels_equal_brute_force(seed: int, rows: int) -> None:
    values = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed)) ** 3
    ordered = values.sort(0).values
    total = (values - values.mean(0)).square().sum(0)
    left = [sum((part - part.mean(0)).square().sum(0) for part in (ordered[:i], ordered[i:])) for i in range(1, rows)]
    assert torch.allclose(two_level_share(values), 1 - torch.stack(left).amin(0) / total, atol=1e-4)


def test_the_control_leaves_out_what_is_no_range_and_counts_by_importance() -> None:
    model, task, _ = reference.build("pair-memoriser", p=17)
    evidence = mechanisms.rectangles(model, task)
    assert evidence.details["two_level"] == pytest.approx(1.0) and evidence.value == 0.0
    assert evidence.control == 0.0, "a single cell is a rectangle under any names"


def test_accuracy_is_measured_on_a_sample_of_a_large_table() -> None:
    small, large = (mechanisms.read(*reference.build("columns", n=n)[:2]) for n in (20, 70))
    assert sorted(judged_rows(small, seed=0).tolist()) == list(range(400))
    assert len(judged_rows(large, seed=0).unique()) == 4096
