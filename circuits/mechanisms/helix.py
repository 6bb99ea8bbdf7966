"""Helix and number-line fits: does the model run on a representation of numbers by a few periods, or by a line?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import group_index
from circuits.mechanisms.interchange import operand_embedding
from circuits.mechanisms.readings import Readings, activations, answer_logits, decisive_layers, read
from circuits.mechanisms.selection import forward_selection, regression
from circuits.tasks.base import Task

PERIODS = (2, 5, 10, 100)
"""Decimal periods of the published helix."""
FITTED = 0.75
"""Share of the numbers, or of the results, that a fit sees."""
KEPT = 0.95
FOLDS = 4
ROWS = 800
ANSWER_ROWS = 1600
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32)
FEWEST_NUMBERS = 12
SEPARATE = 0.05
"""Accuracy that the site has to carry before a share of it means anything."""


def helix_features(
    x: Float[Tensor, " rows"], frequencies: Sequence[float], *, linear: bool = True
) -> Float[Tensor, "rows features"]:
    """Columns cos 2 pi f x and sin 2 pi f x for each frequency f, and x itself.

    Source: Kantamneni & Tegmark 2025 (arXiv 2502.00873), section 4.2: B(a) = [a, cos(2 pi a / T), sin(2 pi a / T)] for
    T = 2, 5, 10, 100.
    """
    turns = 2 * math.pi * x[:, None].double() * torch.tensor(frequencies, device=x.device, dtype=torch.float64)
    parts = [turns.cos(), turns.sin()] + ([x[:, None].double()] if linear else [])
    return torch.cat(parts, dim=1)


def polynomial_features(x: Float[Tensor, " rows"], degree: int) -> Float[Tensor, "rows degree"]:
    """Legendre polynomials of degree 1 to ``degree`` of x, its range scaled to [-1, 1]."""
    low, high = float(x.min()), float(x.max())
    scaled = (2 * (x.double() - low) / max(high - low, 1e-12) - 1).cpu().numpy()
    return torch.from_numpy(np.polynomial.legendre.legvander(scaled, degree)[:, 1:]).to(x.device)


def piecewise_features(x: Float[Tensor, " rows"], pieces: int) -> Float[Tensor, "rows pieces"]:
    """x, and relu(x - t) for the inner ends t of ``pieces`` equal pieces of its range."""
    knots = torch.linspace(float(x.min()), float(x.max()), pieces + 1, device=x.device, dtype=torch.float64)[1:-1]
    return torch.cat([x[:, None].double(), torch.relu(x[:, None].double() - knots)], dim=1)


def number_names(task: Task, operands: Int[Tensor, "rows 2"]) -> tuple[Tensor, Tensor, Bool[Tensor, " rows"], int]:
    """Operands as numbers whose sum is the answer (modulo M, where the task is modular), rows that have them, and M.

    On a line the second operand of a subtraction is its negative.
    """
    renamed = group_index(task, operands)
    assert renamed is not None  # every one-token task has a renaming
    a, b, kept, modulus = renamed
    if not task.period:
        b = torch.where(b > task.n_operand_values, b - modulus, b)
    return a.double(), b.double(), kept, modulus


@dataclass(frozen=True, eq=False)
class Bench:
    """Operand pairs on which a patched site is judged, and what the intact and the ablated model get right there.

    ``group`` is the number (or the result) whose state is replaced: the unit of the interval.
    """

    operands: Int[Tensor, "rows 2"]
    tokens: Int[Tensor, "rows pos"]
    labels: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    hook: str
    position: int
    intact: float
    ablated: float

    def right(self, model: Any, task: Task, states: Float[Tensor, "rows d"]) -> Bool[Tensor, " rows"]:
        """Which rows are right with these states at the site."""

        def put(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, self.position] = states.to(activation.dtype)
            return activation

        return answer_logits(model, task, self.tokens, [(self.hook, put)]).argmax(-1) == self.labels

    def kept(self, right: Bool[Tensor, " rows"]) -> float:
        """Share of the accuracy that the site carries which is kept: 0 as with the mean state, 1 as intact."""
        return float(self.shares(right).mean()) if len(right) else float("nan")

    def shares(self, right: Bool[Tensor, " rows"]) -> Float[np.ndarray, " groups"]:
        """``kept`` for each number; 0 where the site carries next to nothing, as in an untrained model."""
        groups = self.group.unique()
        mean = torch.stack([right[self.group == g].double().mean() for g in groups])
        if self.intact - self.ablated < SEPARATE:
            return np.zeros(len(groups))
        return ((mean - self.ablated) / (self.intact - self.ablated)).cpu().numpy()


def _bench(
    model: Any, task: Task, readings: Readings, rows: Tensor, group: Tensor, site: tuple[str, int], states: Tensor
) -> Bench:
    """A bench on some rows of the readings; ``states`` are those whose mean is put there to ablate."""
    hook, position = site
    right = readings.right[rows]
    bench = Bench(
        readings.operands[rows],
        readings.tokens[rows],
        readings.labels[rows],
        group,
        hook,
        position,
        float(right.double().mean()),
        0.0,
    )
    ablated = bench.right(model, task, states.mean(0).expand(len(rows), -1))
    return replace(bench, ablated=float(ablated.double().mean()))


@dataclass(frozen=True, eq=False)
class _Operand:
    """The first operand's embedding and benches on the numbers that fits see and on the others."""

    x: Float[Tensor, " numbers"]
    states: Float[Tensor, "numbers d"]
    fit: Bool[Tensor, " numbers"]
    seen: Bench
    unseen: Bench
    modulus: int

    def accuracy(self, model: Any, task: Task, features: Tensor, bench: Bench) -> Bool[Tensor, " rows"]:
        """Which rows of a bench are right once the number's state is what the features predict."""
        return bench.right(model, task, regression(features, self.states, self.fit)[bench.group])

    def chosen(self, x: Tensor, most: int) -> list[float]:
        """Frequencies, most important first, by forward selection on the numbers that fits see."""
        all_of_them = [k / self.modulus for k in range(1, self.modulus // 2 + 1)]
        waves = helix_features(x, all_of_them, linear=False)
        paired = waves.reshape(len(x), 2, -1).transpose(1, 2).flatten(1)
        order = forward_selection(paired[self.fit], self.states[self.fit], block=2, most=most)
        return [all_of_them[i] for i in order]


def _operand(model: Any, task: Task, readings: Readings, generator: torch.Generator) -> _Operand:
    n, device = task.n_operand_values, readings.tokens.device
    line = torch.stack([torch.arange(n), torch.ones(n, dtype=torch.long)], dim=1).to(device)
    x, _, kept, modulus = number_names(task, line)
    embedding = operand_embedding(model, task)
    where = kept.nonzero().flatten()
    fit = torch.ones(len(where), dtype=torch.bool)
    fit[torch.randperm(len(where), generator=generator)[: round(len(where) * (1 - FITTED))]] = False
    fit = fit.to(device)
    number = torch.full((n,), -1, device=device)
    number[where] = torch.arange(len(where), device=device)
    benches = []
    usable = number_names(task, readings.operands)[2]
    for chosen in (fit, ~fit):
        mine = usable & torch.isin(readings.operands[:, 0], where[chosen])
        rows = mine.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)[:ROWS].to(device)]
        group = number[readings.operands[rows, 0]]
        benches.append(_bench(model, task, readings, rows, group, ("hook_embed", 0), embedding[where]))
    return _Operand(x[where], embedding[where], fit, benches[0], benches[1], modulus)


