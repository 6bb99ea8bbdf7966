"""Every figure of the nine published clock and pizza networks, by this package's tests of mechanisms."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from conftest import reference_folder, with_repeats

from circuits import mechanisms
from circuits.mechanisms.groups import group_table
from circuits.mechanisms.progress_measures import loss_and_accuracy, neuron_shares, restricted_logits
from circuits.model import from_transformer_lens
from circuits.reference import MlpNetwork
from circuits.tasks import ModularAddition, WithoutEquals

RUNS = (
    "p99zdpze5l",
    "l8k1hzciux",
    "p71frej8t7",
    "qlvxqhkvit",
    "2k4ohj6bhd",
    "h9m153uuh9",
    "f5dh675z97",
    "n9n7h3p965",
    "4asyr7ht1p",
)
TASK: Any = WithoutEquals(ModularAddition(p=59, train_fraction=0.8))
METRICS = (
    "accuracy_full_table",
    "min_margin",
    "l2norm",
    "gradient_symmetricity",
    "gradient_symmetricity_sd",
    "distance_irrelevance",
    "distance_irrelevance_top_wrong_logit(train-main.py variant)",
    "circularity",
    "embedding_top_freqs",
    "embedding_freq_share_top5",
    "embedding_freq_gini",
    "attn_last_row_sd_over_inputs",
    "neurons",
    "circles",
    "whole_model",
)
SUB_LABELS = {
    "p99zdpze5l": "pizza",
    "l8k1hzciux": "clock",
    "p71frej8t7": "pizza",
    "qlvxqhkvit": "clock",
    "2k4ohj6bhd": "mixed",
    "h9m153uuh9": "pizza",
    "4asyr7ht1p": "mixed",
    # at initialisation, and stopped early
    "f5dh675z97": None,
    "n9n7h3p965": None,
}


@cache
def published(run: str) -> tuple[Any, dict[str, Any]]:
    """Return a published network and its figures."""
    folder = reference_folder() / "clock-pizza"
    figures = json.loads((folder / "reference.json").read_text())[run]
    weights = torch.load(folder / f"model_{run}.pt", map_location="cpu", weights_only=True)
    config = figures["config"]
    if "model_type" in config:
        layers = [
            (weights[f"{name}.weight"].T, weights[f"{name}.bias"]) for name in ("l1", "l2") if f"{name}.bias" in weights
        ]
        joined = "concatenated" if config["model_type"] == "D" else "sum"
        return MlpNetwork(weights["embed.weight"], layers, weights["unembed.weight"].T, joined=joined), figures
    model = from_transformer_lens(
        weights,
        act_fn="relu",
        normalization=None,
        causal=False,
        softmax_share=config["attn_coeff"],
        uniform_weight=1.0,
    )
    return model, figures


@cache
def measured(run: str) -> dict[str, Any]:
    """Return what the tests of mechanisms say of a network, under the names of the published figures."""
    model, _ = published(run)
    readings = mechanisms.read(model, TASK)
    evidence = {name: mechanisms.TESTS[name](model, TASK, readings=readings) for name in mechanisms.MODULAR}
    symmetricity, irrelevance, circular, circles, terms = evidence.values()
    group = group_table(TASK, readings)
    neurons = neuron_shares(readings, group)["neurons_of_one_frequency"]
    return {
        "evidence": tuple(evidence.values()),
        "accuracy_full_table": symmetricity.number("accuracy"),
        "min_margin": irrelevance.number("smallest_margin"),
        "l2norm": sum(float(p.detach().double().square().sum()) for p in model.parameters()) ** 0.5,
        "gradient_symmetricity": symmetricity.value,
        "gradient_symmetricity_sd": symmetricity.number("spread"),
        "distance_irrelevance": irrelevance.value,
        "distance_irrelevance_top_wrong_logit(train-main.py variant)": irrelevance.number("top_wrong"),
        "circularity": circular.value,
        "embedding_top_freqs": [
            [*pair] for pair in zip(circular.details["frequencies"], circular.details["shares"], strict=True)
        ],
        "embedding_freq_share_top5": circular.number("share_of_five"),
        "embedding_freq_gini": circular.number("gini"),
        "attn_last_row_sd_over_inputs": {f"attn{i}": v for i, v in symmetricity.details["attention_variation"].items()},
        "neurons": {
            f"post{layer}": {
                "n_live": of["live"],
                "mean_best_frac": of["mean_share"],
                "share_gt_.85": of["single"],
                "freq_counts": of["frequencies"],
            }
            for layer, of in neurons.items()
        },
        "circles": [_circle(c) for c in circles.details["circles"]],
        "whole_model": _whole(terms.details, group),
    }


def _circle(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "pcs": found["components"],
        "freqs": found["frequencies"],
        "power": found["power"],
        "explained_var_ratio": found["variance_share"],
        "is_circle": found["is_circle"],
        "Qclock": found["clock"],
        "Qpizza": found["pizza"],
        "Qpizza'": found["pizza_appendix"],
        "Qaccompanying": found["accompanying"],
    }


def _whole(found: dict[str, Any], group: Any) -> dict[str, Any]:
    keys = tuple(int(k) for k, _ in found["clock_terms"][:5])
    restricted = restricted_logits(group.logits, group.total, keys, group.modulus, bias_correction=False)
    scores = [loss_and_accuracy(x, group.total) for x in (group.logits, restricted, group.logits.double() - restricted)]
    return {
        "fve_fn_of_residual_a+b-c": found["of_a+b-c"],
        "fve_fn_of_(a+b,c)": found["of_(a+b, c)"],
        "fve_fn_of_(a+b-c,a-b)": found["of_(a+b-c, a-b)"],
        "clock_term_top": found["clock_terms"],
        "pizza_term_top": found["pizza_terms"],
        "fve_clock_terms_top3": found["clock_3"],
        "fve_pizza_terms_top3": found["pizza_3"],
        "fve_clock_terms_top5": found["clock_5"],
        "fve_pizza_terms_top5": found["pizza_5"],
        "fve_clock_terms_top29": found["clock_all"],
        "fve_pizza_terms_top29": found["pizza_all"],
        "fve_clock+pizza_top5": found["both_5"],
        "restricted_acc_top5": scores[1][1],
        "excluded_acc_top5": scores[2][1],
        "full_loss": scores[0][0],
        "restricted_loss_top5": scores[1][0],
        "excluded_loss_top5": scores[2][0],
    }


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    """Compare nested figures: numbers to 1e-3, everything else exactly."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where} {key}")
    elif (
        isinstance(theirs, list)
        and len(theirs) == 2
        and where.endswith(("freqs", "_top")) is False
        and _is_pair(theirs)
    ):
        assert_close(ours[1], theirs[1], where)
        # Frequencies of nothing have no order: only those that explain something must be the same.
        assert theirs[1] < 2e-3 or ours[0] == theirs[0], where
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}[{i}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3), where
    else:
        assert ours == theirs, where


