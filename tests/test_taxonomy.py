"""The heuristic taxonomy: matching against brute force, planted neurons by name, and models that are known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import mechanisms, reference
from circuits.errors import BadInput
from circuits.mechanisms.heuristics import Matches, decimal_patterns, declare, match, own_patterns, ranks
from circuits.mechanisms.taxonomy import value_vectors


def square(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = torch.arange(n * n)
    operands = torch.stack([flat // n, flat % n], dim=1)
    return operands, operands[:, 0], operands[:, 1]


def with_noise(maps: list[torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([m.float() + 0.01 * torch.rand(len(m), generator=generator) for m in maps], dim=1)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_are_shares_of_the_top_prompts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    operands, _, _ = square(12)
    results = operands.sum(1)
    keys, key_values = (torch.rand(144, 3, generator=generator) for _ in range(2))
    found = match(keys, key_values, operands, results)
    for i in torch.randperm(len(found.heuristics.names), generator=generator)[:40].tolist():
        maps = key_values if found.heuristics.on_result[i] else keys
        k = int(found.heuristics.tops[i])
        for neuron in range(3):
            top = maps[:, neuron].topk(k).indices
            share = float(found.heuristics.members[i][top].float().mean())
            if float(found.score[neuron, i]) == 0 and found.heuristics.kinds[i] == "pattern":
                continue  # none of the neuron's own patterns
            assert float(found.score[neuron, i]) == pytest.approx(share, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_a_neurons_patterns_are_the_five_that_most_of_its_top_prompts_have(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    operands, a, b = square(25)
    found = declare(operands, a + b)
    support = torch.rand(3, len(found.names), generator=generator)
    allowed = own_patterns(found, support)
    for neuron in range(3):
        for number in ("a", "b", "result"):
            named = [i for i, name in enumerate(found.names) if name.startswith(f"{number} is")]
            patterns = [i for i in named if found.kinds[i] == "pattern"]
            best = sorted(patterns, key=lambda i: -float(support[neuron, i]))[:5]
            kept = {i for i in best if float(support[neuron, i]) >= 0.1}
            assert {i for i in patterns if bool(allowed[neuron, i])} == kept and len(patterns) > 5
    others = torch.tensor([kind != "pattern" for kind in found.kinds])
    assert bool(allowed[:, others].all())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_tied_prompts_count_by_their_chance_to_be_on_top(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(4, (30, 2), generator=generator).float()
    chance = ranks(maps).top(k)
    assert torch.allclose(chance.sum(0), torch.full((2,), float(k)))
    for column in range(2):
        for row in range(30):
            above = int((maps[:, column] > maps[row, column]).sum())
            tied = int((maps[:, column] == maps[row, column]).sum())
            expected = min(max((k - above) / tied, 0), 1)
            assert float(chance[row, column]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(ranks(-maps).top(k), ranks(maps).reversed().top(k))


def planted() -> tuple[Matches, list[str]]:
    operands, a, b = square(40)
    results = a + b
    on_operands = {
        "a in 10 to 19": (a >= 10) & (a < 20),
        "a and b in 20 to 29": (a >= 20) & (a < 30) & (b >= 20) & (b < 30),
        "b = 2 mod 5": b % 5 == 2,
        "a and b = 1 mod 3": (a % 3 == 1) & (b % 3 == 1),
        "a is .7": a % 10 == 7,
        "b is 13": b == 13,
        "a = b": a == b,
    }
    on_result = {
        "result in 30 to 39": (results >= 30) & (results < 40),
        "result = 4 mod 7": results % 7 == 4,
        "multi-result": (results == 31) | (results == 46),
    }
    nothing = torch.zeros(1600)
    keys = with_noise([*on_operands.values(), *[nothing] * len(on_result)])
    key_values = with_noise([*[nothing] * len(on_operands), *on_result.values()])
    return match(keys, key_values, operands, results), [*on_operands, *on_result]


def test_planted_neurons_are_matched_by_name() -> None:
    found, names = planted()
    for neuron, name in enumerate(names):
        assert name in found.names_of(neuron), (name, found.names_of(neuron))
    assert found.classified().all()
    kinds = ["range", "both ranges", "modulo", "both modulo", "pattern", "value", "identical", "range", "modulo"]
    for neuron, kind in enumerate([*kinds, "multi-result"]):
        assert bool(found.of_kind(kind)[neuron]), (names[neuron], kind)


def test_a_prompt_is_associated_with_the_neurons_whose_heuristics_are_about_it() -> None:
    found, names = planted()
    associated = found.associated()
    operands, _, _ = square(40)
    for row in (15 * 40 + 16, 25 * 40 + 21, 7 * 40 + 13):
        for neuron in range(len(names)):
            about = found.heuristics.members[:, row] & found.matched()[neuron]
            expected = int(about.sum()) + (names[neuron] == "multi-result" and int(operands[row].sum()) in (31, 46))
            assert int(associated[row, neuron]) == expected


def test_a_map_without_structure_has_the_base_score_and_no_heuristic() -> None:
    operands, _, _ = square(20)
    constant = torch.full((400, 1), 0.3)
    found = match(constant, constant, operands, operands.sum(1))
    whole = found.heuristics.base * 400 >= found.heuristics.tops
    declared = torch.tensor([kind != "pattern" for kind in found.heuristics.kinds])
    assert torch.allclose(found.score[0, declared], found.heuristics.base[declared], atol=1e-5)
    assert bool(whole.any()) and not found.classified().any()
    # active at a handful of scattered prompts: all else is tied at zero
    sparse = torch.zeros(400, 1)
    sparse[[3, 77, 150, 291, 360]] = 1.0
    assert not match(sparse, sparse, operands, operands.sum(1)).of_kind("range").any()


def test_the_lowest_prompts_count_where_asked() -> None:
    operands, a, _ = square(30)
    low = -with_noise([(a >= 10) & (a < 20)])
    nothing = torch.zeros_like(low)
    assert not match(low, nothing, operands, operands.sum(1)).of_kind("range").any()
    assert "a in 10 to 19" in match(low, nothing, operands, operands.sum(1), both_ends=True).names_of(0)


@pytest.mark.parametrize("high", [53, 119])
def test_patterns_are_those_of_the_decimal_strings(high: int) -> None:
    numbers = torch.arange(high)
    width = len(str(high - 1))
    patterns = decimal_patterns(numbers)
    for pattern, members in patterns.items():
        expected = [re.fullmatch(pattern, str(x).zfill(width)) is not None for x in range(high)]
        assert members.tolist() == expected, pattern
        values = numbers[members]
        assert "." not in pattern or int(values.max() - values.min()) >= len(values), "a run of numbers is a range"
    assert len({tuple(m.tolist()) for m in patterns.values()}) == len(patterns)


def test_sizes_of_ranges_and_residues() -> None:
    operands, a, b = square(60)
    found = declare(operands, a + b)
    by_name = dict(zip(found.names, zip(found.members, found.tops.tolist(), strict=True), strict=True))
    members, top = by_name["a in 10 to 39"]
    assert top == int(members.sum()) == 30 * 60
    assert {n for n in by_name if n.startswith("a in ") and n.endswith("9")} >= {"a in 0 to 9", "a in 20 to 29"}
    assert by_name["result = 0 mod 10"][1] == int(((a + b) % 10 == 0).sum())
    assert by_name["a is .7"][1] == 60
    assert "a in 0 to 99" not in by_name, "it is about everything"


def test_votes_are_the_direct_path_to_the_logits() -> None:
    model, task, _ = reference.build("range-lookup", n=20, grids=1)
    votes = value_vectors(model, task, (0,))
    tokens = task.encode(torch.tensor([[3, 4]])).inputs
    with torch.no_grad():
        logits = model(tokens)[0, -1, task.answer_tokens]

        def more(activation, hook):
            activation = activation.clone()
            activation[0, -1, 5] += 1.0
            return activation

        with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", more)]):
            moved = model(tokens)[0, -1, task.answer_tokens] - logits
    assert torch.allclose(votes[5], moved - moved.mean(), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("result-range-bag", 0.25, 1.0), ("pair-memoriser", -0.05, 0.05), ("random-init", -0.15, 0.15)],
)
def test_excess_over_permuted_tokens(name: str, low: float, high: float) -> None:
    model, task, _ = reference.build(name, seed=1, **({"p": 31} if name != "result-range-bag" else {"n": 40}))
    evidence = mechanisms.taxonomy(model, task)
    assert low <= evidence.value <= high and abs(evidence.control) < 0.15
    assert evidence.value == pytest.approx(evidence.details["matched"] - evidence.details["renamed"], abs=1e-6)
    assert evidence.interval[0] <= evidence.value <= evidence.interval[1]
    assert evidence.passed is None


def test_a_network_whose_neurons_are_silent_matches_nothing() -> None:
    model, task, _ = reference.build("random-init", p=11)
    with torch.no_grad():
        model.blocks[0].mlp.W_in.zero_()
        model.blocks[0].mlp.b_in.fill_(-1.0)
    readings = mechanisms.read(model, task)
    assert math.isnan(mechanisms.taxonomy(model, task, readings=readings).value)
    assert math.isnan(mechanisms.knockout(model, task, readings=readings).value)


def test_the_published_score_says_yes_to_an_untrained_network() -> None:
    evidence = mechanisms.taxonomy(*reference.build("random-init", p=31)[:2])
    assert evidence.details["raw"] > 0.95 and evidence.details["raw_renamed"] > 0.95


def test_an_algorithm_can_match_better_than_a_lookup() -> None:
    columns = mechanisms.taxonomy(*reference.build("columns", n=50)[:2]).details
    lookup = mechanisms.taxonomy(*reference.build("range-lookup", n=50, grids=1)[:2]).details
    assert columns["matched"] > lookup["matched"] + 0.3


@pytest.mark.untyped
def test_maps_that_do_not_fit_are_named() -> None:
    operands, _, _ = square(6)
    maps = torch.rand(36, 2)
    with pytest.raises(BadInput, match="do not fit"):
        match(maps, maps[:, :1], operands, operands.sum(1))
    with pytest.raises(BadInput, match="not finite"):
        match(maps.log() * float("nan"), maps, operands, operands.sum(1))
    with pytest.raises(BadInput, match="at least one"):
        declare(operands[:0], operands[:0, 0])