def _validated(model: Any, task: Task, operand: _Operand, frequencies: list[float]) -> float:
    """What a helix keeps on the seen numbers, each predicted from the others of them in ``FOLDS`` folds."""
    features = helix_features(operand.x, frequencies)
    fold = torch.cumsum(operand.fit.long(), 0) % FOLDS
    states = operand.states.clone()
    for i in range(FOLDS):
        mine = operand.fit & (fold == i)
        states[mine] = regression(features, operand.states, operand.fit & ~mine)[mine]
    return operand.seen.kept(operand.seen.right(model, task, states[operand.seen.group]))


def _helix_of(model: Any, task: Task, operand: _Operand) -> tuple[list[float], bool]:
    """The helix's frequencies, chosen by cross-validation on the seen numbers, and whether they are the decimal ones.

    Those are tried first on a line; then the fewest multiples of 1/M on which the model runs. Where it runs on none,
    those on which it runs best.
    """
    order = operand.chosen(operand.x, max(1, int(operand.fit.sum()) // 3))
    if operand.seen.intact - operand.seen.ablated < SEPARATE:
        return order[:4], False  # nothing to choose by
    tried = [] if task.period else [[1 / period for period in PERIODS]]
    tried += [order[:size] for size in SIZES if size <= len(order)]
    best, kept = tried[0], -math.inf
    for frequencies in tried:
        now = _validated(model, task, operand, frequencies)
        if now > kept:
            best, kept = frequencies, now
        if kept >= KEPT:
            break
    return best, not task.period and best is tried[0]


def _controls(
    model: Any, task: Task, operand: _Operand, frequencies: list[float], generator: torch.Generator
) -> dict[str, float]:
    """What other fits of as many parameters keep on unseen numbers, and the line's with fewer."""
    terms = 2 * len(frequencies) + 1
    renaming = torch.randperm(len(operand.x), generator=generator).to(operand.x.device)
    elsewhere = operand.x[renaming]
    strongest = operand.chosen(operand.x, 1)[0] if operand.modulus > 1 else frequencies[0]
    features = {
        "polynomial": polynomial_features(operand.x, terms),
        "circle": helix_features(operand.x, [strongest * j for j in range(1, len(frequencies) + 1)]),
        "relabelled": helix_features(elsewhere, operand.chosen(elsewhere, len(frequencies))),
        "line": operand.x[:, None],
        "piecewise_line": piecewise_features(operand.x, terms),
    }
    found = {
        name: operand.unseen.kept(operand.accuracy(model, task, columns, operand.unseen))
        for name, columns in features.items()
    }
    # Principal components see the unseen numbers' states themselves: a ceiling, no prediction.
    centred = operand.states - operand.states.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:terms]
    states = (centred @ axes.T @ axes + operand.states.mean(0))[operand.unseen.group]
    return found | {"components": operand.unseen.kept(operand.unseen.right(model, task, states))}


def _answer_position(
    model: Any, task: Task, readings: Readings, frequencies: list[float], generator: torch.Generator
) -> dict[str, float]:
    """What is kept at the answer position by helices of the operands, of their sum and of all three, on unseen results.

    The sites are what the first decisive MLP reads and what the last layer leaves.
    """
    device = readings.tokens.device
    a, b, kept, modulus = number_names(task, readings.operands)
    rows = kept.nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)[:ANSWER_ROWS].to(device)]
    a, b, labels = a[rows], b[rows], readings.labels[rows]
    total = (a + b) % modulus if task.period else a + b
    n_answers = len(task.answer_values)
    hidden = torch.randperm(n_answers, generator=generator)[: round(n_answers * (1 - FITTED))].to(device)
    fit = ~torch.isin(labels, hidden)
    names = torch.randperm(n_answers, generator=generator).to(device).double()
    others = torch.randperm(max(n_answers, task.n_operand_values), generator=generator).to(device).double()

    def of(*parts: Tensor) -> Tensor:
        return torch.cat([helix_features(part, frequencies) for part in parts], dim=1)

    renamed_a, renamed_b = (others[(v.long() % len(others))] for v in (a, b))
    families = {
        "operands": (of(a, b), of(renamed_a, renamed_b)),
        "result": (of(total), of(names[labels])),
        "all": (of(a, b, total), of(renamed_a, renamed_b, names[labels])),
    }
    first, last = decisive_layers(model, task, readings)[0], model.cfg.n_layers - 1
    sites = {"before": f"blocks.{first}.hook_resid_mid", "after": f"blocks.{last}.hook_resid_post"}
    found: dict[str, float] = {}
    for name, hook in sites.items():
        if hook not in model.hook_dict:  # a model whose attention and MLP read the same stream has no middle
            continue
        states = activations(model, readings.tokens[rows], [hook])[hook][:, -1]
        bench = _bench(model, task, readings, rows[~fit], labels[~fit], (hook, -1), states)
        for family, columns in families.items():
            for suffix, features in zip(("", "_relabelled"), columns, strict=True):
                right = bench.right(model, task, regression(features, states, fit)[~fit])
                found[f"answer_{name}_{family}{suffix}"] = bench.kept(right)
    return found


