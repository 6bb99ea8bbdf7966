"""A study: a grid of task x recipe x seed, trained and analysed run by run, with its table and report."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from circuits.study.study import Study as Study
    from circuits.study.study import run as run

_FOLDER = Path(__file__).parent / "presets"

PRESETS: dict[str, Path] = {
    "arithmetic-quick": _FOLDER / "arithmetic-quick.toml",
    "arithmetic": _FOLDER / "arithmetic.toml",
    "range-codes": _FOLDER / "range-codes.toml",
    "games": _FOLDER / "games.toml",
    "games-smoke": _FOLDER / "games-smoke.toml",
    "players": _FOLDER / "players.toml",
    "smoke": _FOLDER / "smoke.toml",
}

__all__ = ["PRESETS", "Study", "read_toml", "run"]


def read_toml(preset_or_toml: str | Path) -> str:
    """The TOML of a preset (by name) or of a file (whose name ends in .toml).

    Raises:
        UnknownName: no preset has that name.
        BadInput: the file cannot be read.
    """
    name = str(preset_or_toml)
    if name.endswith(".toml"):
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{name}: cannot be read as a study file ({error})") from error
    if name not in PRESETS:
        raise UnknownName("preset (a file of your own must end in .toml)", name, PRESETS)
    return PRESETS[name].read_text(encoding="utf-8")


def __getattr__(name: str) -> Any:
    # late, so that the command line can start the fork server before it loads torch itself
    if name in ("Study", "run"):
        return getattr(importlib.import_module("circuits.study.study"), name)
    raise AttributeError(f"module 'circuits.study' has no attribute {name!r}")
