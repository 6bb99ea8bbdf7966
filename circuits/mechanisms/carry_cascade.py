"""The column algorithm in full: sums and carries by head group, and how far a carry reaches through nines."""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits._decoding import last_logits
from circuits._stats import wilson_interval
from circuits.errors import BadInput
from circuits.mechanisms.columns import (
    PAIRS,
    Found,
    Swaps,
    choose_heads,
    digit_right,
    digit_tokens,
    evidence_of,
    inner_variables,
    source_outputs,
    swapped_share,
    third_digit,
)
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import device_of
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Batch, Task, Variable

DRAWN = 4000
NINE_ROWS, NINE_COLUMNS = 0.5, 0.5
"""Share of the drawn sums that have nines, and of their columns that are made to sum to nine."""
FEWEST = 30
REACHED = RULE.cascade_reached
"""A cascade is reached whose accuracy is at least this share of that without one."""
STATES = ("8 or less", "9", "10 or more")


def draw_operands(digits: int, n: int, *, generator: torch.Generator, nines: bool) -> Int[Tensor, "n 2"]:
    """Return uniform operand pairs; with ``nines``, half of them have columns that sum to nine in one place of two.

    Source: enriching with nines: Quirke & Barez 2024 (arXiv 2310.13121); repository quanta_maths,
    maths_data_generator.py.
    """
    a, b = torch.randint(10, (2, n, digits), generator=generator)
    if nines:
        chosen = (torch.rand(n, 1, generator=generator) < NINE_ROWS) & (
            torch.rand(n, digits, generator=generator) < NINE_COLUMNS
        )
        b = torch.where(chosen, 9 - a, b)
    powers = 10 ** torch.arange(digits)
    return torch.stack([(a * powers).sum(1), (b * powers).sum(1)], dim=1)


def digits_right(model: Any, batch: Batch) -> Bool[Tensor, "batch n_answers"]:
    """Return which digits of the sum are right when the digits before them are; all are where greedy decoding is.

    Greedy decoding is right if and only if each digit is right after the right ones, so that one forward tells both.
    """
    answers = batch.answer_mask
    with torch.no_grad():
        last = int(answers.int().argmax())  # the first answer digit; our own model computes no others
        logits = last_logits(model, batch.inputs.to(device_of(model)), len(answers) - last)
        said = logits[:, answers[last:]].argmax(-1)
    return said.to(batch.tokens.device) == batch.targets[:, answers]


