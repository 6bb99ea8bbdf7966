"""Distributed alignment search: learned subspaces for two variables, and what learning alone would give."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.errors import UnsupportedModel
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.interchange import Swap, draw_swaps
from circuits.mechanisms.readings import Readings, device_of, read
from circuits.mechanisms.variable_interchange import Candidate, answer_variable, swapped
from circuits.model import Transformer
from circuits.tasks.base import Task, Variable

CANDIDATES = 2
TRAIN, JUDGED = 640, 400
EPOCHS, BATCH, LEARNING_RATE = 16, 128, 2e-2
MOST_RANK = 16


@dataclass(frozen=True, eq=False)
class Pairing:
    """Base and source inputs, the answers asked for, and the value that the variable has on each source."""

    base: Int[Tensor, "rows pos"]
    source: Int[Tensor, "rows pos"]
    targets: Int[Tensor, " rows"]
    keys: list[int]


def _library() -> Any:
    try:
        from transformer_lens.tools.analysis import interchange
    except ImportError as error:
        raise UnsupportedModel(
            "distributed alignment search is transformer_lens.tools.analysis.interchange, which TransformerLens has "
            "since 4.3: install transformer-lens>=4.3, or use the tests interchange and variable-interchange"
        ) from error
    return interchange


def das_available() -> bool:
    """Whether the installed TransformerLens has distributed alignment search."""
    try:
        _library()
    except UnsupportedModel:
        return False
    return True


def reinitialised(model: Any, *, seed: int) -> Any:
    """Return an untrained copy: fresh weights, or, where the model has no recipe, its own in random order."""
    if isinstance(model, Transformer):
        return Transformer(model.config, seed=seed).to(device_of(model)).eval()
    try:
        return _library().reinitialized(model, seed)
    except ValueError:  # a module without reset_parameters, as in a bridge
        fresh = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in fresh.parameters():
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].reshape(weight.shape))
        return fresh.eval()


def best_candidates(model: Any, task: Task, readings: Readings, *, seed: int) -> list[Candidate]:
    """Return the two variables (at a place each) whose class means go furthest past chance."""
    found, results = swapped(model, task, readings, seed=seed)
    ahead = {
        c.key: float(right.float().mean()) - control if len(right) else -1.0
        for c, (right, control) in zip(found, results, strict=True)
    }
    ranked = sorted((c for c in found if c.key != "answer @ after"), key=lambda c: -ahead[c.key])
    return ranked[:CANDIDATES]


def _variable(task: Task, name: str) -> Variable:
    """The variable of a candidate; a basis for the whole second operand is named for how it is made."""
    known = {v.name: v for v in (*task.variables(), answer_variable(task))}
    return known.get(name, known["value of b"])


def pairing(task: Task, swap: Swap, variable: Variable, device: torch.device, most: int) -> Pairing:
    """Pairs that the model answers rightly and on which swapping the variable gives another, legal answer."""
    predicted = variable.swapped_answer(swap.base, swap.source)
    legal = torch.isin(predicted, task.answer_values) & (predicted != task.answer(swap.base))
    rows = (legal & swap.right.to(legal.device)).nonzero().flatten()[:most]
    base, source = (task.encode(of[rows]).inputs.to(device) for of in (swap.base, swap.source))
    targets = torch.searchsorted(task.answer_values, predicted[rows]).to(device)
    return Pairing(base, source, targets, variable.value(swap.source[rows]).tolist())


@dataclass(frozen=True, eq=False)
class _Search:
    """Everything of a search but the model and the targets: it is repeated with others for the controls."""

    library: Any
    task: Task
    hook: str
    position: int
    rank: int
    train: Pairing
    judged: Pairing
    seed: int

    def accuracy(self, model: Any, train: Tensor, judged: Tensor) -> Bool[Tensor, " judged"]:
        """Which unseen pairs give the answer asked for, through the subspace that is learned on the others."""
        answers = self.task.answer_tokens.to(device_of(model))

        def logits(tokens: Tensor) -> Tensor:
            output: Tensor = model(tokens)[:, -1][:, answers]
            return output

        def at(pairs: Pairing) -> Tensor:
            return torch.full((len(pairs.base),), self.position % pairs.base.shape[1], device=pairs.base.device)

        learned = self.library.fit_das(
            model,
            self.hook,
            self.train.base,
            self.train.source,
            train,
            logits,
            rank=self.rank,
            base_positions=at(self.train),
            source_positions=at(self.train),
            epochs=EPOCHS,
            batch_size=BATCH,
            lr=LEARNING_RATE,
            seed=self.seed,
        )
        states = self.library.collect_activations(
            model, self.hook, self.judged.source, logits, positions=at(self.judged)
        )
        swap = self.library.SubspaceInterchange(learned.basis)
        output = self.library.intervened_logits(
            model, self.hook, swap, self.judged.base, states, logits, positions=at(self.judged)
        )
        return output.argmax(-1) == judged.to(output.device)


def _searched(
    model: Any, task: Task, candidate: Candidate, untrained: Any, *, seed: int
) -> dict[str, Bool[Tensor, " k"]] | None:
    """Accuracy of the learned subspace, with arbitrary labels and on the untrained model; None with too few pairs."""
    device = device_of(model)
    variable = _variable(task, candidate.variable)
    swaps = [draw_swaps(model, task, n=3 * TRAIN, seed=seed + offset) for offset in (11, 12)]
    train, judged = (pairing(task, s, variable, device, most) for s, most in zip(swaps, (TRAIN, JUDGED), strict=True))
    if min(len(train.base), len(judged.base)) < 20:
        return None
    library = _library()
    rank = max(1, min(int(candidate.basis.shape[1]), MOST_RANK, candidate.basis.shape[0] - 1))
    search = _Search(library, task, candidate.site.hook, candidate.site.position, rank, train, judged, seed)
    n_answers = len(task.answer_values)
    labels: Callable[[Pairing], Tensor] = lambda of: library.arbitrary_targets(of.keys, n_answers, seed)  # noqa: E731
    return {
        "learned": search.accuracy(model, train.targets, judged.targets),
        "arbitrary": search.accuracy(model, labels(train), labels(judged)),
        "untrained": search.accuracy(untrained, train.targets, judged.targets),
    }


def das(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Interchange accuracy, on unseen pairs, through a subspace that is learned for the most promising variables.

    The two candidates of ``variable-interchange`` whose class means go furthest beyond a random subspace (the result
    after the last layer apart) are searched for by TransformerLens's DAS: an orthonormal basis of the rank of the class
    means (at most 16) is trained so that swapping it gives the answers that the causal model predicts, and judged on
    pairs that it has not seen. ``value`` is the better one.

    Learning finds a subspace for nearly anything, given rank enough: ``control`` is the better of the same search for
    arbitrary answers (one drawn for each value of the variable) and in an untrained copy of the model. What these
    reach, and the class means themselves, stands beside each candidate. A variable is there only if accuracy is high
    and both controls are low. Three searches for each candidate: the costliest test, which ``explain`` leaves out of
    its quick budget.

    Formula: max over two variables of mean over unseen pairs of [argmax logits(base with Q Q^T x(source) in place of
        Q Q^T x(base)) = answer(base with the source's value of the variable)], Q learned on other pairs.

    Source: Geiger et al. 2024 (arXiv 2303.02536), section 3; arbitrary labels and untrained models as controls: Arora
    et al. 2024 (arXiv 2402.12560), section 5; implementation: TransformerLens, tools/analysis/interchange.py.
    Fails when: the state's rank is not far above the subspace's (controls are then high); or a few steps do not reach
    the subspace that is there (low, while the class means' accuracy is high).

    Raises:
        UnsupportedModel: this TransformerLens has no DAS.
        BadInput: the task has no one answer token.
    """
    start = time.perf_counter()
    _library()
    if getattr(model, "training", False):
        model = copy.deepcopy(model).eval()
    readings = readings or read(model, task, seed=seed)
    untrained = reinitialised(model, seed=seed)
    by_means = dict(zip(*_named(swapped(model, task, readings, seed=seed)), strict=True))
    details: dict[str, Any] = {"candidates": {}}
    best: tuple[float, float, Tensor] | None = None
    for candidate in best_candidates(model, task, readings, seed=seed):
        found = _searched(model, task, candidate, untrained, seed=seed)
        if found is None:
            continue
        shares = {name: float(right.float().mean()) for name, right in found.items()}
        rank = min(int(candidate.basis.shape[1]), MOST_RANK)
        details["candidates"][candidate.key] = shares | {"class_means": by_means[candidate.key], "rank": rank}
        if best is None or shares["learned"] > best[0]:
            best = shares["learned"], max(shares["arbitrary"], shares["untrained"]), found["learned"]
            details["best"] = candidate.key
    nan = float("nan")
    value, control, right = best if best is not None else (nan, None, None)
    return Evidence(
        test="das",
        value=value,
        interval=(nan, nan) if right is None else wilson_interval(int(right.sum()), len(right)),
        control=control,
        control_name="better of arbitrary labels and an untrained model",
        threshold="learned >= 0.95 and controls <= 0.20"
        if best
        else "not run: fewer than 20 pairs are answered rightly",
        passed=None if control is None else value >= 0.95 and control <= 0.2,
        details=details,
        source="Geiger et al. 2024, arXiv 2303.02536; Arora et al. 2024, arXiv 2402.12560",
        seconds=time.perf_counter() - start,
    )


def _named(
    of: tuple[list[Candidate], list[tuple[Bool[Tensor, " _"], float]]],
) -> tuple[list[str], list[float]]:
    found, results = of
    return [c.key for c in found], [float(r.float().mean()) if len(r) else 0.0 for r, _ in results]
