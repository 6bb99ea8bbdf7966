"""Range matching: are neurons two-level rectangles of the operand square, and is the code really the rectangles?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import Readings, answer_logits, decisive_layers, read, varies
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

TOP_NEURONS = 2048
"""So many neurons of a layer are fitted at most, the most important ones."""
CRISP = 0.8
"""R2 above which a neuron is its best rectangle."""
WIDE = 2
"""Fewest values of either operand in a rectangle: a single row, column or pair is no range."""
SYMMETRIC = 0.98
"""Correlation of a map with its mirror image from which on the neuron does not tell a from b."""
MOST = 0.5
"""Least part of all importance that the share of rectangles is about."""
MOST_ROWS = 4096
"""So many inputs are answered with other neurons at most."""
EDGE_DRAWS = 999
"""Sets of edges drawn at random, which the found ones are compared with."""
FEW_EDGES, COARSE = 17, 13
"""Edges of an axis up to which all rectangles are tried; how many of a longer axis are tried at first."""
ROUNDS, PURSUED = 4, 0.4
"""How often the columns and then the rows of a rectangle are moved, as long as it explains so much."""
CHUNK = 1 << 22
"""Numbers in the largest tensor of a step of the fit."""

Rectangle = tuple[int, int, int, int]
"""(r0, r1, c0, c1) of r0 <= a < r1 and c0 <= b < c1."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Integral images of centred maps and of the number of inputs in each cell of the table, at the edges of cells."""

    maps: Float[Tensor, "neurons edges edges"]
    inputs: Float[Tensor, "edges edges"]
    squares: Float[Tensor, " neurons"]
    """The sum of squares of each map."""

    @staticmethod
    def of(maps: Float[Tensor, "neurons n n"], inputs: Float[Tensor, "n n"]) -> Sums:
        """The integral images of maps, which are zero where there is no input."""
        images = [torch.nn.functional.pad(x.cumsum(1).cumsum(2), (1, 0, 1, 0)) for x in (maps, inputs[None])]
        return Sums(images[0], images[1][0], maps.square().sum((1, 2)))

    def some(self, neurons: Tensor) -> Sums:
        """Those of some of the neurons."""
        return Sums(self.maps[neurons], self.inputs, self.squares[neurons])

    def turned(self) -> Sums:
        """The same with the operands exchanged."""
        return Sums(self.maps.mT, self.inputs.T, self.squares)

    def symmetric(self) -> Sums:
        """The means of the maps and their mirror images: of symmetric maps the same, where every pair has been read."""
        return Sums((self.maps + self.maps.mT) / 2, (self.inputs + self.inputs.T) / 2, self.squares)

    def explained(self, total: Tensor, count: Tensor) -> Tensor:
        """R2 of two levels, one of them on areas with these sums and so many inputs.

        Of k of N inputs with the centred sum S it is S^2 / (k (1 - k / N)) over the sum of squares.
        """
        left = count * (1 - count / self.inputs[-1, -1])
        squares = self.squares.reshape(-1, *[1] * (total.ndim - 1)).clamp_min(1e-30)
        return total.square() / left.masked_fill(left < 1e-6, torch.inf) / squares

    def of_coarse(
        self, edges: Int[Tensor, " some"], mirrored: bool
    ) -> tuple[Float[Tensor, " neurons"], Int[Tensor, "neurons 4"]]:
        """The largest R2 among all rectangles on some of the edges, and that rectangle."""
        low, high = torch.combinations(edges).T
        rows = [x[:, high] - x[:, low] for x in (self.maps, self.inputs[None])]
        total, count = (x[:, :, high] - x[:, :, low] for x in rows)
        if mirrored:
            # where rows and columns are apart, the mirror image has the same sum and no input in common
            total, count = 2 * total * ((high[:, None] <= low) | (high <= low[:, None])), 2 * count
        best, flat = self.explained(total, count).flatten(1).max(1)
        i, j = flat // len(low), flat % len(low)
        return best, torch.stack([low[i], high[i], low[j], high[j]], dim=1)

    def columns_moved(
        self, at: Int[Tensor, "neurons 4"], mirrored: bool
    ) -> tuple[Float[Tensor, " neurons"], Int[Tensor, "neurons 4"]]:
        """The largest R2 of each map's rectangle when its columns may be any, and the rectangle then."""
        r0, r1 = at[:, :2].T
        each, edge = torch.arange(len(at), device=at.device), torch.arange(len(self.inputs), device=at.device)
        rows = self.maps[each, r1] - self.maps[each, r0], self.inputs[r1] - self.inputs[r0]
        # first edge down, last edge across; there are no inputs where the last comes first
        total, count = (x[:, None, :] - x[:, :, None] for x in rows)
        if mirrored:
            apart = (edge <= r0[:, None])[:, None, :] | (edge >= r1[:, None])[:, :, None]
            total, count = 2 * total * apart, 2 * count
        best, flat = self.explained(total, count).flatten(1).max(1)
        return best, torch.stack([r0, r1, flat // len(edge), flat % len(edge)], dim=1)

    def best(self, *, mirrored: bool = False) -> tuple[Float[Tensor, " neurons"], Int[Tensor, "neurons 4"]]:
        """The largest R2 that is found for each map, and the edges of its rectangle.

        All rectangles are tried where there are few edges; else those on a coarse grid, and from the best of them
        columns and rows are moved in turn to where they explain most. What then explains little is not followed up.
        """
        size = len(self.inputs)
        if size <= FEW_EDGES:
            return self.of_coarse(torch.arange(size, device=self.inputs.device), mirrored)
        coarse = torch.linspace(0, size - 1, COARSE, device=self.inputs.device).round().long()
        r2, at = self.of_coarse(coarse, mirrored)
        moving = torch.arange(len(at), device=at.device)
        for _ in range(ROUNDS):
            part = self.some(moving)
            columns = part.columns_moved(at[moving], mirrored)[1]
            now, rows = part.turned().columns_moved(columns.roll(2, 1), mirrored)
            more = now > r2[moving] + 1e-4
            r2[moving], at[moving] = now, rows.roll(2, 1)
            moving = moving[more & (now > PURSUED) & (now < 1 - 1e-3)]
            if not len(moving):
                break
        return r2, at


def two_level_share(values: Float[Tensor, "rows n"]) -> Float[Tensor, " n"]:
    """Share of each column's variance that the best two levels explain (2-means in one dimension, exactly)."""
    centred = (values - values.mean(0)).T.contiguous()
    total = centred.square().sum(1)
    below = centred.sort(1).values.cumsum(1)[:, :-1]
    count = torch.arange(1, len(values), device=values.device)
    gain = (below.square() / (count * (1 - count / len(values)))).amax(1)
    return torch.where(varies(values), gain / total.clamp_min(1e-30), torch.zeros_like(total))


@dataclass(frozen=True, eq=False)
class Fits:
    """The best rectangle of each of some neurons, and whether the neuron is that rectangle.

    A neuron that is ``mirrored`` is on where a and b are exchanged too.
    """

    neurons: Int[Tensor, " k"]
    two_level: Float[Tensor, " k"]
    rectangles: Int[Tensor, "k 4"]
    mirrored: Bool[Tensor, " k"]
    crisp: Bool[Tensor, " k"]

    @property
    def found(self) -> list[Rectangle]:
        """The rectangles of the neurons that are one."""
        return [(r0, r1, c0, c1) for r0, r1, c0, c1 in self.rectangles[self.crisp].tolist()]

    def of(self, some: Tensor) -> Fits:
        """Those of some of the neurons."""
        fields = (self.neurons, self.two_level, self.rectangles, self.mirrored, self.crisp)
        return Fits(*(x[some] for x in fields))

    def inside(self, operands: Int[Tensor, "rows 2"]) -> Bool[Tensor, "rows found"]:
        """Where each neuron that is a rectangle is on."""
        r0, r1, c0, c1 = self.rectangles[self.crisp].T
        a, b = operands[:, :1], operands[:, 1:]
        on, mirror = ((x >= r0) & (x < r1) & (y >= c0) & (y < c1) for x, y in ((a, b), (b, a)))
        return on | (mirror & self.mirrored[self.crisp])


def _fits(
    readings: Readings, operands: Int[Tensor, "rows 2"], neurons: Int[Tensor, " k"], two: Float[Tensor, " k"], n: int
) -> Fits:
    """The best rectangles of some neurons, of which two levels explain so much, as functions of these operands."""
    at = torch.tensor([0, n, 0, n], device=two.device).repeat(len(two), 1)
    r2, mirrored = torch.zeros_like(two), torch.zeros_like(two, dtype=torch.bool)
    flat = operands[:, 0] * n + operands[:, 1]
    inputs = torch.zeros(n * n, device=two.device).index_fill_(0, flat, 1.0).reshape(n, n)
    tried = FEW_EDGES if n < FEW_EDGES else COARSE
    # no rectangle explains more than the best two levels
    possible = (two > CRISP).nonzero().flatten()
    for some in possible.split(max(1, CHUNK // max(n * n, (tried * (tried - 1) // 2) ** 2))):
        values = readings.neurons[:, neurons[some]].T
        maps = torch.zeros(len(some), n * n, device=two.device)
        maps[:, flat] = values - values.mean(1, keepdim=True)
        maps = maps.reshape(-1, n, n)
        sums = Sums.of(maps, inputs)
        r2[some], at[some] = sums.best()
        alike = (maps * maps.mT).sum((1, 2)) >= SYMMETRIC * (maps.square() * inputs.T).sum((1, 2))
        other = (alike & (r2[some] <= CRISP)).nonzero().flatten()
        joined, where = sums.some(other).symmetric().best(mirrored=True)
        better = joined > r2[some][other]
        chosen = some[other][better]
        r2[chosen], at[chosen], mirrored[chosen] = joined[better], where[better], True
    wide = torch.minimum(at[:, 1] - at[:, 0], at[:, 3] - at[:, 2]) >= WIDE
    return Fits(neurons, two, at, mirrored, (r2 > CRISP) & wide)


def rectangle_fits(readings: Readings, n: int) -> Fits:
    """Return the best rectangles of each layer's most important neurons; fitted once for all tests of an n x n table.

    A neuron is a rectangle if that explains more than 80 % of it; a single row, column or pair is no range. Of a table
    that is too large to be read whole the inputs that were read are fitted.
    """
    if "rectangles" not in readings.remembered:
        order = readings.importance.argsort(descending=True)
        layer = torch.tensor(readings.layers, device=order.device)[order]
        top = torch.cat([order[layer == i][:TOP_NEURONS] for i in layer.unique()])
        two = two_level_share(readings.neurons[:, top])
        readings.remembered["rectangles"] = _fits(readings, readings.operands, top, two, n)
    fitted: Fits = readings.remembered["rectangles"]
    return fitted


def judged_rows(readings: Readings, *, seed: int) -> Int[Tensor, " some"]:
    """Return the rows that accuracy with other neurons is measured on: all, or as many at random as suffice."""
    order = torch.randperm(len(readings.labels), generator=torch.Generator().manual_seed(seed))
    return order[:MOST_ROWS].to(readings.labels.device)


def accuracy_with(
    model: Any,
    task: Task,
    readings: Readings,
    columns: Int[Tensor, " k"],
    values: Float[Tensor, "some k"],
    rows: Int[Tensor, " some"],
) -> Bool[Tensor, " some"]:
    """Return which of some rows are right once the given neurons take the given values there."""
    layers = torch.tensor(readings.layers, device=columns.device)
    hooks = []
    for layer in sorted(set(readings.layers)):
        start = int((layers < layer).sum())
        mine = layers[columns] == layer
        where, what = columns[mine] - start, values[:, mine]

        def put(activation: Tensor, hook: Any, where: Tensor = where, what: Tensor = what) -> Tensor:
            activation = activation.clone()
            activation[:, -1, where] = what.to(activation.dtype)
            return activation

        if len(where):
            hooks.append((f"blocks.{layer}.mlp.hook_post", put))
    return answer_logits(model, task, readings.tokens[rows], hooks, cheap=True).argmax(-1) == readings.labels[rows]


def _matched(importance: Tensor, chosen: Tensor, pool: Tensor) -> Tensor:
    """Neurons of ``pool``, most important first, until their importance reaches that of ``chosen`` (or pool ends)."""
    ordered = pool[importance[pool].argsort(descending=True)]
    reached = importance[ordered].cumsum(0) >= importance[chosen].sum()
    return ordered[: int((~reached).sum()) + 1]


def _share(importance: Float[Tensor, " k"], yes: Bool[Tensor, " k"]) -> tuple[float, int]:
    """The largest share of some among the most important neurons that have half of all importance or more; how many.

    ``importance`` descends. Neurons of the units digit can be the most important ones of a lookup of ranges, and many
    neurons of little importance do nothing in particular: neither a fixed number nor all of them would do.
    """
    so_far = importance.cumsum(0)
    share = (importance * yes).cumsum(0) / so_far.clamp_min(1e-12)
    size = int(torch.where(so_far >= MOST * so_far[-1], share, -1.0).argmax()) + 1
    return float(share[size - 1]), size


def rectangles(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that are one two-level rectangle of the operand square.

    The share is that among the most important neurons of a layer: as many as have half of all importance, or more where
    it is then larger. Of the layers without which answers go wrong it is that with the largest share.

    Of a neuron that does not tell a from b, the best rectangle R x R' joined with its mirror image R' x R is tried too,
    R and R' having no value in common: joined rectangles that overlap are staircases, which fit steps of a + b. What
    one layer makes of a sum of codes, on for all pairs of values in R or R', is not counted: networks trained on exact
    labels have it more often than those trained on ranges.

    A crisp picture is not yet a code: the rectangles are *idealised* (each rectangle neuron is replaced by its two
    levels) and accuracy must survive, and mean-ablating them must hurt. The control is the same share after renaming
    the operands at random; ablating importance-matched other neurons is reported beside.
    ``covered`` is the part of its layer's importance that the share is about, ``share_of_all`` the share of all of it.
    ``edge_width`` and ``edge_offset`` are the band width and offset that most interior edges lie on, ``edge_p`` says
    how often edges drawn at random do so on the grid that suits them best.

    Formula: sum over neurons i of importance_i [R2(h_i; 1[a in R_i, b in R'_i]) and two-levelness of h_i are
        high] / sum of importance_i, the sums over the layer's neurons with most importance; R_i, R'_i the
        ranges that fit h_i best.

    Source: range neurons of Nikankin et al. 2025 (arXiv 2410.21272), figure 3; single-rectangle fit, two-levelness
    (2-means) and idealisation are ours.
    Fails when: a neuron matches several ranges (it then counts as none), or a table that is read in part has ranges of
    so few pairs that few of them are read.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    n = task.n_operand_values
    every = rectangle_fits(readings, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(readings.operands.device)
    renamed = _fits(readings, order[readings.operands], every.neurons, every.two_level, n)
    layer_of = torch.tensor(readings.layers, device=every.neurons.device)[every.neurons]
    share, size, layer, control = -1.0, 0, 0, 0.0
    for i in decisive_layers(model, task, readings):
        mine = layer_of == i
        importance = readings.importance[every.neurons[mine]]
        this, many = _share(importance, every.crisp[mine])
        control = max(control, _share(importance, renamed.crisp[mine])[0])
        if this > share:
            share, size, layer = this, many, i
    fitted = every.of(layer_of == layer)
    importance = readings.importance[fitted.neurons]
    weight = importance / importance.sum().clamp_min(1e-12)
    details: dict[str, Any] = {
        "layer": layer,
        "covered": float(weight[:size].sum()),
        "two_level": float(weight[fitted.two_level > 0.9].sum()),
        "crisp": float(weight[fitted.crisp & (fitted.two_level > 0.9)].sum()),
        "n_rectangles": int(fitted.crisp.sum()),
        "n_mirrored": int((fitted.crisp & fitted.mirrored).sum()),
        "share_of_all": float(weight[fitted.crisp].sum()),
        "n_neurons": len(weight),
        "accuracy": float(readings.right.float().mean()),
    }
    passed = False
    if details["n_rectangles"]:
        details |= _causal(model, task, readings, fitted, seed=seed)
        details |= edge_grid(fitted.found, n, seed=seed)
        kept = details["idealised"] >= details["accuracy"] - RULE.rectangles_idealised
        needed = details["ablated"] <= RULE.rectangles_ablated
        passed = share >= RULE.rectangles_share and control <= RULE.rectangles_renamed and kept and needed
    counted = weight[:size] / weight[:size].sum().clamp_min(1e-12)
    effective = max(1, int(1 / float(counted.square().sum().clamp_min(1e-12))))
    return Evidence(
        test="rectangles",
        value=share,
        interval=wilson_interval(min(effective, round(share * effective)), effective),
        control=control,
        control_name="operands renamed at random",
        threshold=f"share >= {RULE.rectangles_share:.2f}, renamed <= {RULE.rectangles_renamed:.2f}, accuracy survives "
        f"idealisation (-{RULE.rectangles_idealised:.2f}), ablation leaves <= {RULE.rectangles_ablated:.2f}",
        passed=passed,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272; idealisation is ours",
        seconds=time.perf_counter() - start,
    )


def _causal(model: Any, task: Task, readings: Readings, fitted: Fits, *, seed: int) -> dict[str, float]:
    """Accuracy with the rectangle neurons idealised, mean-ablated, and with importance-matched others ablated."""
    chosen, rows = fitted.neurons[fitted.crisp], judged_rows(readings, seed=seed)
    values, inside = readings.neurons[:, chosen], fitted.inside(readings.operands)
    high, low = ((values * part).sum(0) / part.sum(0).clamp_min(1) for part in (inside, ~inside))
    mean = readings.neurons.mean(0)
    rest = torch.ones(len(mean), dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    others = _matched(readings.importance, chosen, rest.nonzero().squeeze(1))

    def accuracy(columns: Tensor, what: Tensor) -> float:
        return float(accuracy_with(model, task, readings, columns, what, rows).float().mean())

    return {
        "accuracy": float(readings.right[rows].float().mean()),
        "idealised": accuracy(chosen, torch.where(inside[rows], high, low)),
        "ablated": accuracy(chosen, mean[chosen].expand(len(rows), -1)),
        "others_ablated": accuracy(others, mean[others].expand(len(rows), -1)),
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
