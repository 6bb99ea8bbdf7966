"""Mechanism tests and the verdict that they add up to. Each test is usable alone on any hooked model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from circuits.errors import BadInput, CorruptRun
from circuits.mechanisms.accuracy import accuracy_gate, block_gap
from circuits.mechanisms.columns import column_interchange
from circuits.mechanisms.evidence import LABELS, Evidence, Verdict
from circuits.mechanisms.functional_form import functional_form
from circuits.mechanisms.interchange import interchange
from circuits.mechanisms.pair_lookup import pair_lookup
from circuits.mechanisms.readings import Readings, has_one_answer_token, read
from circuits.mechanisms.rectangles import rectangles
from circuits.mechanisms.region_interchange import region_interchange
from circuits.mechanisms.result_heuristics import result_heuristics
from circuits.mechanisms.rule import RULE, VERSION, Thresholds, decide, learned, rule_table
from circuits.mechanisms.slice_transfer import slice_transfer
from circuits.mechanisms.spectral import spectral
from circuits.tasks.base import Task

TESTS: dict[str, Callable[..., Evidence]] = {
    "accuracy-gate": accuracy_gate,
    "block-gap": block_gap,
    "spectral": spectral,
    "functional-form": functional_form,
    "interchange": interchange,
    "region-interchange": region_interchange,
    "slice-transfer": slice_transfer,
    "rectangles": rectangles,
    "result-heuristics": result_heuristics,
    "pair-lookup": pair_lookup,
    "column-interchange": column_interchange,
}

ONE_TOKEN = (
    "spectral",
    "functional-form",
    "interchange",
    "region-interchange",
    "slice-transfer",
    "rectangles",
    "result-heuristics",
    "pair-lookup",
)
"""Tests that read the whole operand square off one answer token; they share one ``Readings``."""

__all__ = [
    "LABELS",
    "RULE",
    "TESTS",
    "VERSION",
    "Evidence",
    "Readings",
    "Thresholds",
    "Verdict",
    "accuracy_gate",
    "applicable",
    "block_gap",
    "column_interchange",
    "decide",
    "explain",
    "functional_form",
    "interchange",
    "pair_lookup",
    "read",
    "rectangles",
    "region_interchange",
    "result_heuristics",
    "rule_table",
    "slice_transfer",
    "spectral",
]


def applicable(task: Task) -> tuple[str, ...]:
    """Names of the tests that a task allows, in the order in which ``explain`` runs them."""
    if has_one_answer_token(task):
        return ("accuracy-gate", "block-gap", *ONE_TOKEN)
    if any(change.startswith("carry into column") for change in getattr(task, "pair_changes", ())):
        return ("accuracy-gate", "block-gap", "column-interchange")
    return ("accuracy-gate", "block-gap")


def explain(model: Any, task: Task, *, seed: int = 0, progress: bool = False) -> Verdict:
    """Return the verdict on how a model does a task: label, mechanism, evidence for and against.

    Tests of mechanism are run only on a model that has learned its training pairs; before that there is nothing to
    explain. A second or two for p = 53; the seconds of each test stand in its evidence.

    Args:
        model: any hooked model (ours or a ``TransformerBridge``) that reads the task's tokens.
        task: the task that it was trained on, with the same splits.
        seed: seed of every draw that the tests make.
        progress: show a progress bar.

    Raises:
        BadInput: model and task do not belong together.
        CorruptRun: the model's weights or logits are not finite.

    Source: the tests name theirs; the rule is ours (``circuits/mechanisms/rule.py``).
    Fails when: no candidate algorithm is the true one; the label is then ``undetermined``.
    """
    from tqdm.auto import tqdm

    if not hasattr(model, "hook_dict"):
        raise BadInput(f"{type(model).__name__} has no TransformerLens hooks; pass a HookedRootModule or a bridge")
    for weight_name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CorruptRun(f"{weight_name} is not finite (NaN or infinity): the model is damaged")
    items: list[Evidence] = []
    readings: Readings | None = None
    for name in tqdm(applicable(task), desc="explain", unit="test", disable=not progress, leave=False):
        if len(items) == 2 and not learned(items[0]):
            break
        started = time.perf_counter()
        if name in ONE_TOKEN:
            readings = readings or read(model, task, seed=seed)
            evidence = TESTS[name](model, task, seed=seed, readings=readings)
        else:
            evidence = TESTS[name](model, task, seed=seed)
        items.append(dataclasses.replace(evidence, seconds=time.perf_counter() - started))
    return decide(tuple(items))
