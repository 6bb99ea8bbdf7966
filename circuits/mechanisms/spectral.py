"""Spectral necessity and sufficiency: is the answer carried by a few frequencies of the operands' sum?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.functional_form import circle_length, most_frequencies
from circuits.mechanisms.groups import angle, group_index
from circuits.mechanisms.progress_measures import progress_measures
from circuits.mechanisms.readings import Readings, read
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

FVE_ENOUGH, RESTRICTED_ENOUGH = 0.95, 0.98


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits split into the part inside chosen frequencies and the rest, and how well each part answers."""

    frequencies: tuple[int, ...]
    explained: float
    restricted: Tensor
    excluded: Tensor

    def shares(self) -> dict[str, float]:
        """Return the explained variance, and how often each part answers rightly."""
        right = {name: float(getattr(self, name).float().mean()) for name in ("restricted", "excluded")}
        return {"explained": self.explained, **right}

    @property
    def passes(self) -> bool:
        """Whether the frequencies are sufficient and necessary."""
        shares = self.shares()
        return (
            shares["explained"] >= RULE.explained
            and shares["restricted"] >= RULE.restricted
            and shares["excluded"] <= RULE.excluded
        )


def frequency_basis(
    a: Int[Tensor, " rows"], b: Int[Tensor, " rows"], frequency: int, modulus: int
) -> Float[Tensor, "rows 4"]:
    """Columns {cos, sin} w(a+b) times ``{1, |cos w(a-b)/2|}``.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 4.1, for the first two; Zhong et al. 2023
    (arXiv 2306.17844), section 4, for the factor ``|cos w(a-b)/2|`` that the logits of a pizza network carry.
    """
    total, difference = angle(a + b, frequency, modulus), angle(a - b, frequency, modulus)
    modulation = (difference / 2).cos().abs()
    cos, sin = total.cos(), total.sin()
    return torch.stack([cos, sin, cos * modulation, sin * modulation], dim=1)


def orthonormal_basis(
    a: Int[Tensor, " rows"], b: Int[Tensor, " rows"], frequency: int, modulus: int
) -> Float[Tensor, "rows 4"]:
    """Orthonormal columns with the span of ``frequency_basis``, centred; zeros where it has less than four dimensions.

    The highest frequency of an even modulus has no sine, and its cosine says what the distance says.
    """
    basis = frequency_basis(a, b, frequency, modulus).double()
    basis = basis - basis.mean(0)
    squares, directions = torch.linalg.eigh(basis.T @ basis)
    there = squares > 1e-8 * squares[-1]
    return (basis @ (directions * there / squares.clamp_min(1e-30).sqrt())).float()


def beside(q: Float[Tensor, "rows k"], new: Float[Tensor, "rows 4"]) -> Float[Tensor, "rows m"]:
    """Orthonormal columns that span what ``new`` adds to ``q``."""
    for _ in range(2):  # twice is enough (Parlett): once leaves rounding where the two are close
        new = new - q @ (q.T @ new)
    squares, directions = torch.linalg.eigh(new.double().T @ new.double())
    there = squares > 1e-8
    return (new.double() @ (directions[:, there] / squares[there].sqrt())).to(new.dtype)


def split(
    logits: Float[Tensor, "rows n_answers"],
    inside: Float[Tensor, "rows n_answers"],
    labels: Int[Tensor, " rows"],
    frequencies: tuple[int, ...],
) -> Projection:
    """Judge the part of the logits inside some frequencies; restricted logits keep the mean (bias correction)."""
    mean = logits.mean(0)
    explained = float(inside.square().sum() / (logits - mean).square().sum().clamp_min(1e-30))
    restricted = (inside + mean).argmax(-1) == labels
    return Projection(frequencies, explained, restricted, (logits - inside).argmax(-1) == labels)


def project(
    logits: Float[Tensor, "rows n_answers"],
    a: Int[Tensor, " rows"],
    b: Int[Tensor, " rows"],
    labels: Int[Tensor, " rows"],
    frequencies: tuple[int, ...],
    modulus: int,
) -> Projection:
    """Project logits on the chosen frequencies."""
    q = torch.zeros(len(a), 0, device=logits.device)
    for k in frequencies:
        q = torch.cat([q, beside(q, orthonormal_basis(a, b, k, modulus))], dim=1)
    return split(logits, q @ (q.T @ (logits - logits.mean(0))), labels, frequencies)


