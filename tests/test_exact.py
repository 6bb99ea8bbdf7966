"""Exact patching of edges and sources against a loop that patches one edge at a time through hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from discovery_models import SHAPES, at_answers, build, close, hooks_into, hugging_face, model_of, shapes, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import Graph, exact, exact_nodes, kl_divergence, log_probability, squared_error
from circuits.discovery.ablate import replacement
from circuits.discovery.activations import source_differences, source_values
from circuits.discovery.blocks import blocks_of
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import Transformer
from circuits.tasks.base import Pairs


def logits_with_one_edge_changed(model: Any, tokens: Tensor, change: Tensor, reader: str) -> Tensor:
    """One whole forward with hooks, in which one reader sees ``change`` more."""
    with torch.no_grad(), model.hooks(fwd_hooks=hooks_into(model, reader, change)):
        return model(tokens)


def one_at_a_time(model: Any, pairs: Pairs, ablation: str = "corrupt") -> Tensor:
    """The definition: [edge, pair]."""
    sites = sites_of(model)
    clean = source_values(model, sites, pairs.clean)
    changes = source_differences(sites, replacement(model, sites, pairs, ablation), clean)
    base = at_answers(model(pairs.clean), pairs).detach()
    order = {name: i for i, name in enumerate(sites.graph.sources)}
    rows = []
    for source, reader in sites.graph.edges:
        logits = logits_with_one_edge_changed(model, pairs.clean, changes[order[source]], reader)
        rows.append(at_answers(logits, pairs) - base)
    return torch.stack(rows)


@shapes
def test_every_edge_equals_a_loop_that_patches_one_at_a_time(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(4)
    circuit = exact(model, pairs)
    expected = one_at_a_time(model, pairs).T
    assert circuit.per_example is not None and close(circuit.per_example, expected, 1e-4)
    assert close(circuit.scores, expected.mean(0), 1e-4)
    assert float(expected.abs().max()) > 1e-2
    assert "whole_forwards_because" not in circuit.details
    large = expected.mean(0).abs() > 1e-2 * float(expected.abs().max())
    relative = ((circuit.scores - expected.mean(0)) / expected.mean(0))[large].abs().max()
    assert large.sum() > 10 and float(relative) < 1e-4
    assert ("kv" in str(circuit.graph.readers)) == (shape == "Llama")


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model in double precision stay there: some take a step to single precision in a norm or a softmax."""
    softmax = torch.nn.functional.softmax

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def wide_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)


# The attention of a GPT-J turns queries and keys in single precision whatever the model's own.
@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "GPTJ"])
def test_in_double_precision_no_edge_however_small_is_off(shape: str) -> None:
    model, pairs = model_of(shape).double(), some_pairs(4)
    expected = one_at_a_time(model, pairs).T
    circuit = exact(model, pairs)
    assert circuit.per_example is not None
    error = (circuit.per_example - expected).abs()
    assert bool((error <= 1e-6 * expected.abs() + 1e-12).all())
    # down to edges a million times smaller than the largest
    assert float((expected.abs() > 1e-9).double().mean()) > 0.3


