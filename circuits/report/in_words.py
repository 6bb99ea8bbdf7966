"""What a figure shows, in sentences, for who cannot see it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from circuits.report.provenance import counted

LISTED = 8
"""Bars, edges or pictures that are named one by one, at most."""


def in_words(figure: Any) -> str:
    """Return the axes of a plotly figure and, of each of its traces, the numbers that a reader would take from it.

    A line is said by its ends and extremes, marks one by one, bars and edges by the largest, a heat map by its range.
    """
    titles = {"across": figure.layout.xaxis.title.text, "up": figure.layout.yaxis.title.text}
    axes = [f"{side}: {_plain(title)}" for side, title in titles.items() if title]
    said = [f"{'; '.join(axes)}." if axes else ""]
    said += [_trace(trace) for trace in figure.data if trace.type != "heatmap" and trace.name]
    said += [_maps(figure), _edges(figure)]
    return " ".join(filter(None, said))


def _plain(text: str) -> str:
    """Text without its markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).strip()


def _trace(trace: Any) -> str:
    """One named trace."""
    name, x, y = _plain(trace.name), _values(trace.x), _values(trace.y)
    if not x or len(x) != len(y):
        return ""
    if trace.type == "bar":
        numbers = y if _numeric(y) else x
        if not _numeric(numbers):
            return ""
        places = x if numbers is y else y
        order = sorted(range(len(numbers)), key=lambda i: -abs(numbers[i]))[:LISTED]
        return f"{name}, the largest of {len(numbers)}: {_listed((places[i], numbers[i]) for i in order)}."
    if any(isinstance(value, str) for value in y):  # one mark for each name on the axis
        return f"{name}: {_listed(zip(y, x, strict=True))}."
    known = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None and np.isfinite(b)]
    if not known:
        return ""
    if isinstance(known[0][0], str) or len(known) <= 3:
        return f"{name}: {_listed(known)}."
    (first, start), (last, end) = known[0], known[-1]
    heights = [b for _, b in known]
    return (
        f"{name}: {_number(start)} at {_number(first)}, {_number(end)} at {_number(last)}, "
        f"between {_number(min(heights))} and {_number(max(heights))}."
    )


def _maps(figure: Any) -> str:
    """Heat maps, with the titles that stand above them."""
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    if not maps:
        return ""
    ranges = [np.asarray(trace.z, dtype=float) for trace in maps]
    named = [_plain(note.text or "") for note in figure.layout.annotations]
    shape = " by ".join(map(str, ranges[0].shape))
    said = [
        f"{title or 'values'} from {_number(np.nanmin(values))} to {_number(np.nanmax(values))}"
        for title, values in zip([*named, *[""] * len(maps)], ranges, strict=False)
    ]
    return f"{counted(len(maps), 'heat map')} of {shape} cells: {'; '.join(said[:LISTED])}."


def _edges(figure: Any) -> str:
    """Edges of a circuit: unnamed lines, each with a text whose first two lines are its name and its score."""
    texts = [
        trace.text[0] for trace in figure.data if not trace.name and isinstance(trace.text, tuple | list) and trace.text
    ]
    scored = [" ".join(_plain(part) for part in text.split("<br>")[:2]) for text in texts if "score" in text]
    if not scored:
        return ""
    sizes = [abs(float(text.split("score ")[1].split()[0])) for text in scored]
    order = sorted(range(len(scored)), key=lambda i: -sizes[i])[:LISTED]
    return f"The largest of {counted(len(scored), 'edge')}: {'; '.join(scored[i] for i in order)}."


def _values(of: Any) -> list[Any]:
    """A trace's tuple or array as Python's own numbers and strings."""
    return [] if of is None else np.asarray(of, dtype=object).tolist()


def _numeric(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _listed(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Names with their values, or values with their places."""
    return ", ".join(
        f"{place} {_number(value)}" if isinstance(place, str) else f"{_number(value)} at {_number(place)}"
        for place, value in pairs
    )


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
