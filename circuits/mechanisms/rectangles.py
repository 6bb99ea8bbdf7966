"""Range matching: are neurons two-level rectangles of the operand square, and is the code really the rectangles?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import MAX_ROWS, Readings, answer_logits, read
from circuits.tasks.base import Task

TOP_NEURONS, POOL = 80, 320
"""So many neurons are fitted, most important first; copies of one among the first ``POOL`` count as one."""
COPY = 0.999
NULL_NEURONS = 20
EDGE_DRAWS = 999
COARSE = 24
"""Edges per axis up to which all rectangles are tried."""


Rectangle = tuple[int, int, int, int]


def best_rectangles(maps: Float[Tensor, "neurons n n"], edges: Int[Tensor, " edges"]) -> list[tuple[float, Rectangle]]:
    """For each map, R2 of the best two-level fit 1[r0 <= a < r1, c0 <= b < c1], and that (r0, r1, c0, c1).

    All pairs of ``edges`` are tried on both axes where there are few of them; else all pairs of every few edges, and
    then those near the best. R2 is by differences of the integral image: for a rectangle with k of N cells and centred
    sum S it is S^2 / (k (1 - k / N)) over the total variance.
    """
    stride = -(-len(edges) // COARSE)
    coarse = torch.unique(torch.cat([torch.arange(0, len(edges), stride), torch.tensor([len(edges) - 1])]))
    near = torch.arange(-stride, stride + 1) if stride > 1 else None
    found: list[tuple[float, Rectangle]] = []
    for activation in maps:
        centred = activation - activation.mean()
        total = float(centred.square().sum())
        if total < 1e-12:
            found.append((0.0, (0, maps.shape[-1], 0, maps.shape[-1])))
            continue
        integral = torch.nn.functional.pad(centred.cumsum(0).cumsum(1), (1, 0, 1, 0))[edges][:, edges]
        sides = [(coarse, coarse)] * 2
        gain, chosen = _best_of(integral, edges, sides)
        if near is not None:
            around = [(at + near).clamp(0, len(edges) - 1).unique() for at in chosen]
            gain, chosen = _best_of(integral, edges, [(around[0], around[1]), (around[2], around[3])])
        r0, r1, c0, c1 = (int(edges[i]) for i in chosen)
        found.append((gain / total, (r0, r1, c0, c1)))
    return found


def _best_of(
    integral: Float[Tensor, "edges edges"],
    edges: Int[Tensor, " edges"],
    sides: list[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]],
) -> tuple[float, tuple[int, int, int, int]]:
    """Return the largest sum of squares that a rectangle explains, with its edges' numbers: of rows, then of columns.

    For rows and for columns, ``sides`` has what may be the first and what may be the last edge.
    """
    n = int(edges[-1])
    spans = []
    for first, last in sides:
        low, high = torch.cartesian_prod(first, last).T
        ordered = low < high
        spans.append((low[ordered].to(edges.device), high[ordered].to(edges.device)))
    (r0, r1), (c0, c1) = spans
    cells = (edges[r1] - edges[r0]).float()[:, None] * (edges[c1] - edges[c0]).float()[None, :]
    weight = torch.where(cells < n * n, 1 / (cells * (1 - cells / (n * n))).clamp_min(1e-6), 0.0)
    rows = integral[r1] - integral[r0]
    gain = (rows[:, c1] - rows[:, c0]).square_().mul_(weight)
    flat = int(gain.argmax())
    i, j = flat // len(c0), flat % len(c0)
    return float(gain.flatten()[flat]), (int(r0[i]), int(r1[i]), int(c0[j]), int(c1[j]))


def two_level_share(values: Float[Tensor, "rows n"], *, iterations: int = 20) -> Float[Tensor, " n"]:
    """Share of each column's variance that the best two levels explain (2-means in one dimension)."""
    low, high = values.amin(0), values.amax(0)
    inside = values > (low + high) / 2
    for _ in range(iterations):
        count = inside.sum(0).clamp(1, len(values) - 1)
        upper = (values * inside).sum(0) / count
        lower = (values * ~inside).sum(0) / (len(values) - count)
        inside = values > (upper + lower) / 2
    fitted = torch.where(inside, upper, lower)
    total = (values - values.mean(0)).square().sum(0)
    left = (values - fitted).square().sum(0)
    return torch.where(total > 1e-12, 1 - left / total.clamp_min(1e-12), torch.zeros_like(total))


def _inside(operands: Int[Tensor, "rows 2"], rectangle: Rectangle) -> Bool[Tensor, " rows"]:
    r0, r1, c0, c1 = rectangle
    a, b = operands[:, 0], operands[:, 1]
    return (a >= r0) & (a < r1) & (b >= c0) & (b < c1)


