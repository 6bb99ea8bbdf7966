"""Blocks whose attention and MLP run side by side behind one norm (GPT-J, Phi): each engine against single edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from discovery_models import at_answers, close, hooks_into, hugging_face, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import GradientRules, Graph, acdc, eap, exact, mask_gradient
from circuits.discovery.activations import check_model, source_differences, source_values
from circuits.discovery.sites import sites_of
from circuits.errors import UnsupportedModel
from circuits.tasks.base import Pairs

architectures = pytest.mark.parametrize("architecture", ["GPTJ", "Phi"])


def one_at_a_time(model: Any, pairs: Pairs, share: float = 1.0) -> Tensor:
    """The definition: [pair, edge], of a share of each source's change."""
    sites = sites_of(model)
    clean, corrupt = (source_values(model, sites, t) for t in (pairs.clean, pairs.corrupt))
    changes = source_differences(sites, corrupt, clean)
    base = at_answers(model(pairs.clean), pairs).detach()
    rows = []
    for source, reader in sites.graph.edges:
        change = share * changes[sites.graph.sources.index(source)]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks_into(model, reader, change)):
            rows.append(at_answers(model(pairs.clean), pairs) - base)
    return torch.stack(rows, 1)


@architectures
def test_the_mlp_reads_what_attention_reads(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    graph, sites = Graph.from_model(model), sites_of(model)
    assert graph.visible[graph.readers.index("m1")] == graph.visible[graph.readers.index("a1.h0.q")]
    assert all(layer.shares_norm and layer.mlp_stream == layer.resid for layer in sites.layers)
    check_model(model, sites, pairs.clean)
    with (
        model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda x, hook: 2 * x)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.1\.mlp\.hook_in is not the normalised stream that attention"),
    ):
        check_model(model, sites, pairs.clean)


@architectures
def test_patching_and_ablation_equal_one_edge_at_a_time(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    expected = one_at_a_time(model, pairs)
    circuit = exact(model, pairs)
    assert "whole_forwards_because" not in circuit.details
    assert circuit.per_example is not None and close(circuit.per_example, expected, 1e-4)
    alone = ~torch.eye(circuit.graph.n_edges, dtype=torch.bool)
    base = at_answers(model(pairs.clean), pairs).detach()
    assert close((discovery.ablated_metric(model, pairs, alone) - base).T, expected, 1e-4)
    # a single edge into every MLP matters, or the test would show nothing of them
    _, reader = circuit.graph.ends()
    assert float(expected[:, reader == circuit.graph.readers.index("m1")].abs().max()) > 1e-3


@architectures
def test_first_order_scores_are_slopes_of_the_patching(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    step = 1e-2
    slopes = (one_at_a_time(model, pairs, step) - one_at_a_time(model, pairs, -step)) / (2 * step)
    circuit = eap(model, pairs)
    assert circuit.per_example is not None and close(circuit.per_example, slopes, 1e-3)
    # by autograd all the way, through the norm in closed form
    assert close(mask_gradient(model, pairs).scores, circuit.scores, 1e-4)


@architectures
def test_rules_and_acdc_take_such_blocks_too(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    plain = eap(model, pairs).scores
    for rules in (GradientRules(freeze_norm=True), GradientRules(linear_activation=True), "gim", "relp"):
        if architecture == "GPTJ" and isinstance(rules, str):  # its bridge computes patterns where no hook is
            with pytest.raises(UnsupportedModel, match=r"does not go through blocks\.0\.attn"):
                eap(model, pairs, rules=rules)
            continue
        scores = eap(model, pairs, rules=rules).scores
        assert bool(torch.isfinite(scores).all()) and not close(scores, plain, 1e-3)
    circuit = acdc(model, pairs, tau=0.01)
    left = discovery.ablated_metric(model, pairs, circuit.kept[None])[0].mean().detach()
    full = at_answers(model(pairs.clean), pairs).mean().detach()
    assert abs(float(left - full)) <= float(circuit.scores[~circuit.kept].sum()) + 1e-4
