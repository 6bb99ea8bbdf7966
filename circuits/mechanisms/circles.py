"""Circles of the embedding: is the embedding made of them, and what does the network compute from one alone?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import GroupTable, group_operands, group_table
from circuits.mechanisms.interchange import operand_embedding
from circuits.mechanisms.progress_measures import gini
from circuits.mechanisms.readings import Readings, answer_logits, operand_positions, read
from circuits.tasks.base import Task

COMPONENTS = 4
CIRCLES = 6
ROUND = 0.9
"""Share of one frequency from which on a principal component counts as a wave."""
FORMULAS = ("clock", "pizza", "pizza_appendix", "accompanying")


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of the operands' embedding, the operands in the order of the group."""

    values: Int[Tensor, " m"]
    """The operand that each row is of."""
    mean: Float[Tensor, " d"]
    scores: Float[Tensor, "m r"]
    directions: Float[Tensor, "r d"]
    power: Float[Tensor, "r frequencies"]
    """Share of each component's variance at frequencies 1, 2, ..."""
    share: Float[Tensor, " r"]
    """Share of the embedding's variance."""

    def isolated(self, plane: Float[Tensor, "2 r"], like: Tensor) -> Tensor:
        """Return the embedding of every operand value, projected on a plane of the components; the mean elsewhere."""
        return self._with(self.scores @ plane.T @ plane, like)

    def of_frequency(self, frequency: int) -> Float[Tensor, "m r"]:
        """Return the part of the components that is one frequency of the operand, in whatever components that is."""
        m = len(self.scores)
        phase = 2 * math.pi * frequency / m * torch.arange(m, dtype=torch.double, device=self.scores.device)
        waves = torch.stack([phase.cos(), phase.sin()], dim=1)
        waves = waves / waves.norm(dim=0).clamp_min(1e-6)  # the highest frequency of an even number has no sine
        return waves @ (waves.T @ self.scores)

    def alone(self, frequency: int, like: Tensor) -> Tensor:
        """Return the embedding of every operand value with one frequency only; the mean elsewhere."""
        return self._with(self.of_frequency(frequency), like)

    def strongest(self, most: int) -> list[int]:
        """Return the frequencies with most of the embedding's variance, strongest first."""
        return [k + 1 for k in self.total_power().argsort(descending=True)[:most].tolist()]

    def total_power(self) -> Float[Tensor, " frequencies"]:
        """Return each frequency's share of the embedding's variance."""
        return (self.power * self.share[:, None]).sum(0)

    def _with(self, scores: Float[Tensor, "m r"], like: Tensor) -> Tensor:
        table = self.mean.repeat(len(like), 1)
        table[self.values] = self.mean + scores @ self.directions
        return table.to(like.dtype)


def power_of(waves: Float[Tensor, "m r"]) -> Float[Tensor, "r frequencies"]:
    """Return the share of each column's square sum at each frequency from 1 on."""
    m = len(waves)
    spectrum = torch.fft.rfft(waves, dim=0).abs().square()[1:] * 2 / m
    if m % 2 == 0:
        spectrum[-1] /= 2
    return (spectrum / waves.square().sum(0).clamp_min(1e-30)).T


def components_of(model: Any, task: Task, embedding: Float[Tensor, "n d"]) -> Components:
    """Return the principal components of the operands' embedding, largest first.

    Raises:
        BadInput: the operation has no group structure.
    """
    values = group_operands(task).to(embedding.device)
    rows = embedding[values].double()
    mean = rows.mean(0)
    u, s, v = torch.linalg.svd(rows - mean, full_matrices=False)
    real = s > 1e-6 * s.max().clamp_min(1e-30)
    scores = (u * s)[:, real]
    share = s[real].square() / s.square().sum().clamp_min(1e-30)
    return Components(values, mean, scores, v[real], power_of(scores), share)


