"""Evidence for and against: which mechanism each test speaks for, and how that stands to a verdict."""

from __future__ import annotations

from collections.abc import Callable

from circuits.mechanisms.evidence import Evidence


def _variables(item: Evidence) -> str | None:
    best = str(item.details.get("best", ""))
    return {"frequencies": "fourier", "line": "number-line"}.get(best, "columns" if "digit" in best else None)


def _region(item: Evidence) -> str | None:
    return str(item.details.get("algorithm")) if item.passed else None


STANDS_FOR: dict[str, str | Callable[[Evidence], str | None]] = {
    "spectral": "fourier",
    "functional-form": "fourier",
    "interchange": _variables,
    "region-interchange": _region,
    "rectangles": "range-lookup",
    "result-heuristics": "result-range-bag",
    "pair-lookup": "pairs",
    "digit-neurons": "columns",
    "column-interchange": "columns",
    "carry-cascade": "columns",
    "column-parts": "columns",
}
"""The mechanism that passing a test speaks for, and that failing it speaks against."""
ALGORITHMS = ("fourier", "number-line", "columns")


def testimony(
    items: tuple[Evidence, ...], label: str, mechanism: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sentences for a verdict and those against it, one for each test that speaks.

    A test that passes speaks for its mechanism; one that fails speaks against it, which says something of a verdict of
    that mechanism only. The accuracy on unseen pairs, the held-out block and the transfer between slices speak for or
    against a rule that holds everywhere. For ``undetermined``, all that passes is for some mechanism, all that fails
    against one, and each sentence says which.
    """
    if label == "not-learned":
        return (), ()
    supports: list[str] = []
    opposes: list[str] = []
    for item in items:
        if item.passed is None or item.value != item.value:
            continue
        of = STANDS_FOR.get(item.test)
        named = of(item) if callable(of) else of
        if named is None and item.test in ("accuracy-gate", "block-gap", "slice-transfer"):
            holds = item.passed
            about = "a rule that holds everywhere"
            wanted = mechanism in ALGORITHMS and label == "algorithm"
        elif named is not None:
            holds, about, wanted = item.passed, named, named == mechanism
        else:
            continue
        sentence = f"{item.test} {item.value:.2f}{_beside(item)}: {'for' if holds else 'against'} {about}"
        if label == "undetermined" or wanted:
            (supports if holds else opposes).append(sentence)
        elif holds and named is not None:
            opposes.append(sentence)  # another mechanism's test passes
        elif not holds and named is None and label in ("memorisation", "heuristics", "mixed"):
            supports.append(sentence)
    return tuple(supports), tuple(opposes)


def _beside(item: Evidence) -> str:
    return "" if item.control is None or item.control != item.control else f" (control {item.control:.2f})"
