"""The rule from evidence to verdict. The thresholds are data: one table, one version, printed with every verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from circuits.mechanisms.evidence import Evidence, Verdict

VERSION = "arithmetic-2"


@dataclass(frozen=True)
class Thresholds:
    """Every number that the rule uses; shares unless the name says otherwise."""

    learned_train: float = 0.95
    generalises: float = 0.95
    memorised_unseen: float = 0.2
    frequency_share: float = 0.75
    explained: float = 0.90
    restricted: float = 0.95
    excluded: float = 0.15
    interchange: float = 0.95
    interchange_control: float = 0.10
    line_interchange: float = 0.95
    hinge_share: float = 0.75
    indicator_share: float = 0.75
    slice_heuristic: float = 0.85
    block_algorithm: float = 0.05
    block_heuristic: float = 0.20
    column_interchange: float = 0.95


RULE = Thresholds()
HEURISTICS = {"rectangles": "range-lookup", "result-heuristics": "result-range-bag"}
"""The mechanism that a test of heuristics stands for."""


def rule_table(rule: Thresholds = RULE) -> dict[str, float]:
    """The thresholds by name, as printed in reports."""
    return asdict(rule)


def decide(items: tuple[Evidence, ...], rule: Thresholds = RULE) -> Verdict:
    """Return the verdict that the rule gives on some evidence.

    In order: not learned; memorisation (training pairs right, unseen pairs wrong once mirror images are set aside);
    an algorithm (a candidate passes all its tests, and the held-out block agrees); matching of ranges of the operands
    or of ranges and residues of the result (each survives idealisation); heuristics (two or more signs and no
    algorithm); otherwise mixed or undetermined. Slices are a sign of heuristics, but do not speak against an algorithm
    that passes: a magnitude code answers small and large numbers with different neurons of the same kind.
    """
    by = {e.test: e for e in items}
    gate = by["accuracy-gate"]
    train, unseen = gate.number("train"), gate.number("random")
    unmirrored = gate.number("unmirrored")

    def verdict(label: str, mechanism: str | None, why: str) -> Verdict:
        return Verdict(label, mechanism, items, why, VERSION)

    if train < rule.learned_train and unseen < rule.learned_train:
        return verdict(
            "not-learned",
            None,
            f"Right on {train:.0%} of the training pairs and {unseen:.0%} of unseen ones: the task is not learned, so "
            "there is no mechanism to name.",
        )
    candidates = {name: _candidate(name, by, rule) for name in ("fourier", "number-line", "columns")}
    passing = [name for name, (passes, _) in candidates.items() if passes]
    if unmirrored < rule.memorised_unseen:
        if passing:
            return verdict(
                "mixed",
                passing[0],
                f"Unseen pairs are right in only {unmirrored:.0%}, yet {candidates[passing[0]][1]}.",
            )
        mirror = "" if abs(unmirrored - unseen) < 0.02 else f" ({unseen:.0%} with pairs whose mirror image was trained)"
        return verdict(
            "memorisation",
            "pairs",
            f"Right on {train:.0%} of the training pairs but on only {unmirrored:.0%} of unseen ones{mirror}: "
            f"what was learned is the list of training pairs. {_against(candidates)}",
        )
    if unseen < rule.generalises:
        return verdict(
            "mixed" if passing else "undetermined",
            passing[0] if passing else None,
            f"Right on {train:.0%} of the training pairs and {unseen:.0%} of unseen ones: more than a list of pairs, "
            f"less than a rule. {_against(candidates)}",
        )
    return _generalising(by, candidates, passing, rule, verdict)


def _generalising(
    by: dict[str, Evidence],
    candidates: dict[str, tuple[bool, str]],
    passing: list[str],
    rule: Thresholds,
    verdict: Callable[[str, str | None, str], Verdict],
) -> Verdict:
    gap, slices = by.get("block-gap"), by.get("slice-transfer")
    small_gap = gap is None or not gap.value > rule.block_algorithm
    if passing and small_gap:
        name = passing[0]
        return verdict("algorithm", name, f"{candidates[name][1]}; {_agreement(gap, slices)}.")
    if passing:
        return verdict(
            "mixed",
            passing[0],
            f"{candidates[passing[0]][1]}, but {_agreement(gap, slices)}: the algorithm does not hold everywhere.",
        )
    for name, words in (("rectangles", _range_words), ("result-heuristics", _result_words)):
        if name in by and by[name].passed:
            return verdict("heuristics", HEURISTICS[name], words(by[name]))
    signs = _heuristic_signs(by, rule)
    if len(signs) >= 2:
        return verdict("heuristics", None, f"No candidate algorithm passes, and {' and '.join(signs)}.")
    seen = f" One sign of heuristics: {signs[0]}." if signs else ""
    return verdict("undetermined", None, f"Generalises, but no candidate explains how. {_against(candidates)}{seen}")


def _candidate(name: str, by: dict[str, Evidence], rule: Thresholds) -> tuple[bool, str]:
    """Whether a candidate algorithm passes all its tests, and the sentence that says by what."""
    if name == "columns" and "column-interchange" in by:
        e = by["column-interchange"]
        if "carry-cascade" in by and by["carry-cascade"].passed:
            return True, _column_words(by["carry-cascade"])
        return e.value >= rule.column_interchange and (e.control or 0) <= rule.interchange_control, (
            f"swapping the carry, or the digits, of one column alone through some attention heads gives the digit that "
            f"the column algorithm predicts in at least {e.value:.0%} of cases for every inner column (all heads "
            f"{e.control or 0:.0%})"
        )
    if not {"spectral", "functional-form", "interchange"} <= set(by):
        return False, f"{name} was not tested"
    form, spectrum, swap = by["functional-form"], by["spectral"], by["interchange"]
    if name == "fourier":
        passes = (
            form.number("frequency_least") >= rule.frequency_share
            and spectrum.number("explained") >= rule.explained
            and spectrum.number("restricted") >= rule.restricted
            and spectrum.number("excluded") <= rule.excluded
            and swap.number("frequencies") >= rule.interchange
            and swap.number("frequencies_control") <= rule.interchange_control
        )
        keys = ", ".join(str(k) for k in form.details.get("key_frequencies", []))
        return passes, (
            f"{form.value:.0%} of neuron importance is in single-frequency neurons (key frequencies {keys or 'none'}), "
            f"logits restricted to {int(spectrum.number('n_frequencies'))} frequencies are right in "
            f"{spectrum.number('restricted'):.0%} and without them in {spectrum.number('excluded'):.0%}, and swapping "
            f"these frequencies in the embedding changes the answer as predicted in {swap.number('frequencies'):.0%} "
            f"(random subspace {swap.number('frequencies_control'):.0%})"
        )
    if name == "number-line":
        passes = swap.number("line") >= rule.line_interchange and form.number("hinge_least") >= rule.hinge_share
        return passes, (
            f"moving the operand along one direction of the embedding changes the answer as predicted in "
            f"{swap.number('line'):.0%}, and {form.number('hinge_least'):.0%} of neuron importance, in the "
            "layer where it is least, is in hinges"
        )
    units, tens = swap.number("units_digit_of_a"), swap.number("tens_digit_of_a")
    passes = min(units, tens) >= rule.interchange and swap.number("line") <= rule.interchange_control
    return passes, (
        f"swapping the units digit or the tens digit alone changes the answer as predicted in {units:.0%} and "
        f"{tens:.0%}"
    )


def _column_words(columns: Evidence) -> str:
    d = columns.details
    cascades = d.get("by_cascade", [])
    shares = ", ".join(f"{row[1]:.0%}" for row in cascades)
    missing = (
        f"columns without the cascade: a carry gets through at most {d.get('reach')} columns that sum to nine"
        if d.get("cascade") == "missing"
        else f"columns with the cascade: a carry gets through {d.get('reach')} columns that sum to nine"
    )
    return (
        f"{missing} (of sums rich in nines {shares} are right where the longest cascade is 0 to {len(cascades) - 1}; "
        f"by size of the sum accuracy differs by {d.get('size_drop', 0):.0%}), and swapping the carry, or the digits, "
        f"of one column alone through some attention heads gives the digit that the column algorithm predicts in at "
        f"least "
        f"{columns.value:.1%} of cases for every inner column (all heads {columns.control or 0:.0%})"
    )


def _against(candidates: dict[str, tuple[bool, str]]) -> str:
    tested = [words for passes, words in candidates.values() if not passes and "not tested" not in words]
    return f"Against an algorithm: {tested[0]}." if tested else ""


def _agreement(gap: Evidence | None, slices: Evidence | None) -> str:
    words = []
    if gap is not None and gap.value == gap.value:
        words.append(
            f"accuracy is {gap.number('block'):.0%} on the held-out block against {gap.number('random'):.0%} on random "
            "unseen pairs"
        )
    if slices is not None:
        undecided = " (not decisive)" if slices.passed is None else ""
        words.append(f"neurons that suffice for one slice of inputs do {slices.value:.0%} as well on others{undecided}")
    return " and ".join(words) or "no block or slices were tested"


def _range_words(shapes: Evidence) -> str:
    d = shapes.details
    return (
        f"{shapes.value:.0%} of neuron importance is in neurons that fire on one range of each operand "
        f"(renamed operands {shapes.control or 0:.0%}); replacing them by exact two-level rectangles keeps accuracy at "
        f"{d.get('idealised', float('nan')):.0%}, removing them leaves {d.get('ablated', float('nan')):.0%}; "
        f"{d.get('edge_share', 0):.0%} of their edges lie on a grid of width {d.get('edge_width')} at offset "
        f"{d.get('edge_offset')}."
    )


def _result_words(shapes: Evidence) -> str:
    d = shapes.details
    return (
        f"{shapes.value:.0%} of the neuron importance of layer {d.get('layer')} is in neurons that match a range or a "
        f"residue of the result (renamed results {shapes.control or 0:.0%}); replacing them by two levels keeps "
        f"accuracy at {d.get('idealised', 0):.0%}, removing them leaves {d.get('ablated', 0):.0%}."
    )


def _heuristic_signs(by: dict[str, Evidence], rule: Thresholds) -> list[str]:
    signs = []
    form, gap, slices = by.get("functional-form"), by.get("block-gap"), by.get("slice-transfer")
    if form is not None and form.number("indicator") >= rule.indicator_share:
        signs.append(f"{form.number('indicator'):.0%} of neuron importance is in indicators of the operands")
    if slices is not None and slices.passed is not None and slices.value <= rule.slice_heuristic:
        signs.append(f"neurons that suffice for one slice of inputs do only {slices.value:.0%} as well on others")
    if gap is not None and gap.value >= rule.block_heuristic:
        signs.append(
            f"accuracy is {gap.number('block'):.0%} on the held-out block against {gap.number('random'):.0%} on random "
            "unseen pairs"
        )
    return signs
