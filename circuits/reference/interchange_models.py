"""Small transformers trained so that chosen components carry chosen variables, and no other component matters.

``python -m circuits.reference.interchange_models [NAME ...]`` trains them anew into the files that come with the
package; a model takes one to four minutes on one core.
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
Swap = tuple[Place, Tensor | None]
"""A place whose output is moved to that of another run, and each input's share of the way; None: all of it."""
FOLDER = "interchange"
N_HEADS = 4
BATCH, LEARNING_RATE = 256, 2e-3
SIZE = 4.0
"""What strict training fixes the logits to: this at an answer, and minus this elsewhere."""
NO_STEP, STEP = 0.4, 0.6
"""Parts of the way up to which a flat variable stays as it is, and from which on it is swapped."""


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
    values = [causal.run(tokens, {}) for tokens in (clean, corrupt)]
    correct, wrong = (known["answer"] for known in values)
    differ = correct != wrong if causal.differ is None else causal.differ(*values)
    rows = differ.nonzero().flatten()[:n_pairs]
    position = torch.full((len(rows),), clean.shape[1] - 1)
    pairs = Pairs(clean[rows], corrupt[rows], position, correct[rows], wrong[rows], "every token")
    edges, needed = (
        on_a_path({edge for source, target in some for edge in _into(source, target)})
        for some in (causal.edges, causal.edges if causal.needed is None else causal.needed)
    )
    changes = source_changes(model, pairs)
    active = on_a_path({(source, reader) for source, reader in needed if float(changes[source].abs().max()) > 1e-4})
    return model, pairs, edges, active, True, {"made": "interchange intervention training"}


def interchange_accuracy(model: Transformer, name: str, *, n: int = 1024, seed: int = 1) -> dict[str, float]:
    """Return how often the model answers as its causal model does after the same swap.

    One entry per variable; ``"task"``, without any swap; ``"others"``, the least over all components that carry
    nothing, whose swap must change nothing; ``"all others"``, with all of those swapped at once; and, of a strict
    causal model, ``"sets"``, with sets of variables swapped, those that are flat by parts of the way.

    Source: Geiger et al. 2022, Inducing Causal Structure for Interpretable Neural Networks, arXiv 2112.00826,
        section 2; Gupta et al. 2024, InterpBench, arXiv 2407.14494, section 3 (other components).
    """
    causal = CAUSAL_MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    base, source = (causal.sample(n, generator) for _ in range(2))
    with torch.no_grad():
        stored = _outputs(model, source)

        def right(swaps: Sequence[Swap], expected: Tensor) -> float:
            return agreement(_edits(stored, swaps), expected)

        def agreement(edits: Sequence[Hook], expected: Tensor) -> float:
            logits = _edited(model, base, edits)[:, : causal.n_answers]
            return float((logits.argmax(-1) == expected).double().mean())

        plain, others = causal.run(base, {})["answer"], other_places(name)
        out = {"task": right([], plain)}
        for variable, place in causal.places.items():
            out[variable] = right([(place, None)], _expected(causal, base, source, variable))
        out["others"] = min(right([(place, None)], plain) for place in others)
        out["all others"] = right([(place, None) for place in others], plain)
        if causal.strict:
            swapped, held, expected = _drawn_swaps(causal, base, source, generator)
            edits = [*_edits(stored, swapped), *_edits(_outputs(model, base), held)]
            out["sets"] = agreement(edits, expected["answer"])
    return out


def other_places(name: str) -> list[Place]:
    """Return every head and MLP, at the positions at which it carries nothing."""
    causal = CAUSAL_MODELS[name]
    length = causal.sample(1, torch.Generator().manual_seed(0)).shape[1]
    used: dict[str, set[int]] = {}
    for component, positions in (*causal.places.values(), *INNER.get(name, ())):
        used.setdefault(component, set()).update(positions)
    names = [f"a{i}.h{h}" for i in range(causal.n_layers) for h in range(N_HEADS)]
    names += [f"m{i}" for i in range(causal.n_layers)]
    places = ((c, tuple(p for p in range(length) if p not in used.get(c, set()))) for c in names)
    return [place for place in places if place[1]]


