"""Activation patching: one place at a time, over layers and positions, heads or neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ABLATIONS
from circuits.discovery.activations import values_at
from circuits.discovery.batches import Setting, patchings, setting_of
from circuits.discovery.blocks import same
from circuits.discovery.circuit import mean_interval
from circuits.discovery.exact import check_effects, check_finite
from circuits.discovery.memory import pairs_at_a_time
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.patching import Patching
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import HookedModel, module_of
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Rows = Int[Tensor, " row"] | slice
Parts = Iterator[tuple[int, slice, Float[Tensor, "pair cell"]]]
"""A layer, the cells of it that were patched, and their effects."""


@dataclass(frozen=True, eq=False)
class ActivationPatching:
    """The effect of patching each place on each pair's metric, in the metric's unit; negative where it harms."""

    over: str
    """What the places of a layer are: ``positions``, ``heads`` or ``neurons``."""
    metric: str
    per_example: Float[Tensor, "pair layer cell"]

    @property
    def scores(self) -> Float[Tensor, "layer cell"]:
        """The mean effect over pairs."""
        return self.per_example.mean(0)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per place, the largest effect first, with 95 % bootstrap intervals over pairs."""
        import pandas as pd

        flat = self.per_example.flatten(1)
        low, high = mean_interval(flat)
        n_layers, n_cells = self.scores.shape
        frame = pd.DataFrame(
            {
                "layer": [i for i in range(n_layers) for _ in range(n_cells)],
                self.over.removesuffix("s"): [*range(n_cells)] * n_layers,
                "score": flat.mean(0).tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
            }
        )
        return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)

    def figure(self, *, top: int = 40) -> go.Figure:
        """Return a map of the effects, layers upwards; of neurons the ``top`` largest as bars with their intervals."""
        from circuits.discovery.figures import draw_bars, draw_map

        title = f"Activation patching over {self.over}"
        subtitle = f"{self.metric}, mean effect on {len(self.per_example)} pairs"
        cell = self.over.removesuffix("s")
        if self.over != "neurons":
            return draw_map(self.scores.tolist(), title=title, subtitle=subtitle, x=cell, y="layer", unit=self.metric)
        frame = self.to_frame().head(top)
        names = [f"m{int(i)}.{int(n)}" for i, n in zip(frame["layer"], frame[cell], strict=True)]
        return draw_bars(names, frame, title=f"{title}: the {len(frame)} largest", subtitle=subtitle, unit=self.metric)

    def _repr_html_(self) -> str:
        return self.to_frame().head(15).to_html(float_format=lambda v: f"{v:+.4f}", index=False)