def _most_important(readings: Readings) -> Int[Tensor, " k"]:
    """The neurons that are fitted: the most important ones, with the copies of each."""
    order = readings.importance.argsort(descending=True)[:POOL]
    centred = readings.neurons[:, order] - readings.neurons[:, order].mean(0)
    unit = centred / centred.norm(dim=0).clamp_min(1e-12)
    # Each neuron stands with the first one that it is a copy of.
    first = ((unit.T @ unit) > COPY).int().argmax(0)
    return order[torch.isin(first, first.unique()[:TOP_NEURONS])]


@dataclass(frozen=True, eq=False)
class Fits:
    """The best rectangle of each of some neurons, and whether the neuron is that rectangle."""

    neurons: Int[Tensor, " k"]
    rectangles: list[Rectangle]
    crisp: Bool[Tensor, " k"]

    @property
    def found(self) -> list[Rectangle]:
        """The rectangles of the neurons that are one."""
        return [r for r, is_one in zip(self.rectangles, self.crisp.tolist(), strict=True) if is_one]


def _edges(n: int) -> Int[Tensor, " edges"]:
    return torch.arange(n + 1)


def rectangle_fits(readings: Readings, n: int) -> Fits:
    """Return the best rectangles of the most important neurons of an n x n table; fitted once for all tests.

    A neuron is a rectangle if that explains 80 % of it; a single row, column or pair is no range.
    """
    if "rectangles" not in readings.remembered:
        top = _most_important(readings)
        fits = best_rectangles(readings.neurons[:, top].T.reshape(-1, n, n), _edges(n).to(top.device))
        wide = [min(r1 - r0, c1 - c0) > 1 for _, (r0, r1, c0, c1) in fits]
        crisp = torch.tensor([r2 > 0.8 and w for (r2, _), w in zip(fits, wide, strict=True)], device=top.device)
        readings.remembered["rectangles"] = Fits(top, [rectangle for _, rectangle in fits], crisp)
    fitted: Fits = readings.remembered["rectangles"]
    return fitted


def accuracy_with(
    model: Any, task: Task, readings: Readings, columns: Int[Tensor, " k"], values: Float[Tensor, "rows k"]
) -> Bool[Tensor, " rows"]:
    """Return which rows are right once the given neurons take the given values at the answer position."""
    layers = torch.tensor(readings.layers, device=columns.device)
    hooks = []
    for layer in sorted(set(readings.layers)):
        start = int((layers < layer).sum())
        mine = layers[columns] == layer
        where, what = columns[mine] - start, values[:, mine]

        def put(activation: Tensor, hook: Any, where: Tensor = where, what: Tensor = what) -> Tensor:
            activation = activation.clone()
            activation[:, -1, where] = what
            return activation

        if len(where):
            hooks.append((f"blocks.{layer}.mlp.hook_post", put))
    return answer_logits(model, task, readings.tokens, hooks, cheap=True).argmax(-1) == readings.labels


def _matched(importance: Tensor, chosen: Tensor, pool: Tensor) -> Tensor:
    """Neurons of ``pool``, most important first, until their importance reaches that of ``chosen`` (or pool ends)."""
    ordered = pool[importance[pool].argsort(descending=True)]
    reached = importance[ordered].cumsum(0) >= importance[chosen].sum()
    return ordered[: int((~reached).sum()) + 1]


