"""Reference models of plain addition: accuracy and signature of number line, columns, result bag and range lookup."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import accuracy, answered, neuron_maps
from torch import Tensor

from circuits.reference import Reference, build
from circuits.reference.wiring import table


def predicted_by_swap(built: Reference, classes: Tensor, base: Tensor, source: Tensor) -> Tensor:
    """What the model says once the part of a's embedding that tells ``classes`` apart comes from the source."""
    n = built.task.n_operand_values
    embedding = built.model.W_E[:n].detach()
    means = torch.stack([embedding[classes == v].mean(0) for v in classes.unique()])
    basis = torch.linalg.svd((means - embedding.mean(0)).T, full_matrices=False)
    span = basis.U[:, basis.S / basis.S.max() > 1e-4]
    change = (embedding[source[:, 0]] - embedding[base[:, 0]]) @ span @ span.T

    def swap(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, 0] += change
        return activation

    with torch.no_grad(), built.model.hooks([("hook_embed", swap)]):
        return built.model(built.task.encode(base).inputs)[:, -1].argmax(-1)


def base_and_source(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(n, (2, 500, 2), generator=generator))


class TestNumberLine:
    @settings(max_examples=15)
    @given(n=st.integers(5, 60), thresholds=st.integers(1, 64), spread=st.floats(0, 1), seed=st.integers(0, 10**6))
    def test_is_right_on_the_full_table(self, n: int, thresholds: int, spread: float, seed: int) -> None:
        built = build("number-line", seed=seed, n=n, thresholds=thresholds, spread=spread)
        assert built.truth == "algorithm/number-line"
        assert accuracy(built) == 1.0

    def test_is_right_at_the_largest_size(self) -> None:
        assert (
            accuracy(
                build("number-line", n=300), torch.randint(300, (4000, 2), generator=torch.Generator().manual_seed(0))
            )
            == 1.0
        )

    def test_neurons_are_hinges_of_the_sum(self) -> None:
        maps = neuron_maps(build("number-line", n=40, thresholds=5, spread=1.0))
        a, b = torch.cartesian_prod(torch.arange(40), torch.arange(40)).T
        for neuron in maps.flatten(1):
            by_sum = torch.zeros(79, dtype=torch.float64).index_put_((a + b,), neuron)
            assert torch.allclose(by_sum[a + b], neuron, atol=1e-3), "a function of the sum"
            slopes = by_sum.diff()
            inner = slopes[(slopes.abs() > 1e-3) & (slopes.abs() < 0.999)]
            assert len(inner) <= 1, "slope 0 on one side of the threshold and 1 on the other"

    def test_moving_the_operand_along_its_slope_moves_the_answer(self) -> None:
        model, task, _ = build("number-line", n=50)
        embedding, x = model.W_E[:50].detach(), torch.arange(50.0) - 24.5
        line = (embedding - embedding.mean(0)).T @ x
        line = line / line.norm()
        base, source = base_and_source(50)
        change = ((embedding[source[:, 0]] - embedding[base[:, 0]]) @ line)[:, None] * line

        def swap(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, 0] += change
            return activation

        with torch.no_grad(), model.hooks([("hook_embed", swap)]):
            said = model(task.encode(base).inputs)[:, -1].argmax(-1)
        assert (said == source[:, 0] + base[:, 1]).float().mean() > 0.98


