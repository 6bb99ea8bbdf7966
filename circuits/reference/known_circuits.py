"""Models whose circuit is known: which edges do the work, to check discovery methods on.

Three kinds, by how they are made: programs compiled to weights (``compiled_programs``), models trained until swapping
a component's output swaps a known variable (``interchange_models``; those whose names begin with ``hard`` are built so
that discovery methods differ), and a network without any nonlinearity, where first-order scores are exact
(``linear_network``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from circuits.errors import UnknownName
from circuits.model import Transformer
from circuits.reference.causal_models import CAUSAL_MODELS
from circuits.reference.compiled_programs import PROGRAMS, compiled_program
from circuits.reference.interchange_models import interchange_model
from circuits.reference.linear_network import linear_network
from circuits.tasks.base import Pairs

Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """A model, pairs that tell its parts apart, and its true edges as (source, reader) of its graph."""

    name: str
    model: Transformer
    pairs: Pairs
    program: frozenset[Edge]
    """The edges that the mechanism uses."""
    active: frozenset[Edge]
    """Those of them that carry something else on the corrupt inputs: what patching with these pairs can find."""
    components: bool = False
    """Whether the truth is of whole heads, so that a head's q, k and v count as one edge."""
    details: Mapping[str, Any] = field(default_factory=dict)


_Parts = tuple[Transformer, Pairs, frozenset[Edge], frozenset[Edge], bool, dict[str, Any]]

KNOWN_CIRCUITS: dict[str, Callable[..., _Parts]] = {
    **{f"program-{name}": partial(compiled_program, name) for name in PROGRAMS},
    **{
        name if name.startswith("hard-") else f"interchange-{name}": partial(interchange_model, name)
        for name in CAUSAL_MODELS
    },
    "linear": linear_network,
}
"""Every known circuit by its name: what makes its model, pairs, edges and details from a seed."""


def build(name: str, *, n_pairs: int = 64, seed: int = 0) -> KnownCircuit:
    """Return a model with its known circuit.

    Args:
        name: A key of ``KNOWN_CIRCUITS``; underscores are accepted for hyphens.
        n_pairs: Number of pairs of clean and corrupt inputs.
        seed: Of the pairs.

    Raises:
        UnknownName: no known circuit has that name.
    """
    key = name.replace("_", "-")
    if key not in KNOWN_CIRCUITS:
        raise UnknownName("known circuit", name, KNOWN_CIRCUITS)
    return KnownCircuit(key, *KNOWN_CIRCUITS[key](n_pairs=n_pairs, seed=seed))


def describe(name: str) -> str:
    """Return in a line what a known circuit's model computes, and how it was made."""
    kind, _, rest = name.partition("-")
    if kind == "program":
        return f"compiled from a program: {PROGRAMS[rest]}"
    if kind == "interchange":
        return f"trained by interchange interventions: {CAUSAL_MODELS[rest].about}"
    if kind == "hard":
        return f"trained by interchange interventions so that methods differ: {CAUSAL_MODELS[name].about}"
    return "linear: attention-only, with uniform attention and no norm"
