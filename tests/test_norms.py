"""Networks with norms: their scales are read, and forms and spectra are what they are without them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import needs_native_bridge
from constructions import behind_norms, digits, line, pizza, smooth
from discovery_models import hugging_face
from reference_checks import accuracy

from circuits import mechanisms, tasks
from circuits.mechanisms.functional_form import fitted
from circuits.mechanisms.readings import Readings, activations, scale_hooks
from circuits.model import ModelConfig, Transformer


def normed(kind: str, layers: int = 2) -> tuple[Transformer, tasks.Task]:
    task = tasks.get("modular-addition", p=11)
    sizes = {"d_vocab": 12, "n_ctx": 3, "d_model": 12, "d_mlp": 9, "n_layers": layers}
    return Transformer(ModelConfig(**sizes, normalization=kind), seed=0).eval(), task


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_scales_are_what_the_norms_divide_by(kind: str) -> None:
    model, task = normed(kind)
    readings = mechanisms.read(model, task)
    assert set(readings.scales) == {"blocks.0.ln2", "blocks.1.ln2", "ln_final"}
    _, cache = model.run_with_cache(readings.tokens)
    for name, stream in (("blocks.1.ln2", "blocks.1.hook_resid_mid"), ("ln_final", "blocks.1.hook_resid_post")):
        x = cache[stream][:, -1]
        x = x - x.mean(-1, keepdim=True) if kind == "LN" else x
        expected = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(readings.scales[name], expected, atol=1e-5)
    chosen = torch.tensor([12, 3, 17, 0])  # of both layers
    before = readings.before_norm(chosen)
    assert before is not None
    for column, neuron in zip(before.T, chosen.tolist(), strict=True):
        scale = readings.scales[f"blocks.{readings.layers[neuron]}.ln2"][:, 0]
        assert torch.equal(column, readings.neurons[:, neuron] * scale)


def test_row_factors_undo_norms_and_change_no_answer() -> None:
    model, task = normed("LN")
    readings = mechanisms.read(model, task)
    factors = readings.row_factors()
    assert list(factors) == ["none", "final", "final and mlp"]
    assert all((readings.logits * factor).argmax(1).equal(readings.logits.argmax(1)) for factor in factors.values())
    _, cache = model.run_with_cache(readings.tokens)
    stream = cache["blocks.1.hook_resid_post"][:, -1]
    linear = (stream - stream.mean(1, keepdim=True)) @ model.W_U[:, task.answer_tokens]  # biases are zero
    undone = readings.logits * factors["final"]
    assert torch.allclose(undone / undone.norm(), linear / linear.norm(), atol=1e-5)
    bare, task = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=8, d_mlp=9), seed=0), task
    readings = mechanisms.read(bare, task)
    assert readings.before_norm(torch.arange(3)) is None and list(readings.row_factors()) == ["none"]


@needs_native_bridge
@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_a_bridge_has_the_same_scales(kind: str) -> None:
    model, task = normed(kind)
    ours, theirs = mechanisms.read(model, task), mechanisms.read(model.to_bridge(), task)
    assert ours.scales.keys() == theirs.scales.keys()
    assert all(torch.allclose(ours.scales[name], theirs.scales[name], atol=1e-5) for name in ours.scales)


@pytest.mark.parametrize(("architecture", "norm"), [("GPT2", "ln2"), ("GPTJ", "ln1"), ("Llama", "ln2")])
def test_bridges_of_pretrained_architectures_name_their_norms_alike(architecture: str, norm: str) -> None:
    model = hugging_face(architecture)
    hooks = scale_hooks(model, (0, 1))
    # GPT-J's attention and MLP run side by side behind one norm
    assert hooks["blocks.1.ln2"] == f"blocks.1.{norm}.hook_scale" and hooks["ln_final"] == "ln_final.hook_scale"
    found = activations(model, torch.tensor([[1, 2, 3], [4, 2, 1]]), hooks.values())
    assert {tuple(scale.shape) for scale in found.values()} == {(2, 3, 1)} and len(found) == 3


@pytest.mark.parametrize("gain", [None, 3.0])
def test_a_construction_behind_norms_gives_the_same_answers(gain: float | None) -> None:
    for reference, length in ((pizza(), 2.0), (line(), 10.0), (digits(), 2.0)):
        behind = behind_norms(reference, gain=gain, length=length)
        assert accuracy(behind) == accuracy(reference) == 1.0
        scale = mechanisms.read(behind.model, behind.task).scales["blocks.0.ln2"]
        assert scale.amax() > 1.25 * scale.amin()  # the norms are no formality here
    assert accuracy(smooth(pizza(), 2.0)) == 1.0


def test_a_neuron_is_what_it_is_without_the_norm_before_it() -> None:
    task = tasks.get("modular-addition", p=23)
    a, b = torch.cartesian_prod(torch.arange(23), torch.arange(23)).T
    wave = torch.cos(2 * torch.pi * 4 * (a + b) / 23)
    scale = 1 + 3 * torch.rand(len(a), 1, generator=torch.Generator().manual_seed(0))
    divided = torch.stack([wave, wave], 1) / scale
    divided[:, 1] = wave
    blank = mechanisms.read(Transformer(ModelConfig(d_vocab=24, n_ctx=3, d_model=8, d_mlp=2), seed=0), task)
    readings: Readings = dataclasses.replace(
        blank, neurons=divided, importance=torch.ones(2), scales={"blocks.0.ln2": scale}, remembered={}
    )
    readings.remembered["decisive layers 0.3"] = (0,)
    top, forms = fitted(None, task, readings, seed=0)
    assert forms.family.tolist() == [0, 0] and forms.frequency.tolist() == [4, 4]
    assert forms.undone[top.argsort()].tolist() == [True, False]
    without = dataclasses.replace(readings, scales={}, remembered={"decisive layers 0.3": (0,)})
    assert fitted(None, task, without, seed=0)[1].family[top.argsort()].tolist() == [3, 0]


def test_logits_behind_norms_have_the_spectrum_that_they_have_without() -> None:
    bare, behind = pizza(), behind_norms(pizza())
    plain, normed = (mechanisms.spectral(model, task) for model, task, _ in (bare, behind))
    assert plain.details["norm_undone"] == "none" and normed.details["norm_undone"] == "final and mlp"
    for share in ("explained", "restricted", "excluded"):
        assert normed.number(share) == pytest.approx(plain.number(share), abs=0.02)
    assert normed.details["explained_by_norm"]["none"] < normed.number("explained") - 0.01
    # losses are those of the network, not of what it is without its norms
    readings = mechanisms.read(behind.model, behind.task)
    loss = torch.nn.functional.cross_entropy(readings.logits.double(), readings.labels)
    assert normed.number("loss") == pytest.approx(float(loss))
