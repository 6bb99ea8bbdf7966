"""A study: a grid of task x recipe x seed, trained and analysed run by run, with its table and report."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.study.study import Study as Study
    from circuits.study.study import run as run

_FOLDER = Path(__file__).parent / "presets"

PRESETS: dict[str, Path] = {
    "arithmetic-quick": _FOLDER / "arithmetic-quick.toml",
    "arithmetic": _FOLDER / "arithmetic.toml",
    "smoke": _FOLDER / "smoke.toml",
}

__all__ = ["PRESETS", "Study", "run"]


def __getattr__(name: str) -> Any:
    # run starts the fork server before it loads torch itself, so that both load it at the same time
    if name in ("Study", "run"):
        return getattr(importlib.import_module("circuits.study.study"), name)
    raise AttributeError(f"module 'circuits.study' has no attribute {name!r}")
