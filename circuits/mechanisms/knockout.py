"""Knockout selectivity: does an answer need the neurons whose heuristics are about it, beyond what they contribute?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.heuristics import Matches
from circuits.mechanisms.readings import Readings, forward_backward, hooked, read
from circuits.mechanisms.taxonomy import labelled
from circuits.tasks.base import Task

PROMPTS = 256
SHARES = (0.05, 0.1, 0.3)
"""So much of the neurons is knocked out; the value is the mean over these."""
DRAWS = 3
TOLERANCE = 0.2
"""How far the control's contribution may be from the target's for a prompt to count."""
FEWEST = 20
"""Fewer right answers than this are no sample."""
CLASS_NEURONS, CLASSES, CLASS_PROMPTS = 3, 12, 100


def most_associated(
    associated: Float[Tensor, "rows neurons"], n: int, generator: torch.Generator
) -> Bool[Tensor, "rows neurons"]:
    """Return, for each prompt, the n neurons with most heuristics that are about it (fewer where fewer have any).

    Ties are drawn at random.

    Source: prompt_knockout_experiment in technion-cs-nlp/llm-arithmetic-heuristics, heuristics_analysis.py.
    """
    noise = torch.rand(associated.shape, generator=generator).to(associated.device)
    order = (associated + noise).argsort(dim=1, descending=True)[:, :n]
    return torch.zeros_like(associated, dtype=torch.bool).scatter(1, order, True) & (associated > 0)


def as_many_others(target: Bool[Tensor, "rows neurons"], generator: torch.Generator) -> Bool[Tensor, "rows neurons"]:
    """Return, for each prompt, as many random neurons outside the target as it has (or all that there are)."""
    place = _random_place(target, generator)
    return (place < target.sum(1, keepdim=True)) & ~target


def contribution_matched(
    target: Bool[Tensor, "rows neurons"], contribution: Float[Tensor, "rows neurons"], generator: torch.Generator
) -> Bool[Tensor, "rows neurons"]:
    """Return, for each prompt, random neurons outside the target that contribute as much to its answer in all.

    Of each random order, the start whose sum of contributions is nearest to the target's.
    """
    place = _random_place(target, generator)
    order = place.argsort(dim=1)
    sums = (contribution * ~target).gather(1, order).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    wanted = (contribution * target).sum(1, keepdim=True)
    length = (sums - wanted).abs().argmin(1, keepdim=True)
    return (place < length) & ~target


def _random_place(target: Bool[Tensor, "rows neurons"], generator: torch.Generator) -> Int[Tensor, "rows neurons"]:
    """A random order of each prompt's neurons, those of the target last: the place of each neuron in it."""
    noise = torch.rand(target.shape, generator=generator).to(target.device) + target
    return noise.argsort(dim=1).argsort(dim=1)


def right_without(
    model: Any,
    answer_tokens: Int[Tensor, " n_answers"],
    readings: Readings,
    rows: Int[Tensor, " k"],
    neurons: Int[Tensor, " n"],
    out: Bool[Tensor, "k n"],
) -> Bool[Tensor, " k"]:
    """Return which rows are right once some of the neurons, for each row its own, are zero at the answer position."""
    layers = torch.tensor(readings.layers, device=rows.device)
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for layer in sorted(set(readings.layers)):
        mine = layers[neurons] == layer
        keep = torch.ones(len(rows), int((layers == layer).sum()), device=rows.device)
        keep[:, neurons[mine] - int((layers < layer).sum())] = (~out[:, mine]).float()

        def put(activation: Tensor, hook: Any, keep: Tensor = keep) -> Tensor:
            activation = activation.clone()
            activation[:, -1] *= keep
            return activation

        hooks.append((f"blocks.{layer}.mlp.hook_post", put))
    with torch.no_grad(), hooked(model, hooks):
        logits = model(readings.tokens[rows])[:, -1][:, answer_tokens]
    return logits.argmax(-1) == readings.labels[rows]


