"""Column interchange: in digit-by-digit addition, do attention heads carry each column's carry and digits?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._decoding import greedy_right, last_logits
from circuits._stats import wilson_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import activations, device_of, hooked
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task, Variable

PAIRS = 400
DRAWN = 4000
FEWEST = 20
ENOUGH = 0.97
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Swaps:
    """Base and source inputs, up to the answer digit that is looked at, and what it should become."""

    base: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    predicted: Int[Tensor, " batch"]

    @property
    def position(self) -> int:
        """The position that says the digit: the last."""
        return self.base.shape[1] - 1

    def half(self, which: int) -> Swaps:
        """Return every second row, from the first or from the second on."""
        return Swaps(self.base[which::2], self.source[which::2], self.predicted[which::2])


@dataclass(frozen=True, eq=False)
class Found:
    """Heads that carry one variable: the chosen set, and how often the swap gives the predicted digit."""

    variable: str
    heads: tuple[Head, ...]
    hold: int
    counted: int
    control: float

    @property
    def share(self) -> float:
        """Interchange accuracy of the chosen heads on held-out pairs."""
        return self.hold / max(self.counted, 1)


def draw_swaps(model: Any, task: Any, variable: Variable, column: int, *, seed: int) -> Swaps:
    """Return unrelated base and source inputs for which swapping a variable of a column calls for a third digit.

    The predicted digit is neither the base's own nor the source's: what copies all of the source cannot pass. The model
    is right on both inputs there: a network whose carries do not cascade has no right carry to hand on from some.
    """
    generator = torch.Generator().manual_seed(seed)
    base, source = (task.sample("train", DRAWN, generator=generator).operands for _ in range(2))
    digit, keep = third_digit(task, variable, column, base, source)
    keep = keep.nonzero().flatten()[: 2 * PAIRS]
    n = task.answer_position(column)
    device = device_of(model)
    clean, given = (task.encode(operands[keep]).tokens.to(device) for operands in (base, source))
    known = [digit_right(model, x, n) for x in (clean, given)]
    right = (known[0] & known[1]).nonzero().flatten()[:PAIRS]
    return Swaps(clean[right, :n], given[right, :n], digit_tokens(task)[digit[keep]].to(device)[right])


def digit_tokens(task: Any) -> Int[Tensor, " 10"]:
    """Return the tokens of the digits 0 to 9."""
    return torch.tensor([task.vocabulary.index(str(d)) for d in range(10)])


def carry_into(operands: Int[Tensor, "rows 2"], column: int) -> Bool[Tensor, " rows"]:
    """Return whether the columns below one carry into it."""
    return (operands % 10**column).sum(1) >= 10**column


def third_digit(
    task: Any, variable: Variable, column: int, base: Int[Tensor, "rows 2"], source: Int[Tensor, "rows 2"]
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Return a column's digit once a variable is the source's, and where it is neither's own and agrees with both."""
    answers = variable.swapped_answer(base, source), base.sum(1), source.sum(1)
    digit, own, other = (x // 10**column % 10 for x in answers)
    return digit, (digit != own) & (digit != other) & written_agrees(task, variable, column, base, source)


def written_agrees(
    task: Any, variable: Variable, column: int, base: Int[Tensor, "rows 2"], source: Int[Tensor, "rows 2"]
) -> Bool[Tensor, " rows"]:
    """Return where the digits written before a column's are those of the base, the source and the predicted sum alike.

    Written highest digit first, the digit before tells the carry out of the column: with another one the swapped input
    contradicts itself, and what a network makes of it says nothing. Written units first, they tell the carry into the
    column, which is swapped with it.
    """
    if getattr(task, "reverse", False):
        return torch.ones_like(base[:, 0], dtype=torch.bool)
    digits, below = (base, source) if variable.name.startswith("carry") else (source, base)
    mixed = (digits // 10**column % 10).sum(1) + carry_into(below, column) >= 10
    out, given = (carry_into(x, column + 1) for x in (base, source))
    return (mixed == out) & (given == out)


def digit_right(model: Any, tokens: Int[Tensor, "rows pos"], n: int) -> Bool[Tensor, " rows"]:
    """Return whether the token behind the first ``n`` is the one that the model says."""
    with torch.no_grad():
        said = [last_logits(model, part)[:, -1].argmax(-1) for part in tokens[:, :n].split(1024)]
    return torch.cat(said) == tokens[:, n]


def source_outputs(model: Any, swaps: Swaps) -> dict[str, Float[Tensor, "batch _ ..."]]:
    """Return the heads' outputs, and the embeddings, on the source inputs."""
    names = [*(f"blocks.{i}.attn.hook_z" for i in range(model.cfg.n_layers)), "hook_embed"]
    return activations(model, swaps.source, names, last=1)


def swapped_share(
    model: Any, swaps: Swaps, source: dict[str, Tensor], heads: tuple[Head, ...], *, with_previous: bool
) -> Float[Tensor, " batch"]:
    """Return where the digit is the predicted one once some heads' outputs there come from the source.

    ``with_previous`` also takes the embedding of the digit written before from the source: in a reversed answer that
    digit by itself tells the carry, and the head's message would contradict it.
    """
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for layer in sorted({layer for layer, _ in heads}):
        name = f"blocks.{layer}.attn.hook_z"
        mine = torch.tensor([h for i, h in heads if i == layer], device=swaps.base.device)

        def put(z: Tensor, hook: Any, mine: Tensor = mine, value: Tensor = source[name]) -> Tensor:
            z = z.clone()
            z[:, -1, mine] = value[:, -1, mine]
            return z

        hooks.append((name, put))
    if with_previous:

        def embed(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, -1] = source["hook_embed"][:, -1]
            return activation

        hooks.append(("hook_embed", embed))
    with torch.no_grad(), hooked(model, hooks):
        return (last_logits(model, swaps.base)[:, -1].argmax(-1) == swaps.predicted).float()


def find_heads(model: Any, task: Any, variable: Variable, column: int, *, seed: int) -> Found:
    """Choose heads whose swap gives the predicted digit, greedily on one half of the inputs; judge on the other."""
    return choose_heads(model, task, variable, draw_swaps(model, task, variable, column, seed=seed))


def choose_heads(model: Any, task: Any, variable: Variable, swaps: Swaps) -> Found:
    """Choose heads as ``find_heads`` does, on given swaps of a variable."""
    reverse = bool(getattr(task, "reverse", False))
    with_previous = reverse and variable.name.startswith("carry")
    if len(swaps.predicted) < FEWEST:
        return Found(variable.name, (), 0, 0, 0.0)
    chosen_on, judged_on = swaps.half(0), swaps.half(1)
    source = source_outputs(model, chosen_on)
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    tried: tuple[Head, ...] = ()
    reached: list[tuple[float, int, tuple[Head, ...]]] = []
    while len(tried) < len(heads) and not (reached and reached[-1][0] >= ENOUGH):
        shares = {
            head: float(swapped_share(model, chosen_on, source, (*tried, head), with_previous=with_previous).mean())
            for head in heads
            if head not in tried
        }
        best = max(shares, key=lambda head: shares[head])
        tried = (*tried, best)
        reached.append((shares[best], -len(tried), tried))
    kept = max(reached)[2]
    source = source_outputs(model, judged_on)
    hold = swapped_share(model, judged_on, source, kept, with_previous=with_previous)
    every = swapped_share(model, judged_on, source, tuple(heads), with_previous=reverse)
    return Found(variable.name, kept, int(hold.sum()), len(hold), float(every.mean()))


def inner_variables(task: Any) -> list[tuple[Variable, int]]:
    """Return the carries and base sums, with their columns, of columns that have both and are not the last."""
    named = {variable.name: variable for variable in task.variables()}
    return [
        (named[f"{kind} column {column}"], column)
        for column in range(1, task.digits)
        for kind in ("carry into", "base sum of")
    ]


def column_interchange(model: Any, task: Task, *, seed: int = 0) -> Evidence:
    """Lowest interchange accuracy over columns of the carry and of the base sum, each through some attention heads.

    Base and source are unrelated sums. The heads' outputs at an answer digit are taken from the source; the prediction
    is the digit that the column algorithm gives for the base's column with the source's carry, or for the source's
    column with the base's carry. It is neither the base's digit nor the source's, so that heads which carry both, or
    everything, fail. Heads are added greedily on half of the inputs until 97 % hold, and the best set on the way is
    judged on the other half. The control swaps all heads.

    Columns that have both a carry and digits count; the units have no carry, and the leading digit is one.

    Formula: min over columns and {carry, base sum} of the mean over unrelated base x and source y of [digit(x,
        heads H of y) = (u + v + c) mod 10], with u, v the digits of the base's column and c the carry of the
        source's (for the carry), or the digits of the source's column and the carry of the base's (for the base
        sum).

    Source: interchange accuracy of Geiger et al. 2021 (arXiv 2106.02997), definition 2, on the sub-tasks base add and
    carry of Quirke & Barez 2024 (arXiv 2310.13121), section 3.
    Fails when: one head carries a column's digits and its carry in different directions, or an MLP at an earlier
    position has added them up: the algorithm may be there, but no set of heads can show it.
    """
    start = time.perf_counter()
    if not any(name.startswith("carry into column") for name in getattr(task, "pair_changes", ())):
        raise BadInput(f"{task.name} has no digit columns; column interchange needs a digit-token addition task")
    found = [find_heads(model, task, variable, column, seed=seed) for variable, column in inner_variables(task)]
    details: dict[str, Any] = {"by_cascade": accuracy_by_cascade(model, task, seed=seed)}
    if found:
        details |= {
            "carry": min(f.share for f in found if f.variable.startswith("carry")),
            "digits": min(f.share for f in found if not f.variable.startswith("carry")),
            "n_heads": model.cfg.n_layers * model.cfg.n_heads,
            "mean_heads": sum(len(f.heads) for f in found) / len(found),
        }
    return evidence_of("column-interchange", found, details, start)


def evidence_of(
    test: str,
    found: Sequence[Found],
    details: Mapping[str, Any],
    start: float,
    *,
    control_name: str = "all heads swapped",
) -> Evidence:
    """Return the evidence of the worst carry or base sum, with the heads of each in its details."""
    heads: dict[str, Any] = {}
    for f in found:
        key = f.variable.replace(" ", "_")
        heads[key] = f.share
        if f.heads:
            heads[f"{key}_heads"] = [f"L{layer}H{head}" for layer, head in f.heads]
    value, interval, control, passed = float("nan"), (float("nan"), float("nan")), None, None
    if found and any(f.counted == 0 for f in found):
        heads["too_few_swaps"] = [f.variable for f in found if f.counted == 0]
    elif found:
        worst = min(found, key=lambda f: f.share)
        value, interval = worst.share, wilson_interval(worst.hold, worst.counted)
        control = max(f.control for f in found)
        passed = worst.share >= RULE.column_interchange and control <= RULE.interchange_control
    return Evidence(
        test=test,
        value=value,
        interval=interval,
        control=control,
        control_name=control_name,
        threshold=f"every inner column's carry and digits >= 0.95, {control_name} <= 0.10",
        passed=passed,
        details={**details, **heads},
        source="Quirke & Barez 2024, arXiv 2310.13121; Geiger et al. 2021, arXiv 2106.02997",
        seconds=time.perf_counter() - start,
    )


def accuracy_by_cascade(model: Any, task: Any, *, seed: int = 0, n: int = 2000) -> list[list[float]]:
    """[longest carry cascade, accuracy, n] on unseen random pairs; errors that rise with it are a carry limit."""
    batch = task.examples("random", limit=n, seed=seed)
    right = greedy_right(model, task, batch).float().to(batch.operands.device)
    cascade = task.cascade_length(batch.operands)
    return [[int(c), float(right[cascade == c].mean()), int((cascade == c).sum())] for c in cascade.unique().tolist()]
