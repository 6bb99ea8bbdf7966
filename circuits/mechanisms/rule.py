"""The rule from evidence to verdict; its thresholds are data, in ``thresholds.py``."""

from __future__ import annotations

from circuits.mechanisms.evidence import Evidence, Verdict
from circuits.mechanisms.testimony import testimony
from circuits.mechanisms.thresholds import RULE, VERSION, Thresholds, rule_table
from circuits.mechanisms.wording import (
    against,
    against_ranges,
    agreement,
    column_words,
    pair_words,
    range_words,
    result_words,
)

HEURISTICS = {"rectangles": "range-lookup", "result-heuristics": "result-range-bag"}
"""The mechanism that a test of heuristics stands for."""


def decide(items: tuple[Evidence, ...], rule: Thresholds = RULE) -> Verdict:
    """Return the verdict that the rule gives on some evidence.

    In order: not learned; memorisation (training pairs right, unseen pairs wrong once mirror images are set aside,
    and no ranges of the operands that survive idealisation: a code of ranges may fail on unseen pairs); a list that
    overrules an algorithm; an algorithm (a candidate passes all its tests, no test of heuristics or lists passes
    too, and the held-out block agrees); a mixture (a candidate's variables work on one region and fail on the
    rest); a lookup of all pairs; matching of ranges of the operands or of ranges and residues of the result (each
    survives idealisation); heuristics (two or more signs and no algorithm); otherwise mixed or undetermined. Where
    an algorithm and something else pass all their tests, the evidence disagrees: undetermined. Slices are a sign of
    heuristics, but do not speak against an algorithm that passes: a magnitude code answers small and large numbers
    with different neurons of the same kind. A network that errs, alike on training and on unseen pairs, is named if
    a mechanism passes, errors and all.
    """
    by = {e.test: e for e in items}
    gate = by["accuracy-gate"]
    train, unseen = gate.number("train"), gate.number("random")
    candidates = {name: _candidate(name, by, rule) for name in ("fourier", "number-line", "columns")}
    passing = [name for name, (passes, _) in candidates.items() if passes]

    def verdict(label: str, mechanism: str | None, why: str) -> Verdict:
        supports, opposes = testimony(items, label, mechanism, rule)
        return Verdict(label, mechanism, items, why, VERSION, None, supports, opposes, rule_table(rule))

    right = f"Right on {train:.0%} of the training pairs and {unseen:.0%} of unseen ones"
    unknown = f"{right}: the task is not learned, so there is no mechanism to name."
    if not worth_explaining(gate, rule):
        return verdict("not-learned", None, unknown)
    if learned(gate, rule) and _memorised(gate, rule):
        ranges, pairs = by.get("rectangles"), by.get("pair-lookup")
        if not passing and ranges is not None and ranges.passed and not (pairs is not None and pairs.passed):
            return verdict(
                "heuristics", HEURISTICS["rectangles"], f"{range_words(ranges)} {right}: ranges do not suffice."
            )
        return verdict(*_memorisation(gate, candidates, passing))
    named = _named(by, candidates, passing, rule)
    if named is not None:
        return verdict(*named)
    if not learned(gate, rule):
        return verdict("not-learned", None, unknown)
    opposed = f"{against(candidates)}{against_ranges(by)}"
    if unseen < rule.generalises:
        return verdict(
            "undetermined", None, f"{right}: more than a list of pairs, less than a rule. {opposed}".rstrip()
        )
    signs = _heuristic_signs(by, rule)
    if len(signs) >= 2:
        return verdict("heuristics", None, f"No candidate algorithm passes, and {' and '.join(signs)}.")
    seen = f" One sign of heuristics: {signs[0]}." if signs else ""
    return verdict("undetermined", None, f"Generalises, but no candidate explains how. {opposed}{seen}")


def _memorised(gate: Evidence, rule: Thresholds) -> bool:
    """Whether unseen pairs, mirror images set aside, are wrong, or so few that they could be right by luck."""
    unmirrored, low = gate.number("unmirrored"), gate.number("unmirrored_low", 1.0)
    by_luck = low < gate.number("chance", 0.0) + rule.memorised_luck
    return unmirrored < rule.memorised_unseen or (unmirrored < rule.memorised_few and by_luck)


