"""Knockout selectivity: the controls against brute force, and what each says on models whose mechanism is known."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference
from circuits.mechanisms.knockout import (
    as_many_others,
    contribution_matched,
    contributions,
    most_associated,
    over_prompts,
    right_without,
)


def test_most_associated_neurons_are_those_with_most_heuristics() -> None:
    associated = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    target = most_associated(associated, 2, generator)
    assert target[0].tolist() == [True, False, False, True]
    assert not target[1].any() and int(target[2].sum()) == 2
    drawn = torch.stack([most_associated(associated, 2, generator)[2] for _ in range(60)]).float().mean(0)
    assert drawn.min() > 0.25 and drawn.max() < 0.75, "ties are drawn at random"


def test_controls_lie_outside_the_target_and_match_it() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(50, 40, generator=generator) < 0.2
    contribution = torch.rand(50, 40, generator=generator)
    others = as_many_others(target, generator)
    assert not (others & target).any() and torch.equal(others.sum(1), target.sum(1))
    matched = contribution_matched(target, contribution, generator)
    assert not (matched & target).any()
    wanted, reached = ((contribution * x).sum(1) for x in (target, matched))
    # one neuron more or fewer changes a sum by at most 1
    assert ((wanted - reached).abs() <= 0.5).all()
    again = contribution_matched(target, contribution, generator)
    assert not torch.equal(matched, again)


def test_what_cannot_be_matched_takes_all_that_there_is() -> None:
    target = torch.tensor([[True, False, False]])
    contribution = torch.tensor([[9.0, 1.0, 2.0]])
    matched = contribution_matched(target, contribution, torch.Generator().manual_seed(0))
    assert matched.tolist() == [[False, True, True]]


def test_each_row_loses_its_own_neurons() -> None:
    model, task, _ = reference.build("range-lookup", n=20, grids=1)
    readings = mechanisms.read(model, task)
    rows, neurons = torch.arange(0, 400, 7), torch.tensor([5, 2, 9])
    out = torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(0)) < 0.5
    right = right_without(model, task.answer_tokens, readings, rows, neurons, out)
    for i, row in enumerate(rows.tolist()):

        def zero(activation, hook, chosen=neurons[out[i]]):
            activation = activation.clone()
            activation[:, -1, chosen] = 0.0
            return activation

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", zero)]):
            logits = model(readings.tokens[row][None])[0, -1, task.answer_tokens]
        assert bool(right[i]) == (int(logits.argmax()) == int(readings.labels[row]))
    nothing = torch.zeros_like(out)
    assert torch.equal(right_without(model, task.answer_tokens, readings, rows, neurons, nothing), readings.right[rows])


def test_contributions_add_up_where_logits_are_linear_in_neurons() -> None:
    model, task, _ = reference.build("range-lookup", n=20, grids=1)
    readings = mechanisms.read(model, task)
    rows = torch.arange(50)
    logits = readings.logits[rows]
    labels = readings.labels[rows]
    centred = logits.gather(1, labels[:, None]).squeeze(1) - logits.mean(1)
    assert torch.allclose(contributions(model, task.answer_tokens, readings, rows).sum(1), centred, atol=1e-2)


def test_the_published_control_does_not_tell_an_algorithm_from_a_lookup() -> None:
    columns = mechanisms.knockout(*reference.build("columns", n=30)[:2])
    assert columns.details["random"] > 0.3, "it is as large for a column algorithm"
    lookup = mechanisms.knockout(*reference.build("range-lookup", n=60, grids=2)[:2])
    low, high = lookup.interval
    assert low <= lookup.value <= high and lookup.passed is None
    assert lookup.details["matched_prompts"] > 0.5
    assert low > lookup.control + 0.1, "the matched one finds that cells are needed where they are on"


def test_only_prompts_that_could_be_matched_count() -> None:
    k = 30
    result = {
        "targeted": torch.ones(k, 1),
        "target_sum": torch.full((k, 1), 10.0),
        "matched_sum": torch.cat([torch.full((24, 1), 9.0), torch.full((6, 1), 3.0)]),
        "matched": torch.cat([torch.full((24, 1), 0.5), torch.full((6, 1), -1.0)]),
        "random": torch.cat([torch.full((24, 1), 0.5), torch.full((6, 1), -1.0)]),
    }
    value, (low, high), share = over_prompts(result, "matched", seed=0)
    assert (value, low, high, share) == (0.5, 0.5, 0.5, 0.8)
    assert over_prompts(result, "random", seed=0)[0] == pytest.approx(0.2)
    result["targeted"][:12] = 0
    value, _, share = over_prompts(result, "matched", seed=0)
    assert value != value and share == pytest.approx(12 / 18)


def test_nothing_is_knocked_out_where_nothing_matches() -> None:
    model, task, _ = reference.build("pair-memoriser", p=23)
    evidence = mechanisms.knockout(model, task)
    assert evidence.value != evidence.value and evidence.control is None


def test_the_same_seed_knocks_out_the_same() -> None:
    model, task, _ = reference.build("columns", n=20)
    readings = mechanisms.read(model, task)
    first, again = (mechanisms.knockout(model, task, seed=3, readings=readings) for _ in range(2))
    assert first.details["random"] == again.details["random"] and first.details == again.details
