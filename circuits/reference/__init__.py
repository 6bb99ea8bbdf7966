"""Reference models: networks whose mechanism is known by construction, to check mechanism tests on.

Each is a ``circuits.model.Transformer`` with the interface of a trained one::

    model, task, truth = circuits.reference.build("fourier-pizza", seed=0, p=53)

``transform`` changes a model in ways that must not change the verdict on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from circuits.errors import UnknownName
from circuits.reference.columns import columns
from circuits.reference.compiled_addition import compiled_addition, compiled_sizes
from circuits.reference.digit_columns import digit_columns
from circuits.reference.digit_memoriser import digit_memoriser
from circuits.reference.fourier_clock import fourier_clock
from circuits.reference.fourier_pizza import fourier_pizza
from circuits.reference.fourier_plain import fourier_plain
from circuits.reference.hybrid import hybrid
from circuits.reference.mlp_network import MlpNetwork
from circuits.reference.nuisances import NUISANCES, renamed_tokens, transform
from circuits.reference.number_line import number_line
from circuits.reference.pair_memoriser import pair_memoriser
from circuits.reference.players import PLAYERS, player
from circuits.reference.random_init import random_init
from circuits.reference.range_lookup import range_lookup
from circuits.reference.result_range_bag import result_range_bag
from circuits.reference.trained import banded, banded_twin, interchange_trained
from circuits.reference.wiring import Reference

REFERENCES: dict[str, Callable[..., Reference]] = {
    "columns": columns,
    "compiled-addition": compiled_addition,
    "digit-columns": digit_columns,
    "digit-memoriser": digit_memoriser,
    "fourier-clock": fourier_clock,
    "fourier-pizza": fourier_pizza,
    "fourier-plain": fourier_plain,
    "hybrid": hybrid,
    "number-line": number_line,
    "pair-memoriser": pair_memoriser,
    "random-init": random_init,
    "range-lookup": range_lookup,
    "result-range-bag": result_range_bag,
}
"""Every model that is built from a seed, by its name."""
TRAINED: dict[str, Callable[..., Reference]] = {
    "banded": banded,
    "banded-twin": banded_twin,
    "interchange-trained": interchange_trained,
}
"""Every family of networks that were trained to a mechanism and are stored, by its name."""

__all__ = [
    "NUISANCES",
    "PLAYERS",
    "REFERENCES",
    "TRAINED",
    "MlpNetwork",
    "Reference",
    "banded",
    "banded_twin",
    "build",
    "columns",
    "compiled_addition",
    "compiled_sizes",
    "digit_columns",
    "digit_memoriser",
    "fourier_clock",
    "fourier_pizza",
    "fourier_plain",
    "hybrid",
    "interchange_trained",
    "number_line",
    "pair_memoriser",
    "player",
    "random_init",
    "range_lookup",
    "renamed_tokens",
    "result_range_bag",
    "transform",
]


def build(name: str, *, seed: int = 0, **sizes: object) -> Reference:
    """Return a reference model with its task and what is true of it: ``model, task, truth``.

    Args:
        name: a key of ``REFERENCES`` or ``TRAINED``; underscores are accepted for hyphens.
        seed: seed of the construction's random choices; the same seed gives the same weights.
        sizes: keyword arguments of the construction, such as ``p`` or ``n``.

    Raises:
        UnknownName: no reference model has that name, or it has no such size.
        BadInput: a size has a value that cannot be used.
    """
    key = name.replace("_", "-")
    families = REFERENCES | TRAINED
    if key not in families:
        raise UnknownName("reference model", name, families)
    known = [parameter for parameter in inspect.signature(families[key]).parameters if parameter != "seed"]
    for size in sizes:
        if size not in known:
            raise UnknownName(f"size of {key}", size, known)
    return families[key](seed=seed, **sizes)
