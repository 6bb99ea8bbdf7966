"""Columns in parts of what heads write: what a column's own digits set, and the rest, which has the carry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.mechanisms.carry_cascade import draw_operands, draw_right_swaps
from circuits.mechanisms.columns import Found, Swaps, evidence_of, inner_variables
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import activations, device_of, hooked
from circuits.tasks.base import Task, Variable

FITTED = 5000
"""Sums that parts are fitted to: others than those that are judged."""


def column_digits(operands: Int[Tensor, "rows 2"], column: int) -> Int[Tensor, " rows"]:
    """The two digits of a column as one number, 0 to 99."""
    a, b = (operands // 10**column % 10).T
    return 10 * a + b


def head_outputs(model: Any, tokens: Int[Tensor, "rows pos"], at: int) -> dict[str, Float[Tensor, "rows head d_head"]]:
    """What every layer's heads write at one position."""
    names = [f"blocks.{i}.attn.hook_z" for i in range(model.cfg.n_layers)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in tokens.to(device_of(model)).split(1024):
        for name, value in activations(model, part, names).items():
            found[name].append(value[:, at])
    return {name: torch.cat(values) for name, values in found.items()}


def own_parts(
    model: Any, task: Any, column: int, at: int, *, seed: int, renamed: bool = False
) -> dict[str, Float[Tensor, "digits d"]]:
    """What a column's two digits set of what heads write at a position: the mean for each pair of digits.

    ``renamed`` takes the digits of other sums in their stead: the control.
    """
    generator = torch.Generator().manual_seed(seed + 17)
    operands = draw_operands(task.digits, FITTED, generator=generator, nines=False)
    order = torch.randperm(FITTED, generator=generator) if renamed else torch.arange(FITTED)
    digits = column_digits(operands[order], column).to(device_of(model))
    count = torch.bincount(digits, minlength=100).clamp_min(1)[:, None]
    found = {}
    for name, z in head_outputs(model, task.encode(operands).inputs, at).items():
        total = torch.zeros(100, z.flatten(1).shape[1]).to(z).index_add_(0, digits, z.flatten(1))
        found[name] = total / count
    return found


def swapped_parts(
    model: Any,
    task: Any,
    swaps: Swaps,
    operands: tuple[Int[Tensor, "rows 2"], Int[Tensor, "rows 2"]],
    column: int,
    own: dict[str, Float[Tensor, "digits d"]],
    *,
    carry: bool,
) -> Bool[Tensor, " rows"]:
    """Where the digit is the predicted one once the part of the column's own digits, or all the rest, is the source's.

    Of an answer that is written units first, the digit written before tells the carry by itself: its embedding is the
    source's with the carry.
    """
    at, reverse = swaps.position, bool(getattr(task, "reverse", False))
    clean = head_outputs(model, swaps.base, at)
    given = head_outputs(model, swaps.source, at)
    before, after = (column_digits(x, column).to(swaps.base.device) for x in operands)
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for name, table in own.items():
        moved = (table[after] - table[before]).view_as(clean[name])
        moved = given[name] - clean[name] - moved if carry else moved

        def put(z: Tensor, hook: Any, value: Tensor = clean[name] + moved) -> Tensor:
            z = z.clone()
            z[:, at] = value
            return z

        hooks.append((name, put))
    if reverse and carry:
        embedded = activations(model, swaps.source, ["hook_embed"])["hook_embed"]

        def embed(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, at] = embedded[:, at]
            return activation

        hooks.append(("hook_embed", embed))
    with torch.no_grad(), hooked(model, hooks):
        return model(swaps.base)[:, at].argmax(-1) == swaps.predicted


def judged(model: Any, task: Any, variable: Variable, column: int, *, seed: int) -> Found:
    """How often swapping one part gives the predicted digit, and how often that fitted to other sums' digits does."""
    swaps, base, source = draw_right_swaps(model, task, variable, column, seed=seed)
    if not len(swaps.predicted):
        return Found(variable.name, (), 0, 0, 0.0)
    shares = []
    for renamed in (False, True):
        own = own_parts(model, task, column, swaps.position, seed=seed, renamed=renamed)
        carry = variable.name.startswith("carry")
        shares.append(swapped_parts(model, task, swaps, (base, source), column, own, carry=carry))
    return Found(variable.name, (), int(shares[0].sum()), len(shares[0]), float(shares[1].float().mean()))


def column_parts(model: Any, task: Task, *, seed: int = 0) -> Evidence:
    """Lowest interchange accuracy over inner columns of the carry and of the base sum, through parts of all heads.

    What the heads of all layers write at a digit's position is split into the part that the column's own two digits
    set and the rest: z = F(digits of the column) + rest, where F is the mean over sums with these digits, sums that are
    not judged. F is replaced by that of an unrelated source: the prediction is the digit of the source's column with
    the base's carry. Then the rest is: the digit of the base's column with the source's carry. Either is a third digit,
    neither the base's nor the source's. In contrast to ``column-interchange`` and ``carry-cascade`` no head need carry
    one of them alone. ``control`` is the same for parts fitted to the digits of other sums.

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
    found = [judged(model, task, variable, column, seed=seed) for variable, column in inner_variables(task)]
    return evidence_of("column-parts", found, {}, start, control_name="parts fitted to other sums")
