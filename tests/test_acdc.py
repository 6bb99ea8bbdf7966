"""ACDC against the algorithm as published, run naively, and its decisions under every way to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from discovery_models import at_answers, build, close, hugging_face, planted, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import Graph, acdc, kl_divergence, logit_difference, squared_error
from circuits.discovery.batches import setting_of
from circuits.discovery.removal import reproducible_metric
from circuits.errors import BadInput, UnsupportedModel
from circuits.tasks.base import Pairs

HERE = Path(__file__).parent


def naive(model: Any, pairs: Pairs, metric: Any, tau: float, distance: bool) -> tuple[Tensor, Tensor]:
    """One whole forward per edge, last reader first, last source first: the edges that stay, and each one's change."""
    graph = Graph.from_model(model)
    keep, changes = torch.ones(graph.n_edges, dtype=torch.bool), torch.zeros(graph.n_edges)
    number = {edge: i for i, edge in enumerate(graph.edges)}
    now = discovery.ablated_metric(model, pairs, keep[None], metric=metric)[0].mean()
    for reader in reversed(graph.readers):
        for source in reversed(graph.sources[: graph.visible[graph.readers.index(reader)]]):
            without = keep.clone()
            without[number[source, reader]] = False
            then = discovery.ablated_metric(model, pairs, without[None], metric=metric)[0].mean()
            change = float(then - now)
            changes[number[source, reader]] = change
            if (change if distance else abs(change)) < tau:
                keep, now = without, then
    return keep, changes


SHAPES = ["layer-norm", "rms-gated-no-positions", "GPTNeoX", "Llama"]
CASES = [*((shape, "kl") for shape in SHAPES), ("GPTNeoX", "logit-difference"), ("attention-only", "squared-error")]


@pytest.mark.parametrize(("shape", "metric"), CASES)
def test_decisions_are_those_of_the_published_algorithm(shape: str, metric: str) -> None:
    model = hugging_face(shape) if shape in ("GPTNeoX", "Llama") else build(shape)
    pairs = some_pairs(4)
    of = {"kl": kl_divergence, "squared-error": squared_error}
    measure = of[metric](model, pairs) if metric in of else logit_difference
    nothing = torch.zeros(1, Graph.from_model(model).n_edges, dtype=torch.bool)
    both = discovery.ablated_metric(model, pairs, torch.cat([nothing, ~nothing]), metric=measure).detach()
    tau = 0.003 * float((both[0] - both[1]).abs().mean())
    expected, changes = naive(model, pairs, measure, tau, metric in of)
    circuit = acdc(model, pairs, measure, tau=tau)
    assert torch.equal(circuit.kept, expected)
    assert 3 < circuit.n_kept < circuit.graph.n_edges - 3
    assert float(circuit.scores.min()) >= 0
    stays = circuit.scores[circuit.kept]
    assert close(stays, changes[circuit.kept].abs(), 1e-3) and float(stays.min()) >= tau * 0.999
    assert float(circuit.scores[~circuit.kept].max()) < tau
    assert circuit.per_example is not None and close(circuit.per_example.mean(0), circuit.scores, 1e-5)


@pytest.mark.parametrize("tau", [1e-4, 0.01, 0.3])
def test_decisions_do_not_depend_on_how_many_are_tried_at_a_time(tau: float) -> None:
    model, pairs = build("layer-norm", n_layers=3), some_pairs(5)
    metric = kl_divergence(model, pairs)
    one = acdc(model, pairs, metric, tau=tau)
    for options in ({"speculate": 2}, {"speculate": 5}, {"speculate": 100}, {"batch_size": 1}, {"batch_size": 2}):
        other = acdc(model, pairs, metric, tau=tau, **options)
        assert torch.equal(one.kept, other.kept), options
        assert close(one.scores, other.scores, 1e-4), options
    assert one.details["tried"] <= one.graph.n_edges - 22  # nothing comes in at the position embedding


