"""Interchange of every declared variable: the second operand's, and all at the answer position."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.functional_form import wave_frequencies
from circuits.mechanisms.groups import group_index
from circuits.mechanisms.interchange import Swap, draw_swaps, operand_embedding
from circuits.mechanisms.operand_parts import class_means, frequency_directions, orthonormal, slope, variable_basis
from circuits.mechanisms.readings import Readings, activations, answer_logits, decisive_layers, operand_positions, read
from circuits.tasks.base import Task, Variable

PAIRS = 400
WORTH_A_CONTROL = 0.1
STATE_ROWS = 2048
BETWEEN = 0.95
"""Share of the variance between classes that a subspace of their means has to hold."""


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a variable may be held: a hook point, a position, and the states there.

    ``base`` and ``source`` are the states of the swap's rows, ``states`` and ``operands`` those that subspaces are
    made from.
    """

    name: str
    hook: str
    position: int
    base: Float[Tensor, "rows d"]
    source: Float[Tensor, "rows d"]
    states: Float[Tensor, "states d"]
    operands: Int[Tensor, "states 2"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A variable at a site, the subspace that is tried for it, and the answers predicted when it is swapped."""

    variable: str
    site: Site
    basis: Float[Tensor, "d r"]
    predicted: Int[Tensor, " rows"]

    @property
    def key(self) -> str:
        """``variable @ site``."""
        return f"{self.variable} @ {self.site.name}"


def answer_variable(task: Task) -> Variable:
    """The result as a variable: swapped, it gives the source's answer."""

    def swapped_answer(base: Int[Tensor, "batch 2"], source: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        return task.answer(source)

    return Variable("answer", None, task.answer, swapped_answer)


def leading_means(
    states: Float[Tensor, "rows d"], values: Int[Tensor, " rows"], share: float = BETWEEN
) -> Float[Tensor, "d r"]:
    """Orthonormal directions that hold ``share`` of the variance between the classes' means, largest first."""
    u, s, _ = torch.linalg.svd(class_means(states, values), full_matrices=False)
    power = s.square()
    held = power.cumsum(0) / power.sum().clamp_min(1e-30)
    return u[:, : int((held < share - 1e-6).sum()) + 1]


def sites_of(model: Any, task: Task, readings: Readings, swap: Swap, *, seed: int) -> dict[str, Site]:
    """The second operand's embedding, and the answer position before the decisive MLPs and after the last layer."""
    device = readings.tokens.device
    first, last = decisive_layers(model, task, readings)[0], model.cfg.n_layers - 1
    hooks = {"before": f"blocks.{first}.hook_resid_mid", "after": f"blocks.{last}.hook_resid_post"}
    hooks = {name: hook for name, hook in hooks.items() if hook in model.hook_dict}
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(readings.tokens), generator=generator)[:STATE_ROWS].to(device)
    tokens = [task.encode(of).inputs.to(device) for of in (swap.base, swap.source)]
    base, source, states = (
        activations(model, of, hooks.values()) if hooks else {} for of in (*tokens, readings.tokens[rows])
    )
    found = {
        name: Site(
            name,
            hook,
            -1,
            base[hook][:, -1],
            source[hook][:, -1],
            states[hook][:, -1],
            readings.operands[rows],
        )
        for name, hook in hooks.items()
    }
    embedding = operand_embedding(model, task)
    numbers = torch.arange(len(embedding), device=device)[:, None].expand(-1, 2)
    moved = [embedding[of.to(device)[:, 1]] for of in (swap.base, swap.source)]
    return {
        "embedding": Site("embedding", "hook_embed", operand_positions(task)[1], moved[0], moved[1], embedding, numbers)
    } | found


def candidates(
    model: Any, task: Task, readings: Readings, sites: dict[str, Site], swap: Swap, *, seed: int
) -> list[Candidate]:
    """Every declared variable where it may be held.

    Those of the second operand in its embedding (by its key frequencies, its slope and the means of its digits), and
    all, with the result, at the answer position by the means of their classes.
    """
    out = []
    embedded = sites["embedding"]
    for variable in task.variables():
        if variable.operand == 1:
            predicted = variable.swapped_answer(swap.base, swap.source)
            basis = variable_basis(variable, embedded.states, task.n_operand_values)
            if basis is not None:
                out.append(Candidate(variable.name, embedded, basis, predicted))
                continue
            for name, columns in _whole(model, task, readings, embedded.states, seed=seed).items():
                out.append(Candidate(name, embedded, orthonormal(columns), predicted))
    for name in ("before", "after"):
        if name not in sites:
            continue
        site = sites[name]
        for variable in (*task.variables(), answer_variable(task)):
            values = variable.value(site.operands.to(swap.base.device)).to(site.states.device)
            if len(values.unique()) < 2:
                continue
            basis = leading_means(site.states, values)
            out.append(Candidate(variable.name, site, basis, variable.swapped_answer(swap.base, swap.source)))
    return out


def _whole(model: Any, task: Task, readings: Readings, embedding: Tensor, *, seed: int) -> dict[str, Tensor]:
    """Directions of the whole second operand: of the key frequencies of important neurons, and of growth by one."""
    n = task.n_operand_values
    line = torch.stack([torch.ones(n, dtype=torch.long), torch.arange(n)], dim=1).to(embedding.device)
    renamed = group_index(task, line)
    assert renamed is not None  # every one-token task has a renaming
    _, index, kept, modulus = renamed
    found = {"line": slope(embedding)}
    frequencies = wave_frequencies(model, task, readings, seed=seed)
    if frequencies:
        columns = [frequency_directions(embedding, index, kept, k, modulus) for k in frequencies]
        found["frequencies"] = torch.cat(columns, dim=1)
    return found


def held(
    model: Any, task: Task, swap: Swap, site: Site, basis: Float[Tensor, "d r"], predicted: Int[Tensor, " rows"]
) -> Bool[Tensor, " counted"]:
    """Which predictions hold when the state inside ``basis`` is the source's.

    Rows count whose intact answer is right and whose predicted one is legal and another.
    """
    device = site.base.device
    legal = torch.isin(predicted, task.answer_values) & (predicted != task.answer(swap.base))
    counts = swap.right & legal.to(device)
    if not bool(counts.any()):
        return counts[counts]
    delta = (site.source[counts] - site.base[counts]) @ basis @ basis.T
    tokens = task.encode(swap.base[counts.to(swap.base.device)]).inputs.to(device)

    def put(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, site.position] = activation[:, site.position] + delta.to(activation.dtype)
        return activation

    answers = task.answer_values.to(device)[answer_logits(model, task, tokens, [(site.hook, put)]).argmax(-1)]
    return answers == predicted.to(device)[counts]


def random_basis(site: Site, rank: int, generator: torch.Generator) -> Float[Tensor, "d r"]:
    """A random subspace of equal rank inside the span of a site's states."""
    span = orthonormal((site.states - site.states.mean(0)).T)
    mix = torch.randn(span.shape[1], min(rank, span.shape[1]), generator=generator).to(span)
    return orthonormal(span @ mix)


def variable_interchange(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Best interchange accuracy over the declared variables that ``interchange`` does not look at.

    ``interchange`` swaps variables of the first operand in its embedding. This one swaps those of the second operand in
    its embedding and, at the answer position, each declared variable (values and digits of both operands, the carry)
    and the result: in what the first decisive MLP reads (``before``) and in what the last layer leaves (``after``).
    The subspace is that of the means of the variable's classes (leading directions, with 95 % of their variance). A
    prediction is the answer when this variable alone has the source's value. Accuracies are over inputs that the
    model answers rightly and whose prediction is another answer; each stands in ``accuracies`` beside ``controls``, a
    random subspace of equal rank in the span of the states there (0 where the accuracy is below 0.1). ``value`` is
    the best of those whose control is at most 0.1, or the best.

    The result after the last layer is swapped in any model that is right: it is no candidate for ``value``. High for
    one operand before the MLP: operands are kept apart there; low, with the result high: they are added on the way.

    Formula: mean of [answer with U U^T (s_source - s_base) added to the state s_base = the answer with the
        source's value of the variable], with U the leading directions of the means of the state over the
        variable's classes.

    Source: Geiger et al. 2021 (arXiv 2106.02997), interchange interventions, on all of a causal model's variables.
    Fails when: a variable is held in no linear subspace, or its class means differ in what goes along with it (the
    carry's with the sum's): a subspace can be learned then (``das``). Or states have so low a rank that a random
    subspace of that size is all of it.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    found, results = swapped(model, task, readings, seed=seed)
    accuracies = {c.key: float(r.float().mean()) if len(r) else 0.0 for c, (r, _) in zip(found, results, strict=True)}
    controls = {c.key: control for c, (_, control) in zip(found, results, strict=True)}
    open_to = [c.key for c in found if c.key != "answer @ after"]
    clear = [key for key in open_to if controls[key] <= 0.1] or open_to
    best = max(clear, key=lambda key: accuracies[key])
    right = results[[c.key for c in found].index(best)][0]
    return Evidence(
        test="variable-interchange",
        value=accuracies[best],
        interval=wilson_interval(int(right.sum()), len(right)),
        control=controls[best],
        control_name="random subspace of equal rank",
        threshold="best variable >= 0.95 and random subspace <= 0.10",
        passed=accuracies[best] >= 0.95 and controls[best] <= 0.1,
        details={
            "best": best,
            "accuracies": accuracies,
            "controls": controls,
            "ranks": {c.key: int(c.basis.shape[1]) for c in found},
            "counted": {c.key: len(r) for c, (r, _) in zip(found, results, strict=True)},
        },
        source="Geiger et al. 2021, arXiv 2106.02997",
        seconds=time.perf_counter() - start,
    )


def swapped(
    model: Any, task: Task, readings: Readings, *, seed: int
) -> tuple[list[Candidate], list[tuple[Bool[Tensor, " _"], float]]]:
    """Return all candidates, and of each which predictions hold and the random subspace's accuracy; worked out once."""
    key = f"variable interchange {seed}"
    if key not in readings.remembered:
        swap = draw_swaps(model, task, n=PAIRS, seed=seed + 1)
        sites = sites_of(model, task, readings, swap, seed=seed)
        found = candidates(model, task, readings, sites, swap, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        results = []
        for one in found:
            right = held(model, task, swap, one.site, one.basis, one.predicted)
            control = right[:0]
            if len(right) and float(right.float().mean()) > WORTH_A_CONTROL:
                basis = random_basis(one.site, one.basis.shape[1], generator)
                control = held(model, task, swap, one.site, basis, one.predicted)
            results.append((right, float(control.float().mean()) if len(control) else 0.0))
        readings.remembered[key] = found, results
    remembered: tuple[list[Candidate], list[tuple[Tensor, float]]] = readings.remembered[key]
    return remembered