def knockout(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Accuracy lost by zeroing the neurons whose heuristics are about a prompt, beyond matched random neurons.

    For each of 256 prompts that are answered rightly, the neurons with most matched heuristics about it are zeroed (5,
    10 and 30 % of the 200 most important; the value is the mean). Two controls, three draws each: as many random
    other important neurons, as published (``random``), and random other neurons whose contributions to this answer's
    logit sum to the same within a fifth (the value; ``matched_prompts`` is the share of prompts that allow it). The
    first says little, since neurons that fire on a prompt matter to it whatever they compute: it is 0.4 for a column
    algorithm and a number line, and 0.3 to 0.8 for range lookups. The second is 0.4 to 0.6 for lookups whose neurons
    match, 0 for the column code, the number line and the result bag, and below 0 for Fourier codes. Its control gives
    each neuron another one's heuristics.

    ``class_knockout`` zeroes all neurons of one heuristic: the accuracy that prompts of the heuristic lose more than
    others, over classes of three or more neurons, and ``class_matched`` beyond random neurons that contribute as much.

    Formula: mean over prompts of acc(without as many others of equal contribution) - acc(without the neurons
        about the prompt).

    Source: Nikankin et al. 2025 (arXiv 2410.21272), section 4.2 and figures 7 and 8, and heuristics_analysis.py of
    technion-cs-nlp/llm-arithmetic-heuristics; matching by contribution (gradient times activation) is ours.
    Fails when: few neurons match anything (``prompts_with_target`` is then small), or the neurons outside the target
    contribute less than it in all (few ``matched_prompts``: what is knocked out has no equal, as in a column code of
    two dozen neurons).
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    found = labelled(model, task, readings)
    generator = torch.Generator().manual_seed(seed)
    right = readings.right.nonzero().squeeze(1)
    if len(right) < FEWEST or not bool(found.matches.classified().any()):
        return _evidence(float("nan"), (float("nan"), float("nan")), None, {"n_prompts": len(right)}, start)
    answer_tokens = task.answer_tokens.to(right.device)
    rows = right[torch.randperm(len(right), generator=generator).to(right.device)[:PROMPTS]]
    contribution = contributions(model, answer_tokens, readings, rows)[:, found.neurons]
    associated = found.matches.associated()[rows]
    others = torch.randperm(associated.shape[1], generator=generator).to(rows.device)
    prompts = (model, answer_tokens, readings, rows, found.neurons)
    real = selectivity(*prompts, associated, contribution, generator=generator)
    null = selectivity(*prompts, associated[:, others], contribution, generator=generator, controls=("matched",))
    value, interval, share = over_prompts(real, "matched", seed=seed)
    random, random_interval, _ = over_prompts(real, "random", seed=seed)
    details: dict[str, Any] = {
        "random": random,
        "random_interval": list(random_interval),
        "matched_prompts": share,
        "accuracy_left": {str(s): float(v) for s, v in zip(SHARES, real["left"].mean(0), strict=True)},
        "contribution_ratio": float(real["matched_sum"].sum() / real["target_sum"].sum()),
        "random_contribution_ratio": float(real["random_sum"].sum() / real["target_sum"].sum()),
        "targeted": float(real["targeted"].mean()),
        "prompts_with_target": float((real["targeted"] > 0).any(1).float().mean()),
        "n_prompts": len(rows),
        "labelled": float(found.matches.classified().float().mean()),
    }
    details |= _classes(model, answer_tokens, readings, right, found.neurons, found.matches, generator)
    control = over_prompts(null, "matched", seed=seed)[0]
    return _evidence(value, interval, None if control != control else control, details, start)


def over_prompts(
    result: dict[str, Float[Tensor, "k shares"]], control: str, *, seed: int
) -> tuple[float, tuple[float, float], float]:
    """Return the mean selectivity of ``selectivity``, its interval over prompts and draws, and the share that counts.

    Prompts without a target do not count, nor, for ``matched``, those whose control contributes another amount than
    the target by more than a fifth. Not-a-number where fewer than 20 prompts are left.
    """
    counts = result["targeted"] > 0
    if control == "matched":
        apart = (result["matched_sum"] - result["target_sum"]).abs()
        counts &= apart <= TOLERANCE * result["target_sum"].abs()
    with_target = max(int((result["targeted"] > 0).sum()), 1)
    used = counts.any(1)
    if int(used.sum()) < FEWEST:
        return float("nan"), (float("nan"), float("nan")), float(counts.sum()) / with_target
    data = torch.stack([(result[control] * counts).sum(1), counts.sum(1)], dim=1)[used].cpu().numpy()

    def mean(rows: NDArray[Any]) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    return mean(data), bootstrap_interval(data, mean, seed=seed), float(counts.sum()) / with_target


def _evidence(
    value: float, interval: tuple[float, float], control: float | None, details: dict[str, Any], start: float
) -> Evidence:
    return Evidence(
        test="knockout",
        value=value,
        interval=interval,
        control=control,
        control_name="heuristics exchanged between neurons",
        threshold="none: it describes (about 0 if only contribution counts)",
        passed=None,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272, section 4.2",
        seconds=time.perf_counter() - start,
    )


def contributions(
    model: Any, answer_tokens: Int[Tensor, " n_answers"], readings: Readings, rows: Int[Tensor, " k"]
) -> Float[Tensor, "k n_neurons"]:
    """What each neuron adds to the right answer's centred logit on each row: gradient times activation."""
    layers = tuple(sorted(set(readings.layers)))
    tokens, labels = readings.tokens[rows], readings.labels[rows]
    _, posts, gradients = forward_backward(model, layers, tokens, answer_tokens, labels)
    return posts * gradients


def selectivity(
    model: Any,
    answer_tokens: Int[Tensor, " n_answers"],
    readings: Readings,
    rows: Int[Tensor, " k"],
    neurons: Int[Tensor, " n"],
    associated: Float[Tensor, "k n"],
    contribution: Float[Tensor, "k n"],
    *,
    generator: torch.Generator,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    controls: Sequence[str] = ("random", "matched"),
) -> dict[str, Float[Tensor, "k shares"]]:
    """Return, for each row and share of neurons, accuracy without the controls less accuracy without the target.

    ``random`` and ``matched`` are these, ``left`` is the accuracy without the target, ``targeted`` its size, and
    ``target_sum``, ``random_sum`` and ``matched_sum`` the contributions that were taken away.

    Args:
        model: any hooked model.
        answer_tokens: the tokens that are answers, in the order of ``readings.labels``.
        readings: prompts with their labels; its ``neurons`` are not used.
        rows: the prompts to knock neurons out on.
        neurons: the neurons that may be knocked out.
        associated: how many of the heuristics of each of them are about each prompt.
        contribution: what each adds to the right answer's logit on each prompt.
        generator: of the draws.
        shares: so much of the neurons is knocked out.
        draws: random draws of each control.
        controls: which of the two controls to draw.

    Source: as ``knockout``.
    """
    columns: dict[str, list[Tensor]] = {}
    for share in shares:
        target = most_associated(associated, max(1, round(share * len(neurons))), generator)
        left = right_without(model, answer_tokens, readings, rows, neurons, target).float()
        sums: dict[str, Tensor] = {"left": left, "targeted": target.sum(1).float()}
        sums["target_sum"] = (contribution * target).sum(1)
        for _ in range(draws):
            for name in controls:
                if name == "matched":
                    out = contribution_matched(target, contribution, generator)
                else:
                    out = as_many_others(target, generator)
                gained = right_without(model, answer_tokens, readings, rows, neurons, out).float() - left
                sums[name] = sums.get(name, torch.zeros_like(left)) + gained / draws
                total = (contribution * out).sum(1) / draws
                sums[f"{name}_sum"] = sums.get(f"{name}_sum", torch.zeros_like(left)) + total
        for name, column in sums.items():
            columns.setdefault(name, []).append(column)
    return {name: torch.stack(parts, dim=1) for name, parts in columns.items()}


def _classes(
    model: Any,
    answer_tokens: Int[Tensor, " n_answers"],
    readings: Readings,
    right: Int[Tensor, " k"],
    neurons: Int[Tensor, " n"],
    matches: Matches,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Class knockout: prompts of a heuristic against others, without its neurons and without matched ones."""
    matched = matches.matched()
    size = matched.sum(0)
    largest = size.argsort(descending=True, stable=True)[:CLASSES]
    gaps: list[float] = []
    beyond: list[float] = []
    for heuristic in largest[size[largest] >= CLASS_NEURONS].tolist():
        inside = matches.heuristics.members[heuristic][right]
        groups = [_draw(right[inside], generator), _draw(right[~inside], generator)]
        if min(map(len, groups)) < FEWEST:
            continue
        contribution = contributions(model, answer_tokens, readings, groups[0])[:, neurons].mean(0, keepdim=True)
        target = matched[None, :, heuristic]
        lost = []
        for out in (target, contribution_matched(target, contribution, generator)):
            left = [
                float(right_without(model, answer_tokens, readings, g, neurons, out.expand(len(g), -1)).float().mean())
                for g in groups
            ]
            lost.append(left[1] - left[0])
        gaps.append(lost[0])
        beyond.append(lost[0] - lost[1])
    if not gaps:
        return {"class_knockout": None, "n_classes": 0}
    return {
        "class_knockout": sum(gaps) / len(gaps),
        "class_knockout_interval": list(bootstrap_interval(gaps, seed=0)),
        "class_matched": sum(beyond) / len(beyond),
        "class_matched_interval": list(bootstrap_interval(beyond, seed=0)),
        "n_classes": len(gaps),
    }


def _draw(rows: Int[Tensor, " k"], generator: torch.Generator) -> Int[Tensor, " n"]:
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)[:CLASS_PROMPTS]]
