"""An untrained network."""

from __future__ import annotations

from circuits.model import ModelConfig, Transformer
from circuits.reference.wiring import Reference
from circuits.tasks import Addition, ModularAddition


def random_init(*, seed: int = 0, p: int = 53, n: int | None = None, d_model: int = 64) -> Reference:
    """Return a network with random weights: accuracy at chance.

    A planted negative for every mechanism: whatever a test finds here, it finds in noise.

    Args:
        seed: draws the weights.
        p: the prime modulus, where the task is modular addition.
        n: if given, the task is plain addition of numbers below n instead.
        d_model: width; four heads and 4 d_model neurons.

    Raises:
        BadInput: a size is out of range.

    Source: the initialisation of TransformerLens's legacy ``HookedTransformer``, N(0, 0.8 / sqrt(d_model)).
    """
    task = ModularAddition(p=p) if n is None else Addition(n=n, block=min(10, n // 5))
    config = ModelConfig(d_vocab=task.d_vocab, n_ctx=task.n_ctx, d_model=d_model)
    return Reference(Transformer(config, seed=seed).eval(), task, "not-learned")
