"""Mechanism tests and the verdict that they add up to. Each test is usable alone on any hooked model."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from circuits.errors import BadInput, CorruptRun, UnknownName, UnsupportedModel
from circuits.mechanisms.accuracy import accuracy_gate, block_gap
from circuits.mechanisms.carry_cascade import carry_cascade
from circuits.mechanisms.circles import circularity, isolated_circles
from circuits.mechanisms.clock_pizza import clock_or_pizza
from circuits.mechanisms.column_parts import column_parts
from circuits.mechanisms.column_scrubbing import column_scrubbing
from circuits.mechanisms.columns import column_interchange
from circuits.mechanisms.das import das, das_available
from circuits.mechanisms.description_length import description_length
from circuits.mechanisms.digit_neurons import digit_neurons
from circuits.mechanisms.distance_irrelevance import distance_irrelevance
from circuits.mechanisms.equivariance import equivariance
from circuits.mechanisms.error_pattern import error_pattern
from circuits.mechanisms.evidence import LABELS, Evidence, Verdict
from circuits.mechanisms.functional_form import functional_form
from circuits.mechanisms.gradient_symmetricity import gradient_symmetricity
from circuits.mechanisms.groups import operation_of
from circuits.mechanisms.helix import helix
from circuits.mechanisms.heuristics import Heuristics, Matches, declare, match
from circuits.mechanisms.interchange import interchange
from circuits.mechanisms.knockout import knockout
from circuits.mechanisms.logit_terms import logit_terms
from circuits.mechanisms.pair_lookup import pair_lookup
from circuits.mechanisms.readings import Readings, has_one_answer_token, read
from circuits.mechanisms.rectangles import rectangles
from circuits.mechanisms.region_interchange import region_interchange
from circuits.mechanisms.result_heuristics import result_heuristics
from circuits.mechanisms.rule import RULE, VERSION, Thresholds, decide, rule_table, worth_explaining
from circuits.mechanisms.scrubbing import causal_scrubbing
from circuits.mechanisms.slice_transfer import slice_transfer
from circuits.mechanisms.spectral import spectral
from circuits.mechanisms.taxonomy import taxonomy
from circuits.mechanisms.variable_interchange import variable_interchange
from circuits.tasks.arithmetic.operand_square import check_integer
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
    "gradient-symmetricity": gradient_symmetricity,
    "distance-irrelevance": distance_irrelevance,
    "circularity": circularity,
    "isolated-circles": isolated_circles,
    "logit-terms": logit_terms,
    "taxonomy": taxonomy,
    "knockout": knockout,
    "error-pattern": error_pattern,
    "helix": helix,
    "variable-interchange": variable_interchange,
    "equivariance": equivariance,
    "description-length": description_length,
    "das": das,
    "pair-lookup": pair_lookup,
    "digit-neurons": digit_neurons,
    "causal-scrubbing": causal_scrubbing,
    "column-interchange": column_interchange,
    "carry-cascade": carry_cascade,
    "column-parts": column_parts,
    "column-scrubbing": column_scrubbing,
}

DECIDING = (
    "spectral",
    "functional-form",
    "interchange",
    "region-interchange",
    "slice-transfer",
    "rectangles",
    "result-heuristics",
    "pair-lookup",
    "causal-scrubbing",
)
"""Tests that the rule reads, of tasks with one answer token; they share one ``Readings`` of the operand square."""

DIGITS = ("digit-neurons",)
"""The same where answers do not wrap around."""

DESCRIBING = (
    "taxonomy",
    "knockout",
    "error-pattern",
    "helix",
    "variable-interchange",
    "equivariance",
    "description-length",
    "das",
)
"""Tests that describe such a model and decide nothing: they read the same ``Readings``."""

OF_SUMS = (
    "causal-scrubbing",
    "spectral",
    "functional-form",
    "interchange",
    "region-interchange",
    "variable-interchange",
    "helix",
    "equivariance",
    "description-length",
    "das",
)
"""Tests that need operands under whose names the answer is their sum, as sums, differences and products have."""

MODULAR = ("gradient-symmetricity", "distance-irrelevance", "circularity", "isolated-circles", "logit-terms")
"""The same for answers on a circle: which of the known Fourier algorithms it is."""

COLUMNS = ("column-interchange", "carry-cascade", "column-parts", "column-scrubbing")
"""Tests of digit columns, which the rule reads, of tasks that write one digit to a token."""

BUDGETS = ("full", "quick")

__all__ = [
    "BUDGETS",
    "LABELS",
    "RULE",
    "TESTS",
    "VERSION",
    "Evidence",
    "Heuristics",
    "Matches",
    "Readings",
    "Thresholds",
    "Verdict",
    "accuracy_gate",
    "applicable",
    "block_gap",
    "carry_cascade",
    "causal_scrubbing",
    "circularity",
    "clock_or_pizza",
    "column_interchange",
    "column_parts",
    "column_scrubbing",
    "das",
    "decide",
    "declare",
    "description_length",
    "digit_neurons",
    "distance_irrelevance",
    "equivariance",
    "error_pattern",
    "explain",
    "functional_form",
    "gradient_symmetricity",
    "helix",
    "interchange",
    "isolated_circles",
    "knockout",
    "logit_terms",
    "match",
    "measure",
    "pair_lookup",
    "read",
    "rectangles",
    "region_interchange",
    "result_heuristics",
    "rule_table",
    "slice_transfer",
    "spectral",
    "taxonomy",
    "variable_interchange",
]


def applicable(task: Task, *, budget: str = "full") -> tuple[str, ...]:
    """Names of the tests that a task allows, in the order in which ``explain`` runs them.

    A test that was added to ``TESTS`` and stands in none of the lists above comes last: it describes.

    Raises:
        UnknownName: ``budget`` is not one of ``BUDGETS``.
    """
    if budget not in BUDGETS:
        raise UnknownName("budget", budget, BUDGETS)
    listed = {"accuracy-gate", "block-gap", *DECIDING, *DIGITS, *DESCRIBING, *MODULAR, *COLUMNS}
    own = tuple(name for name in TESTS if name not in listed) if budget == "full" else ()
    if has_one_answer_token(task):
        more = (*(MODULAR if task.period else ()), *DESCRIBING) if budget == "full" else ()
        more = tuple(name for name in more if name != "das" or das_available())
        digits = () if task.period else DIGITS
        names = ("accuracy-gate", "block-gap", *DECIDING, *digits, *more, *own)
        if operation_of(task) is None:
            names = tuple(name for name in names if name not in (*OF_SUMS, *DIGITS, *MODULAR))
        return names
    if any(change.startswith("carry into column") for change in getattr(task, "pair_changes", ())):
        return ("accuracy-gate", "block-gap", *COLUMNS, *own)
    return ("accuracy-gate", "block-gap", *own)


def explain(model: Any, task: Task, *, seed: int = 0, budget: str = "full", progress: bool = False) -> Verdict:
    """Return the verdict on how a model does a task: label, mechanism, evidence for and against.

    Tests of mechanism are run only on a model that has learned its training pairs; before that there is nothing to
    explain. A test that only describes and does not fit the model is passed over, which ``why`` says. The seconds of
    each test stand in its evidence.

    Args:
        model: any hooked model (ours or a ``TransformerBridge``) that reads the task's tokens.
        task: the task that it was trained on, with the same splits.
        seed: seed of every draw that the tests make.
        budget: "full": every test that the task allows; "quick": those that the rule reads, hence the same label.
        progress: show a progress bar.

    Raises:
        BadInput: model and task do not belong together, or ``seed`` is not a whole number from 0 to 2**32 - 1.
        CorruptRun: the model's weights or logits are not finite.
        UnknownName: ``budget`` is not one of ``BUDGETS``.

    Source: the tests name theirs; the rule is ours (``circuits/mechanisms/rule.py``).
    Fails when: no candidate algorithm is the true one; the label is then ``undetermined``.
    """
    check_integer("seed", seed, 0, 2**32 - 1)  # numpy's generators take no other
    if not hasattr(model, "hook_dict"):
        raise BadInput(f"{type(model).__name__} has no TransformerLens hooks; pass a HookedRootModule or a bridge")
    for weight_name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CorruptRun(f"{weight_name} is not finite (NaN or infinity): the model is damaged")
    names = applicable(task, budget=budget)
    gates, _ = measure(model, task, names[:2], seed=seed)
    if not worth_explaining(gates[0]):
        return decide(gates)
    try:
        items, passed_over = measure(model, task, names[2:], seed=seed, progress=progress)
    except _NoNeuron as error:
        verdict = decide(gates)
        return dataclasses.replace(verdict, why=f"{verdict.why.rstrip()} No test of mechanism applies: {error}.")
    verdict = decide((*gates, *items))
    if passed_over:
        verdict = dataclasses.replace(verdict, why=f"{verdict.why} Not applicable: {'; '.join(passed_over)}.")
    sub_label = clock_or_pizza(verdict.items) if verdict.mechanism == "fourier" else None
    if sub_label is None:
        return verdict
    return dataclasses.replace(verdict, sub_label=sub_label.name, why=f"{verdict.why} {sub_label.why}")


def measure(
    model: Any, task: Task, tests: Sequence[str], *, seed: int = 0, progress: bool = False
) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """Return the evidence of some tests, and what is said of those that describe and do not fit the model.

    They share one ``Readings``. Nothing is asked of the model: an untrained one is measured like any other.

    Args:
        model: any hooked model that reads the task's tokens.
        task: the task that it was trained on.
        tests: names of ``TESTS``, as ``applicable`` gives them.
        seed: seed of every draw.
        progress: show a progress bar.

    Raises:
        UnknownName: no such test.
        UnsupportedModel: the model has no neurons that matter to the answers, or a test that the rule reads does not
            fit it.
    """
    from tqdm.auto import tqdm

    items: list[Evidence] = []
    passed_over: list[str] = []
    readings: Readings | None = None
    for name in tqdm(tests, desc="explain", unit="test", disable=not progress, leave=False):
        if name not in TESTS:
            raise UnknownName("test", name, TESTS)
        started = time.perf_counter()
        shared: dict[str, Readings] = {}
        if "readings" in inspect.signature(TESTS[name]).parameters:
            readings = readings or _read(model, task, seed)
            shared = {"readings": readings}
        try:
            evidence = TESTS[name](model, task, seed=seed, **shared)
        except (BadInput, UnsupportedModel) as error:
            if name not in (*DESCRIBING, *MODULAR):
                raise
            passed_over.append(f"{name}: {error}")
            continue
        items.append(dataclasses.replace(evidence, seconds=time.perf_counter() - started))
    return tuple(items), tuple(passed_over)


class _NoNeuron(UnsupportedModel):
    """No neuron has a part in the answers."""


def _read(model: Any, task: Task, seed: int) -> Readings:
    """Read a model whose neurons have a part in its answers.

    Raises:
        _NoNeuron: they have none, or there are none.
    """
    try:
        readings = read(model, task, seed=seed)
    except UnsupportedModel as error:
        raise _NoNeuron(str(error)) from error
    if not bool((readings.importance > 0).any()):
        raise _NoNeuron("no neuron matters to the answers, which pass by the MLPs")
    return readings
