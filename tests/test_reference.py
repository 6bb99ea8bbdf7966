"""Reference models are what they say: accuracy over the full table and the mechanism's signature, by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from torch import Tensor

from circuits import reference
from circuits.errors import BadInput, UnknownName
from circuits.reference import REFERENCES, Reference, build
from circuits.reference.wiring import table


def answered(model: Any, task: Any, operands: Tensor | None = None) -> Bool[Tensor, " pairs"]:
    """Which pairs are right, as an argmax over all tokens; the truth is computed here, not by the task."""
    operands = table(task) if operands is None else operands
    total = operands.sum(1)
    truth = total % task.period if task.period else total
    with torch.no_grad():
        said = model(task.encode(operands).inputs)[:, -1].argmax(-1)
    return said == truth


def accuracy(built: Reference, operands: Tensor | None = None) -> float:
    return float(answered(built.model, built.task, operands).float().mean())


def neuron_maps(built: Reference, layer: int = 0) -> Float[Tensor, "neurons n n"]:
    """Activation of each neuron at the last position over the operand square."""
    n, name = built.task.n_operand_values, f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        _, cache = built.model.run_with_cache(built.task.encode(table(built.task)).inputs, names_filter=name)
    return cache[name][:, -1].T.reshape(-1, n, n).double()


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_same_seed_same_weights_and_another_seed_others(name: str) -> None:
    first, again, other = build(name, seed=3), build(name.replace("-", "_"), seed=3), build(name, seed=4)
    for key, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[key])
    assert not torch.equal(first.model.W_E, other.model.W_E)
    assert first.truth == again.truth == other.truth
    assert first.task == other.task


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_building_leaves_the_global_random_state_alone_and_gives_a_model_at_rest(name: str) -> None:
    before = torch.random.get_rng_state()
    model, task, _ = build(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert model.config.d_vocab == len(task.vocabulary)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_bridge_gives_the_same_logits(name: str) -> None:
    model, task, _ = build(name)
    tokens = task.encode(table(task)[::7]).inputs
    with torch.no_grad():
        ours, theirs = model(tokens), model.to_bridge()(tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'fourier-pizza'"):
        build("fourier-piza")
    with pytest.raises(UnknownName, match="size of fourier-pizza 'n'"):
        build("fourier-pizza", n=5)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("fourier-pizza", {"p": 52}, "not prime"),
        ("fourier-pizza", {"frequencies": 27}, "expected 1 to 26"),
        ("fourier-pizza", {"frequencies": 0}, "expected 1 to 26"),
        ("fourier-pizza", {"phases": 6}, "odd"),
        ("pair-memoriser", {"p": 113, "train_fraction": 0.9}, "at most 8000"),
        ("pair-memoriser", {"width": 2}, "larger width"),
        ("range-lookup", {"grids": 0}, "grids"),
        ("range-lookup", {"width": 51}, "expected 2 to 50"),
        ("range-lookup", {"offset": 10}, "expected 0 to 9"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(name: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(name, **sizes)


class TestFourierPizza:
    @pytest.mark.parametrize(("p", "frequencies"), [(23, 3), (53, 6), (53, 4), (113, 6)])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_is_right_on_the_full_table(self, p: int, frequencies: int, seed: int) -> None:
        built = build("fourier-pizza", seed=seed, p=p, frequencies=frequencies)
        assert built.truth == "algorithm/fourier"
        assert accuracy(built) == 1.0

    @settings(max_examples=15)
    @given(
        p=st.sampled_from([11, 13, 17, 29, 37, 59]), seed=st.integers(0, 10**6), phases=st.sampled_from([5, 7, 9, 11])
    )
    def test_is_right_for_any_size_and_seed(self, p: int, seed: int, phases: int) -> None:
        assert accuracy(build("fourier-pizza", seed=seed, p=p, frequencies=min(5, (p - 1) // 2), phases=phases)) == 1.0

    def test_too_few_frequencies_are_refused_not_built_wrong(self) -> None:
        with pytest.raises(BadInput, match="use more frequencies or phases"):
            build("fourier-pizza", p=197, frequencies=1, phases=5)

    def test_logits_are_the_formula_of_the_pizza(self) -> None:
        built = build("fourier-pizza", seed=5, p=31, frequencies=3, phases=25)
        model, task, _ = built
        a, b = table(task).T
        with torch.no_grad():
            logits = model(task.encode(table(task)).inputs)[:, -1, :31].double()
        spectrum = torch.fft.rfft(model.W_E[:31].detach().double() - model.W_E[:31].mean(0), dim=0).abs().square()
        keys = spectrum.sum(1).argsort(descending=True)[:3]
        expected = torch.zeros_like(logits)
        for k in keys.tolist():
            w = 2 * math.pi * k / 31
            distance = (w * (a - b) / 2).cos().abs()
            expected += distance[:, None] * (w * ((a + b)[:, None] - torch.arange(31))).cos()
        correlation = torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1]
        assert correlation > 0.9999

    def test_neurons_have_one_frequency_each_and_all_frequencies_are_used(self) -> None:
        maps = neuron_maps(build("fourier-pizza", seed=1))
        assert len(maps) == 6 * 7
        # relu(cos(wa-f) + cos(wb-f)) is a function of wa and wb alone: shifting by the period of w changes nothing
        marginal = torch.fft.rfft(maps.mean(2)).abs()[:, 1:]
        frequency = marginal.argmax(1) + 1
        assert sorted(frequency.bincount().unique().tolist()) == [0, 7]
        assert (marginal.amax(1) ** 2 / marginal.square().sum(1)).min() > 0.95


class TestPairMemoriser:
    @pytest.mark.parametrize("sizes", [{}, {"p": 31, "train_fraction": 0.7}, {"n": 30}, {"width": 48}])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_is_right_on_training_pairs_and_at_chance_elsewhere(self, sizes: dict[str, Any], seed: int) -> None:
        built = build("pair-memoriser", seed=seed, **sizes)
        trained, unseen = built.task.examples("train").operands, built.task.examples("random").operands
        assert accuracy(built, trained) == 1.0
        answers = len(built.task.answer_tokens)
        slack = 4 * math.sqrt(len(unseen) / answers) / len(unseen)
        assert accuracy(built, unseen) <= 1 / answers + slack

    @settings(max_examples=15)
    @given(
        p=st.sampled_from([7, 13, 23]),
        share=st.floats(0.2, 0.8),
        symmetric=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def test_remembers_training_pairs_at_any_size(self, p: int, share: float, symmetric: bool, seed: int) -> None:
        built = build("pair-memoriser", seed=seed, p=p, train_fraction=share, symmetric=symmetric)
        assert accuracy(built, built.task.examples("train").operands) == 1.0

    def test_has_one_neuron_for_each_training_pair_that_fires_on_it_alone(self) -> None:
        built = build("pair-memoriser", seed=2, p=17)
        maps = neuron_maps(built)
        on = maps > 1e-4
        assert on.sum((1, 2)).tolist() == [1] * len(maps)
        fires = on.any(0)
        trained = built.task.examples("train").operands
        expected = torch.zeros(17, 17, dtype=torch.bool)
        expected[trained[:, 0], trained[:, 1]] = True
        assert torch.equal(fires, expected)

    def test_guesses_unseen_pairs_with_many_different_answers(self) -> None:
        built = build("pair-memoriser", seed=0)
        with torch.no_grad():
            said = built.model(built.task.examples("random").inputs)[:, -1].argmax(-1)
        assert len(said.unique()) > 20

    def test_the_symmetric_one_knows_mirror_images_and_no_more(self) -> None:
        built = build("pair-memoriser", seed=0, symmetric=True)
        n, unseen = built.task.n_operand_values, built.task.examples("random").operands
        trained = torch.zeros(n, n, dtype=torch.bool)
        pairs = built.task.examples("train").operands
        trained[pairs[:, 0], pairs[:, 1]] = True
        mirrored = trained[unseen[:, 1], unseen[:, 0]]
        right = answered(built.model, built.task, unseen)
        assert right[mirrored].all()
        assert right[~mirrored].float().mean() < 0.06


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


class TestRandomInit:
    @pytest.mark.parametrize("sizes", [{}, {"n": 20}, {"p": 23, "d_model": 32}])
    def test_is_at_chance(self, sizes: dict[str, Any]) -> None:
        built = build("random-init", **sizes)
        assert built.truth == "not-learned"
        assert accuracy(built) < 0.15


def test_reference_is_reachable_from_the_package() -> None:
    import circuits

    assert circuits.reference is reference