def greedy_frequencies(logits: Tensor, a: Tensor, b: Tensor, labels: Tensor, modulus: int, *, most: int) -> Projection:
    """Add the frequency that explains most of what is left, until those chosen are sufficient and necessary.

    The fewest that suffice need not be all that the answer is made of: without them others may still give it.
    """
    residual = logits - logits.mean(0)
    total = residual.square().sum().clamp_min(1e-30)
    inside, explained = torch.zeros_like(residual), 0.0
    bases = torch.stack([orthonormal_basis(a, b, k, modulus) for k in range(1, modulus // 2 + 1)])
    onto = torch.einsum("krc,ra->kca", bases, residual)
    q = torch.zeros(len(a), 0, device=logits.device)
    chosen: list[int] = []
    projection = None
    while len(chosen) < max(1, min(most, len(bases))):
        gains = onto.square().sum((1, 2))
        gains[[k - 1 for k in chosen]] = -1.0
        chosen.append(int(gains.argmax()) + 1)
        new = beside(q, bases[chosen[-1] - 1])
        q = torch.cat([q, new], dim=1)
        along = new.T @ residual
        explained += float(along.square().sum() / total)
        # what the residual loses, each frequency loses of its part
        onto = onto - torch.einsum("krc,rm,ma->kca", bases, new, along)
        inside, residual = inside + new @ along, residual - new @ along
        projection = None
        if explained >= FVE_ENOUGH:
            projection = split(logits, inside, labels, tuple(chosen))
            if float(projection.restricted.float().mean()) >= RESTRICTED_ENOUGH and projection.passes:
                break
    return projection or split(logits, inside, labels, tuple(chosen))


def spectral(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Restricted minus excluded accuracy of the fewest frequencies of the operands' sum that give the answers.

    1 means that the chosen frequencies are sufficient (logits restricted to them answer rightly) and necessary
    (logits without them do not). Restricted accuracy alone is passed by memorisers, because projecting pools over
    all inputs with the same sum; hence all three of explained variance, restricted and excluded accuracy must pass.
    The control repeats it with as many frequencies drawn at random. Frequencies are added, the one that explains most
    of what is left first, until all three pass or a quarter of all is reached (or as many as neurons have).

    Norms divide by a number that depends on both operands. Where a model has them, the logits are also looked at times
    that number, row by row, which changes no answer (``Readings.row_factors``); ``norm_undone`` names the factor with
    which the test passes, or else explains most, and all figures but the progress measures are with that.

    ``details`` also has the progress measures of Nanda et al. at the chosen frequencies (see
    ``circuits/mechanisms/progress_measures.py``): restricted and excluded loss, Gini coefficients, and the share of
    neurons with more than 0.85 of their variance at one frequency.

    Formula: acc(P L + mean L) - acc(L - P L), with L the logits, centred per answer, over all pairs, and P the
        projection on the span over chosen k of {cos, sin}(w_k (a + b)) x {1, abs cos(w_k (a - b) / 2)}, w_k = 2
        pi k / p. The explained variance is ``|P L|^2 / |L|^2``.

    Source: restricted and excluded logits: Nanda et al. 2023 (arXiv 2301.05217), section 5.2 and appendix;
    distance-modulated basis: Zhong et al. 2023 (arXiv 2306.17844).
    Fails when: the algorithm uses nearly all frequencies, or the operation has no group structure.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    circle = circle_length(model, task, readings, seed=seed)
    renamed = group_index(task, readings.operands, circle=circle)
    if renamed is None:
        raise BadInput(f"the operation of {task.name} is that of no group: the spectral test needs one")
    a, b, kept, modulus = renamed
    a, b, labels = a[kept], b[kept], readings.labels[kept]
    logits = readings.logits[kept]
    logits = logits - logits.mean(1, keepdim=True)  # a shift of all answers alike decides nothing
    most = most_frequencies(model, task, readings, modulus, seed=seed)
    factors = {name: factor[kept] for name, factor in readings.row_factors().items()}
    tried = {
        name: greedy_frequencies(logits * factor, a, b, labels, modulus, most=most) for name, factor in factors.items()
    }
    norm = max(tried, key=lambda name: (tried[name].passes, tried[name].explained))
    found = tried[norm]
    generator = torch.Generator().manual_seed(seed)
    others = [k for k in range(1, modulus // 2 + 1) if k not in found.frequencies]
    drawn = [others[i] for i in torch.randperm(len(others), generator=generator)[: len(found.frequencies)]]
    control = project(logits * factors[norm], a, b, labels, tuple(drawn), modulus) if drawn else found
    difference = found.restricted.float() - found.excluded.float()
    details = {
        "frequencies": sorted(found.frequencies),
        "n_frequencies": len(found.frequencies),
        **found.shares(),
        **{f"control_{name}": share for name, share in control.shares().items()},
        "modulus": modulus,
        "norm_undone": norm,
        "explained_by_norm": {name: projection.explained for name, projection in tried.items()},
        **progress_measures(model, task, readings, found.frequencies, circle=circle),
    }
    return Evidence(
        test="spectral",
        value=details["restricted"] - details["excluded"],
        interval=bootstrap_interval(difference.cpu().numpy(), seed=seed),
        control=details["control_restricted"] - details["control_excluded"],
        control_name="as many random frequencies",
        threshold=f"explained >= {RULE.explained:.2f}, restricted >= {RULE.restricted:.2f} and excluded <= "
        f"{RULE.excluded:.2f}",
        passed=found.passes,
        details=details,
        source="Nanda et al. 2023, arXiv 2301.05217; Zhong et al. 2023, arXiv 2306.17844",
        seconds=time.perf_counter() - start,
    )
