"""The battery on models whose mechanism is known: hand-built ones, published weights, and a bridge of each."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference, tasks
from circuits.errors import BadInput, CorruptRun, UnsupportedModel
from circuits.model import ModelConfig, Transformer, from_transformer_lens


def _hooks(model):
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("name", "label", "mechanism"),
    [
        ("fourier-pizza", "algorithm", "fourier"),
        ("pair-memoriser", "memorisation", "pairs"),
        ("range-lookup", "heuristics", "range-lookup"),
        ("random-init", "not-learned", None),
    ],
)
def test_planted_mechanism_is_named(name, label, mechanism):
    model, task, _ = reference.build(name, seed=0)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert (verdict.label, verdict.mechanism) == (label, mechanism), verdict.why
    assert _hooks(model) == 0


def test_published_modular_addition_weights_are_fourier(reference_data):
    path = reference_data / "progress-measures" / "low_precision_mod_addition.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    model = from_transformer_lens(weights, act_fn="relu", normalization=None)
    task = tasks.get("modular-addition", p=113, train_fraction=0.3)
    readings = mechanisms.read(model, task)
    assert float(readings.right.float().mean()) == pytest.approx(0.9994517973, abs=1e-6)
    verdict = mechanisms.explain(model, task, budget="quick")
    assert (verdict.label, verdict.mechanism) == ("algorithm", "fourier")
    assert verdict["functional-form"].details["key_frequencies"] == [6, 23, 39]
    assert verdict["spectral"].number("excluded") < 0.05
    assert verdict["functional-form"].control < 0.05


def test_a_bridge_gets_the_same_evidence():
    task = tasks.get("modular-addition", p=23)
    config = ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=32, d_mlp=64)
    ours = Transformer(config, seed=0)
    bridge = ours.to_bridge()
    a, b = mechanisms.read(ours, task), mechanisms.read(bridge, task)
    assert torch.allclose(a.logits, b.logits, atol=1e-4)
    assert torch.allclose(a.neurons, b.neurons, atol=1e-4)
    assert torch.allclose(a.importance, b.importance, atol=1e-5)
    ours_evidence, theirs = (
        mechanisms.interchange(ours, task, readings=a),
        mechanisms.interchange(bridge, task, readings=b),
    )
    assert ours_evidence.value == pytest.approx(theirs.value, abs=0.02)
    assert mechanisms.explain(bridge, task).label == "not-learned"


@pytest.mark.parametrize("parameters", [{"operation": "-"}, {"operation": "*"}, {"operation": "+", "block": 3}])
def test_every_one_token_test_runs_on_every_operation(parameters):
    task = tasks.get("modular-addition", p=11, **parameters)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=16, d_mlp=24), seed=0)
    for name in mechanisms.applicable(task):
        evidence = mechanisms.TESTS[name](model, task)
        assert evidence.test == name
        assert evidence.source
    assert _hooks(model) == 0


def test_plain_subtraction_has_negative_answers():
    task = tasks.get("addition", n=12, operation="-", block=3)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=16, d_mlp=24), seed=0)
    for name in mechanisms.applicable(task):
        assert mechanisms.TESTS[name](model, task).test == name


def test_untrained_digit_model_has_no_columns():
    task = tasks.get("digit-addition", digits=2)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=task.n_ctx, d_model=16, n_layers=2), seed=0)
    assert not mechanisms.column_interchange(model, task).passed
    assert mechanisms.explain(model, task, budget="quick").label == "not-learned"


@pytest.mark.parametrize("p", [7, 71])  # 71: rows of more than one chunk
def test_readings_importance_is_gradient_times_deviation(p):
    task = tasks.get("modular-addition", p=p)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8, d_mlp=5), seed=0)
    readings = mechanisms.read(model, task)
    # the direct path is linear without a norm: gradient of the centred right logit = W_out (W_U[:, y] - mean W_U)
    unembed = model.unembed.W_U[:, task.answer_tokens]
    direction = unembed[:, readings.labels] - unembed.mean(1, keepdim=True)
    gradient = (model.blocks[0].mlp.W_out @ direction).T
    expected = (gradient * (readings.neurons - readings.neurons.mean(0))).abs().mean(0)
    assert torch.allclose(readings.importance, expected, atol=1e-5)


def test_bad_input_is_named():
    digits = tasks.get("digit-addition", digits=2)
    model = Transformer(ModelConfig(d_vocab=digits.d_vocab, n_ctx=digits.n_ctx, d_model=8), seed=0)
    with pytest.raises(BadInput, match="one answer token"):
        mechanisms.spectral(model, digits)
    task = tasks.get("modular-addition", p=7)
    with pytest.raises(BadInput, match="no digit columns"):
        mechanisms.column_interchange(model, task)
    small = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8, d_vocab_out=4), seed=0)
    with pytest.raises(BadInput, match="do not belong together"):
        mechanisms.spectral(small, task)
    attention_only = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8, attn_only=True), seed=0)
    with pytest.raises(UnsupportedModel, match="no MLP"):
        mechanisms.spectral(attention_only, task)
    with pytest.raises(BadInput, match="hooks"):
        mechanisms.explain(torch.nn.Linear(2, 2), task)
    broken = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8), seed=0)
    with torch.no_grad():
        broken.unembed.W_U[0, 0] = float("nan")
    with pytest.raises(CorruptRun, match="not finite"):
        mechanisms.spectral(broken, task)
    assert _hooks(broken) == 0


@pytest.mark.parametrize("name", ["modular-addition", "digit-addition"])
def test_damaged_weights_get_no_verdict(name):
    task = tasks.get(name, **({"p": 7} if name == "modular-addition" else {"digits": 2}))
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=task.n_ctx, d_model=8), seed=0)
    with torch.no_grad():
        model.unembed.W_U[0, 0] = float("nan")
    with pytest.raises(CorruptRun, match=r"unembed\.W_U is not finite"):
        mechanisms.explain(model, task, budget="quick")


@pytest.mark.parametrize(("name", "parameters"), [("modular-addition", {"p": 2}), ("addition", {"n": 2, "block": 0})])
def test_tables_that_are_too_small_are_named(name, parameters):
    task = tasks.get(name, **parameters)
    model = Transformer(ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=8, d_mlp=8), seed=0)
    for test in ("spectral", "functional-form", "interchange"):
        with pytest.raises(BadInput, match="2 operand values: these tests need 5"):
            mechanisms.TESTS[test](model, task)
