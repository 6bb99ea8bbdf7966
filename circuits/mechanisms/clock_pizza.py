"""Sub-label of a Fourier algorithm: is it more like the published clock or the published pizza?"""

from __future__ import annotations

from dataclasses import dataclass

from circuits.mechanisms.evidence import Evidence

SYMMETRIC, ASYMMETRIC = 0.9, 0.5
RELEVANT, IRRELEVANT = 0.5, 0.7
LEARNED = 0.95


@dataclass(frozen=True)
class SubLabel:
    """``clock``, ``pizza`` or ``mixed``, and the sentence that says by what."""

    name: str
    why: str


def clock_or_pizza(items: tuple[Evidence, ...]) -> SubLabel | None:
    """Return the sub-label that the evidence gives; None where tests are missing or the task is not learned.

    ``pizza``: gradient symmetricity at least 0.9, distance irrelevance at most 0.5, and on the best circle the pizza's
    formula fits better; ``clock``: at most 0.5, at least 0.7, and the clock's fits better; else ``mixed``. The
    thresholds are ours and lie between the published clock (0.33, 0.85) and pizza (0.99, 0.17), for which the paper
    gives none.

    Source: Zhong et al. 2023 (arXiv 2306.17844), sections 4.1 to 4.3.
    Fails when: taken for more than a description. Both kinds add vectors up in their first layer, and networks lie on a
    continuum between the two.
    """
    by = {e.test: e for e in items}
    needed = ("gradient-symmetricity", "distance-irrelevance", "isolated-circles")
    if not set(needed) <= set(by):
        return None
    symmetricity, irrelevance, circles = (by[name] for name in needed)
    if not symmetricity.number("accuracy") >= LEARNED:
        return None
    if symmetricity.value >= SYMMETRIC and irrelevance.value <= RELEVANT and circles.value > 0:
        name = "pizza"
    elif symmetricity.value <= ASYMMETRIC and irrelevance.value >= IRRELEVANT and circles.value < 0:
        name = "clock"
    else:
        name = "mixed"
    why = (
        f"Of the Fourier kind it is {name} (gradient symmetricity {symmetricity.value:.2f}, distance irrelevance "
        f"{irrelevance.value:.2f}, pizza less clock on the best circle {circles.value:+.2f}), a description and no "
        "verdict."
    )
    return SubLabel(name, why)