def complexity(task: Any, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
    """Return each sum's class: 0 no carry, 1 carries that no nine passes on, 2, 3, 4 cascades of 1, 2, 3 nines, 5 more.

    Source: repository quanta_maths, maths_complexity.py (S0 to S5); Quirke, Neo & Barez 2024 (arXiv 2402.02619).
    """
    return torch.where(_carries(task, operands).any(1), (task.cascade_length(operands) + 1).clamp_max(5), 0)


def longest_nines(task: Any, operands: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
    """Return the longest run of adjacent columns that sum to nine, whether or not a carry comes into them."""
    run = longest = torch.zeros_like(operands[:, 0])
    for column in range(task.digits):
        run = torch.where((operands // 10**column % 10).sum(1) == 9, run + 1, 0)
        longest = torch.maximum(longest, run)
    return longest


def _carries(task: Any, operands: Tensor) -> Bool[Tensor, "batch digits"]:
    powers = 10 ** torch.arange(1, task.digits + 1, device=operands.device)
    return (operands[..., None] % powers).sum(1) >= powers


def _by_group(right: Tensor, group: Tensor) -> list[list[float]]:
    """[group, accuracy, low, high, n] for each group that occurs."""
    rows = []
    for value in group.unique().tolist():
        mine = right[group == value]
        rows.append([value, float(mine.float().mean()), *wilson_interval(int(mine.sum()), len(mine)), len(mine)])
    return rows


def error_signature(model: Any, task: Any, *, seed: int, n: int = DRAWN) -> dict[str, Any]:
    """Return accuracy by longest cascade and by complexity class, by size of the sum as control, and the reach.

    ``reach`` is the longest cascade up to which accuracy is at least 0.9 of that without one; ``longest`` the longest
    that was drawn thirty times. Sums are rich in nines, but for ``by_cascade_uniform`` and ``by_size``: uniform sums
    without a cascade, parted into quarters by size. Errors of a network that lacks the cascade come with nines, not
    with size; ``by_nines_at_rest`` tells, by the longest run of columns that sum to nine, whether they come too where
    no carry comes into these columns.

    Source: Quirke & Barez 2024 (arXiv 2310.13121), section 4, for errors along cascades; the control is ours.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform, rich = (
        task.encode(draw_operands(task.digits, n, generator=generator, nines=nines)) for nines in (False, True)
    )
    right, cascade = digits_right(model, rich).all(1), task.cascade_length(rich.operands)
    plainly, usual = digits_right(model, uniform).all(1), task.cascade_length(uniform.operands)
    size = uniform.operands[usual == 0].sum(1).float()
    quarter = torch.bucketize(size, size.quantile(torch.tensor([0.25, 0.5, 0.75])))
    by_cascade, by_size = _by_group(right, cascade), _by_group(plainly[usual == 0], quarter)
    still = cascade == 0
    enough = [row for row in by_cascade if row[4] >= FEWEST]
    reach = -1
    for row in enough:
        if row[1] < REACHED * enough[0][1]:
            break
        reach = int(row[0])
    longest = int(enough[-1][0])
    return {
        "by_cascade": by_cascade,
        "by_cascade_uniform": _by_group(plainly, usual),
        "by_nines_at_rest": _by_group(right[still], longest_nines(task, rich.operands[still])),
        "by_class": [[f"S{int(row[0])}", *row[1:]] for row in _by_group(right, complexity(task, rich.operands))],
        "by_size": by_size,
        "cascade_drop": enough[0][1] - enough[-1][1],
        "size_drop": max(row[1] for row in by_size) - min(row[1] for row in by_size),
        "reach": reach,
        "longest": longest,
        "cascade": "complete" if reach == longest else "missing",
    }


def draw_right_swaps(
    model: Any, task: Any, variable: Variable, column: int, *, seed: int, nines: bool = False, source_right: bool = True
) -> tuple[Swaps, Int[Tensor, "rows 2"], Int[Tensor, "rows 2"]]:
    """Return unrelated base and source sums whose swap of a variable calls for a third digit, and their operands.

    The base's digit is answered rightly, and the source's unless ``source_right`` is false: where the source's is wrong
    the network has no right carry to give.
    """
    generator = torch.Generator().manual_seed(seed)
    base, source = (draw_operands(task.digits, 2 * DRAWN, generator=generator, nines=nines) for _ in range(2))
    digit, keep = third_digit(task, variable, column, base, source)
    keep = keep.nonzero().flatten()[: 3 * PAIRS // 2]
    base, source, digit = base[keep], source[keep], digit[keep]
    clean, given = (task.encode(operands).tokens.to(device_of(model)) for operands in (base, source))
    n = task.answer_position(column)
    right = digit_right(model, clean, n)
    if source_right:
        right &= digit_right(model, given, n)
    chosen = right.nonzero().flatten()[:PAIRS]
    tokens = digit_tokens(task).to(clean.device)
    swaps = Swaps(clean[chosen, :n], given[chosen, :n], tokens[digit.to(clean.device)[chosen]])
    chosen = chosen.to(base.device)
    return swaps, base[chosen], source[chosen]


def state_below(source: Int[Tensor, "rows 2"], column: int) -> Int[Tensor, " rows"]:
    """The state of the column below: 0 for a sum of at most 8, 1 for 9, 2 for 10 or more (the sub-task ST)."""
    below = (source // 10 ** (column - 1) % 10).sum(1)
    return (below >= 9).long() + (below >= 10).long()


def carry_by_state(model: Any, task: Any, found: list[tuple[Found, Variable, int]], *, seed: int) -> list[list[Any]]:
    """Return [state of the source's column below, share of carry swaps that hold, n] over all inner columns.

    Sums are rich in nines and the source need not be right: where the state is 9, the carry has come through a nine
    (the sub-task SS), which is what a network without the cascade cannot do.
    """
    holds, states = [], []
    for heads, variable, column in found:
        swaps, _, source = draw_right_swaps(
            model, task, variable, column, seed=seed + 1, nines=True, source_right=False
        )
        state = state_below(source, column)
        if heads.heads and len(swaps.predicted):
            reverse = bool(getattr(task, "reverse", False))
            outputs = source_outputs(model, swaps)
            holds.append(swapped_share(model, swaps, outputs, heads.heads, with_previous=reverse).to(state.device))
            states.append(state)
    if not holds:
        return []
    hold, state = torch.cat(holds), torch.cat(states)
    return [
        [STATES[i], float(hold[state == i].mean()), int((state == i).sum())]
        for i in range(3)
        if bool((state == i).any())
    ]


def carry_cascade(model: Any, task: Task, *, seed: int = 0) -> Evidence:
    """Lowest interchange accuracy of carries and base sums where the network is right, and how far carries reach.

    Two questions. First, is it a column algorithm at all: for each inner column, the outputs of some heads at the
    digit's position are taken from an unrelated sum, and the digit must become that of the base's column with the
    source's carry (the sub-task SC), or of the source's column with the base's carry (SA); it is a third digit, neither
    the base's nor the source's, so that heads which carry everything fail. In contrast to column-interchange, sums are
    uniform, and both digits were answered rightly before: a network that has no right carry for a cascade cannot hand
    one over, and need not. Heads are chosen on half of the inputs and judged on the other; the control swaps all.

    Second, does the carry cascade: ``reach`` is the number of adjacent columns summing to nine that a carry still gets
    through. Accuracy is given by longest cascade and by complexity class S0 to S5, with intervals, and as a control by
    the size of the sum among sums without a cascade. ``carry_by_state`` tells the interchange of carries by the state
    of the source's column below (ST): at most 8, 10 or more, or 9, where the carry comes from further down (SS).

    Formula: column-interchange's minimum, over sums that are answered rightly; reach = the largest k with
        acc(longest cascade j) >= 0.9 acc(no cascade) for all j <= k, a cascade being a run of adjacent columns
        that sum to nine above one that carries.

    Source: sub-tasks SA, SC, SS and ST: Quirke & Barez 2024 (arXiv 2310.13121), section 3, and Quirke, Neo & Barez
    2024 (arXiv 2402.02619), who test each node on one or two chosen pairs; interchange accuracy over a
    distribution: Geiger et al. 2021 (arXiv 2106.02997), definition 2.
    Fails when: heads carry sums and carries together, or an MLP at an earlier position has added them up (value low,
    though columns may be there); a table learned by heart behind heads that attend to one column each passes, since the
    heads are all that is looked at. The units column has no carry, and the leading digit is one: neither is tested.

    Raises:
        BadInput: the task has no digit columns.
    """
    start = time.perf_counter()
    if not any(name.startswith("carry into column") for name in getattr(task, "pair_changes", ())):
        raise BadInput(f"{task.name} has no digit columns; the carry cascade needs a digit-token addition task")
    found = []
    for variable, column in inner_variables(task):
        swaps, _, _ = draw_right_swaps(model, task, variable, column, seed=seed)
        found.append((choose_heads(model, task, variable, swaps), variable, column))
    details = error_signature(model, task, seed=seed)
    if found:
        carries = [one for one in found if one[0].variable.startswith("carry")]
        details["carry_by_state"] = carry_by_state(model, task, carries, seed=seed)
    return evidence_of("carry-cascade", [f for f, _, _ in found], details, start)
