"""Colours: what can be seen on a card of each theme, and what nothing but a verdict may have."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

from circuits import report
from circuits._style import ON_DARK, PAGES, SERIES, SPLIT_COLOURS, VERDICT_COLOURS, VERDICT_GLYPHS, template
from circuits.discovery.figures import NEUTRAL, OPPOSES, RANKINGS, SUPPORTS
from circuits.mechanisms.evidence import LABELS

SHEET = Path(report.__file__).parent / "report.css"
OTHERS = {*SERIES, *SPLIT_COLOURS.values(), SUPPORTS, OPPOSES, NEUTRAL, *(colour for _, colour in RANKINGS.values())}
THEMES = [
    (PAGES["light"], {colour: colour for colour in ON_DARK}),
    (PAGES["dark"], ON_DARK),
]


def linear(colour: str) -> list[float]:
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: of relative luminances, from 1 to 21."""
    weights = (0.2126, 0.7152, 0.0722)
    dark, light = sorted(sum(w * c for w, c in zip(weights, linear(x), strict=True)) for x in (first, second))
    return (light + 0.05) / (dark + 0.05)


def oklab(colour: str) -> tuple[float, ...]:
    """Björn Ottosson 2020, A perceptual color space for image processing."""
    to_cones = (
        (0.4122214708, 0.5363325363, 0.0514459929),
        (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005),
    )
    to_lab = (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
    cones = [math.cbrt(sum(w * c for w, c in zip(row, linear(colour), strict=True))) for row in to_cones]
    return tuple(sum(w * c for w, c in zip(row, cones, strict=True)) for row in to_lab)


def test_contrast_and_distance_are_those_of_known_colours() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#9ca3af", "#ffffff") == pytest.approx(2.54, abs=0.01)
    assert oklab("#ffffff") == pytest.approx((1, 0, 0), abs=1e-4)


def test_every_label_has_a_colour_and_a_sign() -> None:
    assert tuple(VERDICT_COLOURS) == tuple(VERDICT_GLYPHS) == LABELS
    assert set(ON_DARK) == {*VERDICT_COLOURS.values(), *OTHERS}


@pytest.mark.parametrize(("page", "shown"), THEMES, ids=list(PAGES))
def test_every_colour_stands_out_from_its_ground(page, shown) -> None:
    for colour in shown.values():
        assert min(contrast(colour, page["card"]), contrast(colour, page["bg"])) >= 3, colour
    for text in ("ink", "soft", "accent"):
        assert min(contrast(page[text], page["card"]), contrast(page[text], page["bg"])) >= 4.5, text
    for colour in VERDICT_COLOURS.values():
        assert contrast(page["on-verdict"], shown[colour]) >= 4.5, colour


@pytest.mark.parametrize(("page", "shown"), THEMES, ids=list(PAGES))
def test_a_verdicts_colour_means_nothing_else(page, shown) -> None:
    verdicts = [shown[colour] for colour in VERDICT_COLOURS.values()]
    others = [*(shown[colour] for colour in OTHERS), *page.values()]
    for verdict, other in [*itertools.product(verdicts, others), *itertools.combinations(verdicts, 2)]:
        # a just noticeable difference is about 0.02
        assert math.dist(oklab(verdict), oklab(other)) >= 0.08, (verdict, other)
    assert set(template().layout.colorway) <= OTHERS


def test_the_style_sheet_takes_its_colours_from_the_house_style() -> None:
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", SHEET.read_text(encoding="utf-8")) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", SHEET.read_text(encoding="utf-8"))) - {"verdict", "edge", "columns"}
    assert used <= set(PAGES["light"]) and set(PAGES["light"]) == set(PAGES["dark"])
