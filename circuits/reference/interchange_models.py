"""Small transformers trained so that chosen components carry chosen variables, and no other component matters.

``python -m circuits.reference.interchange_models`` trains them anew into the files that come with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.errors import BadInput, UnknownName
from circuits.model import Hook, ModelConfig, Transformer, load, save
from circuits.reference.causal_models import CAUSAL_MODELS, INNER, CausalModel, Place
from circuits.reference.weight_edges import on_a_path, source_changes
from circuits.tasks.base import Pairs

Edge = tuple[str, str]
FOLDER = "interchange"
N_LAYERS, N_HEADS = 2, 4
BATCH, LEARNING_RATE = 256, 2e-3


def load_interchange_model(name: str) -> Transformer:
    """Return a trained model from the file that comes with the package.

    Args:
        name: A key of ``CAUSAL_MODELS``.

    Raises:
        UnknownName: there is no causal model of that name.
    """
    if name not in CAUSAL_MODELS:
        raise UnknownName("causal model", name, CAUSAL_MODELS)
    with resources.as_file(resources.files("circuits.reference") / FOLDER / f"{name}.safetensors") as path:
        return load(path)


def interchange_model(
    name: str, *, n_pairs: int = 64, seed: int = 0
) -> tuple[Transformer, Pairs, frozenset[Edge], frozenset[Edge], bool, dict[str, Any]]:
    """Return a trained model, pairs of inputs with different answers, and the edges of its causal model.

    Edges are between whole components: a head's q, k and v are all true where the head reads the source. The position
    embedding's are true and never active, as both inputs have the same positions.

    Args:
        name: A key of ``CAUSAL_MODELS``.
        n_pairs: Number of pairs.
        seed: Of the pairs.
    """
    if n_pairs < 1:
        raise BadInput(f"n_pairs = {n_pairs}: expected at least 1")
    causal, model = CAUSAL_MODELS[name], load_interchange_model(name)
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = (causal.sample(16 * n_pairs + 64, generator) for _ in range(2))
    correct, wrong = (causal.run(tokens, {})["answer"] for tokens in (clean, corrupt))
    rows = (correct != wrong).nonzero().flatten()[:n_pairs]
    position = torch.full((len(rows),), clean.shape[1] - 1)
    pairs = Pairs(clean[rows], corrupt[rows], position, correct[rows], wrong[rows], "every token")
    edges = on_a_path({edge for source, target in causal.edges for edge in _into(source, target)})
    changes = source_changes(model, pairs)
    active = on_a_path({(source, reader) for source, reader in edges if float(changes[source].abs().max()) > 1e-4})
    return model, pairs, edges, active, True, {"made": "interchange intervention training"}


def interchange_accuracy(model: Transformer, name: str, *, n: int = 1024, seed: int = 1) -> dict[str, float]:
    """Return how often the model answers as its causal model does after the same swap.

    One entry per variable; ``"task"``, without any swap; ``"others"``, the least over all components that carry
    nothing, whose swap must change nothing; ``"all others"``, with all of those swapped at once.

    Source: Geiger et al. 2022, Inducing Causal Structure for Interpretable Neural Networks, arXiv 2112.00826,
        section 2; Gupta et al. 2024, InterpBench, arXiv 2407.14494, section 3 (other components).
    """
    causal = CAUSAL_MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    base, source = (causal.sample(n, generator) for _ in range(2))
    with torch.no_grad():
        stored = _outputs(model, source)

        def right(places: Sequence[Place], expected: Tensor) -> float:
            return float((_swapped(model, base, stored, places).argmax(-1) == expected).double().mean())

        plain, others = causal.run(base, {})["answer"], other_places(name)
        out = {"task": right([], plain)}
        for variable, place in causal.places.items():
            out[variable] = right([place], _expected(causal, base, source, variable))
        out["others"] = min(right([place], plain) for place in others)
        out["all others"] = right(others, plain)
    return out


def other_places(name: str) -> list[Place]:
    """Return every head and MLP, at the positions at which it carries nothing."""
    causal = CAUSAL_MODELS[name]
    length = causal.sample(1, torch.Generator().manual_seed(0)).shape[1]
    used: dict[str, set[int]] = {}
    for component, positions in (*causal.places.values(), *INNER.get(name, ())):
        used.setdefault(component, set()).update(positions)
    names = [f"a{i}.h{h}" for i in range(N_LAYERS) for h in range(N_HEADS)] + [f"m{i}" for i in range(N_LAYERS)]
    places = ((c, tuple(p for p in range(length) if p not in used.get(c, set()))) for c in names)
    return [place for place in places if place[1]]


def train_interchange_model(
    name: str, *, seed: int = 0, steps: int | None = None, progress: bool = True
) -> Transformer:
    """Return a transformer trained to its causal model by interchange interventions.

    Every step sums three cross-entropies: on the task; on the causal model's answer after one variable is swapped for
    that of another input, where the network's component is swapped alike; and on the unchanged answer where some, or
    all, of the other components are swapped.

    Args:
        name: A key of ``CAUSAL_MODELS``.
        seed: Of weights and data.
        steps: Updates; None: as many as the causal model says.
        progress: Whether to show a bar.

    Source: Geiger et al. 2022, arXiv 2112.00826; the third term is the strict variant of Gupta et al. 2024,
        arXiv 2407.14494, section 3.
    """
    causal = CAUSAL_MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    length = causal.sample(1, generator).shape[1]
    config = ModelConfig(
        d_vocab=causal.d_vocab, d_vocab_out=causal.d_vocab_out, n_ctx=length, n_layers=N_LAYERS, d_model=32,
        n_heads=N_HEADS, d_mlp=64, causal=True,
    )  # fmt: skip
    model = Transformer(config, seed=seed)
    steps = steps or causal.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    variables, others = itertools.cycle(causal.places), other_places(name)
    for _ in tqdm(range(steps), desc=f"training {name}", unit="step", disable=not progress):
        base, source = (causal.sample(BATCH, generator) for _ in range(2))
        stored, variable = _outputs(model, source), next(variables)
        plain = causal.run(base, {})["answer"]
        loss = F.cross_entropy(_swapped(model, base, stored, []), plain)
        swapped = _swapped(model, base, stored, [causal.places[variable]])
        loss = loss + F.cross_entropy(swapped, _expected(causal, base, source, variable))
        drawn = torch.rand(len(others), generator=generator) < torch.rand((), generator=generator)
        some = [place for place, chosen in zip(others, drawn.tolist(), strict=True) if chosen]
        for places in (some, others):
            loss = loss + 0.5 * F.cross_entropy(_swapped(model, base, stored, places), plain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _expected(causal: CausalModel, base: Tensor, source: Tensor, variable: str) -> Int[Tensor, " batch"]:
    return causal.run(base, {variable: causal.run(source, {})[variable]})["answer"]


def _outputs(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """What every head (before its output weights) and MLP gives, with gradients."""
    store: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, *, hook: Any) -> None:
            store[name] = tensor

        return hook

    names = [f"blocks.{i}.{part}" for i in range(N_LAYERS) for part in ("attn.hook_z", "hook_mlp_out")]
    with model.hooks(fwd_hooks=[(name, keep(name)) for name in names]):
        model(tokens)
    return store


def _swapped(
    model: Transformer, tokens: Int[Tensor, "batch pos"], stored: dict[str, Tensor], places: Sequence[Place]
) -> Float[Tensor, "batch d_vocab_out"]:
    """The logits at the last position, with components' outputs at some positions those of another run."""
    hooks: list[Hook] = []
    for component, positions in places:
        layer, _, head = component[1:].partition(".h")
        name = f"blocks.{layer}.attn.hook_z" if head else f"blocks.{layer}.hook_mlp_out"
        where = (slice(None), list(positions), int(head)) if head else (slice(None), list(positions))
        hooks.append((name, _edit(stored[name], where)))
    with model.hooks(fwd_hooks=hooks):
        return model(tokens)[:, -1]


def _edit(stored: Tensor, where: tuple[Any, ...]) -> Callable[..., Tensor]:
    def hook(tensor: Tensor, *, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[where] = stored[where]
        return tensor

    return hook


def _into(source: str, target: str) -> Iterator[Edge]:
    readers = [f"{target}.{kind}" for kind in "qkv"] if target.startswith("a") else [target]
    yield from ((source, reader) for reader in readers)


def main(names: Sequence[str] = ()) -> None:
    """Train every model, or some, and store it with the package's files."""
    torch.set_num_threads(1)
    folder = Path(__file__).parent / FOLDER
    folder.mkdir(exist_ok=True)
    for name in names or CAUSAL_MODELS:
        model = train_interchange_model(name)
        save(model, folder / f"{name}.safetensors")
        print(name, {key: round(value, 3) for key, value in interchange_accuracy(model, name).items()})


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
