"""How the commands print what they found: tables for people, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from circuits.worldmodels import Assessment


def text(frame: pd.DataFrame) -> str:
    """Return a table as aligned text."""
    numbers = {name: f"{{:.{3}f}}".format for name in frame.select_dtypes("number") if frame[name].dtype.kind == "f"}
    columns: Any = numbers
    return frame.to_string(index=False, formatters=columns, na_rep="-", max_colwidth=70)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table as a list of its rows, fit for JSON."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return rows


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_assessment(found: Assessment, *, out: Path | None, as_json: bool) -> None:
    """Print the verdict on a game, and save it where a folder is given."""
    if out is not None:
        found.save(out)
    frame = found.to_frame().reset_index()
    if as_json:
        print_json({"label": found.label, "why": found.why, "scores": records(frame), "controls": found.controls})
        return
    print(f"{found.label}\n{found.why}\n")
    print(text(frame))
    print(f"\n{found.controls}\nrule {found.rule}")
    if found.uninformative:
        print(f"not told apart from its controls on this game: {', '.join(found.uninformative)}")
