"""Progress measures of a Fourier algorithm: restricted and excluded loss, Gini coefficients, neurons' frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from circuits.mechanisms.groups import GroupTable, angle, group_operands, group_table
from circuits.mechanisms.interchange import operand_embedding
from circuits.mechanisms.readings import Readings
from circuits.tasks.base import Task

SINGLE = 0.85
MOST_APART = 16
"""Of more frequencies than these none is key, and leaving out one of them at a time says nothing."""
LIVE = 1e-6
"""A neuron is live whose variance is more than this share of the largest."""


def sum_components(
    logits: Float[Tensor, "rows p"], total: Int[Tensor, " rows"], frequencies: tuple[int, ...], modulus: int
) -> Float[Tensor, "rows p"]:
    """Return the part of the logits along cos w(a + b) and sin w(a + b), over inputs, for some frequencies w.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 5.1; repository progress-measures-paper, helpers.py,
    ``get_component_cos_xpy``.
    """
    waves = [f(angle(total, k, modulus).double()) for k in frequencies for f in (torch.cos, torch.sin)]
    u, s, _ = torch.linalg.svd(torch.stack(waves, dim=1), full_matrices=False)
    q = u[:, s > 1e-4 * s[0]]  # the highest frequency of an even modulus has no sine
    return q @ (q.T @ logits.double())


def restricted_logits(
    logits: Float[Tensor, "rows p"],
    total: Int[Tensor, " rows"],
    frequencies: tuple[int, ...],
    modulus: int,
    *,
    bias_correction: bool = True,
) -> Float[Tensor, "rows p"]:
    """Return the part along some frequencies of the sum, and with ``bias_correction`` the mean over inputs of the rest.

    Source: repository progress-measures-paper, helpers.py, ``test_logits``: what is lost of a bias that does not
    depend on the input is given back.
    """
    inside = sum_components(logits, total, frequencies, modulus)
    return inside + (logits.double() - inside).mean(0) if bias_correction else inside


def loss_and_accuracy(logits: Float[Tensor, "rows p"], answer: Int[Tensor, " rows"]) -> tuple[float, float]:
    """Return cross entropy in nats, in double precision, and accuracy."""
    return float(cross_entropy(logits.double(), answer)), float((logits.argmax(1) == answer).double().mean())


def gini(shares: Float[Tensor, " n"]) -> float:
    """Return the Gini coefficient of non-negative numbers: 0 where all are equal, near 1 where one has everything.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 5.1, for its use on Fourier components.
    """
    ordered = shares.double().sort().values
    n = len(ordered)
    rank = 2 * torch.arange(1, n + 1, device=ordered.device) - n - 1
    return float((rank * ordered).sum() / (n * ordered.sum()).clamp_min(1e-30))


def component_norms(rows: Float[Tensor, "p d"]) -> Float[Tensor, " components"]:
    """Return the norm of the cosine and of the sine component of a map from residues, at each frequency from 1 on."""
    spectrum = torch.fft.rfft(rows.double(), dim=0)[1:]
    norms = torch.cat([spectrum.real.square().sum(1).sqrt(), spectrum.imag.square().sum(1).sqrt()])
    return norms if len(rows) % 2 else norms[:-1]  # the sine of the highest frequency of an even modulus is nothing


@dataclass(frozen=True, eq=False)
class NeuronFrequencies:
    """For each live neuron, the frequency with most of its variance, and how much that is."""

    live: Int[Tensor, " n_live"]
    share: Float[Tensor, " n_live"]
    frequency: Int[Tensor, " n_live"]

    def counts(self) -> dict[str, int]:
        """Return how many neurons have more than 0.85 of their variance at each frequency."""
        chosen = self.frequency[self.share > SINGLE]
        return {str(int(k)): int((chosen == k).sum()) for k in chosen.unique()}


def neuron_frequencies(neurons: Float[Tensor, "rows n"], group: GroupTable) -> NeuronFrequencies | None:
    """Return the frequency of each live neuron; None where not all pairs of operands were read.

    A neuron's share at frequency k is the part of its variance over the table in the products of {1, cos wa, sin wa}
    and {1, cos wb, sin wb} but for the constant.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 4.2; repository progress-measures-paper, transformers.py,
    ``calculate_key_freqs``.
    """
    p = group.modulus
    if len(group.a) != p * p:
        return None
    square = torch.empty(p * p, neurons.shape[1], dtype=torch.double, device=neurons.device)
    square[group.a * p + group.b] = neurons.double()
    square = square - square.mean(0)
    power = square.square().sum(0)
    live = (power > LIVE * power.max().clamp_min(1e-30)).nonzero().flatten()
    best = [_best_frequency(square[:, part].unflatten(0, (p, p)), power[part]) for part in live.split(64) if len(part)]
    share, frequency = (torch.cat(x) for x in zip(*best, strict=True)) if best else (power[live], live)
    return NeuronFrequencies(live, share, frequency)


def _best_frequency(maps: Float[Tensor, "p p n"], power: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    p = len(maps)
    spectrum = torch.fft.rfft2(maps, dim=(1, 0)).abs().square() / p**2  # first operand halved: frequencies 0 to p // 2
    k = torch.arange(1, (p - 1) // 2 + 1, device=maps.device)
    own = 2 * (spectrum[k, 0] + spectrum[0, k] + spectrum[k, k] + spectrum[k, -k])
    share, which = (own / power).max(0)
    return share, which + 1


def progress_measures(
    model: Any, task: Task, readings: Readings, frequencies: tuple[int, ...], *, circle: int | None = None
) -> dict[str, Any]:
    """Return the measures by name, at the given key frequencies of a circle (by default the one that the task implies).

    ``restricted_loss`` is of the logits along the key frequencies of the sum, bias-corrected, on all pairs;
    ``excluded_loss`` of the logits without them, on training pairs, where a network that still remembers pairs has
    other means; ``excluded_loss_by_frequency`` without one of them at a time, of few of them. ``gini_embedding`` and
    ``gini_neuron_logits`` are of the norms of the Fourier components of W_E over the operands and of W_L = W_out W_U
    over the answers; each is there only where the operands, or the answers, are all the steps of the circle, since
    less than a turn has no Fourier components of it, and the second only of a model with an unembedding. Losses are in
    nats.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 5.1; repository progress-measures-paper, transformers.py,
    ``calculate_trig_loss`` and ``calculate_excluded_loss`` (which leaves out one frequency at a time).
    """
    group = group_table(task, readings, circle=circle)
    logits, total, answer, p = group.logits.double(), group.total, group.answer, group.modulus
    trained = group.split == 0
    restricted, _ = loss_and_accuracy(restricted_logits(logits, total, frequencies, p), answer)
    found: dict[str, Any] = {"loss": loss_and_accuracy(logits, answer)[0], "restricted_loss": restricted}
    if bool(trained.any()):
        without = logits - sum_components(logits, total, frequencies, p)
        found["excluded_loss"] = loss_and_accuracy(without[trained], answer[trained])[0]
        if len(frequencies) <= MOST_APART:
            found["excluded_loss_by_frequency"] = [
                [k, loss_and_accuracy((logits - sum_components(logits, total, (k,), p))[trained], answer[trained])[0]]
                for k in sorted(frequencies)
            ]
    maps = {"embedding": operand_embedding(model, task)[group_operands(task)]}
    if hasattr(model, "W_U"):
        neuron_logits = model.blocks[readings.layers[-1]].mlp.W_out.float() @ model.W_U.float()
        answers = task.answer_tokens.to(neuron_logits.device)[group.columns]
        maps["neuron_logits"] = neuron_logits[:, answers].detach().T
    found |= {f"gini_{name}": gini(component_norms(x)) for name, x in maps.items() if len(x) == p}
    return found | neuron_shares(readings, group)


def neuron_shares(readings: Readings, group: GroupTable) -> dict[str, Any]:
    """Return, for each layer, how many neurons live, how many are of one frequency, and of which."""
    layers = torch.tensor(readings.layers, device=readings.neurons.device)
    found: dict[str, Any] = {}
    for layer in sorted(set(readings.layers)):
        of = neuron_frequencies(readings.neurons[group.kept][:, layers == layer], group)
        if of is not None and len(of.live):
            found[str(layer)] = {
                "live": len(of.live),
                "mean_share": float(of.share.mean()),
                "single": float((of.share > SINGLE).double().mean()),
                "frequencies": of.counts(),
            }
    return {"neurons_of_one_frequency": found}
