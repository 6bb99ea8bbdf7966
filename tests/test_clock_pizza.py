"""Descriptions of Fourier algorithms: every formula by brute force, and clocks and pizzas that were built."""

from __future__ import annotations

import cmath
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_native_bridge
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import explained_variance_score
from torch import Tensor

from circuits import mechanisms, reference, tasks
from circuits.errors import BadInput
from circuits.mechanisms.circles import components_of, explained_by, formula_values, power_of, row_moments
from circuits.mechanisms.distance_irrelevance import irrelevance, moments_by_distance
from circuits.mechanisms.gradient_symmetricity import operand_gradients, sampled_triples
from circuits.mechanisms.groups import group_table
from circuits.mechanisms.logit_terms import explained_by_groups, terms_of
from circuits.mechanisms.progress_measures import (
    component_norms,
    gini,
    loss_and_accuracy,
    neuron_frequencies,
    restricted_logits,
    sum_components,
)
from circuits.model import ModelConfig, Transformer
from circuits.reference import MlpNetwork
from circuits.tasks import ModularAddition, WithoutEquals

P = 7


def table(p: int) -> tuple[Tensor, Tensor]:
    """Return both operands of every pair."""
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    return a, b


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# --- formulas by brute force ---


def published_formula(name: str, i: int, j: int, k: int, w: float, half: float) -> float:
    """Return a formula as the published notebooks write it, as sums of the operands' waves."""
    x, y = math.cos(w * i) + math.cos(w * j), math.sin(w * i) + math.sin(w * j)
    if name == "clock":
        return math.cos(w * (i + j - k))
    if name == "pizza":
        c, s = math.cos(w * k / 2), math.sin(w * k / 2)
        return abs(c * x + s * y) - abs(c * y - s * x)
    if name == "pizza_appendix":
        cosines = (abs(x) - abs(y)) * math.cos(w * k)
        return cosines - (abs(x - y) - abs(x + y)) * math.sin(w * k) / math.sqrt(2)
    doubled = math.cos(2 * half * i) + math.cos(2 * half * j), math.sin(2 * half * i) + math.sin(2 * half * j)
    return -(math.cos(half * k) * doubled[0] + math.sin(half * k) * doubled[1])


@pytest.mark.parametrize("name", ["clock", "pizza", "pizza_appendix", "accompanying"])
@pytest.mark.parametrize("frequency", [1, 2, 5])
def test_formulas_are_the_published_ones_up_to_a_factor(name: str, frequency: int) -> None:
    p = 11
    a, b = table(p)
    total, distance = ((a + b) % p)[:, None], ((a - b) % p)[:, None]
    ours = formula_values(name, total, distance, torch.arange(p), frequency, p)
    w, half = 2 * math.pi * frequency / p, 2 * math.pi * (frequency * pow(2, -1, p) % p) / p
    theirs = torch.tensor(
        [
            [published_formula(name, i, j, k, w, half) for k in range(p)]
            for i, j in zip(a.tolist(), b.tolist(), strict=True)
        ],
        dtype=torch.double,
    )
    factor = float((ours * theirs).sum() / theirs.square().sum())
    assert factor > 0.1
    assert torch.allclose(ours, factor * theirs, atol=1e-9)


def test_accompanying_pizzas_need_an_odd_modulus() -> None:
    with pytest.raises(BadInput, match="odd modulus"):
        formula_values("accompanying", torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), torch.arange(8), 1, 8)


@given(st.integers(0, 1000))
def test_explained_variance_is_scikit_learns_after_standardising(seed: int) -> None:
    x, y = noise(9, 5, seed=seed), noise(9, 5, seed=seed + 1) + noise(9, 5, seed=seed)
    standard = [((z - z.mean()) / z.std(unbiased=False)).flatten().numpy() for z in (x, y)]
    assert explained_by(row_moments(x, y).numpy()) == pytest.approx(explained_variance_score(*standard), abs=1e-9)
    assert explained_by(row_moments(x, 3 * x + 2).numpy()) == pytest.approx(1)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12).filter(lambda x: sum(x) > 0.1))
