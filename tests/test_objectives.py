"""The objectives' maths against slow definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import objectives, tasks
from circuits._io import from_json, to_json
from circuits.errors import BadInput
from circuits.model import ModelConfig, Transformer
from circuits.objectives import Recipe, Stage
from circuits.objectives.penalties import two_level
from circuits.objectives.reinforce import leave_one_out
from circuits.tasks.base import Batch

TASK = tasks.get("addition", n=12, block=3)
MODEL = Transformer(ModelConfig(d_vocab=TASK.d_vocab, n_ctx=3, d_model=16, n_heads=2, d_mlp=24), seed=0)
BATCH = TASK.examples("train")


def loss(objective, batch=BATCH, model=MODEL, task=TASK, seed=0):
    return objective.loss(model, task, batch, generator=torch.Generator().manual_seed(seed))


def value(*args, **options):
    return loss(*args, **options).value.item()


def gradient(value):
    parameters = [p for p in MODEL.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_next_token_and_answer_are_cross_entropies():
    logits = MODEL(BATCH.inputs)
    every = F.cross_entropy(logits.flatten(0, 1), BATCH.targets.flatten())
    assert value(objectives.get("next-token")) == pytest.approx(every.item(), rel=1e-5)
    answer = F.cross_entropy(logits[:, -1], BATCH.targets[:, -1])
    assert value(objectives.get("answer")) == pytest.approx(answer.item(), rel=1e-5)


def test_answer_ignores_labels_of_the_prompt():
    digits = tasks.get("digit-addition", digits=2)
    model = Transformer(ModelConfig(d_vocab=digits.d_vocab, n_ctx=digits.n_ctx, d_model=16, n_heads=2), seed=0)
    batch = digits.sample("train", 8, generator=torch.Generator().manual_seed(0))
    logits = model(batch.inputs)
    mask = batch.completion_mask
    expected = F.cross_entropy(logits[:, mask].flatten(0, 1), batch.targets[:, mask].flatten())
    assert value(objectives.get("answer"), batch, model, digits) == pytest.approx(expected.item(), rel=1e-5)


@given(st.floats(0.3, 3.0))
@settings(max_examples=8, deadline=None)
def test_value_loss_grows_with_distance(sigma):
    objective = objectives.get("value", sigma=sigma)
    model = Transformer(MODEL.config, seed=0)
    one = Batch(BATCH.tokens[:1], BATCH.operands[:1], BATCH.roles)
    truth = int(TASK.answer(one.operands))
    losses = []
    for away in range(10):
        peak = torch.zeros(TASK.d_vocab)
        peak[truth + away if truth < 12 else truth - away] = 8.0
        logits = model(one.inputs)
        shift = (peak - logits[0, -1]).detach()

        class Shifted(torch.nn.Module):
            cfg = model.cfg

            def forward(self, tokens, shift=shift):
                out = model(tokens)
                return out + shift

        losses.append(objective.loss(Shifted(), TASK, one, generator=torch.Generator()).value.item())
    assert all(farther - nearer > 0.01 for nearer, farther in itertools.pairwise(losses))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_two_level_penalty_is_zero_only_at_the_levels(seed):
    h = torch.rand(30, generator=torch.Generator().manual_seed(seed)) * 3
    assert float(two_level(torch.tensor([[0.0, 1.0, 1.0, 0.0]])).sum()) == 0.0
    inner = h[(h > 0.01) & ((h - 1).abs() > 0.01)]
    for value in inner.tolist():
        expected = value**2 * max(-1.0, min(1.0, 1 - value)) ** 2 + 0.5 * max(value - 1, 0.0) ** 2
        assert float(two_level(torch.tensor([[value]])).sum()) == pytest.approx(expected, rel=1e-4)
        assert expected > 0


def test_banded_without_share_and_penalty_is_answer():
    exact = objectives.get("banded", share=0.0, two_level_penalty=0.0)
    assert value(exact) == pytest.approx(value(objectives.get("answer")), rel=1e-5)


def test_banded_target_by_brute_force():
    objective = objectives.get("banded", share=0.5, width=5, offset=2, two_level_penalty=0.0)
    one = Batch(BATCH.tokens[40:41], BATCH.operands[40:41], BATCH.roles)
    a, b = one.operands[0].tolist()

    def band(x):
        low = (x - 2) // 5 * 5 + 2
        return [v for v in range(max(low, 0), min(low + 5, 12))]

    target = torch.zeros(TASK.d_vocab)
    for x in band(a):
        for y in band(b):
            target[x + y] += 0.5 / (len(band(a)) * len(band(b)))
    target[a + b] += 0.5
    logp = MODEL(one.inputs)[0, -1].log_softmax(-1)
    assert value(objective, one) == pytest.approx(-(target * logp).sum().item(), rel=1e-4)


def test_leave_one_out_by_definition():
    reward = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([reward[:, i] - reward[:, [j for j in range(5) if j != i]].mean(1) for i in range(5)], 1)
    assert torch.allclose(leave_one_out(reward), expected, atol=1e-6)
    assert torch.allclose(leave_one_out(torch.ones(3, 4)), torch.zeros(3, 4), atol=1e-6)


def test_reinforce_matches_the_exact_policy_gradient_in_expectation():
    small = Batch(BATCH.tokens[:6], BATCH.operands[:6], BATCH.roles)
    objective = objectives.get("reinforce", reward="exact", samples=4096)
    p = MODEL(small.inputs)[:, -1].softmax(-1)
    exact = gradient(-p.gather(1, small.tokens[:, -1:]).mean())
    estimate = torch.stack([gradient(loss(objective, small, seed=s).value) for s in range(30)]).mean(0)
    cosine = F.cosine_similarity(exact, estimate, dim=0)
    assert float(cosine) > 0.9
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1.0, abs=0.25)


def test_random_reward_has_no_gradient_on_average():
    objective = objectives.get("reinforce", reward="random", samples=64)
    draws = torch.stack([gradient(loss(objective, seed=s).value) for s in range(60)])
    mean, error = draws.mean(0), draws.std(0) / 60**0.5
    informative = error > 1e-9
    z = (mean[informative] / error[informative]).abs()
    assert float((z > 4).float().mean()) < 0.01


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES.keys() - {"legal-set", "simulate", "state"}))
def test_every_objective_reaches_every_parameter_and_round_trips(name):
    model = Transformer(MODEL.config, seed=1)
    objective = objectives.get(name)
    loss(objective, model=model).value.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert missing == []
    recipe = Recipe("r", (Stage(objective),))
    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize("name", ["value", "banded"])
def test_one_token_objectives_refuse_digits(name):
    with pytest.raises(BadInput, match="one token"):
        objectives.get(name).check(tasks.get("digit-addition"))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("value", {"sigma": 0}),
        ("banded", {"share": 2}),
        ("banded", {"width": 0}),
        ("reinforce", {"reward": "love"}),
        ("reinforce", {"samples": 1}),
    ],
)
@pytest.mark.untyped
def test_bad_parameters_are_refused(name, fields):
    with pytest.raises(BadInput, match=str(next(iter(fields.values())))):
        objectives.get(name, **fields)