class TestColumns:
    @settings(max_examples=15)
    @given(n=st.integers(11, 100), seed=st.integers(0, 10**6))
    def test_is_right_on_the_full_table(self, n: int, seed: int) -> None:
        built = build("columns", seed=seed, n=n)
        assert built.truth == "algorithm/columns"
        assert accuracy(built) == 1.0

    @pytest.mark.parametrize("n", [50, 100])
    def test_swapping_a_digit_changes_the_answer_as_the_columns_predict(self, n: int) -> None:
        built = build("columns", seed=2, n=n)
        base, source = base_and_source(n)
        a, new = base[:, 0], source[:, 0]
        units = predicted_by_swap(built, torch.arange(n) % 10, base, source)
        assert (units == a // 10 * 10 + new % 10 + base[:, 1]).float().mean() > 0.98
        tens = predicted_by_swap(built, torch.arange(n) // 10, base, source)
        assert (tens == new // 10 * 10 + a % 10 + base[:, 1]).float().mean() > 0.98

    def test_adding_a_carry_adds_ten(self) -> None:
        model, task, _ = build("columns", n=50)
        a, b = table(task).T
        carried = a % 10 + b % 10 >= 10
        maps = neuron_maps(Reference(model, task, "")).flatten(1)
        units = (a % 10 + b % 10).double()
        # the pair of hinges at 9 and 10 stands twice: once in the indicators of the units, once as the carry
        at = {
            t: [i for i, h in enumerate(maps) if torch.allclose(h, (units - t).clamp_min(0), atol=1e-3)]
            for t in (9, 10)
        }
        assert [len(at[t]) for t in (9, 10)] == [2, 2]
        answers = []
        for nine in at[9]:
            for ten in at[10]:

                def carry(activation: Tensor, hook: Any, nine: int = nine, ten: int = ten) -> Tensor:
                    activation = activation.clone()
                    activation[:, -1, nine], activation[:, -1, ten] = 1.0, 0.0
                    return activation

                with torch.no_grad(), model.hooks([("blocks.0.mlp.hook_post", carry)]):
                    answers.append(model(task.encode(table(task)).inputs)[:, -1].argmax(-1))
        without = ~carried & (a + b + 10 < 99)
        assert any(torch.equal(said[without], (a + b + 10)[without]) for said in answers)

    @pytest.mark.parametrize("n", [30, 50, 60, 100])
    def test_without_cascade_it_errs_by_a_hundred_where_nine_takes_a_carry(self, n: int) -> None:
        model, task, truth = build("columns", n=n, cascade=False)
        assert truth == "algorithm/columns"
        a, b = table(task).T
        with torch.no_grad():
            said = model(task.encode(table(task)).inputs)[:, -1].argmax(-1)
        cascade = (a // 10 + b // 10 == 9) & (a % 10 + b % 10 >= 10)
        assert torch.equal(said, a + b - 100 * cascade)


class TestResultRangeBag:
    @pytest.mark.parametrize("n", [7, 20, 50, 73])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_is_right_on_the_full_table(self, n: int, seed: int) -> None:
        built = build("result-range-bag", seed=seed, n=n)
        assert built.truth == "heuristics/result-range-bag"
        assert accuracy(built) == 1.0

    def test_neurons_of_the_second_layer_match_ranges_or_residues_of_the_result(self) -> None:
        built = build("result-range-bag", n=50)
        a, b = table(built.task).T
        seen = []
        for neuron in neuron_maps(built, layer=1).flatten(1):
            results = (a + b)[neuron > 0.5].unique()
            assert torch.allclose(neuron, torch.isin(a + b, results).double(), atol=1e-3), "on or off, by the sum"
            steps = results.diff().unique().tolist()
            if len(results):
                assert len(steps) <= 1, "a range or a residue class"
                seen.append(steps[0] if steps else 0)
        assert {1, *range(2, 11)} <= set(seen)

    def test_no_single_neuron_is_needed_everywhere(self) -> None:
        model, task, _ = build("result-range-bag", n=30)
        tokens, right = task.encode(table(task)).inputs, table(task).sum(1)
        for neuron in range(0, model.W_in.shape[-1], 9):

            def off(activation: Tensor, hook: Any, neuron: int = neuron) -> Tensor:
                activation = activation.clone()
                activation[:, -1, neuron] = 0.0
                return activation

            with torch.no_grad(), model.hooks([("blocks.1.mlp.hook_post", off)]):
                assert (model(tokens)[:, -1].argmax(-1) == right).float().mean() > 0.9


def vote(n: int, offsets: list[int], width: int = 10) -> Tensor:
    """How many pairs a vote of ranges with known units digit gets right, by counting in plain Python."""
    right = torch.zeros(n, n, dtype=torch.bool)
    counts: dict[tuple[int, int, int], dict[int, int]] = {}
    for a in range(n):
        for b in range(n):
            for o in offsets:
                cell = counts.setdefault((o, (a - o) // width, (b - o) // width), {})
                cell[a + b] = cell.get(a + b, 0) + 1
    for a in range(n):
        for b in range(n):
            best, score = None, -math.inf
            for c in range((a + b) % 10, 2 * n - 1, 10):
                total = 0.0
                for o in offsets:
                    cell = counts[(o, (a - o) // width, (b - o) // width)]
                    total += math.log(cell.get(c, 0) / sum(cell.values()) + 1e-9)
                if total > score + 1e-9:
                    best, score = c, total
            right[a, b] = best == a + b
    return right


class TestRangeLookup:
    @pytest.mark.parametrize(("grids", "expected"), [(1, 0.75), (2, 0.9936), (3, 1.0), (4, 1.0)])
    def test_accuracy_by_number_of_grids(self, grids: int, expected: float) -> None:
        built = build("range-lookup", seed=grids, grids=grids)
        assert built.truth == "heuristics/range-lookup"
        assert accuracy(built) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("n", "grids", "offset"), [(30, 1, 0), (50, 1, 3), (37, 2, 4)])
    def test_is_the_vote_that_it_says(self, n: int, grids: int, offset: int) -> None:
        built = build("range-lookup", n=n, grids=grids, offset=offset)
        offsets = [(offset + round(i * 10 / grids)) % 10 for i in range(grids)]
        ours, expected = answered(built.model, built.task).reshape(n, n), vote(n, offsets)
        assert float((ours != expected).float().mean()) < 0.005

    def test_every_error_of_one_grid_is_plus_or_minus_ten(self) -> None:
        model, task, _ = build("range-lookup", grids=1)
        with torch.no_grad():
            said = model(task.encode(table(task)).inputs)[:, -1].argmax(-1)
        error = (said - table(task).sum(1)).abs()
        assert set(error.tolist()) == {0, 10}

    @pytest.mark.parametrize(("offset", "cells"), [(0, 4**2 + 5**2), (3, 5**2 + 5**2)])
    def test_neurons_are_exact_rectangles_on_the_grid_or_digit_pairs(self, offset: int, cells: int) -> None:
        built = build("range-lookup", n=40, grids=2, offset=offset)
        maps = neuron_maps(built)
        on = maps > 0.5
        assert (maps - on.double()).abs().max() < 1e-4
        rectangles = 0
        for neuron in on:
            rows, columns = neuron.any(1).nonzero().flatten(), neuron.any(0).nonzero().flatten()
            assert int(neuron.sum()) == len(rows) * len(columns), "a product set"
            if int(rows[-1] - rows[0]) == len(rows) - 1 and len(rows) > 1:
                rectangles += 1
                edges = {int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1} - {0, 40}
                assert all((edge - offset) % 5 == 0 for edge in edges)
            else:
                assert len({int(r) % 10 for r in rows}) == 1
        assert rectangles == cells

    def test_shifting_the_bands_moves_the_errors(self) -> None:
        wrong = {}
        for offset in (0, 5):
            built = build("range-lookup", grids=1, offset=offset)
            wrong[offset] = ~answered(built.model, built.task).reshape(50, 50)
        assert torch.equal(wrong[0][:40, :40], wrong[5][5:45, 5:45]), "the same pattern, five further on"
