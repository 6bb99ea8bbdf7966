"""Evidence for and against: which mechanism each test speaks for, and how that stands to a verdict."""

from __future__ import annotations

from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.thresholds import Thresholds

STANDS_FOR = {
    "spectral": "fourier",
    "rectangles": "range-lookup",
    "result-heuristics": "result-range-bag",
    "pair-lookup": "pairs",
    "column-interchange": "columns",
    "carry-cascade": "columns",
    "column-parts": "columns",
    "column-scrubbing": "columns",
}
"""The mechanism that passing a test speaks for, and that failing it speaks against."""
ALGORITHMS = ("fourier", "number-line", "columns")
EVERYWHERE = ("accuracy-gate", "block-gap", "slice-transfer")
"""Tests that speak for or against a rule that holds everywhere."""

Claim = tuple[str, bool, float]
"""A mechanism, whether a number speaks for it, and the number."""


def testimony(
    items: tuple[Evidence, ...], label: str, mechanism: str | None, rule: Thresholds
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sentences for a verdict and those against it, one for each number that speaks.

    A number that the rule's threshold lets pass speaks for its mechanism; one that fails speaks against it, which says
    something of a verdict of that mechanism only. The accuracy on unseen pairs, the held-out block and the transfer
    between slices speak for or against a rule that holds everywhere. For ``undetermined``, all that passes is for some
    mechanism, all that fails against one, and each sentence says which.
    """
    if label == "not-learned":
        return (), ()
    supports: list[str] = []
    opposes: list[str] = []
    for item in items:
        if item.test in EVERYWHERE and item.passed is not None and item.value == item.value:
            sentence = _sentence(item, item.passed, "a rule that holds everywhere", item.value)
            if label == "undetermined" or (label == "algorithm" and mechanism in ALGORITHMS):
                (supports if item.passed else opposes).append(sentence)
            elif not item.passed and label in ("memorisation", "heuristics", "mixed"):
                supports.append(sentence)
        for named, holds, number in _claims(item, items, rule):
            sentence = _sentence(item, holds, named, number)
            if label == "undetermined" or named == mechanism:
                (supports if holds else opposes).append(sentence)
            elif holds:
                opposes.append(sentence)  # another mechanism's test passes
    return tuple(supports), tuple(opposes)


def _claims(item: Evidence, items: tuple[Evidence, ...], rule: Thresholds) -> list[Claim]:
    """What a test says of mechanisms, by the numbers that the rule reads."""
    if item.value != item.value:
        return []
    if item.test == "functional-form":
        waves, hinges = item.number("frequency_least"), item.number("hinge_least")
        return [("fourier", waves >= rule.frequency_share, waves), ("number-line", hinges >= rule.hinge_share, hinges)]
    if item.test == "interchange":
        return _of_swaps(item, items, rule)
    if item.test == "causal-scrubbing":
        # what survives is no sign of an algorithm by itself; what does not speaks against one
        line, columns = item.number("line"), max(item.number("line"), item.number("columns", 1.0))
        found = [("number-line", False, line)] if line < rule.scrubbed_line else []
        return [*found, *([("columns", False, columns)] if columns < rule.scrubbed_columns else [])]
    if item.test == "region-interchange":
        return [(str(item.details.get("algorithm")), True, item.value)] if item.passed else []
    if item.test == "digit-neurons":
        # neurons of any magnitude code let digits of it be swapped: they speak where the operands are stored by digits
        swaps = [claim for e in items if e.test == "interchange" for claim in _of_swaps(e, items, rule)]
        stored = any(named == "columns" and holds for named, holds, _ in swaps)
        return [("columns", bool(item.passed), item.value)] if stored else []
    named = STANDS_FOR.get(item.test)
    return [] if named is None or item.passed is None else [(named, item.passed, item.value)]


def _of_swaps(swap: Evidence, items: tuple[Evidence, ...], rule: Thresholds) -> list[Claim]:
    """Which algorithms' variables can be swapped.

    Frequencies of the operand carry it in any code of few dimensions: they speak where there are neurons of waves, and
    where as many random functions do not carry it too. Whoever can move along a line can change any digit.
    """
    waves, line = swap.number("frequencies"), swap.number("line")
    digits = max(
        min(swap.number(f"{one}_digit_of_a", 0.0), swap.number(f"{other}_digit_of_a", 0.0))
        for one, other in (("low", "high"), ("units", "tens"))
    )
    found = [("number-line", line >= rule.line_interchange, line)]
    neurons = max([e.number("frequency", 0.0) for e in items if e.test == "functional-form"], default=0.0)
    alone = swap.number("frequencies_control") <= rule.interchange_control
    if neurons >= rule.region_frequency_share and (alone or waves < rule.interchange):
        found.append(("fourier", waves >= rule.interchange, waves))
    if line <= rule.columns_line and swap.number("digits_control", 1.0) <= rule.digits_random:
        found.append(("columns", digits >= rule.interchange, digits))
    return found


def _sentence(item: Evidence, holds: bool, about: str, number: float) -> str:
    control = "" if item.control is None or item.control != item.control else f" (control {item.control:.2f})"
    return f"{item.test} {number:.2f}{control}: {'for' if holds else 'against'} {about}"