def train_interchange_model(
    name: str, *, seed: int = 0, steps: int | None = None, progress: bool = True
) -> Transformer:
    """Return a transformer trained to its causal model by interchange interventions.

    Every step sums three cross-entropies: on the task; on the causal model's answer after one variable is swapped for
    that of another input, where the network's component is swapped alike; and on the unchanged answer where some, or
    all, of the other components are swapped.

    Strict training has squared errors from fixed logits instead, so that what changes no answer must change no logit.
    Every input draws a set of variables to swap, some of the rest to hold at what they are without any swap, and a set
    of other components to swap or to hold. Of a flat variable, half of the inputs go a part of the way only: up to 0.4
    of it where it is not swapped, and from 0.6 on where it is.

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
        d_vocab=causal.d_vocab, d_vocab_out=causal.d_vocab_out, n_ctx=length, n_layers=causal.n_layers,
        d_model=causal.d_model, n_heads=N_HEADS, d_mlp=causal.d_mlp, normalization=causal.normalization,
        causal=True,
    )  # fmt: skip
    model = Transformer(config, seed=seed)
    steps = steps or causal.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    variables, others = itertools.cycle(causal.places), other_places(name)
    for _ in tqdm(range(steps), desc=f"training {name}", unit="step", disable=not progress):
        base, source = (causal.sample(BATCH, generator) for _ in range(2))
        stored = _outputs(model, source)
        if causal.strict:
            swapped, held, expected = _drawn_swaps(causal, base, source, generator)
            others_swapped, others_held = _drawn_others(others, generator)
            with torch.no_grad():
                own = _outputs(model, base)
            edits = [*_edits(stored, swapped + others_swapped), *_edits(own, held + others_held)]
            loss = F.mse_loss(_edited(model, base, edits), _fixed_logits(causal, expected))
        else:
            loss = _cross_entropies(causal, model, base, source, stored, next(variables), others, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _cross_entropies(
    causal: CausalModel, model: Transformer, base: Tensor, source: Tensor, stored: dict[str, Tensor], variable: str,
    others: Sequence[Place], generator: torch.Generator,
) -> Float[Tensor, ""]:  # fmt: skip
    """The loss where one variable is swapped, and in other runs some or all of the other components."""
    plain = causal.run(base, {})["answer"]
    loss = F.cross_entropy(_edited(model, base, []), plain)
    swapped = _edited(model, base, _edits(stored, [(causal.places[variable], None)]))
    loss = loss + F.cross_entropy(swapped, _expected(causal, base, source, variable))
    drawn = torch.rand(len(others), generator=generator) < torch.rand((), generator=generator)
    some = [place for place, chosen in zip(others, drawn.tolist(), strict=True) if chosen]
    for places in (some, others):
        logits = _edited(model, base, _edits(stored, [(place, None) for place in places]))
        loss = loss + 0.5 * F.cross_entropy(logits, plain)
    return loss


def _drawn_swaps(
    causal: CausalModel, base: Tensor, source: Tensor, generator: torch.Generator
) -> tuple[list[Swap], list[Swap], dict[str, Tensor]]:
    """For every input a set of variables to swap and one to hold, and the causal model's values after that.

    The set has one variable, or each of them with probability 1/2, or none. A variable is held at its value without
    any swap: patching a single edge does so to all that is not behind it.
    """
    n, k = len(base), len(causal.places)

    def chance(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    one = torch.randint(k, (n,), generator=generator) == torch.arange(k)[:, None]
    chosen = torch.where(chance(n) < 0.5, one, chance(k, n) < 0.5) & (chance(n) < 0.9)
    stays = (chance(k, n) < 0.5 * (chance(n) < 0.4)) & ~chosen
    swap: dict[str, Tensor] = {}
    swapped: list[Swap] = []
    plain, wanted = causal.run(base, {}), causal.run(source, {})
    for (variable, place), which, held in zip(causal.places.items(), chosen, stays, strict=True):
        share = which.float()
        if variable in causal.flat:
            part = torch.where(which, STEP + (1 - STEP) * chance(n), NO_STEP * chance(n))
            share = torch.where(chance(n) < 0.5, part, share)
        # a later variable is that of the model in which the earlier ones are swapped already
        value = torch.where(held, plain[variable], causal.run(base, swap)[variable])
        swap[variable] = torch.where(which, wanted[variable], value)
        swapped.append((place, share))
    held_places = [(place, held.float()) for place, held in zip(causal.places.values(), stays, strict=True)]
    return swapped, held_places, causal.run(base, swap)


def _drawn_others(others: Sequence[Place], generator: torch.Generator) -> tuple[list[Swap], list[Swap]]:
    """For every input a set of other components, none, some or all, to swap or to hold."""
    share = (2 * torch.rand(BATCH, generator=generator) - 0.5).clamp(0, 1)
    drawn = torch.rand(len(others), BATCH, generator=generator) < share
    held = torch.rand(BATCH, generator=generator) < 0.4
    swapped, stay = ((drawn & which).float() for which in (~held, held))
    return list(zip(others, swapped, strict=True)), list(zip(others, stay, strict=True))


def _fixed_logits(causal: CausalModel, values: dict[str, Tensor]) -> Float[Tensor, "batch d_vocab_out"]:
    targets = torch.full((len(values["answer"]), causal.d_vocab_out), -SIZE)
    targets.scatter_(1, values["answer"][:, None], SIZE)
    if causal.n_answers is not None:
        targets.scatter_(1, causal.n_answers + values["second answer"][:, None], SIZE)
    return targets


def _expected(causal: CausalModel, base: Tensor, source: Tensor, variable: str) -> Int[Tensor, " batch"]:
    return causal.run(base, {variable: causal.run(source, {})[variable]})["answer"]


def _outputs(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """What every head (before its output weights) and MLP gives, with gradients."""
    store: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, *, hook: Any) -> None:
            store[name] = tensor

        return hook

    names = [f"blocks.{i}.{part}" for i in range(model.config.n_layers) for part in ("attn.hook_z", "hook_mlp_out")]
    with model.hooks(fwd_hooks=[(name, keep(name)) for name in names]):
        model(tokens)
    return store


def _edited(
    model: Transformer, tokens: Int[Tensor, "batch pos"], edits: Sequence[Hook]
) -> Float[Tensor, "batch d_vocab_out"]:
    """The logits at the last position, with some components' outputs changed."""
    with model.hooks(fwd_hooks=list(edits)):
        return model(tokens)[:, -1]


def _edits(stored: dict[str, Tensor], swaps: Sequence[Swap]) -> list[Hook]:
    """What changes components' outputs at some positions to those of another run."""
    edits: dict[str, list[tuple[tuple[Any, ...], Tensor | None]]] = {}
    for (component, positions), share in swaps:
        layer, _, head = component[1:].partition(".h")
        name = f"blocks.{layer}.attn.hook_z" if head else f"blocks.{layer}.hook_mlp_out"
        where = (slice(None), list(positions), int(head)) if head else (slice(None), list(positions))
        edits.setdefault(name, []).append((where, share))
    return [(name, _edit(stored[name], places)) for name, places in edits.items()]


def _edit(stored: Tensor, places: Sequence[tuple[tuple[Any, ...], Tensor | None]]) -> Callable[..., Tensor]:
    """What moves an output to that of another run, at each place by each input's share of the way."""
    moved = stored.new_zeros(stored.shape[:-1])
    for where, share in places:
        moved[where] = 1.0 if share is None else share[:, None]

    def hook(tensor: Tensor, *, hook: Any) -> Tensor:
        # exact at both ends
        return torch.lerp(tensor, stored, moved[..., None])

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