def helix(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of the accuracy that is kept when unseen numbers' embeddings are what a helix predicts for them.

    The first operand's embedding is regressed on B(a) = [a, cos 2 pi f a, sin 2 pi f a for some f] over three quarters
    of the numbers; then the model runs with the *predicted* embedding of the others in place of their own, and
    ``value`` is (accuracy - ablated) / (intact - ablated), where the ablated embedding is the mean one. On a line the
    frequencies are the published 1/2, 1/5, 1/10 and 1/100 if the model runs on them; else, and always modulo p, where
    decimal periods mean nothing, they are the fewest multiples of 1/M (M = p, of the discrete logarithm p - 1, on a
    line the number of results) on which it does, by forward selection and cross-validation on the numbers that the
    fit sees. ``periods`` names them.

    ``control`` is the best of three fits with equally many parameters: a polynomial, one closed curve (the strongest
    period with its harmonics) and the helix of randomly renamed numbers, with frequencies chosen anew. ``components``
    (as many principal components) is a ceiling: it has seen the numbers. ``line`` and ``piecewise_line`` are the
    number-line fits, of one parameter and of as many as the helix has. At the answer position, before the first
    decisive MLP and after the last layer, helices of the operands, of the result and of both are fitted on three
    quarters of the results and patched on the rest, each beside the same with renamed numbers.

    High with a low control: numbers are represented by these periods and the model uses nothing else of them. High
    with a high ``line``: a number line (a helix has a linear term). Low: a code that unseen numbers do not follow.

    Formula: (acc(E replaced by C B(a)) - acc(E replaced by its mean)) / (acc - acc(E replaced by its mean)), over
        unseen a; C by least squares on the other numbers.

    Source: Kantamneni & Tegmark 2025 (arXiv 2502.00873), sections 4 and 5 (fits, patching, controls; repository
    LLM-addition). Choice of frequencies, the share kept and the held-out results are ours.
    Fails when: there are fewer than 12 numbers (not applicable); or bands or digits of a regular width make a lookup's
    embedding periodic: the built ``range-lookup`` passes. A helix says how numbers are written, not what is done with
    them.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    operand = _operand(model, task, readings, generator)
    if len(operand.x) < FEWEST_NUMBERS:
        return _not_applicable(start, len(operand.x))
    frequencies, decimal = _helix_of(model, task, operand)
    features = helix_features(operand.x, frequencies)
    right = operand.accuracy(model, task, features, operand.unseen)
    shares = operand.unseen.shares(right)
    details: dict[str, Any] = {
        "periods": [1 / f for f in frequencies],
        "decimal": decimal,
        "n_parameters": 2 * len(frequencies) + 1,
        "seen_numbers": operand.seen.kept(operand.accuracy(model, task, features, operand.seen)),
        "intact": operand.unseen.intact,
        "ablated": operand.unseen.ablated,
        **_controls(model, task, operand, frequencies, generator),
        **_answer_position(model, task, readings, frequencies, generator),
    }
    if not task.period:
        published = helix_features(operand.x, [1 / period for period in PERIODS])
        details["decimal_periods"] = operand.unseen.kept(operand.accuracy(model, task, published, operand.unseen))
    control = max(details[name] for name in ("polynomial", "circle", "relabelled"))
    value = float(shares.mean())
    return Evidence(
        test="helix",
        value=value,
        interval=bootstrap_interval(shares, seed=seed),
        control=control,
        control_name="best other fit of equally many parameters (polynomial, one circle, renamed helix)",
        threshold="kept >= 0.90 and best other fit <= 0.50 for a helix",
        passed=value >= 0.9 and control <= 0.5,
        details=details,
        source="Kantamneni & Tegmark 2025, arXiv 2502.00873",
        seconds=time.perf_counter() - start,
    )


def _not_applicable(start: float, numbers: int) -> Evidence:
    nan = float("nan")
    return Evidence(
        test="helix",
        value=nan,
        interval=(nan, nan),
        control=None,
        control_name="",
        threshold=f"not applicable: {numbers} numbers are too few to fit and to hold out (needs {FEWEST_NUMBERS})",
        passed=None,
        source="Kantamneni & Tegmark 2025, arXiv 2502.00873",
        seconds=time.perf_counter() - start,
    )
