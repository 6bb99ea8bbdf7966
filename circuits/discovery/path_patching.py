"""Path patching: what travels along one named path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.batches import Ablation, patchings, setting_of
from circuits.discovery.circuit import mean_interval
from circuits.discovery.exact import check_effects, check_finite
from circuits.discovery.graph import Graph
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.patching import Patching
from circuits.discovery.removal import Kept, PartialRun
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PathEffect:
    """The effect of ablating one path on each pair's metric, in the metric's unit."""

    path: tuple[str, ...]
    metric: str
    per_example: Float[Tensor, " pair"]

    @property
    def score(self) -> float:
        """The mean effect over pairs."""
        return float(self.per_example.mean())

    def interval(self, *, level: float = 0.95, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
        """Return the score's percentile-bootstrap interval over pairs."""
        low, high = mean_interval(self.per_example[:, None], level=level, seed=seed, resamples=resamples)
        return float(low), float(high)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair: ``effect``, in the metric's unit."""
        import pandas as pd

        return pd.DataFrame(
            {"effect": self.per_example.tolist()}, index=pd.RangeIndex(len(self.per_example), name="pair")
        )

    def _repr_html_(self) -> str:
        low, high = self.interval()
        about = f"{' → '.join(self.path)}, {self.metric}, {len(self.per_example)} pairs"
        return f"<p><b>Effect {self.score:+.4f}</b> [{low:+.4f}, {high:+.4f}], {escape(about)}</p>"

    def __repr__(self) -> str:
        low, high = self.interval()
        return f"PathEffect({' -> '.join(self.path)}: {self.score:+.4f} [{low:+.4f}, {high:+.4f}], {self.metric})"


def path_patching(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    path: Sequence[str],
    ablation: Ablation = "corrupt",
    denoising: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> PathEffect:
    """Return the exact effect of ablating one path through the model.

    ``path`` starts at a source and goes on from reader to reader: ``("embed", "a0.h1.v", "a1.h0.k", "logits")``. The
    first reader reads the source's replacement; what that changes in its head (or MLP) reaches the next reader alone,
    and so on: whatever is off the path reads what it does without the intervention. A head's or MLP's own name, such
    as ``"a1.h0"``, stands for all that it reads. A path that ends before the logits lets its last step's change go on
    freely: the receivers of Wang et al. The score is m(patched) - m(clean), the mean over pairs.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        path: A source, then one or more readers, heads or MLPs.
        ablation: What the path's first edge carries: see ``exact``.
        denoising: Restore the path in the corrupt run instead: m(corrupt run) - m(corrupt run with that path from the
            clean run), negative where restoring helps.
        memory_budget: Bytes that the computation may take beside the model, its result included, from which the
            batches follow by what a few pairs are measured to take; None: 512 MB beside the result.
        batch_size: Pairs at a time, at most.

    Cost: two forwards, and of every step one head or MLP; a path that ends before the logits takes what lies behind its
        end. No backward.

    Conventions: the path is ablated in the clean run (noising) unless ``denoising`` is asked for. Below zero the path
        supports the answer under ``logit_difference``.

    Source: Goldowsky-Dill et al. 2023, arXiv 2304.05969, section 2; Wang et al. 2022, arXiv 2211.00593, appendix B
        (paths that end at receivers).

    Fails when: two paths stand in for each other, so that ablating either alone changes little.

    Raises:
        UnknownName: a step is no source or reader of the graph, or there is no such ablation.
        BadInput: the path has fewer than two steps, or a step comes before the one that it reads from; the pairs do
            not line up, or the metric does not depend on the logits.
        UnsupportedModel: the model cannot be taken apart into blocks.
    """
    with torch.no_grad():
        setting = setting_of(
            model,
            pairs,
            metric,
            ablation=ablation,
            denoising=denoising,
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
        if setting.blocks is None:
            raise UnsupportedModel(f"path patching runs the model part by part: {setting.why_whole}")
        source, first, kept = _edges(setting.sites.graph, tuple(path))
        effects = torch.zeros(len(pairs), device=setting.pairs.clean.device)

        def effect(patching: Patching) -> Float[Tensor, " pair"]:
            change = patching.changes[[source]]
            return PartialRun(patching).follow({reader: change for reader in first}, kept)[0] - patching.base

        batches = patchings(setting, effect, kept=4 * len(pairs), memory_budget=memory_budget, batch_size=batch_size)
        for rows, patching in batches:
            effects[rows] = effect(patching).to(effects.dtype)
            del patching  # before the next one is made
    check_finite(setting, effects)
    check_effects(setting, effects[:, None])
    return PathEffect(tuple(path), name_of(metric), -effects if denoising else effects)


def _edges(graph: Graph, path: tuple[str, ...]) -> tuple[int, list[int], Kept]:
    """Return the path's source, its first readers, and the edges along which changes go on."""
    if len(path) < 2:
        raise BadInput(f"path {path}: expected a source and at least one reader")
    if path[0] not in graph.sources:
        raise UnknownName("source", path[0], graph.sources)
    steps = [_step(graph, name) for name in path[1:]]
    source = graph.sources.index(path[0])
    kept = np.zeros((len(graph.readers), len(graph.sources)), dtype=bool)
    before: tuple[int, ...] = (source,)
    name = path[0]
    for i, (readers, feeds) in enumerate(steps):
        if not before:
            raise BadInput(f"path {path}: {path[i + 1]} comes after the logits, which write nothing")
        for u in before:
            for r in readers:
                if u >= graph.visible[r]:
                    raise BadInput(f"path {path}: {path[i + 1]} is computed before {name} writes")
                kept[r, u] = i > 0
        before, name = feeds, path[i + 1]
    if before:
        inner = {u for _, feeds in steps[:-1] for u in feeds}
        free = [u for u in range(min(before), len(graph.sources)) if u not in inner]
        kept[:, free] = np.array(free)[None] < np.array(graph.visible)[:, None]
    return source, list(steps[0][0]), kept


def _step(graph: Graph, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the readers that a step of a path stands for, and the sources that pass it on."""
    if name in graph.readers:
        reader = graph.readers.index(name)
        return (reader,), graph.feeds[reader]
    computed = {graph.sources[u]: u for fed in graph.feeds for u in fed}
    if name not in computed:
        raise UnknownName("reader", name, [*graph.readers, *computed])
    u = computed[name]
    return tuple(r for r, fed in enumerate(graph.feeds) if u in fed), (u,)