def _memorisation(
    gate: Evidence, candidates: dict[str, tuple[bool, str]], passing: list[str]
) -> tuple[str, str | None, str]:
    train, unseen, unmirrored = gate.number("train"), gate.number("random"), gate.number("unmirrored")
    if passing:
        return (
            "mixed",
            passing[0],
            f"Unseen pairs are right in only {unmirrored:.0%}, yet {candidates[passing[0]][1]}.",
        )
    mirror = "" if abs(unmirrored - unseen) < 0.02 else f" ({unseen:.0%} with pairs whose mirror image was trained)"
    return (
        "memorisation",
        "pairs",
        f"Right on {train:.0%} of the training pairs but on only {unmirrored:.0%} of unseen ones{mirror}: "
        f"what was learned is the list of training pairs. {against(candidates)}",
    )


def _named(
    by: dict[str, Evidence], candidates: dict[str, tuple[bool, str]], passing: list[str], rule: Thresholds
) -> tuple[str, str | None, str] | None:
    """The mechanism, or mixture of two, whose tests pass, and the sentence that says by what; None where none's do."""
    over = _overruled(by, rule)
    if over is not None:
        return ("mixed", *over)
    others = [test for test in ("pair-lookup", *HEURISTICS) if test in by and by[test].passed]
    # a bag of ranges and residues of the result moves with the operands as a line does: what its neurons are decides
    passing = [name for name in passing if not (name == "number-line" and "result-heuristics" in others)]
    if len(passing) > 1:
        both = "; ".join(candidates[name][1] for name in passing)
        return "undetermined", None, f"The evidence disagrees: {' and '.join(passing)} both pass: {both}."
    if passing and others and not learned(by["accuracy-gate"], rule):
        if passing[0] != "columns":
            return None
        passing = []  # columns know their carries: ranges of ten that leave answers open do not
    if passing and others and passing[0] != "columns":  # columns were held against them already
        return (
            "undetermined",
            None,
            f"The evidence disagrees: {candidates[passing[0]][1]}; yet {', '.join(others)} passes too.",
        )
    if passing:
        return _algorithm(by, candidates, passing[0], rule)
    part = _region(by, rule)
    if part is not None:
        return ("mixed", *part)
    if "pair-lookup" in others:
        return "memorisation", "pairs", pair_words(by["pair-lookup"])
    for name, words in (("rectangles", range_words), ("result-heuristics", result_words)):
        if name in others:
            return "heuristics", HEURISTICS[name], words(by[name])
    return None


def _algorithm(
    by: dict[str, Evidence], candidates: dict[str, tuple[bool, str]], name: str, rule: Thresholds
) -> tuple[str, str | None, str]:
    """What an algorithm that passes all its tests amounts to, by how far it holds."""
    gate, gap, slices = by["accuracy-gate"], by.get("block-gap"), by.get("slice-transfer")
    train, unseen = gate.number("train"), gate.number("random")
    words = candidates[name][1]
    if unseen < rule.generalises:
        if train - rule.errs_alike <= unseen and (unseen >= rule.limited or train < rule.learned_train):
            return (
                "algorithm",
                name,
                f"{words}; it errs alike on training pairs ({train:.0%} right) and on unseen ones "
                f"({unseen:.0%}), so that the algorithm is limited, not a list.",
            )
        return "mixed", name, f"{words}; yet {unseen:.0%} of unseen pairs are right, {train:.0%} of training pairs."
    # few pairs in the block make for a wide interval: what speaks against an algorithm is a gap that they show
    if gap is None or not gap.interval[0] > rule.block_algorithm or _only_cascades_fail(by, rule):
        return "algorithm", name, f"{words}; {agreement(gap, slices)}."
    return "mixed", name, f"{words}, but {agreement(gap, slices)}: the algorithm does not hold everywhere."


def worth_explaining(gate: Evidence, rule: Thresholds = RULE) -> bool:
    """Whether there may be a mechanism: the task is learned, or done with errors, alike on unseen pairs."""
    train, unseen = gate.number("train"), gate.number("random")
    return learned(gate, rule) or (train >= rule.errs_learned and unseen >= train - rule.errs_alike)


