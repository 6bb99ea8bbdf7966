"""Memory budgets: what the tensors of a call take together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from discovery_models import build, close, some_pairs

from circuits import discovery
from circuits.discovery import METHODS, attribute
from circuits.discovery.memory import pairs_at_a_time, peak_bytes
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import ModelConfig, Transformer
from circuits.tasks.base import Pairs

MB = 2**20

# every allocation is counted in Python: with run-time types on top, each of these takes a minute instead of seconds
pytestmark = pytest.mark.untyped


def wide(d_vocab: int = 40, **changes: Any) -> Transformer:
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "act_fn": "gelu", "normalization": "LN", **changes}
    return Transformer(ModelConfig(d_vocab=d_vocab, n_ctx=8, **sizes), seed=0).eval()


def many_pairs(n: int, d_vocab: int = 40, pos: int = 8) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, d_vocab, (2, n, pos), generator=generator)
    correct, wrong = torch.randint(0, d_vocab, (2, n), generator=generator)
    return Pairs(clean, corrupt, torch.full((n,), pos - 1), correct, wrong, "everything")


def test_allocations_are_counted_until_they_are_freed_and_views_are_not() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(1000)
        first.view(10, 100).add_(1)
        del first
        second = torch.zeros(2000)
        return second[:10] + 1

    assert peak_bytes(run) == 4 * 2010
    x = torch.ones(500, requires_grad=True)
    # the square is kept for the backward, and with it, at the end, the gradients of the root and of the square
    assert 4 * 1000 <= peak_bytes(lambda: torch.autograd.grad((x.square().sqrt()).sum(), x)) <= 4 * 3010


@pytest.mark.parametrize("fixed", [0, 3000])
def test_as_many_pairs_are_taken_as_fit(fixed: int) -> None:
    tried: list[int] = []

    def rehearse(n: int) -> torch.Tensor:
        tried.append(n)
        return torch.zeros(fixed + 100 * n)

    for budget in (20_000, 100_000, 10**6):
        size = pairs_at_a_time(rehearse, 500, memory_budget=budget)
        assert peak_bytes(lambda size=size: rehearse(size)) <= 0.85 * budget  # type: ignore[misc]
        if budget > 20_000 or not fixed:  # else one pair takes most of it
            assert size >= min(500, 0.4 * (0.75 * budget / 4 - fixed) / 100)
    tried.clear()
    assert pairs_at_a_time(rehearse, 500, memory_budget=None, estimate=1000) == 500 and not tried
    assert pairs_at_a_time(rehearse, 500, memory_budget=None, batch_size=7) == 7
    with pytest.raises(BadInput, match=r"memory_budget = 300 bytes: one pair takes \d+, of which the result"):
        pairs_at_a_time(rehearse, 500, memory_budget=300, kept=100)


LEARNED = ("subnetwork-probing", "edge-pruning", "uniform-gradient-sampling")
CALLS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda model, pairs, name=name, **o: attribute(model, pairs, method=name, **o)
        for name in METHODS
        if name not in LEARNED
    },
    **{
        name: lambda model, pairs, name=name, **o: attribute(
            model, pairs, method=name, **o, steps=2, batch_size=len(pairs)
        )
        for name in LEARNED
    },
    "constants": lambda model, pairs, **o: discovery.optimal_constants(model, pairs, steps=2, batch_size=128, **o),
    "nodes": discovery.node_attribution,
    "exact-nodes": discovery.exact_nodes,
    "patterns": discovery.attention_patterns,
    "positions": lambda model, pairs, **o: discovery.activation_patching(model, pairs, "positions", **o),
    "neurons": lambda model, pairs, **o: discovery.activation_patching(model, pairs, "neurons", **o),
    "path": lambda model, pairs, **o: discovery.path_patching(model, pairs, ("embed", "a0.h1.v", "logits"), **o),
    "means": lambda model, pairs, **o: discovery.exact(model, pairs, ablation="mean", **o),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_method_keeps_its_budget_with_many_pairs(call: str) -> None:
    model, pairs = wide(), many_pairs(256)
    run = CALLS[call]
    budget = 3 * MB
    taken = peak_bytes(lambda: run(model, pairs, memory_budget=budget))
    assert taken <= 1.1 * budget
    assert call in ("nodes", "patterns", "path") or taken >= 0.2 * budget


@pytest.mark.parametrize("call", ["eap", "exact", "path", "acdc", "mask-gradient"])
def test_a_large_vocabulary_counts(call: str) -> None:
    model, pairs = wide(d_vocab=5000), many_pairs(64, 5000)
    budget = 8 * MB
    assert peak_bytes(lambda: CALLS[call](model, pairs, memory_budget=budget)) <= 1.1 * budget
    # which a batch of all pairs would not keep
    assert peak_bytes(lambda: model(pairs.clean)) > budget


@pytest.mark.parametrize("call", ["exact", "acdc", "eap"])
def test_a_model_that_is_run_whole_keeps_its_budget_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedModel("an odd part")

    monkeypatch.setattr("circuits.discovery.batches.blocks_of", refuse)
    model, pairs = wide(), many_pairs(128)
    assert peak_bytes(lambda: CALLS[call](model, pairs, memory_budget=2 * MB)) <= 1.1 * 2 * MB


@pytest.mark.parametrize("method", LEARNED)
def test_masks_learned_in_parts_are_those_learned_at_once(method: str) -> None:
    model, pairs = build(), some_pairs(12)
    whole, parts = (
        attribute(model, pairs, method=method, steps=5, batch_size=12, memory_budget=budget)
        for budget in (None, 1_000_000)
    )
    assert close(whole.scores, parts.scores, 1e-4)
    assert whole.details["loss"] == pytest.approx(parts.details["loss"], rel=1e-4)


def test_edges_removed_within_a_small_budget_are_those_of_a_large_one() -> None:
    model, pairs = build(), some_pairs(40)
    metric = discovery.kl_divergence(model, pairs)
    whole = discovery.acdc(model, pairs, metric, tau=0.002)
    small = discovery.acdc(model, pairs, metric, tau=0.002, memory_budget=400_000)
    assert "does not fit the memory budget" in str(small.details["whole_forwards_because"])
    assert "whole_forwards_because" not in whole.details
    assert torch.equal(whole.kept, small.kept) and close(whole.scores, small.scores, 1e-3)