def activation_patching(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    over: str,
    ablation: str = "corrupt",
    denoising: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> ActivationPatching:
    """Return the exact effect of giving one place of the clean run its activation of the corrupt run, for every place.

    ``over`` says what the places of each layer are: ``positions``: the residual stream in front of the block, at one
    position; ``heads``: what one head writes, at all positions; ``neurons``: one MLP neuron's activation, at all
    positions. The score is m(patched) - m(clean), the mean over pairs.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        over: ``positions``, ``heads`` or ``neurons``.
        ablation: What is put in place: ``corrupt``, the activation on the corrupt input; ``mean``, that over the clean
            inputs; ``zero``, nothing. Of a stream, this is said of everything written there but the biases.
        denoising: Restore the place in the corrupt run instead: m(corrupt run) - m(corrupt run with the place from the
            clean run), negative where restoring helps.
        memory_budget: Bytes that the computation may take beside the model, its result included, from which the
            batches follow by what a few pairs are measured to take; None: 512 MB beside the result.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards (three for neurons), and for each place what lies behind it: on average half a forward. No
        backward.

    Conventions: corrupt activations are put into the clean run (noising) unless ``denoising`` is asked for. Below zero
        the place supports the answer under ``logit_difference``.

    Source: Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262, section 2; Heimersheim and Nanda
        2024, arXiv 2404.15255 (noising and denoising).

    Fails when: two places stand in for each other, so that patching either alone changes little; and a position that is
        patched early is followed by all that reads it, so that its effect says where information is, not what uses it.

    Raises:
        UnknownName: no such sweep, or no such ablation.
        BadInput: the pairs do not line up, the ablation is no name, the budget does not hold one pair, or the metric
            does not depend on the logits.
        UnsupportedModel: the model cannot be taken apart into blocks, or its neurons do not add up to its MLPs.
    """
    if over not in SWEEPS:
        raise UnknownName("sweep", over, SWEEPS)
    if not isinstance(ablation, str):
        raise BadInput(f"ablation is a {type(ablation).__name__}: expected one of {', '.join(ABLATIONS)}, by name")
    if ablation not in ABLATIONS:
        raise UnknownName("ablation", ablation, ABLATIONS)
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
            raise UnsupportedModel(f"activation patching runs the model part by part: {setting.why_whole}")
        n_cells, patch = SWEEPS[over](setting, ablation, memory_budget, batch_size)
        shape = (len(pairs), len(setting.sites.layers), n_cells)
        effects = torch.zeros(shape, device=setting.pairs.clean.device)
        with tqdm(total=None, desc=f"patching {over}", unit="place", disable=not progress) as bar:
            batches = patchings(
                setting,
                lambda patching: [found for _, _, found in patch(slice(len(patching.base)), patching)],
                kept=4 * effects.numel(),
                memory_budget=memory_budget,
                batch_size=batch_size,
            )
            for rows, patching in batches:
                for layer, cells, found in patch(rows, patching):
                    effects[rows, layer, cells] = found.to(effects.dtype)
                    bar.update(found.shape[1])
                del patching  # before the next one is made
    check_finite(setting, effects.flatten(1))
    check_effects(setting, effects.flatten(1))
    return ActivationPatching(over, name_of(metric), -effects if denoising else effects)


Patch = Callable[[Rows, Patching], Parts]


def _positions(setting: Setting, *_: object) -> tuple[int, Patch]:
    graph = setting.sites.graph

    def patch(rows: Rows, patching: Patching) -> Parts:
        first = 0
        for i, layer in enumerate(setting.sites.layers):
            stream, change = patching.stream(i), patching.changes[: graph.visible[first]].sum(0)
            first += sum(W.shape[0] for W in layer.W) + (layer.mlp_in is not None)
            for cells in torch.arange(stream.shape[1]).split(patching.chunk):
                here = torch.zeros(len(cells), 1, stream.shape[1], 1, dtype=stream.dtype, device=stream.device)
                here[torch.arange(len(cells)), 0, cells] = 1
                span = slice(int(cells[0]), int(cells[-1]) + 1)
                yield i, span, patching.from_block(i, stream + here * change).T

    return setting.pairs.clean.shape[1], patch


def _heads(setting: Setting, *_: object) -> tuple[int, Patch]:
    counts = [len(layer.W_O) for layer in setting.sites.layers]

    def patch(rows: Rows, patching: Patching) -> Parts:
        first = setting.sites.graph.sources.index("a0.h0")
        for i, layer in enumerate(setting.sites.layers):
            change = patching.changes[first : first + counts[i], :, patching.at(i)]
            yield i, slice(counts[i]), patching.after_attention(i, change).T
            first += counts[i] + (layer.mlp_out is not None)

    return max(counts), patch


def _neurons(setting: Setting, ablation: str, memory_budget: int | None, batch_size: int | None) -> tuple[int, Patch]:
    model, names, weights = setting.model, [], []
    for i, layer in enumerate(setting.sites.layers):
        if layer.mlp_out is None:
            raise UnsupportedModel(f"blocks.{i} has no MLP: there are no neurons to patch")
        names.append(f"blocks.{i}.mlp.hook_post")
        weights.append(_output_weights(setting, i, names[-1]))
    means = None
    if ablation == "mean":
        means = _means(setting, names, memory_budget, batch_size)

    def patch(rows: Rows, patching: Patching) -> Parts:
        length = patching.stream(0).shape[1]
        values = values_at(model, names, setting.tokens[rows, :length])
        there = setting.pairs.clean if setting.denoising else setting.pairs.corrupt
        others = values_at(model, names, there[rows, :length]) if ablation == "corrupt" else {}
        for i, (name, W) in enumerate(zip(names, weights, strict=True)):
            other = others.get(name, 0.0) if means is None else means[name][:, :length]
            change = (other - values[name])[:, patching.at(i)]
            for cells in torch.arange(len(W), device=W.device).split(patching.chunk):
                written = change[..., cells].movedim(-1, 0)[..., None] * W[cells, None, None]
                span = slice(int(cells[0]), int(cells[-1]) + 1)
                yield i, span, patching.after_block(i, written).T

    return len(weights[0]), patch


def _means(setting: Setting, names: list[str], memory_budget: int | None, batch_size: int | None) -> dict[str, Tensor]:
    """Return the mean over the clean inputs of some activations, position by position."""
    clean, totals = setting.pairs.clean, dict[str, Tensor]()
    size = pairs_at_a_time(
        lambda n: values_at(setting.model, names, clean[:n]),
        len(clean),
        memory_budget=memory_budget,
        batch_size=batch_size,
    )
    for tokens in clean.split(size):
        for name, value in values_at(setting.model, names, tokens).items():
            part = value.sum(0, keepdim=True)
            totals[name] = totals[name] + part if name in totals else part
    return {name: total / len(clean) for name, total in totals.items()}


def _output_weights(setting: Setting, i: int, post: str) -> Float[Tensor, "neuron d_model"]:
    """Return the weights by which the neurons of block ``i`` write, checked against what its MLP writes."""
    layer, model = setting.sites.layers[i], setting.model
    weight = getattr(module_of(model, f"blocks.{i}.mlp"), "W_out", None)
    if not isinstance(weight, Tensor) or post not in getattr(model, "hook_dict", {}) or layer.mlp_out is None:
        raise UnsupportedModel(f"{type(model).__name__} has no W_out or hook_post at blocks.{i}.mlp")
    values = values_at(model, [post, layer.mlp_out], setting.tokens[:2])
    spread = [values[name] - values[name].mean((0, 1)) for name in (post, layer.mlp_out)]
    if not same(spread[0] @ weight.to(spread[0].dtype), spread[1]):
        raise UnsupportedModel(f"the neurons at {post} do not add up to what the MLP of blocks.{i} writes")
    return weight.detach()


SWEEPS: dict[str, Callable[[Setting, str, int | None, int | None], tuple[int, Patch]]] = {
    "positions": _positions,
    "heads": _heads,
    "neurons": _neurons,
}
"""What the places of a layer can be."""
