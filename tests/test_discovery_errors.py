"""What discovery refuses, and that it leaves models, flags and hooks as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from discovery_models import build, close, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import Circuit, Graph, eap, eap_ig_inputs
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import Transformer
from circuits.tasks.base import Pairs


def state_of(model: Transformer) -> tuple[Any, ...]:
    hooks = [(name, len(p.fwd_hooks), len(p.bwd_hooks)) for name, p in model.hook_dict.items()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks += [(name, *(len(getattr(module, kind)) for kind in kinds)) for name, module in model.named_modules()]
    grads = [p.grad is None and p.requires_grad for p in model.parameters()]
    return hooks, grads, model.training, dict(vars(model.cfg)), {k: v.clone() for k, v in model.state_dict().items()}


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:4] == b[:4] and all(torch.equal(a[4][k], b[4][k]) for k in a[4])


def broken(logits: Tensor, pairs: Pairs) -> Tensor:
    raise RuntimeError("this metric breaks")


def few_steps(name: str) -> dict[str, int]:
    return {"steps": 2} if name in ("subnetwork-probing", "edge-pruning", "uniform-gradient-sampling") else {}


ANALYSES: dict[str, Callable[..., Any]] = {
    **{
        name: lambda model, pairs, name=name, **o: discovery.attribute(
            model, pairs, method=name, **few_steps(name), **o
        )
        for name in discovery.METHODS
    },
    "eap+gim": lambda model, pairs, **o: eap(model, pairs, rules=discovery.GIM, **o),
    "eap+relp": lambda model, pairs, **o: eap(model, pairs, rules=discovery.RELP, **o),
    "nodes": discovery.node_attribution,
    "exact nodes": discovery.exact_nodes,
    "patterns": discovery.attention_patterns,
    "positions": lambda model, pairs, **o: discovery.activation_patching(model, pairs, over="positions", **o),
    "path": lambda model, pairs, **o: discovery.path_patching(model, pairs, path=("embed", "a0.h1.v", "logits"), **o),
    "faithfulness": lambda model, pairs, **o: discovery.faithfulness(model, eap(model, pairs), pairs, **o),
    "completeness": lambda model, pairs, **o: discovery.completeness(
        model, eap(model, pairs).top(5), pairs, n_random=1, greedy_steps=1, greedy_candidates=2, **o
    ),
    "minimality": lambda model, pairs, **o: discovery.minimality(model, eap(model, pairs).top(3), pairs, **o),
    "tests": lambda model, pairs, **o: discovery.hypothesis_tests(
        model, eap(model, pairs).top(5), pairs, n_random=44, permutations=99, **o
    ),
    "ablated": lambda model, pairs, **o: discovery.ablated_metric(
        model, pairs, torch.zeros(2, Graph.from_model(model).n_edges, dtype=torch.bool), **o
    ),
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_no_analysis_changes_the_model_or_the_callers_hooks_even_when_it_fails(analysis: str) -> None:
    model, pairs, seen = build(), some_pairs(), []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(1))]):
        before = state_of(model)
        ANALYSES[analysis](model, pairs)
        assert same(before, state_of(model)) and seen
        if analysis != "information-flow-routes":  # which has no use for a metric
            with pytest.raises(RuntimeError, match="this metric breaks"):
                ANALYSES[analysis](model, pairs, metric=broken)
        assert same(before, state_of(model))


def test_frozen_parameters_and_inference_mode_make_no_difference() -> None:
    model, pairs = build(), some_pairs()
    for name in discovery.METHODS:
        expected = discovery.attribute(model, pairs, method=name, **few_steps(name)).scores
        with torch.inference_mode():
            assert torch.equal(discovery.attribute(model, pairs, method=name, **few_steps(name)).scores, expected), name
    with torch.inference_mode():
        discovery.node_attribution(model, pairs, steps=3)
        discovery.attention_patterns(model, pairs, steps=3)
        discovery.optimal_constants(model, pairs, steps=2)
    expected = eap(model, pairs).scores
    model.requires_grad_(False)
    assert torch.equal(eap(model, pairs).scores, expected)


@pytest.mark.parametrize(("detour", "message"), [(False, "is not there"), (True, "is never reached in a run")])
def test_a_model_without_a_hook_is_refused_by_name(detour: bool, message: str) -> None:
    model, pairs = build(), some_pairs()
    if detour:
        model.blocks[0].hook_resid_pre = torch.nn.Identity()
    else:
        del model.hook_dict["blocks.0.hook_resid_pre"]
    with pytest.raises(UnsupportedModel, match=rf"blocks\.0\.hook_resid_pre of Transformer {message}"):
        eap(model, pairs)


def test_effects_that_are_all_zero_are_a_result_where_the_metric_can_change() -> None:
    model, pairs = build(), some_pairs()

    def constant(logits: Tensor, pairs: Pairs) -> Tensor:
        return torch.ones(len(pairs))

    def is_the_corrupt_run(logits: Tensor, pairs: Pairs) -> Tensor:
        corrupt = model(pairs.corrupt)[torch.arange(len(pairs)), pairs.position].detach()
        return ((logits - corrupt).abs().amax(-1) < 1e-4).float()

    path = ("embed", "a0.h1.v", "logits")
    assert not discovery.exact(model, pairs, is_the_corrupt_run).scores.any()
    assert discovery.path_patching(model, pairs, is_the_corrupt_run, path=path).score == 0
    with pytest.raises(BadInput, match="no ablation changes metric constant at all"):
        discovery.path_patching(model, pairs, constant, path=path)


def test_half_precision_scores_are_near_the_full_ones() -> None:
    model, pairs = build(), some_pairs()
    expected = eap(model, pairs).scores
    assert close(eap(model.to(torch.bfloat16), pairs).scores, expected, 0.15)


METRICS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "constant": (lambda logits, pairs: torch.ones(len(pairs)), "does not depend on the logits"),
    "detached": (lambda logits, pairs: logits.detach()[:, 0], "does not depend on the logits"),
    "flat": (lambda logits, pairs: 0 * logits[:, 0], "zero gradient at the clean point: scores would all be zero"),
    "scalar": (lambda logits, pairs: logits.mean(), "expected one number for each of 4 pairs"),
    "infinite": (
        lambda logits, pairs: (logits[:, 0] * 0).sqrt(),
        "not finite although every source is: check the metric",
    ),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.untyped
def test_a_metric_that_gives_no_scores_is_refused(name: str) -> None:
    metric, message = METRICS[name]
    with pytest.raises(BadInput, match=message):
        eap(build(), some_pairs(), metric=metric)


@pytest.mark.untyped
def test_pairs_that_do_not_line_up_are_refused() -> None:
    model, pairs = build(), some_pairs()
    for changes, message in (
        ({"corrupt": pairs.corrupt[:, :3]}, "expected equal lengths"),
        ({"corrupt": pairs.clean}, "expected pairs that differ"),
        ({"position": pairs.position + 9}, "expected 0 to 3"),
        ({"wrong": pairs.wrong[:2]}, "pairs.wrong"),
        ({"position": pairs.position.double()}, "pairs.position is of torch.float64: expected whole numbers"),
        ({n: getattr(pairs, n)[:0] for n in ("clean", "corrupt", "position", "correct", "wrong")}, "no pairs"),
    ):
        with pytest.raises(BadInput, match=message):
            eap(model, replace(pairs, **changes))


@pytest.mark.untyped
def test_other_bad_arguments_are_refused() -> None:
    model, pairs = build(), some_pairs()
    with pytest.raises(UnknownName, match="did you mean 'eap'"):
        discovery.attribute(model, pairs, method="eapp")
    with pytest.raises(UnknownName, match="unknown ablation 'shuffle'"):
        discovery.ablated_metric(model, pairs, torch.ones(1, 53, dtype=torch.bool), ablation="shuffle")
    with pytest.raises(BadInput, match="a column per edge"):
        discovery.ablated_metric(model, pairs, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="steps = 0"):
        eap_ig_inputs(model, pairs, steps=0)
    with pytest.raises(BadInput, match=r"steps = 2\.5: expected a whole number"):
        eap_ig_inputs(model, pairs, steps=2.5)
    with pytest.raises(BadInput, match="batch_size = 0"):
        eap(model, pairs, batch_size=0)
    with pytest.raises(BadInput, match="ablation is a dict: expected one of corrupt, mean, zero"):
        discovery.activation_patching(model, pairs, over="heads", ablation=discovery.optimal_constants(model, pairs))
    with pytest.raises(BadInput, match="one pair, and resampling it changes nothing"):
        discovery.stability(eap(model, some_pairs(1)), 3)
    assert eap(model, some_pairs(1)).to_frame()["low"].isna().all()


def test_a_weight_that_is_not_finite_is_named_by_its_source() -> None:
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1, 0, 0] = math.nan
    with pytest.raises(BadInput, match=r"source a1\.h1 is not finite"):
        eap(model, some_pairs())


@pytest.mark.parametrize("method", [name for name in discovery.METHODS if name != "information-flow-routes"])
def test_a_weight_of_the_unembedding_that_is_not_finite_is_not_blamed_on_the_rest(method: str) -> None:
    model = build()
    with torch.no_grad():
        model.unembed.W_U[0, 0] = math.nan
    with pytest.raises(BadInput, match=r"not finite.* check .*weights"):
        discovery.attribute(model, some_pairs(), method=method, **few_steps(method))


@pytest.mark.parametrize("analysis", ANALYSES)
def test_what_edges_cannot_represent_is_refused_by_name(analysis: str) -> None:
    model, pairs = build(), some_pairs()
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x / x.norm(dim=-1, keepdim=True))]),
        pytest.raises(UnsupportedModel, match=r"blocks\.0\.hook_mlp_in is not the sum of the sources"),
    ):
        ANALYSES[analysis](model, pairs)
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_k", lambda x, hook: 2 * x)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn\.hook_k is not the projection"),
    ):
        ANALYSES[analysis](model, pairs)
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_in", lambda x, hook: 2 * x + 1)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.0\.hook_mlp_in is not the sum of the sources"),
    ):
        ANALYSES[analysis](model, pairs)


@pytest.mark.untyped
def test_a_model_without_hooks_is_refused_with_the_way_to_get_them() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    bare = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)).eval()
    for model in (bare, torch.nn.Linear(2, 2)):
        for name in discovery.METHODS:
            with pytest.raises(UnsupportedModel, match=r"has no TransformerLens hooks: .*boot_transformers"):
                discovery.attribute(model, some_pairs(), method=name)
        with pytest.raises(UnsupportedModel, match="has no TransformerLens hooks"):
            discovery.attribute(model, some_pairs())


def test_a_model_that_drops_activations_at_random_is_refused() -> None:
    model, pairs = build(), some_pairs()
    model.add_module("extra", torch.nn.Dropout(0.5))
    with pytest.raises(BadInput, match="dropout is active in extra"):
        eap(model.train(), pairs)
    assert isinstance(eap(model.eval(), pairs), Circuit)


@pytest.mark.parametrize("option", ["n_random", "greedy_steps", "greedy_candidates"])
def test_numbers_of_knock_outs_are_counted(option: str) -> None:
    model, pairs = build(), some_pairs(4)
    with pytest.raises(BadInput, match=f"{option} = -1"):
        discovery.completeness(model, eap(model, pairs).top(10), pairs, **{option: -1})


def test_an_option_of_another_method_is_named() -> None:
    with pytest.raises(BadInput, match="rules is no option of 'exact', the method for 61 edges"):
        discovery.attribute(build(), some_pairs(4), rules="gim")
    with pytest.raises(
        BadInput, match=r"neurons is no option of 'acdc': name a method that has it \(eap, eap-ig-inputs"
    ):
        discovery.attribute(build(), some_pairs(4), method="acdc", neurons=True)
    with pytest.raises(BadInput, match=r"neuron is no option of 'eap': expected some of metric, rules"):
        discovery.attribute(build(), some_pairs(4), method="eap", neuron=True)


def test_hypotheses_on_a_metric_that_knows_no_logits_are_refused() -> None:
    model, pairs = build(), some_pairs(6)
    circuit = eap(model, pairs).top(10)
    with pytest.raises(BadInput, match="no set of edges changes metric"):
        discovery.hypothesis_tests(
            model, circuit, pairs, lambda logits, p: torch.ones(len(p)), quantile=0.5, n_random=7
        )
