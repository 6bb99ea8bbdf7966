"""Typed errors: each says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CircuitsError(Exception):
    """Base of every error that a user can cause; the command line prints it as one line and exits with 2."""


class BadInput(CircuitsError, ValueError):
    """An argument has a value that cannot be used."""


class UnknownName(BadInput):
    """A name is not in the table that it was looked up in."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(known)
        # a name may come from JSON, TOML or a notebook, and need not be a text
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


class CorruptRun(CircuitsError):
    """A stored file is missing, truncated or altered."""


class IncompatibleRun(CircuitsError):
    """A stored run was written in another format version or with another configuration."""


class StorageError(CircuitsError, OSError):
    """A directory cannot be written, or not be looked into."""


class Diverged(CircuitsError):
    """Training met a loss or a weight that is not finite."""


class UnsupportedModel(CircuitsError, TypeError):
    """A model lacks what an analyzer needs, or has a part that it cannot represent exactly."""