def learned(gate: Evidence, rule: Thresholds = RULE) -> bool:
    """Whether the task is learned: the training pairs, unseen ones, or all sums without a carry cascade are right."""
    shares = [gate.number(key) for key in ("train", "random", "without_cascade")]
    return any(share >= rule.learned_train for share in shares)


def _only_cascades_fail(by: dict[str, Evidence], rule: Thresholds) -> bool:
    """Whether errors are the carry cascades of columns without them, of which a block of operands can have many."""
    columns = by.get("carry-cascade")
    if columns is None or not columns.passed or columns.details.get("cascade") != "missing":
        return False
    return by["accuracy-gate"].number("without_cascade", 0.0) >= rule.generalises


def _region(by: dict[str, Evidence], rule: Thresholds) -> tuple[str, str] | None:
    """The algorithm that holds on one region and not elsewhere, and the sentence that says by what."""
    part = by.get("region-interchange")
    if part is None or not part.passed:
        return None
    d, name = part.details, str(part.details["algorithm"])
    if "rectangles" in by and by["rectangles"].passed:
        return None  # ranges account for all pairs: some of them look like swaps that hold
    # Neurons need not be waves over the whole square, where waves are for a part of it.
    if part.number("complement") > rule.interchange_complement:
        return None
    pairs = by.get("pair-lookup")
    if pairs is not None and pairs.passed and pairs.number("known_pairs") > 1 - rule.list_known:
        return None  # a list of every pair: a few of them may look like swaps that hold
    if name == "number-line" and _survives(by, "line") < rule.scrubbed_columns * d["area"]:
        return None  # a list of pairs that are written as one number can be swapped along it
    return name, (
        f"On {d['area']:.0%} of the operand pairs swapping the variables of the {name} algorithm changes the answer "
        f"as predicted in {d['inside']:.0%} (random subspace {d['control']:.0%}), on the others in "
        f"{d['outside']:.0%}, and the answers are right on both ({d['right_inside']:.0%}, {d['right_outside']:.0%}): "
        "an algorithm on one part, something else on the rest."
    )


def _overruled(by: dict[str, Evidence], rule: Thresholds) -> tuple[str, str] | None:
    """The algorithm that lies under a list of some of the pairs, and the sentence that says by what."""
    pairs, swap, form = by.get("pair-lookup"), by.get("interchange"), by.get("functional-form")
    if pairs is None or swap is None or form is None:
        return None
    known, overrules = pairs.number("known_pairs"), pairs.number("overrules")
    if not rule.list_known <= known <= 1 - rule.list_known:
        return None
    waves, renamed = pairs.number("elsewhere_frequency", 0.0), pairs.number("elsewhere_renamed", 1.0)
    if (
        waves >= rule.frequency_share
        and renamed <= rule.interchange_control
        and max(overrules, pairs.value / known) >= rule.list_overrules
    ):
        return "fourier", (
            f"{known:.0%} of the operand pairs have neurons of their own, without which {pairs.value:.0%} of the "
            f"answers are lost, and on the others {waves:.0%} of the importance of the other neurons is in waves of a "
            f"single frequency (operands renamed {renamed:.0%}): a list of some pairs beside an algorithm."
        )
    if overrules < rule.list_overrules:
        return None
    waves = swap.number("frequencies") if form.value >= max(rule.region_frequency_share, 2 * (form.control or 0)) else 0
    digits = min(swap.number("low_digit_of_a", 0.0), swap.number("high_digit_of_a", 0.0))
    works = {
        "fourier": waves,
        "number-line": swap.number("line"),
        "columns": digits if swap.number("line") <= rule.columns_line * digits else 0.0,
    }
    if _survives(by, "columns") < min(rule.list_algorithm, _survives(by, "line")):
        works |= {"columns": 0.0, "number-line": max(works["columns"], works["number-line"])}
    name = max(works, key=lambda algorithm: works[algorithm])
    if works[name] < rule.list_algorithm:
        return None
    return name, (
        f"{known:.0%} of the operand pairs have neurons of their own, which make the answer theirs on other pairs too "
        f"({overrules:.0%}), and swapping the variables of the {name} algorithm works in {works[name]:.0%}: a list of "
        "some pairs over an algorithm."
    )


