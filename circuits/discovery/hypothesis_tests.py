"""Five hypothesis tests of a circuit: is it equivalent, responsible, minimal, sufficient, necessary?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.ablate import SAME_POSITIONS
from circuits.discovery.circuit import Circuit
from circuits.discovery.evaluate import ablated_metric
from circuits.discovery.graph import Graph
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.random_circuits import random_circuits, random_path
from circuits.errors import BadInput, UnknownName
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class HypothesisTest:
    """One test: what was assumed, and how surprising the data are if it holds."""

    name: str
    null: str
    statistic: float
    p_value: float
    p_adjusted: float
    """After Holm's correction over the five tests; that of minimality enters with its smallest adjusted edge."""
    rejected: bool
    wanted: str
    """What a good circuit does: ``rejected`` or ``kept``."""

    @property
    def passed(self) -> bool:
        """Whether the outcome is the one that a good circuit gives. A null that is kept is not thereby proved."""
        return self.rejected == (self.wanted == "rejected")


@dataclass(frozen=True, eq=False)
class CircuitTests:
    """The tests of a circuit, and the minimality test edge by edge."""

    tests: tuple[HypothesisTest, ...]
    edges: pd.DataFrame
    """One row per edge of the circuit that counts: its knock-out effect, in the metric's unit, the share of random
    edges of inflated circuits with a smaller one, the p-value, Holm-adjusted over edges, and whether the edge is
    redundant."""
    n_edges: int
    """Edges of the circuit that count."""
    n_pairs: int

    def __getitem__(self, name: str) -> HypothesisTest:
        for test in self.tests:
            if test.name == name:
                return test
        raise KeyError(f"no test {name!r}; there is: {', '.join(test.name for test in self.tests)}")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per test."""
        import pandas as pd

        rows = [vars(test) | {"passed": test.passed} for test in self.tests]
        return pd.DataFrame(rows).set_index("name")

    def _repr_html_(self) -> str:
        about = f"{self.n_edges} edges, {self.n_pairs} pairs"
        return f"<p><b>Hypothesis tests</b>, {escape(about)}</p>{self.to_frame().to_html(float_format='{:.3g}'.format)}"


def hypothesis_tests(
    model: HookedModel,
    circuit: Circuit,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    epsilon: float = 0.1,
    quantile: float = 0.9,
    n_random: int = 100,
    permutations: int = 1000,
    level: float = 0.05,
    reference: str = "model",
    seed: int = 0,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> CircuitTests:
    """Return the five tests of the circuit that ``circuit.kept`` is.

    With s the metric of an example, M the model, C the circuit and M - C its complement (all other edges ablated):

    * equivalence: null abs(P(s(C) > s(M)) - 1/2) < epsilon. With k of n examples on which C is above M (ties are
      left out), p = sum over all j with abs(j/n - 1/2) >= abs(k/n - 1/2) of Binomial(j; n, 1/2 + epsilon).
    * independence: null s(M - C) and s(M) are independent, by permutations of the Hilbert-Schmidt criterion with
      Gaussian kernels as wide as the median distance.
    * minimality, per edge: null: knocking the edge out of C moves the metric more than knocking a random edge out of
      C inflated by a random path does, with probability at least ``quantile``. p is the lower tail of
      Binomial(n_random, quantile); a rejection calls the edge redundant. The circuit's p is the smallest adjusted.
    * sufficiency: null: C is closer to M than a random circuit of its size is, with probability at most
      ``quantile``; p is the upper tail.
    * partial necessity: null: ablating C moves the metric more than ablating a random circuit of its size does, with
      probability at most ``quantile``; p is the upper tail. ``reference`` says where that one is drawn from.

    Distances between two circuits are means over pairs of abs(s - s'). The released code takes the mean score
    difference as the statistic of the equivalence test; this follows the paper. P-values are Holm-adjusted in two
    steps: over the edges, and over the five tests, of which minimality has the smallest adjusted p of an edge. A large
    circuit so does not pass independence and equivalence for its many edges.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        circuit: The edges to test.
        pairs: Clean and corrupt inputs, best others than those that chose the circuit.
        metric: One number per pair.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        epsilon: Half-width of the equivalence null.
        quantile: Of random circuits or edges that is to be beaten.
        n_random: Random circuits, and random inflated circuits.
        permutations: Of the independence test.
        level: Family-wise error rate.
        reference: Where the random circuits of partial necessity are drawn from: ``model``, all its edges, or
            ``complement``, the edges that C does not have. A random circuit of the model shares edges with a large C,
            and then ablating either does much the same.
        seed: Of random circuits and permutations.
        memory_budget: Bytes that the computation may take beside the model, its result included, of which the test of
            independence takes 32 for every two pairs; None: see ``ablated_metric``.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: 4 x ``n_random`` forwards, one for every edge of the circuit, and three. No backward.

    Conventions: a good circuit keeps the first three nulls and rejects the last two. P-values are Holm-adjusted over
        the edges, and then over the five tests. Under ``corrupt`` and ``mean`` ablation edges from a position embedding
        carry what they carry anyway: as in ``faithfulness`` they do not count, are kept in every set of edges, and no
        random path goes along them, which would make random circuits smaller than they seem.

    Source: Shi et al. 2024, Hypothesis Testing the Circuit Hypothesis in LLMs, arXiv 2410.13032, sections 3 and 4;
        Gretton et al. 2007 (independence criterion); Holm 1979 (correction).

    Fails when: there are few pairs, so that equivalence and independence are kept for want of data; the null of
    equivalence being kept is no proof that the circuit is equivalent.

    Raises:
        BadInput: the circuit is of another graph, empty or the whole model, the metric does not depend on the logits,
            a rate is not between 0 and 1, there are
            too few random circuits or permutations for any outcome to be significant at ``level``, the complement
            has no random circuits of the circuit's size, or the budget does not hold what has to be there at a time.
        UnknownName: no such ``reference``.
    """
    counted = circuit.graph.counted(positions=ablation not in SAME_POSITIONS)
    _check(model, circuit, counted, epsilon=epsilon, quantile=quantile, level=level)
    _check_power(quantile, n_random, permutations, level)
    if reference not in REFERENCES:
        raise UnknownName("reference of partial necessity", reference, REFERENCES)
    if memory_budget is not None and (needed := KERNELS * len(pairs) ** 2) > memory_budget:
        raise BadInput(
            f"memory_budget = {memory_budget} bytes: the test of independence compares any two of {len(pairs)} pairs, "
            f"which takes {needed}; expected at least that, or fewer pairs"
        )
    groups = _groups(circuit.graph, circuit.kept.cpu() & counted, counted, reference, n_random, seed)
    keep = (torch.cat(groups) | ~counted).to(circuit.kept.device)
    options: dict[str, Any] = {"neurons": circuit.graph.has_neurons, "progress": progress}
    options |= {"memory_budget": memory_budget, "batch_size": batch_size}
    scores = ablated_metric(model, pairs, keep, metric=metric, ablation=ablation, **options)
    parts = scores.double().cpu().split([len(group) for group in groups])
    full, own, complement = parts[0][0], parts[1][0], parts[2][0]
    if bool((torch.cat(parts) == full).all()):
        raise BadInput(
            f"no set of edges changes metric {name_of(metric)} at all: expected one that depends on the logits, and "
            "pairs whose corruption changes the answer"
        )
    found = [_equivalence(own, full, epsilon), _independence(complement, full, permutations, seed)]
    found += _against_random(full, own, complement, parts[3], parts[4], quantile)
    effects = (parts[7] - own).abs().mean(1)
    reference = (parts[5] - parts[6]).abs().mean(1)
    beaten = (effects[:, None] > reference).double().mean(1).tolist()
    edge_p = [_tail(round(share * n_random), n_random, quantile, "less") for share in beaten]
    edges = [edge for edge, there in zip(circuit.graph.edges, groups[1][0].tolist(), strict=True) if there]
    return _report(edges, len(pairs), found, effects.tolist(), beaten, edge_p, level)


def _against_random(
    full: Tensor, own: Tensor, complement: Tensor, random: Tensor, without_random: Tensor, quantile: float
) -> list[tuple[str, float, float]]:
    """Sufficiency and partial necessity: name, p-value, and the share of random circuits that are beaten."""
    closer = (own - full).abs().mean() < (random - full).abs().mean(1)
    worse = (complement - full).abs().mean() > (without_random - full).abs().mean(1)
    return [
        (name, _tail(int(beats.sum()), len(beats), quantile, "greater"), float(beats.double().mean()))
        for name, beats in (("sufficiency", closer), ("partial necessity", worse))
    ]


def _groups(
    graph: Graph,
    kept: Bool[Tensor, " edge"],
    counted: Bool[Tensor, " edge"],
    reference: str,
    n_random: int,
    seed: int,
) -> list[Bool[Tensor, "_ edge"]]:
    """The sets of edges whose metric the tests are about, kind by kind."""
    n_edges = int(kept.sum())
    skip = frozenset(graph.ends()[0][~counted].tolist())
    random = removed = random_circuits(graph, n_edges, n_random, seed=seed, skip=skip)
    if reference == "complement":
        removed = random_circuits(graph, n_edges, n_random, seed=seed, without=kept, skip=skip)
        if (least := int(removed.sum(1).min())) < n_edges:
            raise BadInput(
                f"the circuit has {n_edges} of {int(counted.sum())} edges, and a random circuit of the others has "
                f"{least}: expected as many; take a smaller circuit, or reference = 'model'"
            )
    inflated, knocked = _inflated(graph, kept, n_random, torch.Generator().manual_seed(seed), skip)
    members = kept.nonzero().flatten()
    without = kept.repeat(len(members), 1)
    without[torch.arange(len(members)), members] = False
    whole = torch.ones(1, graph.n_edges, dtype=torch.bool)
    return [whole, kept[None], ~kept[None], random, ~removed, inflated, knocked, without]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values, in the order given.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6:65.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(v) for v in adjusted]


def hsic(x: Float[Tensor, " pair"], y: Float[Tensor, " pair"], permutations: int, seed: int) -> tuple[float, float]:
    """Return the Hilbert-Schmidt independence criterion (biased estimate) and its permutation p-value.

    Source: Gretton et al. 2007, A Kernel Statistical Test of Independence, equation 4.
    """
    n = len(x)
    centred = _gaussian_kernel(x)
    row, column, whole = centred.mean(0), centred.mean(1, keepdim=True), centred.mean()
    centred.sub_(row).sub_(column).add_(whole)
    other = _gaussian_kernel(y)

    def criterion(order: Tensor) -> float:
        return float(torch.dot(centred.flatten(), other[order[:, None], order].flatten())) / n**2

    observed = criterion(torch.arange(n))
    generator = torch.Generator().manual_seed(seed)
    above = sum(criterion(torch.randperm(n, generator=generator)) >= observed for _ in range(permutations))
    return observed, (1 + above) / (1 + permutations)


def _gaussian_kernel(v: Float[Tensor, " pair"]) -> Float[Tensor, "pair pair"]:
    distance = (v[:, None] - v).abs_()
    upper = torch.triu_indices(len(v), len(v), 1)
    apart = distance[upper[0], upper[1]]
    del upper
    apart = apart[apart > 0]
    width = apart.median() if len(apart) else torch.ones(())
    return distance.square_().div_(-2 * width**2).exp_()


def equivalence_p(above: int, n: int, epsilon: float) -> float:
    """Return the p-value of the null abs(P(above) - 1/2) < epsilon, where ``above`` of ``n`` examples are above."""
    if n == 0:
        return 1.0
    from scipy.stats import binom

    k = np.arange(n + 1)
    extreme = np.abs(2 * k - n) >= abs(2 * above - n)
    return float(min(1.0, binom.pmf(k[extreme], n, 0.5 + epsilon).sum()))


def _equivalence(own: Tensor, full: Tensor, epsilon: float) -> tuple[str, float, float]:
    # Equal up to rounding is a tie: the same numbers summed in another order must not count as better or worse.
    ties = (own - full).abs() <= 1e-6 * (1 + full.abs())
    above, n = int((own > full)[~ties].sum()), int((~ties).sum())
    return "equivalence", equivalence_p(above, n, epsilon), above / n if n else 0.5


def _independence(complement: Tensor, full: Tensor, permutations: int, seed: int) -> tuple[str, float, float]:
    statistic, p = hsic(complement, full, permutations, seed)
    return "independence", p, statistic


def _tail(successes: int, n: int, quantile: float, alternative: Literal["less", "greater"]) -> float:
    from scipy.stats import binomtest

    return float(binomtest(successes, n, quantile, alternative=alternative).pvalue)


def _inflated(
    graph: Graph, kept: Bool[Tensor, " edge"], n: int, generator: torch.Generator, skip: frozenset[int]
) -> tuple[Bool[Tensor, "circuit edge"], Bool[Tensor, "circuit edge"]]:
    """The circuit with a random path added, and the same with one of the added edges knocked out again."""
    inflated = kept.repeat(n, 1)
    for row in inflated:
        path = torch.tensor(random_path(graph, generator, skip=skip))
        while bool(kept[path].all()):
            path = torch.tensor(random_path(graph, generator, skip=skip))
        row[path] = True
    knocked = inflated.clone()
    for row in knocked:
        added = (row & ~kept).nonzero().flatten()
        row[added[int(torch.randint(len(added), (1,), generator=generator))]] = False
    return inflated, knocked


KERNELS = 32
"""Bytes that the test of independence takes for every two pairs."""
REFERENCES = ("model", "complement")
"""Where the random circuits of partial necessity can be drawn from."""

NULLS = {
    "equivalence": ("the circuit is above the model on about half of the examples", "kept"),
    "independence": ("the complement's metric is independent of the model's", "kept"),
    "minimality": ("every edge matters more than random edges of inflated circuits", "kept"),
    "sufficiency": ("the circuit is no closer to the model than random circuits of its size", "rejected"),
    "partial necessity": ("ablating the circuit does no more than ablating random circuits of its size", "rejected"),
}


def _report(
    members: Sequence[tuple[str, str]],
    n_pairs: int,
    found: Sequence[tuple[str, float, float]],
    effects: Sequence[float],
    beaten: Sequence[float],
    edge_p: Sequence[float],
    level: float,
) -> CircuitTests:
    import pandas as pd

    edge_adjusted = holm(edge_p)
    edges = pd.DataFrame(
        {
            "source": [source for source, _ in members],
            "reader": [reader for _, reader in members],
            "effect": effects,
            "beats": beaten,
            "p_value": edge_p,
            "p_adjusted": edge_adjusted,
            "redundant": [p <= level for p in edge_adjusted],
        }
    )
    rows = [(name, statistic, p) for name, p, statistic in found]
    # what enters is corrected for the number of edges already
    rows.insert(2, ("minimality", float(edges["redundant"].mean()), min(edge_adjusted)))
    adjusted = holm([p for _, _, p in rows])
    tests = tuple(
        HypothesisTest(name, NULLS[name][0], statistic, p, a, a <= level, NULLS[name][1])
        for (name, statistic, p), a in zip(rows, adjusted, strict=True)
    )
    return CircuitTests(tests, edges, len(members), n_pairs)


def _check_power(quantile: float, n_random: int, permutations: int, level: float) -> None:
    """Refuse draws so few that Holm's first step, five times the smallest p-value, exceeds the level whatever comes."""
    for name, value, needed in (
        ("n_random", n_random, math.ceil(math.log(level / len(NULLS)) / math.log(quantile))),
        ("permutations", permutations, math.ceil(len(NULLS) / level) - 1),
    ):
        if value < needed:
            raise BadInput(f"{name} = {value}: nothing could be significant at level = {level}; expected >= {needed}")


def _check(model: HookedModel, circuit: Circuit, counted: Bool[Tensor, " edge"], **rates: float) -> None:
    if Graph.from_model(model, neurons=circuit.graph.has_neurons) != circuit.graph:
        raise BadInput("the circuit is of another graph than this model's: attribute this model first")
    kept, n_edges = int((circuit.kept.cpu() & counted).sum()), int(counted.sum())
    if not 0 < kept < n_edges:
        raise BadInput(
            f"the circuit keeps {kept} of the {n_edges} edges that count: expected some but not all, such as "
            f"circuit.top(20)"
        )
    for name, value in rates.items():
        if not 0 < value < 1:
            raise BadInput(f"{name} = {value}: expected a number between 0 and 1")
