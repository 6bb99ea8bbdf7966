"""Colours of the pages: the house style as CSS."""

from __future__ import annotations

from circuits._style import ON_DARK, PAGES, VERDICT_COLOURS, WORLD_MODEL_COLOURS


def css() -> str:
    """Return the variables of both themes: what the system asks for, unless ``data-theme`` of the page says otherwise.

    Without any script the page is dark where the system is.
    """
    colours = {**VERDICT_COLOURS, **WORLD_MODEL_COLOURS}
    verdicts = {"light": colours, "dark": {label: ON_DARK[colour] for label, colour in colours.items()}}
    light, dark = (
        f"color-scheme: {theme}; " + " ".join(f"--{k}: {v};" for k, v in {**page, **verdicts[theme]}.items())
        for theme, page in PAGES.items()
    )
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {dark} }} }}\n"
        f":root[data-theme=dark] {{ {dark} }}\n"
    )
