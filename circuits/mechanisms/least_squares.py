"""Held-out R2 of many least-squares fits at once, from inner products of features and neurons alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TERMS = 8
RIDGE = 1e-4


def class_means(
    values: Float[Tensor, "rows n"], classes: Int[Tensor, " rows"], n_classes: int
) -> Float[Tensor, "n_classes n"]:
    """Return the mean of the rows of each class; zero for a class that no row has."""
    counts = torch.bincount(classes, minlength=n_classes).clamp_min(1)[:, None].to(values)
    return values.new_zeros(n_classes, values.shape[1]).index_add_(0, classes, values) / counts


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products over some rows, in double precision: all that a least-squares fit on those rows needs.

    ``features`` is the Gram matrix of the features, ``cross`` their products with the neurons, ``squares`` and
    ``deviations`` the neurons' sums of squares, plain and about their means.
    """

    features: Float[Tensor, "features features"]
    cross: Float[Tensor, "features n"]
    squares: Float[Tensor, " n"]
    deviations: Float[Tensor, " n"]

    @staticmethod
    def of(features: Float[Tensor, "rows features"], neurons: Float[Tensor, "rows n"]) -> Products:
        """The inner products of some features with themselves and with some neurons."""
        x, y = features.double(), neurons.double()
        return Products(x.mT @ x, x.mT @ y, y.square().sum(0), (y - y.mean(0)).square().sum(0))

    def r_squared(self, weights: Float[Tensor, "n terms"], index: Int[Tensor, "n terms"]) -> Float[Tensor, " n"]:
        """Share of each neuron's variance that its weights on its own features predict."""
        gram = self.features[index[:, :, None], index[:, None, :]]
        cross = self.cross.mT.gather(1, index)
        left = self.squares - 2 * (weights * cross).sum(1) + (weights * (gram @ weights[..., None]).squeeze(-1)).sum(1)
        return _share(left, self.deviations, self.squares)


def r_squared(true: Float[Tensor, "rows n"], predicted: Float[Tensor, "rows n"]) -> Float[Tensor, " n"]:
    """Share of each column's variance that is predicted; -1 at worst, 0 for a constant column."""
    return _share((true - predicted).square().sum(0), (true - true.mean(0)).square().sum(0), true.square().sum(0))


def block_fits(
    blocks: Float[Tensor, "rows blocks features"], neurons: Float[Tensor, "rows n"], fit: Bool[Tensor, " rows"]
) -> tuple[Float[Tensor, "blocks n"], Float[Tensor, "blocks n"]]:
    """R2 of each neuron's least-squares fit by each block of features: on the rows fitted on, and on the others.

    Source: Golub and Van Loan 2013, *Matrix Computations*, section 5.3 (normal equations, by pseudo-inverse).
    """
    weights: Tensor | None = None
    shares = []
    for rows in (fit, ~fit):
        x, y = blocks[rows].double(), neurons[rows].double()
        gram = torch.einsum("rkf,rkg->kfg", x, x)
        cross = (x.flatten(1).mT @ y).unflatten(0, x.shape[1:])
        if weights is None:
            weights = torch.linalg.pinv(gram, hermitian=True) @ cross
        left = y.square().sum(0) - 2 * (weights * cross).sum(1) + (weights * (gram @ weights)).sum(1)
        shares.append(_share(left, (y - y.mean(0)).square().sum(0), y.square().sum(0)).to(neurons.dtype))
    return shares[0], shares[1]


def _share(
    left: Float[Tensor, "*blocks n"], total: Float[Tensor, " n"], squares: Float[Tensor, " n"]
) -> Float[Tensor, "*blocks n"]:
    """Share of the variance that is not left; -1 at worst, 0 for a constant, whose variance is none of its squares."""
    live = total > 1e-12 * squares
    share = 1 - left / torch.where(live, total, torch.ones_like(total))
    return torch.where(live, share, torch.zeros_like(share)).clamp_min(-1)


def greedy_fit(
    features: Float[Tensor, "rows features"],
    neurons: Float[Tensor, "rows n"],
    fit: Bool[Tensor, " rows"],
    terms: int = TERMS,
) -> Float[Tensor, " n"]:
    """Held-out R2 of orthogonal matching pursuit with ``terms`` features and a constant for each neuron.

    Source: Pati, Rezaiifar and Krishnaprasad 1993 (orthogonal matching pursuit); Rubinstein, Zibulevsky and Elad
    2008 (Technion CS-2008-08), section 2, for the form that works from the Gram matrix.
    """
    constant = torch.ones(len(features), 1, device=features.device, dtype=features.dtype)
    x = torch.cat([constant, features], dim=1)
    inside, outside = Products.of(x[fit], neurons[fit]), Products.of(x[~fit], neurons[~fit])
    rows, n = inside.features[0, 0], neurons.shape[1]
    mean = inside.features[0] / rows
    spread = (inside.features.diagonal() / rows - mean.square()).clamp_min(0).sqrt()
    usable = (spread > 1e-6).to(spread.dtype)
    usable[0] = 0
    scale = (usable / spread.clamp_min(1e-6))[:, None].expand(-1, n).clone()
    index = torch.zeros(n, 1, dtype=torch.long, device=x.device)
    weights = (inside.cross[0] / rows)[:, None]
    for _ in range(terms):
        spread_out = torch.zeros_like(inside.cross).scatter_(0, index.mT, weights.mT)
        left = inside.cross - inside.features @ spread_out
        correlation = (left - mean[:, None] * left[0]).abs() * scale
        chosen = correlation.argmax(0)
        scale.scatter_(0, chosen[None], 0.0)
        index = torch.cat([index, chosen[:, None]], dim=1)
        gram = inside.features[index[:, :, None], index[:, None, :]]
        size = gram.diagonal(dim1=1, dim2=2).mean(-1)
        gram = gram + RIDGE * torch.eye(gram.shape[-1], device=x.device, dtype=x.double().dtype) * size[:, None, None]
        weights = torch.linalg.solve(gram, inside.cross.mT.gather(1, index)[..., None]).squeeze(-1)
    return outside.r_squared(weights, index).to(neurons.dtype)