def thresholds(model: Any, pairs: Pairs, metric: Any) -> list[float]:
    """Thresholds at which rounding alone would decide: effects that were measured, and their neighbours in float32."""
    first = acdc(model, pairs, metric, tau=0.02)
    assert first.per_example is not None
    effects = first.per_example.double().mean(0)
    order = [i for i in effects.argsort(descending=True).tolist() if effects[i] > 1e-3]
    measured = float(effects[order[len(order) // 2]])
    return [measured, float(torch.nextafter(torch.tensor(measured), torch.tensor(0.0)))]  # met, and missed by a hair


@pytest.mark.parametrize(("shape", "kind"), [("layer-norm", "logits"), ("Llama", "kl")])
def test_a_threshold_set_exactly_at_an_effect_gives_one_answer(shape: str, kind: str) -> None:
    model, pairs = (build() if shape == "layer-norm" else hugging_face(shape)), some_pairs(6)
    metric = kl_divergence(model, pairs) if kind == "kl" else logit_difference
    for tau in thresholds(model, pairs, metric):
        one = acdc(model, pairs, metric, tau=tau)
        for options in ({"batch_size": 1}, {"batch_size": 4, "speculate": 3}):
            other = acdc(model, pairs, metric, tau=tau, **options)
            assert torch.equal(one.kept, other.kept), (tau, options)


def test_a_reproducible_run_is_the_same_to_the_last_bit() -> None:
    model, pairs = build(), some_pairs(19)
    keep = torch.rand(61, generator=torch.Generator().manual_seed(0)) < 0.6
    found = []
    for batch_size in (1, 5, None):
        setting = setting_of(model, pairs, logit_difference, ablation="corrupt", denoising=False, batch_size=batch_size)
        with torch.no_grad():
            found.append(reproducible_metric(setting, keep))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with torch.no_grad():
        together = discovery.ablated_metric(model, pairs, keep[None])[0]
    assert close(found[0], together, 1e-5)


SCRIPT = """
import json, sys, torch
from discovery_models import build, some_pairs
from circuits.discovery import acdc, kl_divergence
torch.set_num_threads(int(sys.argv[1]))  # what is imported above leaves torch one thread
model, pairs = build('layer-norm', d_model=64, d_mlp=256), some_pairs(20)
metric = kl_divergence(model, pairs)
options = json.loads(sys.argv[2])
kept = [acdc(model, pairs, metric, tau=tau, **options).kept.tolist() for tau in json.loads(sys.argv[3])]
print(json.dumps(kept), torch.get_num_threads())
"""


def test_decisions_do_not_depend_on_threads_or_hash_seed() -> None:
    model, pairs = build("layer-norm", d_model=64, d_mlp=256), some_pairs(20)
    taus = [0.02, thresholds(model, pairs, kl_divergence(model, pairs))[0]]
    runs = []
    for threads, options, seed in (("1", {}, "0"), ("2", {"batch_size": 9, "speculate": 3}, "random")):
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        # threads that wait must not take the cores of those that work, here or in another test
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
        environment.pop("OMP_NUM_THREADS", None)
        call = [sys.executable, "-c", SCRIPT, threads, json.dumps(options), json.dumps(taus)]
        runs.append((threads, subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True)))
    kept = []
    for threads, run in runs:
        printed = run.communicate(timeout=300)[0].rsplit(maxsplit=1)
        assert run.returncode == 0
        kept.append(json.loads(printed[0]))
        # as many threads as before: none was left at one
        assert printed[1] == threads
    assert kept[0] == kept[1]
    assert 3 < sum(kept[0][0]) < 58


@pytest.mark.parametrize("shape", ["layer-norm", "Llama"])
def test_a_model_that_cannot_be_taken_apart_is_run_whole(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = (build() if shape == "layer-norm" else hugging_face(shape)), some_pairs(4)
    expected = acdc(model, pairs, tau=0.05)

    def refuse(*_: Any) -> None:
        raise UnsupportedModel("an odd part")

    monkeypatch.setattr("circuits.discovery.batches.blocks_of", refuse)
    whole = acdc(model, pairs, tau=0.05, speculate=3, batch_size=3)
    assert torch.equal(whole.kept, expected.kept) and close(whole.scores, expected.scores, 1e-4)
    assert whole.details["whole_forwards_because"] == "an odd part"


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_what_is_left_gives_what_the_decisions_say(ablation: str) -> None:
    model, pairs = build(), some_pairs(4)
    circuit = acdc(model, pairs, tau=0.05, ablation=ablation)
    left = discovery.ablated_metric(model, pairs, circuit.kept[None], ablation=ablation)[0].mean().detach()
    full = at_answers(model(pairs.clean), pairs).mean().detach()
    removed = circuit.scores[~circuit.kept].sum()
    assert abs(float(left - full)) <= float(removed) + 1e-4


def test_a_planted_circuit_is_what_is_left() -> None:
    pairs = Pairs(
        torch.tensor([[0, 1, 2], [3, 1, 2]]),
        torch.tensor([[3, 1, 2], [1, 0, 0]]),
        torch.tensor([2, 2]),
        torch.tensor([0, 2]),
        torch.tensor([3, 0]),
        "first token",
    )
    model = planted()
    for metric in (logit_difference, kl_divergence(model, pairs)):
        kept = set(acdc(model, pairs, metric, tau=1e-4).edges)
        assert kept == {("embed", "a0.h1.v"), ("a0.h1", "a1.h0.v"), ("a1.h0", "logits")}


def test_bad_requests_are_refused() -> None:
    model, pairs = build(), some_pairs(3)
    for tau in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="expected a finite number above 0"):
            acdc(model, pairs, tau=tau)
    with pytest.raises(BadInput, match="speculate = 0"):
        acdc(model, pairs, speculate=0)

    def constant(logits: Tensor, pairs: Pairs) -> Tensor:
        return torch.ones(len(pairs))

    with pytest.raises(BadInput, match="no ablation changes metric constant at all"):
        acdc(model, pairs, constant)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_decisions_in_half_precision_do_not_depend_on_how_many_are_tried_at_a_time() -> None:
    model, pairs = build("layer-norm").to(torch.bfloat16), some_pairs(6)
    one, four = (acdc(model, pairs, tau=0.01, speculate=n) for n in (1, 4))
    assert torch.equal(one.kept, four.kept)
    assert "bfloat16" in str(one.details["whole_forwards_because"])