def _survives(by: dict[str, Evidence], *variables: str) -> float:
    """The largest share of answers that survives scrubbing by one of some variables; all where none was measured."""
    scrub = by.get("causal-scrubbing")
    return max((scrub.number(name) for name in variables if name in scrub.details), default=1.0) if scrub else 1.0


def _swap_control(swap: Evidence, rule: Thresholds) -> bool:
    """Whether a swap of frequencies is about the frequencies, and not about so many dimensions.

    Either as many random functions of the operand do not carry it; or, where there are many frequencies and random
    functions overlap them, the rest of the state does not carry it. Where there are hardly any functions of so few
    values besides, random ones say nothing.
    """
    if swap.number("frequencies_control") <= rule.interchange_control:
        return True
    rest, random = swap.number("frequencies_complement"), swap.number("frequencies_control")
    spare = swap.number("n_values") - 1 - swap.number("frequencies_rank")
    return rest <= rule.interchange_complement and (random <= rule.interchange_random or spare <= rule.spare_functions)


def _spectrum_agrees(form: Evidence, spectrum: Evidence, rule: Thresholds) -> bool:
    """Whether logits are of the frequencies, or are made of them by a layer that only decodes the result.

    Such a layer makes one peak of a sum of waves, which has all frequencies: its logits say nothing.
    """
    return bool(form.details.get("decoding_layers")) or (
        spectrum.number("explained") >= rule.explained
        and spectrum.number("restricted") >= rule.restricted
        and spectrum.number("excluded") <= rule.excluded
    )


def _columns_of_tokens(by: dict[str, Evidence], rule: Thresholds) -> tuple[bool, str]:
    """Whether digits that are tokens are added in columns: by heads, parts of what all heads write, or neurons.

    Heads may bring the digits of a list of pairs as well: neurons that know more than their column overrule them.
    """
    e, parts, neurons = by["column-interchange"], by.get("column-parts"), by.get("column-scrubbing")
    known = 1.0 if neurons is None else neurons.number("own", 1.0)
    if neurons is not None and (known < rule.column_listed or neurons.value < rule.scrubbed_columns):
        return False, (
            f"{known:.0%} of what neurons know, where a digit is written, is its column's digits and carry, and taken "
            f"from other sums with the same ones they keep {neurons.value:.0%} of the digits: they know more"
        )
    if "carry-cascade" in by and by["carry-cascade"].passed:
        return True, column_words(by["carry-cascade"])
    heads = e.value >= rule.column_interchange and (e.control or 0) <= rule.interchange_control
    words = (
        f"swapping the carry, or the digits, of one column alone through some attention heads gives the digit that "
        f"the column algorithm predicts in at least {e.value:.0%} of cases for every inner column (all heads "
        f"{e.control or 0:.0%})"
    )
    if not heads and neurons is not None and neurons.passed:
        return True, (
            f"neurons taken from other sums with the same column and carry keep at least {neurons.value:.0%} of the "
            f"digits in every inner column (from other columns {neurons.control or 0:.0%}), and at least {known:.0%} "
            "of what they know is the column's digits and carry"
        )
    if heads or parts is None or parts.value != parts.value:
        return heads, words
    return parts.value >= rule.column_interchange and (parts.control or 0) <= rule.interchange_control, (
        f"{words}; swapping the part of all heads' outputs that a column's own digits set, or the rest, does in at "
        f"least {parts.value:.0%} (parts fitted to other sums {parts.control or 0:.0%})"
    )


