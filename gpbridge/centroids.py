r"""Centroids of rows by k-means: where inducing points are first put.

In: rows and a number. Out: as many centres, or all distinct rows if they are fewer.
Next: ``inducing_points``; deep GPs push them through the fixed means of their layers.

References:
    Arthur, Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gpbridge.checks import check_count, check_inputs, check_not_empty

_STEPS = 30  # of Lloyd's algorithm; the last ones hardly move a centre
_NUMBERS = 2**24  # distances at a time


def centroids(X: Tensor, num_points: int, generator: Generator | None = None) -> Tensor:
    """Centres ``k x d`` of rows ``n x d`` by k-means, started by k-means++.

    Costs up to 30 n k d. Rows that occur several times count as one, so that no two
    centres are the same; with at most ``num_points`` distinct rows these are returned.

    Args:
        X: Rows.
        num_points: The number k of centres.
        generator: Source of randomness; None is a fresh one with seed 0.

    Returns:
        Centres in the dtype of the rows.

    Example:
        >>> X = torch.tensor([[0.0], [0.2], [5.0], [5.2], [5.2]])
        >>> centroids(X, 2).sort(0).values.flatten()
        tensor([0.1000, 5.1000])
    """
    check_inputs(X, "X")
    check_not_empty(X=X)
    check_count(num_points=num_points)
    rows = X.detach().unique(dim=0)
    if len(rows) <= num_points:
        return rows.to(X)
    if generator is None:
        generator = Generator(X.device).manual_seed(0)
    center = rows.mean(0)  # distances lose fewer digits
    rows = rows - center
    centers = _spread(rows, num_points, generator)
    for _ in range(_STEPS):
        nearest, distance = _nearest(rows, centers)
        count = torch.bincount(nearest, minlength=num_points)
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        moved = sums / count.clamp_min(1)[:, None]
        # A centre without rows goes where a row is far from all others.
        far = distance.topk(num_points).indices
        moved = torch.where((count > 0)[:, None], moved, rows[far])
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers + center


def _spread(rows: Tensor, k: int, generator: Generator) -> Tensor:
    """Rows drawn with probabilities as the squared distance to those before."""
    device = generator.device
    first = torch.randint(len(rows), (1,), generator=generator, device=device)
    chosen = [rows[first.to(rows.device)]]
    distance = (rows - chosen[0]).square().sum(-1)
    for _ in range(k - 1):
        # Inverse of the distribution function: multinomial ends at 2^24 rows.
        level = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
        total = distance.double().cumsum(0)
        index = torch.searchsorted(total, level.to(total.device) * total[-1])
        chosen.append(rows[index.clamp_max(len(rows) - 1)])
        distance = torch.minimum(distance, (rows - chosen[-1]).square().sum(-1))
    return torch.cat(chosen)


def _nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centre of each row, and its squared distance."""
    indices, values = [], []
    for part in rows.split(max(1, _NUMBERS // len(centers))):
        squares = centers.square().sum(-1) - 2 * part @ centers.mT
        value, index = squares.min(-1)
        indices.append(index)
        values.append((value + part.square().sum(-1)).clamp_min(0))
    return torch.cat(indices), torch.cat(values)
