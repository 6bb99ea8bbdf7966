"""Rectangles that are the code, with their edges on the planted bands, and rectangles that are a fake."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference
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
