"""Selection of regressors, alone or in blocks, for all targets together or for each its own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SMALLEST = 1e-5
"""Share of a regressor's own variance below which what the chosen ones leave of it counts as rounding."""


def forward_selection(
    features: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"], *, block: int = 1, most: int
) -> list[int]:
    """Return blocks of columns in the order in which each explains most of what the earlier ones leave of the targets.

    ``features`` are blocks of ``block`` adjacent columns; a block is chosen whole. Rows are centred first. Ends after
    ``most`` blocks, or where no block explains any more.

    Source: Chen, Billings & Luo 1989 (International Journal of Control 50:1873), orthogonal least squares.
    """
    x = (features - features.mean(0)).double()
    y = (targets - targets.mean(0)).double()
    size = x.square().sum(0)
    alive = size > 1e-9 * size.max().clamp_min(1e-30)
    x = torch.where(alive, x / size.clamp_min(1e-30).sqrt(), torch.zeros_like(x))
    gram, cross = x.T @ x, x.T @ y
    total = float(y.square().sum())
    eye = torch.eye(block, dtype=gram.dtype, device=gram.device)
    columns = torch.arange(x.shape[1], device=x.device).reshape(-1, block)
    chosen: list[int] = []
    while len(chosen) < min(most, len(columns)):
        own = gram[columns[:, :, None], columns[:, None, :]]
        live = own.diagonal(dim1=1, dim2=2) > SMALLEST
        # Columns that the chosen ones already span are taken out, or the solution is rounding magnified.
        masked = torch.where(live[:, :, None] & live[:, None, :], own, torch.zeros_like(own)) + SMALLEST * eye
        part = cross[columns] * live[:, :, None]
        solved = torch.linalg.solve(masked, part)
        gain = (part * solved).sum((1, 2))
        gain[chosen] = -1.0
        best = int(gain.argmax())
        if float(gain[best]) <= 1e-9 * total:
            break
        chosen.append(best)
        at = columns[best][live[best]]
        weights = torch.linalg.solve(
            gram[at][:, at] + SMALLEST * torch.eye(len(at), dtype=gram.dtype, device=gram.device),
            torch.cat([gram[at], cross[at]], dim=1),
        )
        side = gram[:, at].clone()
        cross = cross - side @ weights[:, len(gram) :]
        gram = gram - side @ weights[:, : len(gram)]
    return chosen


def regression(
    features: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"], fit: Tensor
) -> Float[Tensor, "rows targets"]:
    """Return the least-squares prediction of the targets on all rows, fitted with a constant on the rows ``fit``.

    Regressors that the others span are dropped rather than given huge weights (pseudo-inverse).
    """
    mean, scale = features[fit].mean(0), features[fit].std(0).clamp_min(1e-9)
    x = ((features - mean) / scale).double()
    y = targets[fit].double()
    weights = torch.linalg.pinv(x[fit], rtol=1e-6) @ (y - y.mean(0))
    return (x @ weights + y.mean(0)).to(targets.dtype)


def matching_pursuit(
    features: Float[Tensor, "rows features"],
    targets: Float[Tensor, "rows targets"],
    fit: Bool[Tensor, " rows"],
    *,
    block: int = 1,
    terms: int,
) -> tuple[list[Float[Tensor, "rows targets"]], Int[Tensor, "terms targets"]]:
    """Return each target's prediction from its own best 1, 2, ... ``terms`` blocks of columns, and the blocks.

    Chosen and fitted on the rows ``fit``, predicted on all. The same selection as that of ``greedy_fit``, in Gram
    space, where its cost does not grow with the rows.

    Source: Pati, Rezaiifar, Krishnaprasad 1993 (orthogonal matching pursuit); in Gram space: Rubinstein, Zibulevsky &
        Elad 2008 (Technion CS-2008-08).
    """
    mean, centre = features[fit].mean(0), targets[fit].mean(0)
    x = features - mean
    size = x[fit].norm(dim=0)
    x = torch.where(size > 1e-6 * size.max(), x / size.clamp_min(1e-30), torch.zeros_like(x))
    gram = (x[fit].T @ x[fit]).double()
    cross = (x[fit].T @ (targets[fit] - centre)).double()
    columns = torch.arange(x.shape[1], device=x.device).reshape(-1, block)
    ridge = SMALLEST * torch.eye(block * terms, dtype=gram.dtype, device=gram.device)
    own = gram[columns[:, :, None], columns[:, None, :]] + ridge[:block, :block]
    inverse = torch.linalg.inv(own)
    each = torch.arange(targets.shape[1], device=x.device)
    chosen: list[Tensor] = []
    predicted: list[Tensor] = []
    left = cross
    for term in range(1, min(terms, len(columns)) + 1):
        part = left[columns]
        gain = (part * (inverse @ part)).sum(1)
        for earlier in chosen:
            gain.scatter_(0, earlier[None], -1.0)
        chosen.append(gain.argmax(0))
        at = columns[torch.stack(chosen, dim=1)].flatten(1)
        within = gram[at[:, :, None], at[:, None, :]] + ridge[: term * block, : term * block]
        solved = torch.linalg.solve(within, cross[at, each[:, None]][..., None]).squeeze(-1)
        weights = torch.zeros_like(cross).scatter_(0, at.T, solved.T)
        left = cross - gram @ weights
        predicted.append((x @ weights.to(x.dtype) + centre).to(targets.dtype))
    return predicted, torch.stack(chosen)