def rectangles(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that are one two-level rectangle of the operand square.

    A crisp picture is not yet a code: the rectangles are *idealised* (each rectangle neuron is replaced by its two
    levels) and accuracy must survive, and mean-ablating them must hurt. The control is the share after renaming
    the operands at random; ablating importance-matched other neurons is reported beside.
    ``edge_width`` and ``edge_offset`` are the band width and offset that most interior edges lie on, ``edge_p`` says
    how often edges drawn at random do so on the grid that suits them best.

    Source: range neurons of Nikankin et al. 2025 (arXiv 2410.21272), figure 3; single-rectangle fit, two-levelness
    (2-means) and idealisation are ours.
    Fails when: a neuron matches several ranges (it then counts as none), or the square is too large to enumerate.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    n = task.n_operand_values
    if n * n > MAX_ROWS:
        return _sampled_only(start, n)
    fitted = rectangle_fits(readings, n)
    top, crisp, edges = fitted.neurons, fitted.crisp, _edges(n).to(readings.neurons.device)
    maps = readings.neurons[:, top[:NULL_NEURONS]].T.reshape(-1, n, n)
    two = two_level_share(readings.neurons[:, top])
    weight = readings.importance[top] / readings.importance[top].sum().clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(top.device)
    renamed = best_rectangles(maps[:, order][:, :, order], edges)
    null = torch.tensor([r2 for r2, _ in renamed], device=top.device)
    share = float(weight[crisp].sum())
    details: dict[str, Any] = {
        "two_level": float(weight[two > 0.9].sum()),
        "crisp": float(weight[crisp & (two > 0.9)].sum()),
        "n_rectangles": int(crisp.sum()),
        "importance_of_all": float(readings.importance[top[crisp]].sum() / readings.importance.sum().clamp_min(1e-12)),
        "accuracy": float(readings.right.float().mean()),
    }
    passed = False
    if bool(crisp.any()):
        details |= _causal(model, task, readings, top, crisp, fitted.rectangles)
        details |= edge_grid(fitted.found, n, seed=seed)
        real = share >= 0.5 and float((null > 0.8).float().mean()) <= 0.1
        passed = real and details["idealised"] >= details["accuracy"] - 0.05 and details["ablated"] <= 0.7
    effective = max(1, int(1 / float(weight.square().sum())))
    return Evidence(
        test="rectangles",
        value=share,
        interval=wilson_interval(round(share * effective), effective),
        control=float((null > 0.8).float().mean()),
        control_name="operands renamed at random",
        threshold="share >= 0.50, renamed <= 0.10, accuracy survives idealisation (-0.05), ablation leaves <= 0.70",
        passed=passed,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272; idealisation is ours",
        seconds=time.perf_counter() - start,
    )


def _causal(
    model: Any, task: Task, readings: Readings, top: Tensor, crisp: Tensor, found: list[Rectangle]
) -> dict[str, float]:
    """Accuracy with the rectangle neurons idealised, mean-ablated, and with importance-matched others ablated."""
    chosen = top[crisp]
    columns = []
    for neuron, keep, rectangle in zip(top.tolist(), crisp.tolist(), found, strict=True):
        if keep:
            inside, values = _inside(readings.operands, rectangle), readings.neurons[:, neuron]
            columns.append(torch.where(inside, values[inside].mean(), values[~inside].mean()))
    mean = readings.neurons.mean(0)
    rest = torch.ones(readings.neurons.shape[1], dtype=torch.bool, device=top.device)
    rest[chosen] = False
    others = _matched(readings.importance, chosen, rest.nonzero().squeeze(1))
    rows = len(readings.operands)
    return {
        "idealised": float(accuracy_with(model, task, readings, chosen, torch.stack(columns, 1)).float().mean()),
        "ablated": float(accuracy_with(model, task, readings, chosen, mean[chosen].expand(rows, -1)).float().mean()),
        "others_ablated": float(
            accuracy_with(model, task, readings, others, mean[others].expand(rows, -1)).float().mean()
        ),
        "others_importance_ratio": float(
            readings.importance[others].sum() / readings.importance[chosen].sum().clamp_min(1e-12)
        ),
    }


def edge_grid(found: list[Rectangle], n: int, *, seed: int = 0) -> dict[str, Any]:
    """Width and offset of the regular grid that holds most interior edges, with the share on it and by chance.

    That grid is the best of many: ``edge_chance`` is the mean share on the best grid of as many edges drawn at random,
    and ``edge_p`` how often these lie on theirs as far beyond one in a width as the found ones do.
    """
    edges = torch.tensor([e for r in found for e in r if 0 < e < n], dtype=torch.long)
    if not len(edges):
        nothing = {"edge_width": None, "edge_offset": None, "edge_share": 0.0, "edge_chance": 0.0, "edge_p": 1.0}
        return {"edges": [], **nothing}
    widths = range(min(5, max(2, n // 2)), max(3, n // 2 + 1))
    grids = [(width, offset) for width in widths for offset in range(width)]
    width_of, offset_of = torch.tensor(grids).T
    on = (torch.arange(n)[:, None] % width_of == offset_of).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, n, (EDGE_DRAWS, len(edges)), generator=generator)
    # the first row is what was found
    counts = torch.zeros(1 + EDGE_DRAWS, n, dtype=torch.double)
    together = torch.cat([edges[None], drawn])
    counts.scatter_add_(1, together, torch.ones_like(together, dtype=torch.double))
    shares = counts @ on / len(edges)
    beyond, best = (shares - 1 / width_of).max(1)
    width, offset = grids[int(best[0])]
    return {
        "edges": sorted(edges.tolist()),
        "edge_width": width,
        "edge_offset": offset,
        "edge_share": float(shares[0, best[0]]),
        "edge_chance": float(shares[1:].gather(1, best[1:, None]).mean()),
        "edge_p": (1 + int((beyond[1:] >= beyond[0] - 1e-9).sum())) / (1 + EDGE_DRAWS),
    }


def _sampled_only(start: float, n: int) -> Evidence:
    if n < 2:
        raise BadInput(f"a table of {n} operands has no rectangles")
    nan = float("nan")
    return Evidence(
        test="rectangles",
        value=nan,
        interval=(nan, nan),
        control=None,
        control_name="",
        threshold=f"not run: {n} x {n} operand pairs are more than {MAX_ROWS}",
        passed=None,
        source="Nikankin et al. 2025, arXiv 2410.21272",
        seconds=time.perf_counter() - start,
    )