def circularity(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Mean share of one frequency in each of the first four principal components of the operands' embedding.

    A component x_0, ..., x_(p-1) over the operand values has power ``2 |sum_t x_t e^(2 pi i k t / p)|^2 / p`` at
    frequency k, as a share of its square sum; the value is the mean over four components of the largest share. Clocks
    and pizzas both have circles (0.99 and more in the published ones), so that it does not tell them apart. ``details``
    has the share of the embedding's variance at the strongest frequencies, and the Gini coefficient of these shares.
    The control reads the operands in random order.

    Where circles have equal radii the principal components of their space are arbitrary: each holds waves of several
    frequencies, and the value falls although every circle is one. ``shares`` and ``share_of_five`` are the same in any
    basis, and ``roundness``, the shorter radius of each strongest frequency's own ellipse as a share of the longer, is
    that of the frequency alone: 1 for a circle, 0 for a wave along one direction.

    Formula: mean over the first four components x of max_k of 2 abs(sum_t x_t e^(2 pi i k t / p))^2 / (p norm(x)^2).

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 5; repository fjzzq2002/pizza, eval-main.ipynb.
    Fails when: two circles have equal radii, since components then mix them: 0.73 in a published network that is right
    on every pair.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    embedding = operand_embedding(model, task)
    parts = components_of(model, task, embedding)
    best = parts.power[:COMPONENTS].amax(1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(parts.scores), generator=generator).to(parts.scores.device)
    power, strongest = parts.total_power(), parts.strongest(CIRCLES)
    radii = [torch.linalg.svdvals(parts.of_frequency(k))[:2] for k in strongest]
    return Evidence(
        test="circularity",
        value=float(best.mean()),
        interval=bootstrap_interval(best.cpu().numpy(), seed=seed),
        control=float(power_of(parts.scores[order][:, :COMPONENTS]).amax(1).mean()),
        control_name="operands in random order",
        threshold="none: near 1 in clocks and pizzas alike",
        passed=None,
        details={
            "frequencies": strongest,
            "shares": [float(power[k - 1]) for k in strongest],
            "share_of_five": float(sum(power[k - 1] for k in strongest[:5])),
            "roundness": [float(r[-1] / r[0].clamp_min(1e-30)) if len(r) > 1 else 0.0 for r in radii],
            "gini": gini(power),
            "accuracy": float(readings.right.float().mean()),
        },
        source="Zhong et al. 2023, arXiv 2306.17844, section 5",
        seconds=time.perf_counter() - start,
    )


def formula_values(
    name: str,
    total: Int[Tensor, "rows 1"],
    distance: Int[Tensor, "rows 1"],
    answer: Int[Tensor, " n_answers"],
    frequency: int,
    modulus: int,
) -> Float[Tensor, "rows n_answers"]:
    """Return what a formula says of the logit of each answer c, for sums s = a + b and distances d = a - b.

    With w = 2 pi k / p, up to a factor:

    * ``clock``: cos w(s - c);
    * ``pizza``: ``|cos wd/2| (|cos w(s - c)/2| - |sin w(s - c)/2|)``;
    * ``pizza_appendix``: ``|cos wd/2| (g(ws/2) cos wc - h(ws/2) sin wc)`` with ``g(x) = |cos x| - |sin x|`` and
      ``h(x) = |cos(x + pi/4)| - |cos(x - pi/4)|``;
    * ``accompanying``: -cos v d cos v(s - c), with v half of w modulo p: it only says which sums are not meant, since
      its own frequency makes opposite points look alike.

    Source: Zhong et al. 2023 (arXiv 2306.17844), sections 3 to 5 and appendix; repository fjzzq2002/pizza,
    eval-main.ipynb, whose sums of cosines are these products.

    Raises:
        BadInput: there is no such formula, or no half of the frequency.
    """
    w = 2 * math.pi * frequency / modulus
    rest = ((total - answer) % modulus).double()
    # d and s stand for p values each: every formula is the same for d + p, and s only occurs as s - c or in |.|
    factor = (w * distance.double() / 2).cos().abs()
    if name == "clock":
        return (w * rest).cos()
    if name == "pizza":
        return factor * ((w * rest / 2).cos().abs() - (w * rest / 2).sin().abs())
    if name == "pizza_appendix":
        half, c = w * total.double() / 2, answer.double()
        cosines = (half.cos().abs() - half.sin().abs()) * (w * c).cos()
        sines = ((half + math.pi / 4).cos().abs() - (half - math.pi / 4).cos().abs()) * (w * c).sin()
        return factor * (cosines - sines)
    if name == "accompanying" and modulus % 2:
        v = 2 * math.pi * (frequency * (modulus + 1) // 2 % modulus) / modulus
        return -(v * distance.double()).cos() * (v * rest).cos()
    raise BadInput(f"formula {name!r} modulo {modulus}: expected one of {FORMULAS}, the last for an odd modulus")


def row_moments(
    logits: Float[Tensor, "rows n_answers"], formula: Float[Tensor, "rows n_answers"]
) -> Float[Tensor, "rows 6"]:
    """Return, for each row, count and sums of logits x, x^2, formula y, y^2 and xy."""
    x, y = logits.double(), formula.double()
    parts = (torch.ones_like(x), x, x.square(), y, y.square(), x * y)
    return torch.stack([part.sum(1) for part in parts], dim=1)


def explained_by(moments: Any) -> float:
    """Return the explained variance of standardised logits by a standardised formula: 2 r - 1, r their correlation.

    -1 is no correlation at all, and a formula that is right up to scale has 1.

    Source: repository fjzzq2002/pizza, eval-main.ipynb (scikit-learn's ``explained_variance_score`` after both are
    standardised; the two are the same number).
    """
    n, x, xx, y, yy, xy = (float(m) for m in moments.sum(0))
    covariance = xy / n - x / n * y / n
    variances = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
    return 2 * covariance / math.sqrt(variances) - 1 if variances > 0 else -1.0


def logits_from(model: Any, task: Task, group: GroupTable, table: Float[Tensor, "n d"]) -> Float[Tensor, "rows p"]:
    """Return the answers' logits, in the group's order, with the operands' embeddings taken from a table."""
    out = []
    places = operand_positions(task)
    for tokens, operands in zip(group.tokens.split(4096), group.operands.split(4096), strict=True):

        def put(activation: Tensor, hook: Any, operands: Tensor = operands) -> Tensor:
            activation = activation.clone()
            for operand, place in enumerate(places):
                activation[:, place] = table[operands[:, operand]].to(activation.dtype)
            return activation

        out.append(answer_logits(model, task, tokens, [("hook_embed", put)]))
    return torch.cat(out)[:, group.columns]


def isolated_circles(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """How much better the pizza's formula than the clock's explains the logits of a network left with one circle.

    The embedding is replaced by its projection on a pair of principal components, (1, 2), (3, 4), ... up to six pairs,
    and the logits are compared with the formulas of ``formula_values`` at the pair's frequency: FVE is the explained
    variance once both are standardised. The value is the FVE of the pizza less that of the clock on the pair where
    one of them is largest: +0.22 in the published pizza, -0.17 in the published clock. A pair is a circle where both
    components have 0.9 of their power at one frequency. Accompanying pizzas are circles that the network uses to tell
    opposite points of another circle apart. The control isolates a random plane of the embedding.

    Components that mix circles of equal radii isolate none: a pair of them leaves a piece of each, the formulas are
    compared at the frequency of the larger piece, and the value is that of the pair that is least mixed.
    ``by_frequency`` asks the same of each of the strongest frequencies alone, in whatever components it is, and
    ``own_frequency`` is pizza less clock on the one of these that a formula fits best.

    It is a description, never a verdict (see gradient-symmetricity). Over the whole network's logits the two formulas
    are equally good (see logit-terms): only isolated circles tell them apart.

    Formula: FVE(L, f_pizza) - FVE(L, f_clock), L the logits with the embedding projected on one plane, standardised as
        f is; FVE = 1 - norm(L - f)^2 / norm(L)^2; f_clock = cos w(a + b - c), f_pizza = abs(cos w(a - b)/2) f_clock.

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 4.3 and appendix; repository fjzzq2002/pizza, eval-main.ipynb.
    Fails when: one frequency alone does not drive the network (both FVE are then near -1), or circles of equal
    radii mix in the components.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    embedding = operand_embedding(model, task)
    parts = components_of(model, task, embedding)
    group = group_table(task, readings)
    rank = parts.scores.shape[1]
    axes = torch.eye(rank, dtype=torch.double, device=embedding.device)
    circles: list[dict[str, Any]] = []
    best, best_moments = -2.0, None
    for first in range(0, 2 * min(CIRCLES, rank // 2), 2):
        found, moments = _one_circle(model, task, group, parts, embedding, axes[first : first + 2], first)
        circles.append(found)
        if max(found["clock"], found["pizza"]) > best:
            best, best_moments, frequency = max(found["clock"], found["pizza"]), moments, found["frequencies"][0]
    if best_moments is None:
        raise BadInput("the embedding of the operands has fewer than two dimensions: there is no circle in it")
    alone = [_one_frequency(model, task, group, parts, embedding, k) for k in parts.strongest(CIRCLES)]
    clearest = max(alone, key=lambda found: max(found["clock"], found["pizza"]))
    random_plane = torch.linalg.qr(
        torch.randn(rank, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(axes.device)
    )[0].T
    other = logits_from(model, task, group, parts.isolated(random_plane, embedding))
    control = [explained_by(row_moments(other, _formula(name, group, frequency))) for name in ("pizza", "clock")]
    return Evidence(
        test="isolated-circles",
        value=difference(best_moments),
        interval=bootstrap_interval(best_moments.cpu().numpy(), difference, seed=seed, resamples=400),
        control=control[0] - control[1],
        control_name="a random plane of the embedding",
        threshold="none: above 0 in a pizza, below in a clock",
        passed=None,
        details={
            "best": best,
            "n_circles": sum(bool(c["is_circle"]) for c in circles),
            "circles": circles,
            "own_frequency": clearest["pizza"] - clearest["clock"],
            "by_frequency": alone,
            "accuracy": float(readings.right.float().mean()),
        },
        source="Zhong et al. 2023, arXiv 2306.17844, section 4.3",
        seconds=time.perf_counter() - start,
    )


def difference(moments: Any) -> float:
    """Return the FVE of the pizza less that of the clock; columns 0 to 5 are of the pizza, 6 to 11 of the clock."""
    return explained_by(moments[:, :6]) - explained_by(moments[:, 6:])


def _formula(name: str, group: GroupTable, frequency: int) -> Tensor:
    answer = torch.arange(group.modulus, device=group.total.device)
    return formula_values(name, group.total[:, None], group.distance[:, None], answer, frequency, group.modulus)


def _one_frequency(
    model: Any, task: Task, group: GroupTable, parts: Components, embedding: Tensor, frequency: int
) -> dict[str, Any]:
    logits = logits_from(model, task, group, parts.alone(frequency, embedding))
    fits = {name: explained_by(row_moments(logits, _formula(name, group, frequency))) for name in ("clock", "pizza")}
    return {"frequency": frequency, "variance_share": float(parts.total_power()[frequency - 1]), **fits}


def _one_circle(
    model: Any, task: Task, group: GroupTable, parts: Components, embedding: Tensor, plane: Tensor, first: int
) -> tuple[dict[str, Any], Tensor]:
    power, which = parts.power[first : first + 2].max(1)
    frequencies = [int(k) + 1 for k in which]
    logits = logits_from(model, task, group, parts.isolated(plane, embedding))
    moments = {
        name: row_moments(logits, _formula(name, group, frequencies[0]))
        for name in FORMULAS
        if name != "accompanying" or group.modulus % 2
    }
    found: dict[str, Any] = {
        "components": [first + 1, first + 2],
        "frequencies": frequencies,
        "power": power.tolist(),
        "variance_share": float(parts.share[first : first + 2].sum()),
        "is_circle": frequencies[0] == frequencies[1] and float(power.min()) >= ROUND,
        **{name: explained_by(value) for name, value in moments.items()},
    }
    return found, torch.cat([moments["pizza"], moments["clock"]], dim=1)
