"""A job for tests of the executor in a module of its own, which a worker imports in no time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sleeper:
    """A job that says which process does it, and never ends."""

    id: str
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}.log"

    def __call__(self) -> None:
        part = self.folder / "part"
        part.write_text(str(os.getpid()))
        part.rename(self.folder / f"{self.id}.pid")
        time.sleep(600)