def _candidate(name: str, by: dict[str, Evidence], rule: Thresholds) -> tuple[bool, str]:
    """Whether a candidate algorithm passes all its tests, and the sentence that says by what."""
    if name == "columns" and "column-interchange" in by:
        return _columns_of_tokens(by, rule)
    if not {"spectral", "functional-form", "interchange"} <= set(by):
        return False, f"{name} was not tested"
    form, spectrum, swap = by["functional-form"], by["spectral"], by["interchange"]
    if name == "fourier":
        passes = (
            form.number("frequency_least") >= rule.frequency_share
            and _spectrum_agrees(form, spectrum, rule)
            and swap.number("frequencies") >= rule.interchange
            and _swap_control(swap, rule)
        )
        keys = ", ".join(str(k) for k in form.details.get("key_frequencies", []))
        return passes, (
            f"{form.value:.0%} of neuron importance is in single-frequency neurons (key frequencies {keys or 'none'}), "
            f"logits restricted to {int(spectrum.number('n_frequencies'))} frequencies are right in "
            f"{spectrum.number('restricted'):.0%} and without them in {spectrum.number('excluded'):.0%}, and swapping "
            f"these frequencies of the operand changes the answer as predicted in {swap.number('frequencies'):.0%} "
            f"(as many random functions {swap.number('frequencies_control'):.0%}, all the rest "
            f"{swap.number('frequencies_complement'):.0%})"
        )
    if name == "number-line":
        # along an embedding of one dimension every swap works: a list of pairs written as one number has neurons, and
        # answers, that hang on which pair it is
        scrubbed = _survives(by, "line")
        passes = swap.number("line") >= rule.line_interchange and form.number("hinge_least") >= rule.hinge_share
        passes = passes and swap.number("line_control", 0.0) <= rule.line_random
        return passes and scrubbed >= rule.scrubbed_line, (
            f"moving the operand along one direction of the embedding changes the answer as predicted in "
            f"{swap.number('line'):.0%}, {form.number('hinge_least'):.0%} of neuron importance, in the layer where it "
            f"is least, is in hinges, and {scrubbed:.0%} of answers survive neurons from other operands with the same "
            "result"
        )
    low, high = swap.number("low_digit_of_a"), swap.number("high_digit_of_a")
    units, tens = swap.number("units_digit_of_a"), swap.number("tens_digit_of_a")
    base = swap.number("digit_base")
    wraps = base != base
    if min(units, tens) >= rule.interchange:
        low, high, base = units, tens, 10
    # Swaps say how the operands are stored. A list of pairs, or ranges, of numbers stored by digits adds no columns.
    # What neurons work on says it, where lists or ranges of them seem to be there: digits of one column are ranges, and
    # the result's own digits, a column's last step, are ranges and residues of it.
    own = by.get("digit-neurons")
    counted = own is not None and own.value >= rule.interchange and (own.control or 0) <= rule.interchange_control
    listed = any(by[test].passed for test in ("pair-lookup", *HEURISTICS) if test in by) and not counted
    # A base: none where answers wrap around. Random functions: few values leave nearly all of a state to a digit.
    apart = swap.number("digits_control", 0.0) <= rule.digits_random and not wraps
    passes = min(low, high) >= rule.interchange and swap.number("line") <= rule.columns_line and apart and not listed
    scrubbed = _survives(by, "line", "columns")
    return passes and scrubbed >= rule.scrubbed_columns, (
        f"swapping the low or the high digit alone, in base {base:.0f}, changes the answer as predicted in {low:.0%} "
        f"and {high:.0%}, and {scrubbed:.0%} of answers survive neurons from other operands with the same columns or "
        "result"
    )


def _heuristic_signs(by: dict[str, Evidence], rule: Thresholds) -> list[str]:
    signs = []
    form, gap, slices = by.get("functional-form"), by.get("block-gap"), by.get("slice-transfer")
    if form is not None and form.number("indicator") >= rule.indicator_share:
        signs.append(f"{form.number('indicator'):.0%} of neuron importance is in indicators of the operands")
    if slices is not None and slices.passed is not None and slices.value <= rule.slice_heuristic:
        signs.append(f"neurons that suffice for one slice of inputs do only {slices.value:.0%} as well on others")
    if gap is not None and gap.value >= rule.block_heuristic and gap.interval[0] > rule.block_algorithm:
        signs.append(
            f"accuracy is {gap.number('block'):.0%} on the held-out block against {gap.number('random'):.0%} on random "
            "unseen pairs"
        )
    return signs
