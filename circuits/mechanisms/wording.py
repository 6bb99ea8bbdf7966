"""How a verdict says what its evidence is: one sentence for each kind."""

from __future__ import annotations

from circuits.mechanisms.evidence import Evidence


def column_words(columns: Evidence) -> str:
    """What swaps of columns say, and how far a carry reaches."""
    d = columns.details
    cascades = d.get("by_cascade", [])
    shares = ", ".join(f"{row[1]:.0%}" for row in cascades)
    missing = (
        f"columns without the cascade: a carry gets through at most {d.get('reach')} columns that sum to nine"
        if d.get("cascade") == "missing"
        else f"columns with the cascade: a carry gets through {d.get('reach')} columns that sum to nine"
    )
    words = (
        f"{missing} (of sums rich in nines {shares} are right where the longest cascade is 0 to {len(cascades) - 1}; "
        f"by size of the sum accuracy differs by {d.get('size_drop', 0):.0%})"
    )
    if columns.value != columns.value:
        return words
    return (
        f"{words}, and swapping the carry, or the digits, of one column alone through some attention heads gives the "
        f"digit that the column algorithm predicts in at least {columns.value:.1%} of cases for every inner column "
        f"(all heads {columns.control or 0:.0%})"
    )


def against(candidates: dict[str, tuple[bool, str]]) -> str:
    """Why the first of the algorithms that were tested is none."""
    tested = [words for passes, words in candidates.values() if not passes and "not tested" not in words]
    return f"Against an algorithm: {tested[0]}." if tested else ""


def against_ranges(by: dict[str, Evidence]) -> str:
    """How few neurons match ranges of the operands, where that was tested and failed."""
    shapes = by.get("rectangles")
    if shapes is None or shapes.value != shapes.value or shapes.passed:
        return ""
    return f" Against ranges of the operands: {shapes.value:.0%} of neuron importance is in neurons that match one."


def agreement(gap: Evidence | None, slices: Evidence | None) -> str:
    """Whether the held-out block and other slices agree with a rule that holds everywhere."""
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


def range_words(shapes: Evidence) -> str:
    """What rectangles of the operands say."""
    d = shapes.details
    mirrored = f" ({d['n_mirrored']} of them on both orders of two ranges)" if d.get("n_mirrored") else ""
    covered = f"the importance of the most important neurons of layer {d.get('layer')}"
    kept, left = d.get("idealised", float("nan")), d.get("ablated", float("nan"))
    return (
        f"{shapes.value:.0%} of {covered} is in neurons that fire on one range of each operand{mirrored} (renamed "
        f"operands {shapes.control or 0:.0%}); replacing them by exact two-level rectangles keeps accuracy at "
        f"{kept:.0%}, removing them leaves {left:.0%}; {d.get('edge_share', 0):.0%} of their edges (drawn at random "
        f"{d.get('edge_chance', 0):.0%}) lie on a grid of width {d.get('edge_width')} at offset {d.get('edge_offset')}."
    )


def result_words(shapes: Evidence) -> str:
    """What ranges and residues of the result say."""
    d = shapes.details
    return (
        f"{shapes.value:.0%} of the neuron importance of layer {d.get('layer')} is in neurons that match a range or a "
        f"residue of the result (renamed results {shapes.control or 0:.0%}); replacing them by two levels keeps "
        f"accuracy at {d.get('idealised', 0):.0%}, removing them leaves {d.get('ablated', 0):.0%}."
    )


def pair_words(pairs: Evidence) -> str:
    """What neurons of single pairs say."""
    return (
        f"{pairs.details.get('n_pair_neurons')} neurons each fire on one pair of operands alone, and without those "
        f"that know its pair {pairs.value:.0%} of the right answers are lost (neurons of another pair: "
        f"{pairs.control or 0:.0%}): a list of pairs, of unseen ones too."
    )
