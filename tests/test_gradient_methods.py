"""Gradient methods beyond EAP, each against its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from discovery_models import Naive, build, close, hugging_face, model_of, shapes, some_pairs, variants

from circuits import discovery
from circuits.discovery import METHODS, Circuit, Graph, ablated_metric, eap
from circuits.discovery.ablate import ablated_logits, ablated_logits_by_pair, replacement
from circuits.discovery.activations import gradients, values_at
from circuits.discovery.edge_products import RUNS, edge_product, product_by_position
from circuits.discovery.metrics import measure
from circuits.discovery.reader_gradients import ReaderGradients
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName
from circuits.tasks.base import Pairs


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.corrupt, pairs.clean, pairs.position, pairs.correct, pairs.wrong, pairs.changed)


@variants
def test_a_mask_per_pair_is_a_set_per_pair(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    sites = sites_of(model)
    keep = torch.rand(len(pairs), sites.graph.n_edges, generator=torch.Generator().manual_seed(0))
    for ablation in ("corrupt", "mean"):
        replaced = replacement(model, sites, pairs, ablation)
        with torch.no_grad():
            together = ablated_logits_by_pair(model, sites, pairs.clean, replaced, keep)
            by_set = ablated_logits(model, sites, pairs.clean, replaced, keep)
        assert close(together, torch.stack([by_set[i, i] for i in range(len(pairs))]), 1e-5)


@variants
def test_the_mask_gradient_is_edge_attribution(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    got, expected = discovery.mask_gradient(model, pairs), eap(model, pairs)
    assert got.per_example is not None and expected.per_example is not None
    assert close(got.per_example, expected.per_example, 1e-4)
    split = discovery.mask_gradient(model, pairs, batch_size=1)
    assert split.per_example is not None and close(split.per_example, got.per_example, 1e-5)


@shapes
@pytest.mark.parametrize("together", [False, True], ids=["answers-apart", "answers-together"])
def test_what_is_left_out_of_the_products_is_zero(shape: str, together: bool) -> None:
    model, pairs = model_of(shape), some_pairs(5)
    pairs = replace(pairs, position=torch.full((5,), 2)) if together else pairs
    sites = sites_of(model)
    corrupt = values_at(model, sites.source_hooks, pairs.corrupt)
    values, grads, _ = gradients(model, sites, pairs.clean, pairs, discovery.logit_difference, at=sites.reader_hooks)
    gathered = ReaderGradients(sites)
    gathered.add(values, grads)
    assert gathered.at == (slice(2, 3) if together else slice(None))
    moved = dict(corrupt)
    if sites.pos_embed is not None:
        moved[sites.pos_embed] = corrupt[sites.pos_embed] + 1
    for other in (corrupt, moved):
        got = edge_product(sites, other, values)(values, grads)
        whole = product_by_position(sites, other, values)(values, grads).unflatten(1, (4, -1)).sum(1)
        assert close(got, whole, 1e-5)
        from_positions = ~sites.graph.counted(positions=False)
        if sites.pos_embed is not None:
            assert bool(got[:, from_positions].any()) == (other is moved)
    blocks = [g for g, _ in gathered.by_layer()]
    assert sum(len(g) for g in blocks) == len(sites.graph.readers)
    small = sum(len(g) for g in blocks if g.shape[2] == 1)
    last = sites.layers[-1]
    assert small == (len(last.W[0]) + (last.mlp_in is not None) + 1 if together else 0)


@shapes
@pytest.mark.parametrize("n_runs", [2, RUNS, RUNS + 2])
def test_gradients_added_up_over_runs_give_the_sum_of_the_products(shape: str, n_runs: int) -> None:
    model, pairs = model_of(shape), some_pairs(3)
    sites = sites_of(model)
    corrupt, clean = (values_at(model, sites.all_hooks, tokens) for tokens in (pairs.corrupt, pairs.clean))
    together, total, expected = edge_product(sites, corrupt, clean, n_runs), 0.0, 0.0
    for k in range(n_runs):
        point = {sites.embed: corrupt[sites.embed] + k / n_runs * (clean[sites.embed] - corrupt[sites.embed])}
        values, grads, _ = gradients(
            model, sites, pairs.clean, pairs, discovery.logit_difference, at=sites.reader_hooks, replaced=point
        )
        total = total + together(values, grads)
        expected = expected + edge_product(sites, corrupt, clean)(values, grads)
    assert close(total, expected, 1e-5)


@variants
def test_edges_of_pairs_with_one_answer_position_are_their_first_order_effects(variant: str) -> None:
    model, pairs = build(variant), replace(some_pairs(), position=torch.full((4,), 2))
    naive = Naive(model)
    for method, points in (("eap", [1.0]), ("clean-corrupted", [1.0, 0.0])):
        expected = torch.stack([naive.gradient(pairs, point) for point in points]).mean(0)
        got = discovery.attribute(model, pairs, method=method).per_example
        assert got is not None and close(got, expected, 1e-4)
    steps = discovery.eap_ig_activations(model, pairs, steps=1).per_example
    assert steps is not None and close(steps, naive.gradient(pairs), 1e-4)


@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
def test_mask_integrated_gradients_add_up_to_the_total_effect(ablation: str) -> None:
    model, pairs = build("layer-norm"), some_pairs()
    got = discovery.mask_ig(model, pairs, steps=60, ablation=ablation)
    keep = torch.stack([torch.zeros(61), torch.ones(61)]).bool()
    none, every = ablated_metric(model, pairs, keep, ablation=ablation)
    assert got.per_example is not None
    assert close(got.per_example.sum(1), none - every, 5e-3)
    coarse = discovery.mask_ig(model, pairs, steps=2, ablation=ablation)
    assert coarse.details["points"] == [0.25, 0.75] and not close(coarse.scores, got.scores, 1e-3)


def test_clean_corrupted_is_the_mean_of_both_ends() -> None:
    model, pairs = build(), some_pairs()
    got = discovery.clean_corrupted(model, pairs)
    expected = (eap(model, pairs).scores - eap(model, swapped(pairs)).scores) / 2
    assert close(got.scores, expected, 1e-4)


@variants
def test_activation_paths_move_one_group_of_sources_at_a_time(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    assert close(discovery.eap_ig_activations(model, pairs, steps=1).scores, eap(model, pairs).scores, 1e-5)
    got = discovery.eap_ig_activations(model, pairs, steps=3)
    sites = sites_of(model)
    graph, replaced = sites.graph, replacement(model, sites, pairs, "corrupt")
    group_of = [s if "." not in s else s.split(".")[0] for s, _ in graph.edges]
    expected = torch.zeros(len(pairs), graph.n_edges)
    for group in dict.fromkeys(group_of):
        member = torch.tensor([g == group for g in group_of])
        for k in (1, 2, 3):
            keep = torch.where(member, k / 3, 1.0).repeat(len(pairs), 1).requires_grad_()
            logits = ablated_logits_by_pair(model, sites, pairs.clean, replaced, keep)
            total = measure(discovery.logit_difference, logits, pairs).sum()
            expected -= torch.where(member, torch.autograd.grad(total, keep)[0], 0) / 3
    assert got.per_example is not None and close(got.per_example, expected, 1e-4)
    with pytest.raises(BadInput, match="steps = 0"):
        discovery.eap_ig_activations(model, pairs, steps=0)


@variants
def test_information_flow_shares_what_each_reader_sees(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    got = discovery.information_flow_routes(model, pairs)
    matrix = got.graph.dense(got.scores)
    assert not got.signed and float(got.scores.min()) >= 0
    assert float(matrix.sum(1).max()) <= 1 + 1e-5
    assert torch.equal(got.ranking(absolute=False), got.ranking())
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean)
    embed = cache["hook_embed"]
    parts = [embed] if "hook_pos_embed" not in cache else [embed, cache["hook_pos_embed"].expand_as(embed)]
    for i in range(2):
        first = share(cache[f"blocks.{i}.hook_resid_pre"], parts)
        assert close(matrix[got.graph.readers.index(f"a{i}.h1.v"), : len(parts)], first, 1e-5)
        W_O = model.blocks[i].attn.W_O.detach()  # type: ignore[index, union-attr]
        parts += [cache[f"blocks.{i}.attn.hook_z"][:, :, h] @ W_O[h] for h in range(2)]
        if not model.config.attn_only:
            middle = share(cache[f"blocks.{i}.hook_resid_mid"], parts)
            assert close(matrix[got.graph.readers.index(f"m{i}"), : len(parts)], middle, 1e-5)
            parts.append(cache[f"blocks.{i}.hook_mlp_out"])
    assert close(matrix[-1], share(cache["blocks.1.hook_resid_post"], parts), 1e-5)


def share(y: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    proximity = torch.stack([(y.abs().sum(-1) - (y - a).abs().sum(-1)).clamp_min(0) for a in parts])
    total = proximity.sum(0)
    return torch.where(total > 0, proximity / total, 0).mean((1, 2))


@pytest.mark.parametrize("ablation", ["corrupt", "zero"])
def test_head_importance_is_the_size_of_difference_times_gradient_over_the_blocks_norm(ablation: str) -> None:
    model, pairs = build("layer-norm"), some_pairs()
    got = discovery.hisp(model, pairs, ablation=ablation)
    kept: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, *, hook: Any) -> torch.Tensor:
        kept[hook.name] = tensor
        tensor.retain_grad()
        return tensor

    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.hook_z", "hook_mlp_out")]
    with torch.no_grad():
        _, corrupt = model.run_with_cache(pairs.corrupt)
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        measure(discovery.logit_difference, model(pairs.clean), pairs).sum().backward()
    model.zero_grad()
    sizes: dict[str, torch.Tensor] = {}
    for i in (0, 1):
        of_block: dict[str, torch.Tensor] = {}
        for name in (f"blocks.{i}.attn.hook_z", f"blocks.{i}.hook_mlp_out"):
            change = kept[name] - (corrupt[name] if ablation == "corrupt" else 0)
            along = (change * kept[name].grad).detach().sum((1, -1)).abs()  # type: ignore[operator]
            heads = along.T if along.ndim == 2 else [along]
            of_block |= {(f"m{i}" if along.ndim == 1 else f"a{i}.h{h}"): x for h, x in enumerate(heads)}
        norm = torch.stack([x.mean() for x in of_block.values()]).norm()
        sizes |= {name: x / norm for name, x in of_block.items()}
    most = max(sizes.values(), key=lambda x: float(x.mean()))
    assert got.per_example is not None and not got.signed and got.details["ablation"] == ablation
    for (source, reader), column in zip(got.graph.edges, got.per_example.T, strict=True):
        ends = [sizes.get(source, most), sizes.get(reader.rsplit(".", 1)[0] if "." in reader else reader, most)]
        assert close(column, min(ends, key=lambda x: float(x.mean())), 1e-4), (source, reader)


def test_the_edges_of_most_importance_are_those_among_the_most_important_components() -> None:
    got = discovery.hisp(build("layer-norm", n_layers=3), some_pairs(9))
    scores = [round(score, 5) for score in got.scores.tolist()]  # sums of the same numbers may differ by rounding
    assert len(set(scores)) > 5
    for value in set(scores) - {min(scores)}:
        chosen = [edge for edge, score in zip(got.graph.edges, scores, strict=True) if score >= value]
        ends = {source for source, _ in chosen} | {reader.rsplit(".", 1)[0] for _, reader in chosen}
        inside = [(u, v) for u, v in got.graph.edges if u in ends and v.rsplit(".", 1)[0] in ends]
        assert sorted(chosen) == sorted(inside)
    with pytest.raises(UnknownName, match="unknown ablation of hisp 'mean'"):
        discovery.hisp(build(), some_pairs(), ablation="mean")


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama"])
def test_every_method_runs_on_a_bridge_and_leaves_it_alone(architecture: str) -> None:
    bridge = hugging_face(architecture)
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    few = {key: {"steps": 2} for key in ("subnetwork-probing", "edge-pruning", "uniform-gradient-sampling")}
    for method in METHODS:
        circuit = discovery.attribute(bridge, some_pairs(2, 4, 11), method=method, **few.get(method, {}))
        assert circuit.graph == Graph.from_model(bridge) and bool(torch.isfinite(circuit.scores).all()), method
        for name, p in bridge.named_parameters():
            assert torch.equal(p, before[name]) and p.grad is None, (method, name)


def test_signs_are_saved(tmp_path: Any) -> None:
    circuit = discovery.hisp(build(), some_pairs())
    assert not Circuit.load(circuit.save(tmp_path / "c")).signed
    assert Circuit.load(eap(build(), some_pairs()).save(tmp_path / "d")).signed


def test_metrics_without_gradient_are_refused_by_name() -> None:
    def flat(logits: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return logits[:, 0] * 0

    def constant(logits: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return torch.zeros(len(pairs))

    for method in ("eap-ig-activations", "clean-corrupted", "mask-gradient", "mask-ig", "hisp"):
        with pytest.raises(BadInput, match="flat has zero gradient"):
            discovery.attribute(build(), some_pairs(), method=method, metric=flat)
        with pytest.raises(BadInput, match="constant does not depend on the logits"):
            discovery.attribute(build(), some_pairs(), method=method, metric=constant)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_a_file_of_its_name(name: str) -> None:
    assert METHODS[name].__module__ == f"circuits.discovery.{name.replace('-', '_')}"
