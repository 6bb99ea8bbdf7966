"""Memory budgets: what the tensors of a call take together."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_repeats
from discovery_models import build, close, some_pairs

from circuits import discovery
from circuits.discovery import METHODS, Circuit, Graph, attribute
from circuits.discovery.activation_patching import _means
from circuits.discovery.batches import setting_of
from circuits.discovery.circuit import mean_interval
from circuits.discovery.memory import pairs_at_a_time, peak_bytes
from circuits.discovery.nested import nested_metric
from circuits.discovery.optimal_ablation import starting_constants
from circuits.discovery.sites import sites_of
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

    for budget in (30_000, 100_000, 10**6):
        size = pairs_at_a_time(rehearse, 500, memory_budget=budget)
        assert peak_bytes(lambda size=size: rehearse(size)) <= 0.85 * budget  # type: ignore[misc]
        if budget > 30_000 or not fixed:  # else one pair takes most of it
            assert size >= min(500, 0.4 * (0.5 * budget / 4 - fixed) / 100)
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
    "positions": lambda model, pairs, **o: discovery.activation_patching(model, pairs, over="positions", **o),
    "neurons": lambda model, pairs, **o: discovery.activation_patching(model, pairs, over="neurons", **o),
    "path": lambda model, pairs, **o: discovery.path_patching(model, pairs, path=("embed", "a0.h1.v", "logits"), **o),
    "means": lambda model, pairs, **o: discovery.exact(model, pairs, ablation="mean", **o),
    "neurons, mean": lambda model, pairs, **o: discovery.activation_patching(
        model, pairs, over="neurons", ablation="mean", **o
    ),
    "kl-divergence": lambda model, pairs, **o: discovery.kl_divergence(model, pairs, **o),
    "squared-error": lambda model, pairs, **o: discovery.squared_error(model, pairs, **o),
    "ablated": lambda model, pairs, **o: discovery.ablated_metric(model, pairs, some_sets(model), **o),
    "ablated, mean": lambda model, pairs, **o: discovery.ablated_metric(
        model, pairs, some_sets(model), ablation="mean", **o
    ),
    "ablated by position": lambda model, pairs, **o: discovery.ablated_metric(
        model, pairs, some_sets(model)[:, None].expand(-1, 8, -1), **o
    ),
    "nested": lambda model, pairs, **o: nested_metric(
        model, pairs, some_sets(model).cumprod(0).bool(), discovery.logit_difference, **o
    ),
    "faithfulness": lambda model, pairs, **o: discovery.faithfulness(
        model, circuit_of(model, pairs, o), pairs, n_random=2, **o
    ),
    "faithfulness, zero": lambda model, pairs, **o: discovery.faithfulness(
        model, circuit_of(model, pairs, o), pairs, ablation="zero", shares=[0, 0.3, 0.7, 1], **o
    ),
    "completeness": lambda model, pairs, **o: discovery.completeness(
        model, circuit_of(model, pairs, o), pairs, n_random=8, greedy_steps=2, **o
    ),
    "minimality": lambda model, pairs, **o: discovery.minimality(model, circuit_of(model, pairs, o), pairs, **o),
    "hypothesis-tests": lambda model, pairs, **o: discovery.hypothesis_tests(
        model, circuit_of(model, pairs, o), pairs, quantile=0.5, n_random=7, permutations=99, **o
    ),
    "stability": lambda model, pairs, **o: discovery.stability(SCORED, 900, **o),
    "edge-accuracy": lambda model, pairs, **o: discovery.edge_accuracy(SCORED, TRUE_EDGES, **o),
}
BIG = Graph.build(4, 8)
TRUE_EDGES = BIG.edges[::7]


def some_sets(model: Transformer) -> torch.Tensor:
    """Sets of edges of a model, each with most of them."""
    return torch.rand(40, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.95


def circuit_of(model: Transformer, pairs: Pairs, options: dict[str, Any]) -> Circuit:
    return discovery.eap(model, pairs, **options).top(12)


def scored(size: int) -> Circuit:
    """A circuit whose scores per pair take as many bytes."""
    effects = torch.randn(size // (4 * BIG.n_edges), BIG.n_edges, generator=torch.Generator().manual_seed(0))
    return Circuit.of_effects(BIG, effects, method="x", metric="m", details={})


SCORED = scored(MB // 2)


REPEATS = {
    "mask-gradient",
    "eap-ig-inputs",
    "hisp",
    "clean-corrupted",
    "subnetwork-probing",
    "edge-pruning",
    "neurons",
    "means",
    "ablated, mean",
    "faithfulness, zero",
    "completeness",
    "squared-error",
    "exact-nodes",
}


@pytest.mark.parametrize("call", with_repeats(CALLS, set(CALLS) - REPEATS))
def test_every_method_keeps_its_budget_with_many_pairs(call: str) -> None:
    # two layers, and so a part that is followed by a whole block, where batches follow from that
    n_layers = 2 if call in ("eap", "exact", "acdc", "nested") else 1
    model, pairs = wide(n_layers=n_layers), many_pairs(64)
    run = CALLS[call]
    budget = n_layers * MB
    taken = peak_bytes(lambda: run(model, pairs, memory_budget=budget))
    assert taken <= 1.1 * budget
    assert call in ("nodes", "patterns", "path", "kl-divergence", "squared-error") or taken >= 0.2 * budget


EVALUATIONS = ("ablated", "ablated, mean", "ablated by position", "nested", "completeness", "minimality")


@pytest.mark.parametrize("call", [*EVALUATIONS, "faithfulness", "hypothesis-tests"])
def test_an_evaluation_within_a_budget_is_that_without(call: str) -> None:
    model, pairs = wide(n_layers=1), many_pairs(24)
    whole = CALLS[call](model, pairs)
    for options in ({"memory_budget": 700_000}, {"batch_size": 7}):
        part = CALLS[call](model, pairs, **options)
        for got, expected in zip(numbers(part), numbers(whole), strict=True):
            assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


def numbers(result: Any) -> list[list[float]]:
    frame = next(
        (x for x in (getattr(result, n, None) for n in ("curve", "knockouts", "edges")) if x is not None), result
    )
    if isinstance(frame, torch.Tensor):
        return frame.tolist()
    return frame.select_dtypes("number").to_numpy().tolist()


def test_resamples_within_a_budget_are_those_without() -> None:
    whole, part = (discovery.stability(SCORED, 120, memory_budget=budget) for budget in (None, MB))
    assert part.jaccard == pytest.approx(whole.jaccard) and part.interval == pytest.approx(whole.interval)
    assert torch.allclose(part.frequency, whole.frequency)
    right, left = (discovery.edge_accuracy(SCORED, TRUE_EDGES, memory_budget=budget) for budget in (None, MB))
    assert right.auroc_interval is not None and left.auroc_interval == pytest.approx(right.auroc_interval)
    assert left.average_precision_interval == pytest.approx(right.average_precision_interval)
    values = torch.randn(30, 200, generator=torch.Generator().manual_seed(0)).double()
    for got, expected in zip(mean_interval(values, memory_budget=1000), mean_interval(values), strict=True):
        assert torch.allclose(got, expected)


@pytest.mark.parametrize("call", ["eap", "exact", "path", "ablated", "kl-divergence"])
def test_a_large_vocabulary_counts(call: str) -> None:
    model, pairs = wide(d_vocab=5000, n_layers=1), many_pairs(32, 5000)
    budget = 5 * MB
    assert peak_bytes(lambda: CALLS[call](model, pairs, memory_budget=budget)) <= 1.1 * budget
    # which a batch of all pairs would not keep
    assert peak_bytes(lambda: model(pairs.clean)) > budget


def test_means_over_many_inputs_are_taken_in_parts() -> None:
    model, pairs = wide(d_vocab=5000), many_pairs(256, 5000)
    taken = peak_bytes(lambda: starting_constants(model, sites_of(model), pairs, memory_budget=8 * MB))
    assert taken <= 1.1 * 8 * MB < peak_bytes(lambda: model(pairs.clean))
    setting = setting_of(model, pairs, discovery.logit_difference, ablation="zero", denoising=False)
    names = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    with torch.no_grad():
        assert peak_bytes(lambda: _means(setting, names, 4 * MB, None)) <= 1.1 * 4 * MB
        parts, whole = (_means(setting, names, None, size) for size in (7, None))
    assert all(close(parts[name], whole[name], 1e-5) for name in names)


@pytest.mark.parametrize("call", ["exact", "eap"])
def test_a_model_that_is_run_whole_keeps_its_budget_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedModel("an odd part")

    monkeypatch.setattr("circuits.discovery.batches.blocks_of", refuse)
    model, pairs = wide(), many_pairs(32)
    assert peak_bytes(lambda: CALLS[call](model, pairs, memory_budget=MB)) <= 1.1 * MB


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


SCRIPT = """
import sys, threading, time
import torch
from test_discovery_memory import CALLS, MB, many_pairs, resident, wide

torch.set_num_threads(1)
budget = 64 * MB
model = wide(d_model=128, n_heads=4)
for name in sys.argv[1:]:
    pairs = many_pairs(160 if name in ("exact", "faithfulness") else 640)
    CALLS[name](model, pairs.take(torch.arange(4)), memory_budget=1000 * MB)  # what is loaded at the first call
    start, running, peaks = resident(), True, []

    def watch():
        while running:
            peaks.append(resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    CALLS[name](model, pairs, memory_budget=budget)
    running = False
    thread.join()
    print(name, (max(peaks) - start) / budget)
"""


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a process's memory is read from /proc")
@pytest.mark.parametrize(
    "call", with_repeats(("eap", "exact", "acdc", "mask-gradient", "edge-pruning", "faithfulness"), {"eap"})
)
def test_the_process_keeps_the_budget_too(call: str) -> None:
    """Not what tensors hold, as in the other tests, but what the operating system gave, by its default allocator."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT, call],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=environment,
    )
    name, share = said.stdout.split()
    assert name == call and 0.3 < float(share) < 1.2
