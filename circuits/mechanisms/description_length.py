"""Description length: how many frequencies, hinges, indicators, digits or ranges say what neurons do?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.neuron_rules import COLUMNS, conjunctions
from circuits.mechanisms.readings import Readings, answer_logits, decisive_layers, read
from circuits.mechanisms.selection import matching_pursuit
from circuits.tasks.base import Task

FAITHFUL = 0.95
FIT_ROWS, JUDGED_ROWS = 1200, 500
TERMS = (1, 2, 4, 8)
"""So many hinges or indicators to a neuron are tried; of frequencies the first two."""
NEURON_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Shares of the neurons, most important first, that are tried."""
DECIDES = 0.1
"""Share of the answers that the layer has to change before there is anything to describe."""


@dataclass(frozen=True, eq=False)
class Family:
    """What neurons are by rules of one kind: for each number of rules to a neuron, predictions and bits a neuron.

    ``kind`` numbers the one rule that describes each neuron best, where rules are few enough to count.
    """

    name: str
    terms: tuple[int, ...]
    predicted: tuple[Float[Tensor, "rows n"], ...]
    bits: tuple[Float[Tensor, " n"], ...]
    kind: Int[Tensor, " n"]


def family(name: str, task: Task, bench: Bench, operands: Int[Tensor, "all 2"]) -> Family:
    """Describe the layer's neurons by rules of one kind, as functions of (possibly renamed) operands."""
    n, rows = task.n_operand_values, torch.cat([bench.fit, bench.judged])
    coefficient = math.log2(n * n) / 2
    if name == "conjunctions":
        levels, bits, kind = conjunctions(operands, bench.neurons, rows, n, len(bench.fit))
        return Family(name, (1,), (levels,), (bits + coefficient,), kind)
    make = COLUMNS[name]
    columns, block = make(task, operands[rows]), 8 if name == "frequencies" else 1
    terms: tuple[int, ...] = TERMS[:2] if name == "frequencies" else TERMS
    fit = torch.arange(len(rows), device=rows.device) < len(bench.fit)
    predicted, chosen = matching_pursuit(columns, bench.neurons[rows], fit, block=block, terms=terms[-1])
    terms = tuple(t for t in terms if t <= len(predicted))
    rule = torch.full_like(bench.importance, math.log2(columns.shape[1] / block) + block * coefficient)
    return Family(name, terms, tuple(predicted[t - 1] for t in terms), tuple(t * rule for t in terms), chosen[0])


