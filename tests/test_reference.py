"""Reference models are what they say: accuracy over the full table and the mechanism's signature, by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import accuracy, answered, neuron_maps

from circuits import reference
from circuits.errors import BadInput, UnknownName
from circuits.reference import REFERENCES, build
from circuits.reference.wiring import table


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
    operands = table(task)
    tokens = task.encode(operands[:: max(1, len(operands) // 500)]).inputs
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
        ("fourier-clock", {"phases": 8}, "odd"),
        ("number-line", {"thresholds": 0}, "thresholds"),
        ("number-line", {"spread": 1.5}, "spread"),
        ("columns", {"n": 101}, "expected 11 to 100"),
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


class TestFourierClock:
    @pytest.mark.parametrize(("p", "frequencies"), [(23, 3), (53, 6), (113, 6)])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_is_right_on_the_full_table(self, p: int, frequencies: int, seed: int) -> None:
        assert accuracy(build("fourier-clock", seed=seed, p=p, frequencies=frequencies)) == 1.0

    @settings(max_examples=15)
    @given(p=st.sampled_from([11, 13, 17, 29, 37, 59]), seed=st.integers(0, 10**6), phases=st.sampled_from([5, 7, 9]))
    def test_is_right_for_any_size_and_seed(self, p: int, seed: int, phases: int) -> None:
        assert accuracy(build("fourier-clock", seed=seed, p=p, frequencies=min(5, (p - 1) // 2), phases=phases)) == 1.0

    def test_logits_depend_on_the_sum_alone_unlike_the_pizzas(self) -> None:
        spread = {}
        for name in ("fourier-clock", "fourier-pizza"):
            model, task, _ = build(name, seed=1, p=31, frequencies=4, phases=9)
            a, b = table(task).T
            with torch.no_grad():
                logits = model(task.encode(table(task)).inputs)[:, -1, :31]
            right = logits.gather(1, ((a + b) % 31)[:, None]).squeeze(1)
            square = torch.empty(31, 31).index_put_(((a + b) % 31, (a - b) % 31), right)
            # distance irrelevance of Zhong et al. 2023: how little the right logit varies with the sum alone fixed
            spread[name] = float(square.std(1).mean() / square.mean())
            if name == "fourier-clock":
                assert float(right.mean()) == pytest.approx(20, rel=0.02), "20 times the mean of cos 0"
        assert spread["fourier-clock"] < 0.02
        assert spread["fourier-pizza"] > 0.1

    def test_neurons_have_one_frequency_each(self) -> None:
        maps = neuron_maps(build("fourier-clock", seed=1, frequencies=5))
        assert len(maps) == 5 * 25
        marginal = torch.fft.rfft(maps.mean(2)).abs()[:, 1:]
        assert (marginal.amax(1) ** 2 / marginal.square().sum(1)).min() > 0.95
        assert sorted((marginal.argmax(1) + 1).bincount().unique().tolist()) == [0, 25]

    def test_heads_attend_to_one_operand_each(self) -> None:
        model, task, _ = build("fourier-clock", p=11, frequencies=3)
        name = "blocks.0.attn.hook_pattern"
        _, cache = model.run_with_cache(task.encode(table(task)).inputs, names_filter=name)
        expected = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).expand(121, 2, 3)
        assert torch.allclose(cache[name][:, :, -1], expected, atol=1e-6)


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


class TestRandomInit:
    @pytest.mark.parametrize("sizes", [{}, {"n": 20}, {"p": 23, "d_model": 32}])
    def test_is_at_chance(self, sizes: dict[str, Any]) -> None:
        built = build("random-init", **sizes)
        assert built.truth == "not-learned"
        assert accuracy(built) < 0.15


def test_reference_is_reachable_from_the_package() -> None:
    import circuits

    assert circuits.reference is reference
