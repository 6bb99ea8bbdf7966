"""Columns in parts of what heads write: what a column's own digits set, and the rest, which has the carry."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._decoding import last_logits
from circuits.errors import BadInput
from circuits.mechanisms.carry_cascade import draw_operands, draw_right_swaps
from circuits.mechanisms.columns import Found, Swaps, evidence_of, inner_variables, source_outputs
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.least_squares import class_means
from circuits.mechanisms.readings import activations, device_of, hooked
from circuits.tasks.base import Task, Variable

FITTED = 5000
"""Sums that parts are fitted to: others than those that are judged."""


def column_digits(operands: Int[Tensor, "rows 2"], column: int) -> Int[Tensor, " rows"]:
    """The two digits of a column as one number, 0 to 99."""
    a, b = (operands // 10**column % 10).T
    return 10 * a + b


def head_outputs(
    model: Any, tokens: Int[Tensor, "rows pos"], at: Sequence[int]
) -> dict[str, Float[Tensor, "rows at head d_head"]]:
    """What every layer's heads write at some positions."""
    tokens = tokens[:, : max(at) + 1]
    last = tokens.shape[1] - min(at)
    # counted from the end, as the last block may be computed there alone
    wanted = [position - tokens.shape[1] for position in at]
    names = [f"blocks.{i}.attn.hook_z" for i in range(model.cfg.n_layers)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in tokens.to(device_of(model)).split(1024):
        for name, value in activations(model, part, names, last=last).items():
            found[name].append(value[:, wanted])
    return {name: torch.cat(values) for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Fitted:
    """Sums that parts are fitted to, and what the heads write at the positions where digits are judged."""

    operands: Int[Tensor, "rows 2"]
    order: Int[Tensor, " rows"]
    at: tuple[int, ...]
    outputs: dict[str, Float[Tensor, "rows at head d_head"]]

    def own_parts(self, column: int, at: int, *, renamed: bool = False) -> dict[str, Float[Tensor, "digits d"]]:
        """What a column's two digits set of what heads write at a position: the mean for each pair of digits.

        ``renamed`` takes the digits of other sums in their stead: the control.
        """
        digits = column_digits(self.operands[self.order] if renamed else self.operands, column)
        found = {}
        for name, outputs in self.outputs.items():
            z = outputs[:, self.at.index(at)].flatten(1)
            found[name] = class_means(z, digits.to(z.device), 100)
        return found


def fitted(model: Any, task: Any, at: Sequence[int], *, seed: int) -> Fitted:
    """Run the sums that parts are fitted to, once for all columns."""
    generator = torch.Generator().manual_seed(seed + 17)
    operands = draw_operands(task.digits, FITTED, generator=generator, nines=False)
    order = torch.randperm(FITTED, generator=generator)
    positions = tuple(sorted(set(at)))
    return Fitted(operands, order, positions, head_outputs(model, task.encode(operands).inputs, positions))


def swapped_parts(
    model: Any,
    task: Any,
    swaps: Swaps,
    written: tuple[dict[str, Tensor], dict[str, Tensor]],
    moved: dict[str, Float[Tensor, "rows d"]],
    *,
    carry: bool,
) -> Bool[Tensor, " rows"]:
    """Where the digit is the predicted one once a part of what heads write is the source's.

    ``moved`` is by how much the part of the column's own digits changes from base to source; for the carry all the
    rest is the source's. Of an answer that is written units first, the digit written before tells the carry by itself:
    its embedding is the source's with the carry.
    """
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for name, own in moved.items():
        clean, given = (outputs[name][:, -1] for outputs in written)
        change = own.view_as(clean)
        changed = given - change if carry else clean + change

        def put(z: Tensor, hook: Any, value: Tensor = changed) -> Tensor:
            z = z.clone()
            z[:, -1] = value
            return z

        hooks.append((name, put))
    if carry:

        def embed(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, -1] = written[1]["hook_embed"][:, -1]
            return activation

        hooks.append(("hook_embed", embed))
    with torch.no_grad(), hooked(model, hooks):
        return last_logits(model, swaps.base)[:, -1].argmax(-1) == swaps.predicted


@dataclass(frozen=True, eq=False)
class Drawn:
    """A variable's swaps that are right as they stand, with the operands of base and source."""

    variable: Variable
    column: int
    swaps: Swaps
    base: Int[Tensor, "rows 2"]
    source: Int[Tensor, "rows 2"]


def judged(model: Any, task: Any, drawn: Drawn, sums: Fitted) -> Found:
    """How often swapping one part gives the predicted digit, and how often that fitted to other sums' digits does."""
    swaps, name, column = drawn.swaps, drawn.variable.name, drawn.column
    written = head_outputs(model, swaps.base, [swaps.position]), source_outputs(model, swaps)
    before, after = (column_digits(x, column).to(swaps.base.device) for x in (drawn.base, drawn.source))
    shares = []
    for renamed in (False, True):
        own = sums.own_parts(column, swaps.position, renamed=renamed)
        moved = {hook: table[after] - table[before] for hook, table in own.items()}
        shares.append(swapped_parts(model, task, swaps, written, moved, carry=name.startswith("carry")))
    return Found(name, (), int(shares[0].sum()), len(shares[0]), float(shares[1].float().mean()))


def column_parts(model: Any, task: Task, *, seed: int = 0) -> Evidence:
    """Lowest interchange accuracy over inner columns of the carry and of the base sum, through parts of all heads.

    What the heads of all layers write at a digit's position is split into the part that the column's own two digits
    set and the rest: z = F(digits of the column) + rest, where F is the mean over sums with these digits, sums that are
    not judged. F is replaced by that of an unrelated source: the prediction is the digit of the source's column with
    the base's carry. Then the rest is: the digit of the base's column with the source's carry. Either is a third digit,
    neither the base's nor the source's. In contrast to ``column-interchange`` and ``carry-cascade`` no head need carry
    one of them alone. ``control`` is the same for parts fitted to the digits of other sums.

    Formula: min over inner columns and both parts of mean over sums of [the digit with F, or with z - F, of the source
        in place of the base's = the digit that the column algorithm gives].

    Source: sub-tasks base add and carry: Quirke & Barez 2024 (arXiv 2310.13121), section 3; interchange accuracy over a
    distribution: Geiger et al. 2021 (arXiv 2106.02997), definition 2; the split into parts is ours.
    Fails when: an MLP at an earlier position has added digit and carry up already, or what is written of one
    depends on the other. The units column has no carry, and the leading digit is one: neither is tested.

    Raises:
        BadInput: the task has no digit columns.
    """
    start = time.perf_counter()
    if not any(name.startswith("carry into column") for name in getattr(task, "pair_changes", ())):
        raise BadInput(f"{task.name} has no digit columns; column parts need a digit-token addition task")
    drawn = [
        Drawn(variable, column, *draw_right_swaps(model, task, variable, column, seed=seed))
        for variable, column in inner_variables(task)
    ]
    found = [Found(one.variable.name, (), 0, 0, 0.0) for one in drawn]
    at = [one.swaps.position for one in drawn if len(one.swaps.predicted)]
    if at:
        sums = fitted(model, task, at, seed=seed)
        found = [
            judged(model, task, one, sums) if len(one.swaps.predicted) else nothing
            for one, nothing in zip(drawn, found, strict=True)
        ]
    return evidence_of("column-parts", found, {}, start, control_name="parts fitted to other sums")