@dataclass(frozen=True, eq=False)
class Bench:
    """The layer that is described, its neurons most important first, and rows to fit and to judge on.

    ``said`` is what the intact model answers on the judged rows, ``without`` how often it does so with all neurons at
    their means.
    """

    layer: int
    place: Int[Tensor, " n"]
    neurons: Float[Tensor, "rows n"]
    importance: Float[Tensor, " n"]
    tokens: Int[Tensor, "judged pos"]
    fit: Int[Tensor, " fit"]
    judged: Int[Tensor, " judged"]
    said: Int[Tensor, " judged"]
    table: int
    without: float = 0.0

    def agrees(self, model: Any, task: Task, neurons: Float[Tensor, "judged n"]) -> Bool[Tensor, " judged"]:
        """On which judged rows the model says with these neurons what it says with its own."""

        def put(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[:, -1, self.place] = neurons.to(activation.dtype)
            return activation

        hooks = [(f"blocks.{self.layer}.mlp.hook_post", put)]
        return answer_logits(model, task, self.tokens, hooks).argmax(-1) == self.said

    def faithfulness(self, agrees: Bool[Tensor, " judged"]) -> float:
        """Agreement beyond that of neurons at their means, as a share of all that there is to keep."""
        return (float(agrees.float().mean()) - self.without) / (1 - self.without)

    def means(self) -> Float[Tensor, "judged n"]:
        """All neurons at their means over the rows to fit on."""
        return self.neurons[self.fit].mean(0).expand(len(self.judged), -1)


def _bench(model: Any, task: Task, readings: Readings, *, seed: int) -> Bench:
    layer = decisive_layers(model, task, readings)[-1]
    mine = (torch.tensor(readings.layers, device=readings.labels.device) == layer).nonzero().flatten()
    place = readings.importance[mine].argsort(descending=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(readings.tokens), generator=generator).to(mine.device)
    judged = order[: min(JUDGED_ROWS, len(order) // 3)]
    fit = order[len(judged) :][:FIT_ROWS]
    chosen = mine[place]
    said = readings.logits[judged].argmax(-1)
    bench = Bench(
        layer,
        place,
        readings.neurons[:, chosen],
        readings.importance[chosen],
        readings.tokens[judged],
        fit,
        judged,
        said,
        task.n_operand_values**2,
    )
    return replace(bench, without=float(bench.agrees(model, task, bench.means()).float().mean()))


@dataclass(frozen=True, eq=False)
class Description:
    """A description by one family: rules to a neuron, neurons described, how far it is faithful, and what it costs.

    ``kept`` says whether it keeps 95 % of the faithfulness; where none does, it is that of all neurons by most rules.
    """

    family: str
    terms: int
    neurons: int
    agrees: Bool[Tensor, " judged"]
    faithfulness: float
    rule_bits: float
    kinds: int

    @property
    def wrong(self) -> float:
        """Share of the judged rows on which the model then answers otherwise."""
        return 1 - float(self.agrees.float().mean())

    @property
    def kept(self) -> bool:
        """Whether 95 % of the faithfulness are kept."""
        return self.faithfulness >= FAITHFUL


def bits_of(rule_bits: float, wrong: Any, table: int, n_answers: int) -> Any:
    """Bits of the rules and of the list of exceptions: which of ``table`` answers are wrong, and the right ones.

    Source: two-part codes: Rissanen 1978 (Automatica 14:465); Grünwald 2007, The Minimum Description Length
        Principle, chapter 5.
    """
    share = np.clip(np.asarray(wrong, dtype=float), 1e-12, 1 - 1e-12)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return rule_bits + table * (entropy + share * math.log2(max(n_answers - 1, 1)))


def describe(model: Any, task: Task, bench: Bench, by: Family) -> tuple[Description, Description]:
    """Return the faithful description of fewest rules to a neuron, then fewest neurons, and the cheapest tried.

    Where no number of rules is faithful, both are that of all neurons by most rules.
    """
    n_fit, n = len(bench.fit), len(bench.place)
    means = bench.means()

    every: list[Description] = []

    def tried(term: int, neurons: Bool[Tensor, " n"]) -> Description:
        values = torch.where(neurons, by.predicted[term][n_fit:], means)
        agrees = bench.agrees(model, task, values)
        count = int(neurons.sum())
        kinds = len(by.kind[neurons].unique())
        faithful = bench.faithfulness(agrees)
        bits = float(by.bits[term][neurons].sum())
        every.append(Description(by.name, by.terms[term], count, agrees, faithful, bits, kinds))
        return every[-1]

    order = torch.arange(n, device=means.device)
    found = tried(len(by.terms) - 1, order < n)
    if not found.kept:
        return found, found
    term = len(by.terms) - 1
    for fewer_terms in range(term):
        fewer = tried(fewer_terms, order < n)
        if fewer.kept:
            term, found = fewer_terms, fewer
            break
    low, high = 0, len(NEURON_SHARES) - 1
    while low < high:
        middle = (low + high) // 2
        fewer = tried(term, order < math.ceil(NEURON_SHARES[middle] * n))
        low, high, found = (low, middle, fewer) if fewer.kept else (middle + 1, high, found)
    return found, min(every, key=lambda d: bits_of(d.rule_bits, d.wrong, bench.table, len(task.answer_values)))


def fewest_kinds(model: Any, task: Task, bench: Bench, by: Family) -> int | None:
    """Return the fewest frequencies, those of most importance first, that keep 95 %; None where all of them do not."""
    n_fit, means = len(bench.fit), bench.means()
    weight = torch.zeros(int(by.kind.max()) + 1, device=means.device).index_add_(0, by.kind, bench.importance)
    order = [int(k) for k in weight.argsort(descending=True) if float(weight[k]) > 0]

    def kept(count: int) -> bool:
        chosen = torch.isin(by.kind, torch.tensor(order[:count], device=means.device))
        values = torch.where(chosen, by.predicted[0][n_fit:], means)
        return bench.faithfulness(bench.agrees(model, task, values)) >= FAITHFUL

    if not order or not kept(len(order)):
        return None
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle + 1, high)
    return high


def description_length(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Bits of the cheapest description of what the neurons do, as a share of the bits of the table of answers.

    Each neuron of the last layer without whose MLP answers go wrong is replaced by what its own rules predict: one
    frequency or two (each with its eight products of waves); 1, 2, 4 or 8 hinges, indicators or digits (hinges and
    single values of decimal digits and their column sums); or one conjunction, two levels by whether a is in a set and
    b in another (ranges and residues cost least). The least important neurons stay at their means. Of each family the
    fewest rules to a neuron, and then the fewest neurons, are taken that keep 95 % of the faithfulness (agreement with
    the intact model, 0 with all neurons at their means); ``rules`` has their number, null where not even the most
    suffice. A rule costs log2(size of the dictionary) bits and log2(N) / 2 for each coefficient (N pairs of operands),
    and the inputs on which the model then answers otherwise are listed with their answers: N (H(e) + e log2(answers
    - 1)) bits. The table costs N log2(answers): what a list of pairs would, and no description costs more.
    ``frequencies`` is the fewest distinct frequencies, by importance, that keep 95 % when each neuron is described by
    one.

    The control describes the same neurons by the cheapest family after renaming the operands at random.

    Small: few rules say it all, and ``cheapest`` names their kind. Near 1: a list of pairs, as of a memoriser.

    Formula: min over families of (bits of rules and coefficients + N (H(e) + e log2(answers - 1))) / (N log2(answers)),
        e the share of inputs that the described model answers otherwise.

    Source: ranking by importance and replacing the rest by means: Nikankin et al. 2025 (arXiv 2410.21272), equation
    2, and Nanda et al. 2023 (arXiv 2301.05217), section 4, for frequencies; two-part codes: Rissanen 1978, Automatica
    14:465, and Grünwald 2007, chapter 5. Joining them is ours.
    Fails when: many neurons say the same thing (each is paid for); or the answer passes by the MLP. Which family is
    cheapest says how neurons are best drawn, not whether the whole is an algorithm: compare numbers within a family.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    bench = _bench(model, task, readings, seed=seed)
    if 1 - bench.without < DECIDES:
        return _nothing_to_describe(start, bench.layer)
    table, n_answers = bench.table, len(task.answer_values)
    literal = table * math.log2(n_answers)
    names = [*COLUMNS, *["conjunctions"] * (len(readings.operands) == table)]
    found, cheapest, frequencies = {}, {}, None
    for name in names:
        by = family(name, task, bench, readings.operands)
        found[name], cheapest[name] = describe(model, task, bench, by)
        if name == "frequencies":
            frequencies = fewest_kinds(model, task, bench, by)

    def share(of: Description, wrong: Any) -> Any:
        # a description that costs more than the table is none: the pairs are listed
        return np.minimum(1.0, bits_of(of.rule_bits, wrong, table, n_answers) / literal)

    shares = {name: float(share(d, d.wrong)) for name, d in cheapest.items()}
    best = cheapest[min(shares, key=lambda name: shares[name])]
    generator = torch.Generator().manual_seed(seed)
    renaming = torch.randperm(task.n_operand_values, generator=generator).to(bench.place.device)
    null = describe(model, task, bench, family(best.family, task, bench, renaming[readings.operands]))[1]
    wrong = (~best.agrees).float().cpu().numpy()
    return Evidence(
        test="description-length",
        value=shares[best.family],
        interval=bootstrap_interval(wrong, lambda sample, axis: share(best, np.mean(sample, axis=axis)), seed=seed),
        control=float(share(null, null.wrong)),
        control_name="operands renamed at random",
        threshold="none: it describes (share of the bits of the table)",
        passed=None,
        details={
            "cheapest": best.family if shares[best.family] < 1 else "pairs",
            "rules": {name: d.neurons * d.terms if d.kept else None for name, d in found.items()},
            "rules_per_neuron": {name: d.terms for name, d in found.items()},
            "distinct_rules": {name: d.kinds for name, d in found.items() if name in ("frequencies", "conjunctions")},
            "frequencies": frequencies,
            "faithfulness": {name: d.faithfulness for name, d in found.items()},
            "bits_share": shares,
            "table_bits": literal,
            "layer": bench.layer,
            "n_neurons": len(bench.place),
            "agreement_without": bench.without,
        },
        source="Rissanen 1978; Nanda et al. 2023, arXiv 2301.05217; Nikankin et al. 2025, arXiv 2410.21272",
        seconds=time.perf_counter() - start,
    )


def _nothing_to_describe(start: float, layer: int) -> Evidence:
    nan = float("nan")
    return Evidence(
        test="description-length",
        value=nan,
        interval=(nan, nan),
        control=None,
        control_name="",
        threshold="not applicable: the answers stay when the neurons are replaced by their means",
        passed=None,
        details={"layer": layer},
        source="Rissanen 1978; Nanda et al. 2023, arXiv 2301.05217; Nikankin et al. 2025, arXiv 2410.21272",
        seconds=time.perf_counter() - start,
    )
