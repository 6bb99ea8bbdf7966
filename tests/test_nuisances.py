"""Nuisances leave behaviour as it is (or nearly, for noise) and the given model untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import accuracy
from torch import Tensor

from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer
from circuits.reference import NUISANCES, Reference, build, transform

BUILT = {
    name: build(name, seed=1, **sizes)
    for name, sizes in {
        "fourier-pizza": {"p": 23, "frequencies": 3},
        "fourier-clock": {"p": 23, "frequencies": 3},
        "number-line": {"n": 20},
        "columns": {"n": 30},
        "pair-memoriser": {"p": 17},
        "range-lookup": {"n": 20},
        "result-range-bag": {"n": 12},
    }.items()
}
EXACT = ("rotation", "dead-neurons", "duplicate-neurons")


def trained_like(**config: Any) -> Transformer:
    """A model with every weight and bias random, none of them zero."""
    shape: dict[str, Any] = {
        "d_vocab": 9,
        "n_ctx": 5,
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "attn_bias": True,
    } | config
    model = Transformer(ModelConfig(**shape), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)


def tokens_of(built: Reference) -> Tensor:
    values = torch.arange(built.task.n_operand_values)
    return built.task.encode(torch.cartesian_prod(values, values)).inputs


def assert_same(model: Transformer, other: Transformer, tokens: Tensor) -> None:
    first, second = logits(model, tokens), logits(other, tokens)
    assert (first - second).abs().max() <= 1e-4 * max(1.0, float(first.abs().max()))


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", sorted(BUILT))
def test_reference_models_keep_their_logits(kind: str, name: str) -> None:
    built = BUILT[name]
    before = {key: value.clone() for key, value in built.model.state_dict().items()}
    changed = transform(built.model, kind, seed=2)
    assert_same(built.model, changed, tokens_of(built))
    assert all(torch.equal(before[key], value) for key, value in built.model.state_dict().items())
    assert any(
        value.shape != before[key].shape or not torch.equal(before[key], value)
        for key, value in changed.state_dict().items()
    )
    assert not changed.training


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    "config",
    [{}, {"tied": True}, {"unembed_bias": True}, {"causal": False, "softmax_share": 0.5}, {"gated": True}],
    ids=str,
)
def test_any_model_without_norms_keeps_its_logits(kind: str, config: dict[str, Any]) -> None:
    model = trained_like(**config)
    tokens = torch.randint(9, (64, 5), generator=torch.Generator().manual_seed(0))
    changed = transform(model, kind, seed=5)
    assert_same(model, changed, tokens)
    assert changed.training == model.training


@pytest.mark.parametrize("normalization", ["LN", "RMS"])
@pytest.mark.parametrize("kind", ["dead-neurons", "duplicate-neurons"])
def test_neurons_can_be_added_to_models_with_norms(kind: str, normalization: str) -> None:
    model = trained_like(normalization=normalization)
    tokens = torch.randint(9, (64, 5), generator=torch.Generator().manual_seed(0))
    assert_same(model, transform(model, kind, seed=5), tokens)


@settings(max_examples=20)
@given(share=st.floats(0.01, 1), seed=st.integers(0, 10**6), kind=st.sampled_from(EXACT[1:]))
def test_any_share_of_neurons(share: float, seed: int, kind: str) -> None:
    built = BUILT["columns"]
    changed = transform(built.model, kind, seed=seed, share=share)
    width = built.model.W_in.shape[-1]
    assert changed.W_in.shape[-1] == width + max(1, round(share * width))
    assert_same(built.model, changed, tokens_of(built))


def test_dead_neurons_never_fire_and_would_write_if_they_did() -> None:
    built = BUILT["fourier-pizza"]
    changed = transform(built.model, "dead-neurons", share=0.5)
    name = "blocks.0.mlp.hook_post"
    _, cache = changed.run_with_cache(tokens_of(built), names_filter=name)
    silent = (cache[name] == 0).flatten(0, 1).all(0)
    assert int(silent.sum()) == changed.W_in.shape[-1] - built.model.W_in.shape[-1]
    assert (changed.W_out[0][silent].norm(dim=1) > 0).all()


def test_duplicated_neurons_fire_alike_and_share_the_output() -> None:
    built = BUILT["fourier-clock"]
    changed = transform(built.model, "duplicate-neurons", share=1.0)
    columns, rows = changed.W_in[0].T, changed.W_out[0].detach()
    pairs = (columns[:, None] == columns[None, :]).all(-1)
    assert (pairs.sum(1) == 2).all()
    summed = pairs.to(rows.dtype) @ rows
    original = built.model.W_out[0].detach()
    apart = (summed[:, None] - original[None, :]).norm(dim=-1)
    assert float(apart.amin(1).max()) < 1e-4, "together they write what one neuron wrote"
    assert float(apart.amin(0).max()) < 1e-4


def test_noise_has_the_level_that_was_asked_for() -> None:
    model = trained_like(d_model=64)
    for level in (0.0, 0.03, 0.3):
        changed = transform(model, "weight-noise", level=level, seed=4)
        for key, weight in model.state_dict().items():
            if weight.numel() > 1000:
                relative = (changed.state_dict()[key] - weight).square().mean().sqrt() / weight.square().mean().sqrt()
                assert float(relative) == pytest.approx(level, rel=0.1)


def test_a_little_noise_costs_a_fourier_model_nothing_and_a_lot_all() -> None:
    built = BUILT["fourier-pizza"]
    reached = [
        accuracy(Reference(transform(built.model, "weight-noise", level=level), built.task, built.truth))
        for level in (0.01, 3.0)
    ]
    assert reached[0] == 1.0
    assert reached[1] < 0.3


@pytest.mark.parametrize("kind", sorted(NUISANCES))
def test_same_seed_same_weights_and_another_seed_others(kind: str) -> None:
    model = BUILT["columns"].model
    first, again, other = (transform(model, kind.replace("-", "_"), seed=seed) for seed in (1, 1, 2))
    pairs = [(value, again.state_dict()[key]) for key, value in first.state_dict().items()]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())


def test_what_cannot_be_done_is_refused() -> None:
    model = BUILT["columns"].model
    with pytest.raises(UnknownName, match="did you mean 'rotation'"):
        transform(model, "rotate")
    with pytest.raises(UnknownName, match="option of rotation 'level'"):
        transform(model, "rotation", level=1.0)
    with pytest.raises(BadInput, match="share"):
        transform(model, "dead-neurons", share=0.0)
    with pytest.raises(BadInput, match="level = -1"):
        transform(model, "weight-noise", level=-1.0)
    with pytest.raises(UnsupportedModel, match="LN norms"):
        transform(trained_like(normalization="LN"), "rotation")
    with pytest.raises(UnsupportedModel, match="gelu"):
        transform(trained_like(act_fn="gelu"), "dead-neurons")
    with pytest.raises(UnsupportedModel, match="no neurons"):
        transform(trained_like(attn_only=True), "duplicate-neurons")
