"""Colours of the pages: the house style as CSS, and as what a figure is drawn in."""

from __future__ import annotations

from circuits._style import BLUE, GREY, NAVY, ON_DARK, PAGES, RED, VERDICT_COLOURS
from circuits.discovery.figures import NEUTRAL, OPPOSES, RANKINGS, SUPPORTS

HOUSE = {SUPPORTS: BLUE, OPPOSES: RED, NEUTRAL: GREY, RANKINGS["absolute"][1]: NAVY}
"""What stands on a page for the colours of circuits: those are drawn for white paper, and one is too light for it."""


def css() -> str:
    """Return the variables of both themes: what the system asks for, unless ``data-theme`` of the page says otherwise.

    Without any script the page is dark where the system is.
    """
    verdicts = {
        "light": VERDICT_COLOURS,
        "dark": {label: ON_DARK[colour] for label, colour in VERDICT_COLOURS.items()},
    }
    light, dark = (
        f"color-scheme: {theme}; " + " ".join(f"--{k}: {v};" for k, v in {**page, **verdicts[theme]}.items())
        for theme, page in PAGES.items()
    )
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {dark} }} }}\n"
        f":root[data-theme=dark] {{ {dark} }}\n"
    )


def in_house_colours(figure: str) -> str:
    """Return a figure's JSON with every colour one of the house's."""
    for theirs, ours in HOUSE.items():
        figure = figure.replace(f'"{theirs}"', f'"{ours}"')
    return figure
