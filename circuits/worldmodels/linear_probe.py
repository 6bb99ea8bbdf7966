"""Linear probes of a state's features, fitted by softmax regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

L2 = 1e-3
"""Weight of the squared weights beside the mean cross-entropy."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Softmax regressions on one residual stream, one for each feature of a state, side by side.

    ``mean`` and ``scale`` bring the stream to zero mean and unit variance before ``weight`` is applied.
    """

    weight: Float[Tensor, "n_values d_model"]
    bias: Float[Tensor, " n_values"]
    mean: Float[Tensor, " d_model"]
    scale: Float[Tensor, " d_model"]
    sizes: tuple[int, ...]

    def logits(self, resid: Float[Tensor, "m d_model"]) -> Float[Tensor, "m n_values"]:
        """Return one number for each value of each feature."""
        return F.linear((resid - self.mean) / self.scale, self.weight, self.bias)

    def predict(self, resid: Float[Tensor, "m d_model"]) -> Int[Tensor, "m n_features"]:
        """Return the most probable value of each feature."""
        return torch.stack([part.argmax(1) for part in self.logits(resid).split(list(self.sizes), 1)], 1)

    def loss(self, resid: Float[Tensor, "m d_model"], features: Int[Tensor, "m n_features"]) -> Float[Tensor, " m"]:
        """Return the cross-entropy of each state, the mean over its features."""
        return _losses(self.logits(resid), features, self.sizes)

    @property
    def directions(self) -> Float[Tensor, "n_values d_model"]:
        """The direction in the residual stream along which each value's logit grows."""
        return self.weight / self.scale


def fit_probe(
    resid: Float[Tensor, "m d_model"], features: Int[Tensor, "m n_features"], sizes: tuple[int, ...]
) -> LinearProbe:
    """Return the probe of least mean cross-entropy plus ``L2`` times half the squared weights.

    Source: ours; the linear probe of Nanda, Lee and Wattenberg 2023 (arXiv 2309.00941), section 3, fitted to the
        optimum by L-BFGS instead of by steps of AdamW.
    """
    mean = resid.mean(0)
    scale = resid.std(0, correction=0).clamp_min(1e-6)
    x = (resid - mean) / scale
    weight = torch.zeros(sum(sizes), resid.shape[1], requires_grad=True)
    bias = torch.zeros(sum(sizes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _losses(F.linear(x, weight, bias), features, sizes).mean() + L2 / 2 * weight.square().sum() / len(sizes)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearProbe(weight.detach(), bias.detach(), mean, scale, sizes)


def _losses(logits: Tensor, features: Tensor, sizes: tuple[int, ...]) -> Float[Tensor, " m"]:
    """The cross-entropy of each state, the mean over its features, all of them at once."""
    most = max(sizes)
    if min(sizes) == most:
        each = logits.unflatten(1, (len(sizes), most))
    else:
        parts = [F.pad(p, (0, most - p.shape[1]), value=-torch.inf) for p in logits.split(list(sizes), 1)]
        each = torch.stack(parts, 1)
    right = each.gather(2, features[:, :, None])[:, :, 0]
    return (each.logsumexp(2) - right).mean(1)


def shuffled_labels(
    features: Int[Tensor, "m n_features"], kind: Int[Tensor, " m"], seed: int
) -> Int[Tensor, "m n_features"]:
    """Return labels for a control task: every kind has those of another kind, the same wherever it occurs.

    Source: Hewitt and Liang 2019 (arXiv 1909.03368), section 2: labels that can be right by heart alone.
    """
    kinds, where = kind.unique(return_inverse=True)
    first = torch.zeros(len(kinds), dtype=torch.int64).scatter_(0, where.flip(0), torch.arange(len(kind)).flip(0))
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    return features[first[order][where]]
