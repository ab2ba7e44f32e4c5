"""The best points of a pool by scores of their own.

In: one score for each point. Out: the numbers of q of them, which do not know of one
another: near duplicates come together. ``bait`` chooses points jointly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_count, check_finite, check_tensor


def select_top(scores: Tensor, q: int) -> Tensor:
    """The q points of the largest scores, the best first.

    Of equal scores the first in the pool comes first. Cost n log n.

    Args:
        scores: Of the pool, ``n``.
        q: Points to choose.

    Returns:
        Their numbers in the pool, ``q``.

    Raises:
        ShapeError: If the scores are no vector.
        ValueError: If the pool has fewer than q points.

    Example:
        >>> select_top(torch.tensor([0.1, 0.7, 0.3]), 2)
        tensor([1, 2])
    """
    check_tensor(scores=scores)
    check_count(q=q)
    if scores.dim() != 1:
        raise ShapeError(
            f"scores must be one number per point, ``n``, but has shape "
            f"{tuple(scores.shape)}. Sum or average over the other dimensions."
        )
    check_finite(scores=scores)
    check_pool(len(scores), q)
    return torch.argsort(scores, descending=True, stable=True)[:q]


def check_pool(n: int, q: int) -> None:
    """Require that q points can be chosen from n.

    Args:
        n: Size of the pool.
        q: Points to choose.

    Raises:
        ValueError: If the pool is smaller.
    """
    if q > n:
        raise ValueError(
            f"q must be at most the {n} points of the pool, but is {q}. Label all of "
            "them, or pass a larger pool."
        )
