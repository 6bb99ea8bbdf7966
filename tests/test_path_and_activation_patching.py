"""Path patching and activation-patching sweeps against hooks that do one thing at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from discovery_models import (
    SHAPES,
    VARIANTS,
    at_answers,
    build,
    close,
    hooks_into,
    model_of,
    planted,
    shapes,
    some_pairs,
)
from torch import Tensor

from circuits.discovery import activation_patching, exact, exact_nodes, path_patching
from circuits.discovery.ablate import replacement
from circuits.discovery.activations import source_differences, source_values
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.tasks.base import Pairs


def near(got: Tensor, expected: Tensor) -> bool:
    """Equal but for the roundoff of metrics of size one."""
    return float((got - expected).abs().max()) < 1e-5 + 1e-4 * float(expected.abs().max())


def along(model: Any, pairs: Pairs, path: tuple[str, ...]) -> Tensor:
    """The definition: step by step, what one changed input of one head or MLP changes in what it writes."""
    sites = sites_of(model)
    sources = list(sites.graph.sources)
    clean = source_values(model, sites, pairs.clean)
    base = at_answers(model(pairs.clean), pairs).detach()
    change = source_differences(sites, source_values(model, sites, pairs.corrupt), clean)[sources.index(path[0])]
    for reader in path[1:]:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks_into(model, reader, change)):
            if reader == "logits":
                return at_answers(model(pairs.clean), pairs) - base
            now = source_values(model, sites, pairs.clean)
        (fed,) = sites.graph.feeds[sites.graph.readers.index(reader)]
        change = source_differences(sites, now, clean)[fed]
    raise AssertionError("the path does not end at the logits")


@shapes
def test_a_path_equals_its_definition_step_by_step(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(4)
    readers = sites_of(model).graph.readers
    paths = [("embed", "a0.h1.q", "logits"), ("a0.h1", "a1.h0.q", "logits"), ("embed", "logits")]
    if "a1.h0.k" in readers:
        paths += [("embed", "a0.h0.v", "a1.h0.k", "logits"), ("a0.h0", "a1.h1.v", "logits")]
    if "m1" in readers:
        paths += [("embed", "m0", "a1.h1.q", "logits"), ("a0.h1", "m1", "logits")]
    for path in paths:
        expected = along(model, pairs, path)
        got = path_patching(model, pairs, path=path).per_example
        assert near(got, expected), path


def test_a_path_of_one_edge_into_the_logits_is_that_edge() -> None:
    model, pairs = build(), some_pairs(4)
    circuit = exact(model, pairs)
    for source, reader in (("a1.h0", "logits"), ("m0", "logits"), ("embed", "logits")):
        effect = path_patching(model, pairs, path=(source, reader))
        assert effect.score == pytest.approx(float(circuit.scores[circuit.graph.index(source, reader)]), abs=1e-5)


def test_a_path_that_ends_at_a_reader_lets_its_change_go_on_as_an_edge_does() -> None:
    model, pairs = build(), some_pairs(4)
    circuit = exact(model, pairs)
    for source, reader in (("embed", "a0.h1.k"), ("a0.h0", "a1.h1.v"), ("embed", "m0"), ("a0.h1", "m1")):
        effect = path_patching(model, pairs, path=(source, reader))
        expected = float(circuit.scores[circuit.graph.index(source, reader)])
        assert effect.score == pytest.approx(expected, abs=1e-5 + 1e-4 * abs(expected)), (source, reader)
    assert not close(
        path_patching(model, pairs, path=("embed", "m0")).per_example,
        path_patching(model, pairs, path=("embed", "m0", "logits")).per_example,
        1e-2,
    )


def test_a_heads_own_name_stands_for_all_that_it_reads() -> None:
    model, pairs = build("none"), some_pairs(4)
    whole = path_patching(model, pairs, path=("a0.h0", "a1.h0", "logits")).per_example
    hooks = [
        hook
        for kind in "qkv"
        for hook in hooks_into(
            model,
            f"a1.h0.{kind}",
            source_differences(
                sites_of(model),
                source_values(model, sites_of(model), pairs.corrupt),
                source_values(model, sites_of(model), pairs.clean),
            )[sites_of(model).graph.sources.index("a0.h0")],
        )
    ]
    sites = sites_of(model)
    clean = source_values(model, sites, pairs.clean)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        now = source_values(model, sites, pairs.clean)
    change = source_differences(sites, now, clean)[sites.graph.sources.index("a1.h0")]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks_into(model, "logits", change)):
        expected = at_answers(model(pairs.clean), pairs)
    with torch.no_grad():
        assert close(whole, expected - at_answers(model(pairs.clean), pairs), 1e-4)


def test_the_planted_path_carries_everything_and_others_nothing() -> None:
    model = planted()
    tokens = torch.arange(3)[:, None].repeat(1, 3)
    corrupt = tokens + 1
    position = torch.full((3,), 2)
    pairs = Pairs(
        clean=tokens, corrupt=corrupt, position=position, correct=tokens[:, 2], wrong=corrupt[:, 2], changed="all"
    )
    planted_path = path_patching(model, pairs, path=("embed", "a0.h1.v", "a1.h0.v", "logits"))
    with torch.no_grad():
        total = at_answers(model(corrupt), pairs) - at_answers(model(tokens), pairs)
    assert close(planted_path.per_example, total, 1e-4) and planted_path.score < 0
    for other in (("embed", "a0.h0.v", "a1.h0.v", "logits"), ("embed", "a1.h1.v", "logits"), ("embed", "logits")):
        assert path_patching(model, pairs, path=other).score == pytest.approx(0, abs=1e-6)
    assert "embed -> a0.h1.v -> a1.h0.v -> logits" in repr(planted_path)
    low, high = planted_path.interval()
    assert low <= planted_path.score <= high


def test_paths_that_are_none_are_refused() -> None:
    model, pairs = build(), some_pairs(3)
    with pytest.raises(BadInput, match="expected a source and at least one reader"):
        path_patching(model, pairs, path=("embed",))
    with pytest.raises(UnknownName, match=r"unknown source 'a0\.h1\.q'"):
        path_patching(model, pairs, path=("a0.h1.q", "logits"))
    with pytest.raises(UnknownName, match="unknown reader 'a7'"):
        path_patching(model, pairs, path=("embed", "a7"))
    with pytest.raises(BadInput, match=r"a0\.h1\.q is computed before m0 writes"):
        path_patching(model, pairs, path=("embed", "m0", "a0.h1.q"))
    with pytest.raises(BadInput, match=r"a0\.h0 comes after the logits"):
        path_patching(model, pairs, path=("embed", "logits", "a0.h0"))


def patched(model: Any, pairs: Pairs, name: str, index: tuple[Any, ...]) -> Tensor:
    """One whole forward in which part of one activation is that of the corrupt run."""
    with torch.no_grad():
        store: dict[str, Tensor] = {}
        with model.hooks(fwd_hooks=[(name, lambda x, hook: store.update({name: x}))]):
            model(pairs.corrupt)

        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[index] = store[name][index]
            return x

        base = at_answers(model(pairs.clean), pairs)
        with model.hooks(fwd_hooks=[(name, edit)]):
            return at_answers(model(pairs.clean), pairs) - base


SWEEPS = [(shape, over) for shape in SHAPES for over in ("positions", "heads")]


@pytest.mark.parametrize(("shape", "over"), [*SWEEPS, *((s, "neurons") for s in (*VARIANTS, "Llama"))])
def test_a_sweep_equals_hooks_that_patch_one_place_at_a_time(shape: str, over: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    if over == "neurons" and shape == "attention-only":
        with pytest.raises(UnsupportedModel, match=r"blocks\.0 has no MLP"):
            activation_patching(model, pairs, over=over)
        return
    got = activation_patching(model, pairs, over=over)
    sites, every = sites_of(model), slice(None)
    for i, layer in enumerate(sites.layers):
        name, axes = {
            "positions": (layer.resid, 1),
            "heads": (layer.z, 2),
            "neurons": (f"blocks.{i}.mlp.hook_post", 2),
        }[over]
        for cell in range(got.per_example.shape[2]):
            expected = patched(model, pairs, name, (every,) * axes + (cell,))
            assert near(got.per_example[:, i, cell], expected), (i, cell)
    assert close(got.scores, got.per_example.mean(0), 1e-6)


def test_sweeps_over_heads_are_the_effects_of_those_sources() -> None:
    model, pairs = build(), some_pairs(4)
    for options in ({}, {"ablation": "zero"}, {"denoising": True}):
        got = activation_patching(model, pairs, over="heads", **options)
        frame = exact_nodes(model, pairs, **options).source_frame()
        for i in range(2):
            for h in range(2):
                assert float(got.scores[i, h]) == pytest.approx(frame.loc[f"a{i}.h{h}", "score"], abs=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_neurons_and_positions_can_be_given_the_mean_or_nothing(ablation: str) -> None:
    model, pairs = build(), some_pairs(4)
    got = activation_patching(model, pairs, over="neurons", ablation=ablation)
    base = at_answers(model(pairs.clean), pairs)

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 5] = 0 if ablation == "zero" else x[:, :, 5].mean(0, keepdim=True)
        return x

    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", edit)]):
        expected = at_answers(model(pairs.clean), pairs) - base
    assert close(got.per_example[:, 0, 5], expected, 1e-4)
    sites = sites_of(model)
    change = source_differences(
        sites, replacement(model, sites, pairs, ablation), source_values(model, sites, pairs.clean)
    )
    first = [i for i, name in enumerate(sites.graph.sources) if not name.startswith(("a1", "m1"))]
    shift = torch.zeros_like(change[0])
    shift[:, 2] = change[first].sum(0)[:, 2]
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x + shift)]):
        expected = at_answers(model(pairs.clean), pairs) - base
    at = activation_patching(model, pairs, over="positions", ablation=ablation)
    assert close(at.per_example[:, 1, 2], expected, 1e-4)


def test_sweeps_go_in_batches_and_within_a_budget() -> None:
    model, pairs = build(), some_pairs(5)
    for over in ("positions", "heads", "neurons"):
        whole = activation_patching(model, pairs, over=over).per_example
        for options in ({"batch_size": 2}, {"memory_budget": 150_000}):
            assert close(activation_patching(model, pairs, over=over, **options).per_example, whole, 1e-5)


def test_sweeps_are_shown_as_table_and_figure() -> None:
    model, pairs = build(), some_pairs(4)
    at = activation_patching(model, pairs, over="positions")
    frame = at.to_frame()
    assert list(frame.columns) == ["layer", "position", "score", "low", "high"] and len(frame) == 8
    assert frame["score"].abs().is_monotonic_decreasing
    first = frame.iloc[0]
    assert first["score"] == pytest.approx(float(at.scores[int(first["layer"]), int(first["position"])]))
    figure = at.figure()
    assert figure.layout.xaxis.title.text == "position" and figure.layout.yaxis.title.text == "layer"
    assert figure.data[0].zmax == -figure.data[0].zmin == pytest.approx(float(at.scores.abs().max()))
    bars = activation_patching(model, pairs, over="neurons").figure(top=7)
    assert len(bars.data[0].y) == 7 and "logit_difference" in bars.layout.xaxis.title.text
    assert "<table" in at._repr_html_()


def test_bad_sweeps_are_refused() -> None:
    model, pairs = build(), some_pairs(3)
    with pytest.raises(UnknownName, match="unknown sweep 'head': did you mean 'heads'"):
        activation_patching(model, pairs, over="head")
    with pytest.raises(UnknownName, match="unknown ablation 'shuffle'"):
        activation_patching(model, pairs, over="heads", ablation="shuffle")
    with pytest.raises(BadInput, match="no ablation changes metric"):
        activation_patching(model, pairs, metric=lambda logits, pairs: torch.ones(len(pairs)), over="heads")