def _is_pair(value: list[Any]) -> bool:
    return isinstance(value[0], int) and isinstance(value[1], float)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("run", RUNS)
def test_published_figure_comes_out(run: str, metric: str) -> None:
    _, figures = published(run)
    if metric not in figures:
        assert metric == "attn_last_row_sd_over_inputs" and "model_type" in figures["config"], "an MLP has no attention"
        assert measured(run)[metric] == {}
        return
    assert_close(measured(run)[metric], figures[metric], metric)


@pytest.mark.parametrize("run", RUNS)
def test_no_published_figure_is_left_out(run: str) -> None:
    _, figures = published(run)
    assert set(figures) - set(METRICS) <= {"config", "repo", "repo_csv", "param_shapes"}


@pytest.mark.parametrize("run", RUNS)
def test_sub_label(run: str) -> None:
    found = mechanisms.clock_or_pizza(measured(run)["evidence"])
    assert (found.name if found else None) == SUB_LABELS[run]


def test_intervals_hold_the_values_and_nothing_is_decided() -> None:
    for run in RUNS[:3]:
        for evidence in measured(run)["evidence"]:
            low, high = evidence.interval
            assert low - 1e-9 <= evidence.value <= high + 1e-9, evidence.test
            assert evidence.passed is None and evidence.control is not None


@pytest.mark.parametrize("run", with_repeats(RUNS, {"h9m153uuh9", "qlvxqhkvit", "2k4ohj6bhd", "n9n7h3p965"}))
def test_the_verdict_is_fourier_where_the_task_is_learned(run: str) -> None:
    model, _ = published(run)
    verdict = mechanisms.explain(model, TASK, budget="quick")
    learned = SUB_LABELS[run] is not None
    assert (verdict.label, verdict.mechanism) == (("algorithm", "fourier") if learned else ("not-learned", None))