@pytest.mark.parametrize("shape", ["layer-norm", "GPTNeoX", "Llama"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_edges_can_carry_the_mean_or_nothing(shape: str, ablation: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    circuit = exact(model, pairs, ablation=ablation)
    assert circuit.per_example is not None
    assert close(circuit.per_example, one_at_a_time(model, pairs, ablation).T, 1e-4)
    assert circuit.details["ablation"] == ablation


def test_edges_can_carry_given_constants() -> None:
    model, pairs = build(), some_pairs(3)
    sites = sites_of(model)
    mean = replacement(model, sites, pairs, "mean")
    given = exact(model, pairs, ablation=mean)
    assert torch.equal(given.scores, exact(model, pairs, ablation="mean").scores)
    assert given.details["ablation"] == discovery.mask_gradient(model, pairs, ablation=mean).details["ablation"]
    constants = {name: value.mean(1, keepdim=True) for name, value in mean.items()}
    got = exact(model, pairs, ablation=constants).scores
    one_off = ~torch.eye(sites.graph.n_edges, dtype=torch.bool)
    wide = {name: value.expand(-1, 4, *value.shape[2:]) for name, value in constants.items()}
    assert close(got, exact(model, pairs, ablation=wide).scores, 1e-5) and len(one_off) == len(got)
    with pytest.raises(BadInput, match=r"ablation lacks 'blocks\.1\.hook_mlp_out'"):
        exact(model, pairs, ablation={n: t for n, t in mean.items() if n != "blocks.1.hook_mlp_out"})


@shapes
def test_a_model_that_cannot_be_taken_apart_is_run_whole(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    expected, nodes = exact(model, pairs), exact_nodes(model, pairs).source_frame()

    def refuse(*_: Any) -> None:
        raise UnsupportedModel("an odd part")

    monkeypatch.setattr("circuits.discovery.batches.blocks_of", refuse)
    whole = exact(model, pairs, batch_size=2)
    assert close(whole.scores, expected.scores, 1e-4)
    assert whole.details["whole_forwards_because"] == "an odd part"
    slow = exact_nodes(model, pairs).source_frame().loc[nodes.index]
    assert close(torch.tensor(slow["score"].to_numpy()), torch.tensor(nodes["score"].to_numpy()), 1e-4)


def test_an_attention_of_another_kind_is_noticed() -> None:
    """A bias by head and distance: the products are scaled as usual, but the softmax is of something else."""
    model, pairs = hugging_face("GPT2"), some_pairs(2)
    sites = sites_of(model)
    bias = 4 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def biased(scores: Tensor, hook: Any) -> Tensor:
        return scores + bias

    assert blocks_of(model, sites, pairs.clean).causal
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", biased)]),
        pytest.raises(UnsupportedModel, match=r"attention of blocks\.1 is not a softmax"),
    ):
        blocks_of(model, sites, pairs.clean)


@pytest.mark.parametrize("shape", ["layer-norm", "bidirectional-half-uniform", "Llama"])
def test_batches_and_budgets_do_not_change_the_scores(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(5)
    expected = exact(model, pairs)
    assert expected.per_example is not None
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"memory_budget": 150_000}, {"memory_budget": 10**9}):
        got = exact(model, pairs, **options).per_example
        assert got is not None and close(got, expected.per_example, 1e-5), options


def test_positions_after_the_answers_do_not_count_in_a_causal_model_and_do_in_another() -> None:
    pairs = some_pairs(4)
    early = replace(pairs, position=torch.full((4,), 2))
    other = replace(early, clean=early.clean.clone(), corrupt=early.corrupt.clone())
    other.clean[:, 3], other.corrupt[:, 3] = 0, 5
    causal, both = build(), build("bidirectional-half-uniform")
    assert torch.equal(exact(causal, early).scores, exact(causal, other).scores)
    assert not close(exact(both, early).scores, exact(both, other).scores, 1e-2)


@shapes
def test_a_source_replaced_everywhere_equals_a_hook_on_its_output(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    sites = sites_of(model)
    corrupt = replacement(model, sites, pairs, "corrupt")
    frame = exact_nodes(model, pairs).source_frame()
    base = at_answers(model(pairs.clean), pairs).detach()
    checked = 0
    for name in sites.source_hooks:
        heads = range(corrupt[name].shape[2]) if corrupt[name].ndim == 4 else [None]
        for head in heads:

            def edit(x: Tensor, hook: Any, head: int | None = head, name: str = name) -> Tensor:
                out = corrupt[name].expand_as(x).clone() if head is None else x.clone()
                if head is not None:
                    out[:, :, head] = corrupt[name][:, :, head]
                return out

            with torch.no_grad(), model.hooks(fwd_hooks=[(name, edit)]):
                effect = (at_answers(model(pairs.clean), pairs) - base).mean()
            got = frame.loc[sites.graph.sources[checked], "score"]
            assert got == pytest.approx(float(effect), abs=1e-4 * float(frame["score"].abs().max()))
            checked += 1
    assert checked == len(sites.graph.sources)
    assert ((frame["low"] <= frame["score"] + 1e-6) & (frame["score"] <= frame["high"] + 1e-6)).all()


@pytest.mark.parametrize("shape", ["layer-norm", "Llama"])
def test_denoising_restores_one_edge_in_the_corrupt_run(shape: str) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    swapped = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    got, expected = exact(model, pairs, denoising=True).per_example, -one_at_a_time(model, swapped).T
    assert got is not None and close(got, expected, 1e-4)
    nodes = exact_nodes(model, pairs, denoising=True).source_frame()["score"]
    other = exact_nodes(model, swapped).source_frame()["score"].loc[nodes.index]
    assert close(torch.tensor(nodes.to_numpy()), -torch.tensor(other.to_numpy()), 1e-5)
    with pytest.raises(BadInput, match="denoising restores clean activations"):
        exact(model, pairs, denoising=True, ablation="mean")


def test_in_a_linear_network_edges_into_the_logits_add_up_to_the_total_effect() -> None:
    model, pairs = build("uniform", attn_only=True), some_pairs()
    circuit = exact(model, pairs)
    _, reader = circuit.graph.ends()
    with torch.no_grad():
        total = at_answers(model(pairs.corrupt), pairs) - at_answers(model(pairs.clean), pairs)
    assert circuit.per_example is not None
    into_logits = circuit.per_example[:, reader == circuit.graph.readers.index("logits")]
    assert close(into_logits.sum(1), total, 1e-5)
    # Where nothing is nonlinear the first-order scores are exact, and a source's effect is the sum of its edges'.
    assert close(circuit.per_example, discovery.eap(model, pairs).per_example, 1e-4)
    source, _ = circuit.graph.ends()
    sums = torch.zeros(len(circuit.graph.sources)).index_add(0, source, circuit.scores)
    frame = exact_nodes(model, pairs).source_frame().loc[list(circuit.graph.sources)]
    assert close(torch.tensor(frame["score"].to_numpy()), sums.double(), 1e-4)
    # What ablating an edge of the clean run takes away is what restoring it in the corrupt run brings back.
    assert close(exact(model, pairs, denoising=True).per_example, circuit.per_example, 1e-4)


@pytest.mark.parametrize("factory", [kl_divergence, squared_error])
def test_distances_from_the_clean_output_are_metrics(factory: Any) -> None:
    model, pairs = build(), some_pairs(5)
    metric = factory(model, pairs)
    with torch.no_grad():
        rows = torch.arange(5)
        clean, corrupt = (model(t)[rows, pairs.position] for t in (pairs.clean, pairs.corrupt))
    expected = {
        "kl_divergence": torch.nn.functional.kl_div(
            corrupt.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1),
        "squared_error": (corrupt - clean).square().mean(-1),
    }[factory.__name__]
    assert close(metric(corrupt, pairs), expected, 1e-4)
    assert close(metric(corrupt[[3, 1]], pairs.take(torch.tensor([3, 1]))), expected[[3, 1]], 1e-4)
    assert float(metric(clean, pairs).abs().max()) < 1e-6
    circuit = exact(model, pairs, metric)
    assert circuit.metric == factory.__name__ and float(circuit.scores.min()) > -1e-6
    with pytest.raises(BadInput, match="scores would all be zero"):
        discovery.eap(model, pairs, metric)
    with pytest.raises(BadInput, match=r"knows no clean output for tokens \[0, 0, 0, 0\]"):
        metric(clean, replace(pairs, clean=torch.zeros_like(pairs.clean)))


def test_metrics_need_no_gradient_but_must_look_at_the_logits() -> None:
    model, pairs = build(), some_pairs(6)

    def rank(logits: Tensor, pairs: Pairs) -> Tensor:
        return (logits > logits.gather(1, pairs.correct[:, None])).sum(-1).float()

    got = exact(model, pairs, rank).per_example
    assert got is not None and got.abs().max() >= 1 and torch.equal(got, got.round())
    with pytest.raises(BadInput, match="no ablation changes metric constant at all"):
        exact(model, pairs, lambda_named("constant"))


def test_scores_of_sources_are_a_circuit_between_the_largest() -> None:
    model, pairs = build(), some_pairs(5)
    circuit = exact_nodes(model, pairs)
    frame = circuit.source_frame()
    assert circuit.per_example is not None and circuit.per_example.shape == (5, circuit.graph.n_edges)
    chosen = set(frame.index[:4])
    kept = circuit.threshold(float(circuit.scores.abs().unique(sorted=True)[-4])).pruned()
    assert {source for source, _ in kept.edges} <= chosen and kept.n_kept
    with pytest.raises(BadInput, match="exact scores each edge by itself"):
        exact(model, pairs).source_frame()


def test_the_constant_that_hurts_least_can_be_asked_for_by_name() -> None:
    model, pairs = build(), some_pairs(5)
    found = exact(model, pairs, ablation="optimal")
    assert found.details["ablation"] == "optimal"
    given = exact(model, pairs, ablation=discovery.optimal_constants(model, pairs))
    assert torch.equal(found.scores, given.scores)
    with pytest.raises(BadInput, match="expected neurons = False"):
        exact(model, pairs, ablation="optimal", neurons=True)


def lambda_named(name: str) -> Any:
    def constant(logits: Tensor, pairs: Pairs) -> Tensor:
        return torch.ones(len(pairs))

    constant.__name__ = name
    return constant


def test_nothing_of_the_model_and_no_hook_of_the_caller_is_changed() -> None:
    model, pairs = build(), some_pairs(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {k: v for k, v in vars(model.cfg).items()}
    seen: list[str] = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    def broken(logits: Tensor, pairs: Pairs) -> Tensor:
        raise RuntimeError("on purpose")

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", look)]):
        exact(model, pairs)
        exact_nodes(model, pairs)
        with pytest.raises(RuntimeError, match="on purpose"):
            exact(model, pairs, broken)
        seen.clear()
        model(pairs.clean)
        assert seen == ["blocks.0.hook_mlp_out"]
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model.cfg) == flags and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["GPT2", "Llama"])
def test_hooks_of_the_caller_on_a_bridge_are_left_alone(architecture: str) -> None:
    bridge, pairs = hugging_face(architecture), some_pairs(3)
    seen: list[str] = []
    bridge.add_hook("blocks.0.hook_mlp_out", lambda x, hook: seen.append("their own"))

    def broken(logits: Tensor, pairs: Pairs) -> Tensor:
        raise RuntimeError("on purpose")

    def again(n: int) -> bool:
        seen.clear()
        with torch.no_grad():
            bridge(pairs.clean)
        return sorted(seen) == ["around", "their own"][2 - n :]

    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: seen.append("around"))]):
        assert again(2)
        circuit = discovery.eap(bridge, pairs, rules="relp")
        for run in (
            lambda: exact(bridge, pairs),
            lambda: discovery.mask_gradient(bridge, pairs),
            lambda: discovery.acdc(bridge, pairs, tau=0.5),
            lambda: discovery.edge_pruning(bridge, pairs, steps=2),
            lambda: discovery.activation_patching(bridge, pairs, over="heads"),
            lambda: discovery.faithfulness(bridge, circuit, pairs, n_random=2),
        ):
            run()
            assert seen and again(2)
        with pytest.raises(RuntimeError, match="on purpose"):
            discovery.eap(bridge, pairs, broken)
        assert again(2)
    assert again(1)


@pytest.mark.untyped
def test_bad_requests_are_refused() -> None:
    model, pairs = build(), some_pairs(3)
    with pytest.raises(UnknownName, match="unknown ablation 'shuffle'"):
        exact(model, pairs, ablation="shuffle")
    with pytest.raises(BadInput, match=r"memory_budget = 10 bytes: one pair takes \d+"):
        exact(model, pairs, memory_budget=10)
    with pytest.raises(BadInput, match="batch_size = 0"):
        exact(model, pairs, batch_size=0)
    with pytest.raises(BadInput, match="equal lengths"):
        exact(model, replace(pairs, corrupt=pairs.corrupt[:, :-1]))
    broken = build()
    with torch.no_grad():
        broken.blocks[1].mlp.W_out[0, 0] = torch.nan
    with pytest.raises(BadInput, match="source m1 is not finite"):
        exact(broken, pairs)
    assert isinstance(model, Transformer) and Graph.from_model(model).n_edges == 61
    assert log_probability.__name__ == "log_probability"