def test_gini_is_the_mean_difference_of_all_pairs(shares: list[float]) -> None:
    n, mean = len(shares), sum(shares) / len(shares)
    expected = sum(abs(x - y) for x in shares for y in shares) / (2 * n * n * mean)
    assert gini(torch.tensor(shares, dtype=torch.double)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("m", [7, 8])
def test_power_of_a_wave_is_at_its_frequency_and_adds_up(m: int) -> None:
    columns = noise(m, 3)
    columns = columns - columns.mean(0)
    power = power_of(columns)
    assert torch.allclose(power.sum(1), torch.ones(3, dtype=torch.double))
    for k in range(1, (m - 1) // 2 + 1):
        by_hand = 2 * abs(sum(float(columns[t, 0]) * cmath.exp(2j * math.pi * k * t / m) for t in range(m))) ** 2 / m
        assert float(power[0, k - 1]) == pytest.approx(by_hand / float(columns[:, 0].square().sum()))
    wave = torch.cos(2 * math.pi * 2 * torch.arange(m).double() / m)[:, None]
    assert int(power_of(wave)[0].argmax()) == 1
    assert len(component_norms(noise(m, 2))) == m - 1


@pytest.mark.parametrize(("name", "sign"), [("fourier-clock", -1), ("fourier-pizza", 1)])
def test_circles_of_equal_radii_are_told_apart_by_their_frequencies(name: str, sign: int) -> None:
    # every circle of a built model has the same radius, so that principal components mix them
    model, task, _ = reference.build(name, p=31, frequencies=4)
    readings = mechanisms.read(model, task)
    keys = mechanisms.functional_form(model, task, readings=readings).details["key_frequencies"]
    round_ones = mechanisms.circularity(model, task, readings=readings)
    assert round_ones.value < 0.9 and sorted(round_ones.details["frequencies"][:4]) == keys
    assert min(round_ones.details["roundness"][:4]) > 0.8
    found = mechanisms.isolated_circles(model, task, readings=readings)
    alone = {circle["frequency"]: circle for circle in found.details["by_frequency"]}
    assert sign * found.number("own_frequency") > 0.1
    for k in keys:
        fits = alone[k]
        assert sign * (fits["pizza"] - fits["clock"]) > 0.1 and max(fits["pizza"], fits["clock"]) > 0.8, fits
    assert max(alone[k]["clock"] for k in set(alone) - set(keys)) < 0


def test_a_frequency_alone_is_what_least_squares_keeps() -> None:
    m, like = 11, noise(11, 5).float()
    parts = components_of(None, ModularAddition(p=m), like)
    for k in (1, 5):
        phase = 2 * math.pi * k / m * torch.arange(m).double()
        waves = torch.stack([torch.ones(m).double(), phase.cos(), phase.sin()], dim=1)
        expected = waves @ torch.linalg.lstsq(waves, like.double()).solution
        assert torch.allclose(parts.alone(k, like).double(), expected, atol=1e-5)


@given(st.integers(0, 1000))
def test_distance_irrelevance_is_the_published_ratio(seed: int) -> None:
    a, b = table(P)
    values = noise(P * P, seed=seed)
    square = np.zeros((P, P))
    square[((a + b) % P).numpy(), ((a - b) % P).numpy()] = values.numpy()
    ours = irrelevance(moments_by_distance(values, (a - b) % P, P))
    assert ours == pytest.approx(square.std(0).mean() / square.std(), abs=1e-9)


def test_sampled_triples_are_the_first_of_the_published_shuffle() -> None:
    triples = [(a, b, c) for a in range(P) for b in range(P) for c in range(P)]
    random.Random(42).shuffle(triples)
    assert sampled_triples(P, P).tolist() == [list(t) for t in triples[:100]]
    large = sampled_triples(997, 997, seed=1)
    assert large.shape == (100, 3) and int(large.max()) < 997 and len(large.unique(dim=0)) == 100


def test_gradients_are_those_of_the_logit_by_finite_differences() -> None:
    task = ModularAddition(p=P)
    model = Transformer(ModelConfig(d_vocab=P + 1, n_ctx=3, d_model=8, d_mlp=12), seed=0).double()
    gradient = operand_gradients(model, task, torch.tensor([[2, 5, 3]]))
    step = 1e-5
    for operand in (0, 1):
        for direction in range(0, 8, 3):
            values = []
            for sign in (1, -1):

                def move(x: Tensor, hook: Any, sign: int = sign, at: tuple[int, int] = (operand, direction)) -> Tensor:
                    x = x.clone()
                    x[:, at[0], at[1]] += sign * step
                    return x

                with torch.no_grad(), model.hooks([("hook_embed", move)]):
                    values.append(float(model(task.encode(torch.tensor([[2, 5]])).inputs)[0, -1, 3]))
            expected = (values[0] - values[1]) / (2 * step)
            assert float(gradient[0, operand, direction]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", [P * P, 30])
def test_terms_explain_what_least_squares_explains(rows: int) -> None:
    a, b = (x[:rows] for x in table(P))
    logits = noise(rows, P)
    terms = terms_of(logits, (a + b) % P, (a - b) % P, P)
    centred = logits - logits.mean(1, keepdim=True)
    s, d, c = (a + b)[:, None].double(), (a - b)[:, None].double(), torch.arange(P).double()
    columns = []
    for k in range(1, 4):
        w = 2 * math.pi * k / P
        clock = torch.cos(w * (s - c)).flatten()
        columns.append((clock, (torch.cos(w * d / 2).abs() * torch.cos(w * (s - c))).flatten()))

    def explained(basis: list[Tensor]) -> float:
        x, y = torch.stack(basis, dim=1), centred.flatten()
        left = y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        return float(1 - left.square().sum() / y.square().sum())

    for k, (clock, pizza) in enumerate(columns):
        assert float(terms.explained("clock")[k]) == pytest.approx(explained([clock]), abs=1e-6)
        assert float(terms.explained("pizza")[k]) == pytest.approx(explained([pizza]), abs=1e-6)
        assert float(terms.explained("both")[k]) == pytest.approx(explained([clock, pizza]), abs=1e-6)
    together = explained([column for pair in columns for column in pair])
    assert float(terms.explained("both").sum()) == pytest.approx(together, abs=1e-6)


def test_share_between_groups_is_what_group_means_explain() -> None:
    values, groups = noise(6, 4), torch.arange(24).reshape(6, 4) % 5
    centred = values - values.mean(1, keepdim=True)
    left = centred.clone()
    for g in range(5):
        left[groups == g] -= centred[groups == g].mean()
    assert explained_by_groups(centred, groups) == pytest.approx(
        float(1 - left.square().sum() / centred.square().sum())
    )


def test_restricted_and_excluded_logits_are_projections_with_the_bias_given_back() -> None:
    a, b = table(P)
    total, logits, keys = (a + b) % P, noise(P * P, P), (1, 3)
    inside = torch.zeros_like(logits)
    for k in keys:
        for f in (math.cos, math.sin):
            wave = torch.tensor([f(2 * math.pi * k * int(s) / P) for s in total], dtype=torch.double)
            wave = wave / wave.norm()
            inside += wave[:, None] * (wave @ logits)
    assert torch.allclose(sum_components(logits, total, keys, P), inside, atol=1e-5)
    assert torch.allclose(restricted_logits(logits, total, keys, P, bias_correction=False), inside, atol=1e-5)
    corrected = restricted_logits(logits, total, keys, P)
    assert torch.allclose(corrected.mean(0), logits.mean(0), atol=1e-5)
    assert torch.allclose(corrected - corrected.mean(0), inside - inside.mean(0), atol=1e-5)
    loss, accuracy = loss_and_accuracy(logits, total)
    by_hand = [
        math.log(sum(math.exp(x) for x in row)) - row[s] for row, s in zip(logits.tolist(), total.tolist(), strict=True)
    ]
    assert loss == pytest.approx(sum(by_hand) / len(by_hand))
    assert accuracy == pytest.approx(float((logits.argmax(1) == total).double().mean()))


def test_progress_measures_are_in_the_spectral_evidence() -> None:
    model, task, _ = reference.build("fourier-clock", p=23, frequencies=3)
    details = mechanisms.spectral(model, task).details
    assert details["restricted_loss"] < 0.1 < 1 < details["excluded_loss"]
    assert [k for k, _ in details["excluded_loss_by_frequency"]] == details["frequencies"]
    assert all(loss <= details["excluded_loss"] for _, loss in details["excluded_loss_by_frequency"])
    assert details["gini_embedding"] > 0.4 and details["gini_neuron_logits"] > 0.5
    shares = details["neurons_of_one_frequency"]["0"]
    assert shares["single"] > 0.95 and len(shares["frequencies"]) == 3
    untrained, task, _ = reference.build("random-init", p=23)
    details = mechanisms.spectral(untrained, task).details
    assert details["gini_embedding"] < 0.2
    assert details["neurons_of_one_frequency"]["0"]["single"] == 0


@pytest.mark.parametrize("operation", ["+", "*"])
def test_neuron_frequencies_are_shares_of_the_nine_products(operation: str) -> None:
    task = ModularAddition(p=P, operation=operation)
    model = Transformer(ModelConfig(d_vocab=P + 1, n_ctx=3, d_model=8, d_mlp=5), seed=0)
    readings = mechanisms.read(model, task)
    group = group_table(task, readings)
    neurons = readings.neurons[group.kept].double()
    found = neuron_frequencies(neurons, group)
    assert found is not None
    p = group.modulus
    for at, neuron in enumerate(found.live.tolist()):
        centred = neurons[:, neuron] - neurons[:, neuron].mean()
        shares = []
        for k in range(1, (p - 1) // 2 + 1):
            wa, wb = (2 * math.pi * k * x.double() / p for x in (group.a, group.b))
            basis = [
                x * y
                for x in (torch.ones_like(wa), wa.cos(), wa.sin())
                for y in (torch.ones_like(wb), wb.cos(), wb.sin())
            ]
            q = torch.linalg.qr(torch.stack(basis[1:], dim=1))[0]
            shares.append(float((q.T @ centred).square().sum() / centred.square().sum()))
        assert float(found.share[at]) == pytest.approx(max(shares), abs=1e-9)
        assert int(found.frequency[at]) == 1 + shares.index(max(shares))


# --- on networks ---


def measured(model: Any, task: Any) -> dict[str, Any]:
    readings = mechanisms.read(model, task)
    return {name: mechanisms.TESTS[name](model, task, readings=readings) for name in mechanisms.MODULAR}


def test_a_built_pizza_is_symmetric_and_depends_on_the_distance() -> None:
    model, task, _ = reference.build("fourier-pizza", p=31, frequencies=4)
    found = measured(model, task)
    assert found["gradient-symmetricity"].value > 0.99
    assert found["gradient-symmetricity"].control < 0.5
    assert found["distance-irrelevance"].value < 0.6 < found["distance-irrelevance"].control
    assert found["logit-terms"].details["both_5"] > 0.9 > 0.1 > found["logit-terms"].control


def test_a_built_clock_is_not_and_does_not() -> None:
    model, task, _ = reference.build("fourier-clock", p=31, frequencies=4)
    found = measured(model, task)
    assert found["gradient-symmetricity"].value < 0.5
    assert found["distance-irrelevance"].value > 0.7
    assert found["logit-terms"].value > 0.95
    sub_label = mechanisms.clock_or_pizza(tuple(found.values()))
    assert sub_label is not None and sub_label.name != "pizza"


def test_only_a_fourier_verdict_has_a_sub_label() -> None:
    model, task, _ = reference.build("fourier-clock", p=13, frequencies=2)
    verdict = mechanisms.explain(model, task)
    assert verdict.mechanism == "fourier" and verdict.sub_label in ("clock", "mixed")
    assert "a description and no verdict" in verdict.why
    assert mechanisms.Verdict.from_json(verdict.to_json()).sub_label == verdict.sub_label
    memoriser, task, _ = reference.build("pair-memoriser", p=5)
    assert mechanisms.explain(memoriser, task, budget="quick").sub_label is None


def test_what_is_not_learned_has_no_sub_label() -> None:
    model, task, _ = reference.build("random-init", p=23)
    found = measured(model, task)
    assert found["distance-irrelevance"].value > 0.8, "high without any clock"
    assert mechanisms.clock_or_pizza(tuple(found.values())) is None
    assert mechanisms.clock_or_pizza(tuple(found.values())[:2]) is None
    assert abs(found["isolated-circles"].value) < 0.2


@needs_native_bridge
def test_a_bridge_has_the_same_descriptions() -> None:
    model, task, _ = reference.build("fourier-pizza", p=13, frequencies=3)
    ours, theirs = measured(model, task), measured(model.to_bridge(), task)
    for name in mechanisms.MODULAR:
        assert theirs[name].value == pytest.approx(ours[name].value, abs=2e-3), name


def test_tests_of_circles_refuse_an_embedding_without_one() -> None:
    task = ModularAddition(p=P)
    model = Transformer(ModelConfig(d_vocab=P + 1, n_ctx=3, d_model=8, d_mlp=12), seed=0)
    with torch.no_grad():
        model.embed.W_E[:P] = torch.arange(P).float()[:, None] * torch.ones(8)
    with pytest.raises(BadInput, match="fewer than two dimensions"):
        mechanisms.isolated_circles(model, task)


# --- two tokens, and networks without attention ---

SHORT: Any = WithoutEquals(ModularAddition(p=11))


def test_a_task_without_equals_is_the_same_world() -> None:
    whole = SHORT.task
    for split in ("train", "random"):
        batch, other = SHORT.examples(split), whole.examples(split)
        assert torch.equal(batch.operands, other.operands)
        assert torch.equal(batch.tokens, other.tokens[:, [0, 1, 3]])
        assert SHORT.verify(batch.tokens).all() and torch.equal(
            SHORT.read_answer(batch.tokens), other.operands.sum(1) % 11
        )
    assert (SHORT.d_vocab, SHORT.n_ctx, len(SHORT.roles), SHORT.vocabulary[-1]) == (11, 2, 3, "10")
    pairs = SHORT.pairs(16, seed=1)
    assert pairs.clean.shape == (16, 2) and set(pairs.position.tolist()) == {1}
    assert torch.equal(pairs.correct, pairs.clean.sum(1) % 11)
    assert SHORT.state(torch.tensor([[1, 2]]))["answer"].tolist() == [[-1, 3, 3]]
    assert SHORT.period == 11 and SHORT.name == "modular-addition"
    with pytest.raises(BadInput, match="no equals sign"):
        WithoutEquals(tasks.get("digit-addition"))


@pytest.mark.parametrize("joined", ["sum", "concatenated"])
def test_a_network_without_attention_is_its_formula_and_can_be_explained(joined: str) -> None:
    e, u = noise(11, 6), noise(9, 11)
    layers = [(noise(6 if joined == "sum" else 12, 8, seed=1), noise(8)), (noise(8, 9, seed=2), noise(9))]
    network = MlpNetwork(e.float(), [(w.float(), b.float()) for w, b in layers], u.float(), joined=joined)
    tokens = SHORT.examples("train").inputs
    x = e[tokens[:, 0]] + e[tokens[:, 1]] if joined == "sum" else e[tokens].flatten(1)
    for w, b in layers:
        x = (x @ w + b).clamp_min(0)
    assert torch.allclose(network(tokens)[:, 0].double(), x @ u, atol=1e-3)
    assert mechanisms.explain(network, SHORT).label == "not-learned"
    for evidence in measured(network, SHORT).values():
        assert evidence.value == evidence.value
    assert mechanisms.gradient_symmetricity(network, SHORT).value > 0.95 or joined != "sum"


@pytest.mark.untyped
def test_networks_whose_sizes_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match=r"expected \(12, 8\)"):
        MlpNetwork(torch.zeros(5, 6), [(torch.zeros(6, 8), torch.zeros(8))], torch.zeros(8, 5), joined="concatenated")
    with pytest.raises(BadInput, match="the last layer has 8"):
        MlpNetwork(torch.zeros(5, 6), [(torch.zeros(6, 8), torch.zeros(8))], torch.zeros(7, 5))
    network = MlpNetwork(torch.zeros(5, 6), [(torch.zeros(6, 8), torch.zeros(8))], torch.zeros(8, 5))
    with pytest.raises(BadInput, match="the two operands"):
        network(torch.zeros(2, 3, dtype=torch.long))


@settings(max_examples=4)
@given(st.sampled_from(["+", "-", "*"]), st.integers(0, 100))
def test_every_description_runs_on_every_operation(operation: str, seed: int) -> None:
    task = ModularAddition(p=11, operation=operation)
    model = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=16, d_mlp=24), seed=seed)
    for name, evidence in measured(model, task).items():
        low, high = evidence.interval
        assert evidence.test == name and low - 1e-9 <= evidence.value <= high + 1e-9 and evidence.passed is None
