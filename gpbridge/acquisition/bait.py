r"""Batches of points that together tell most about the predictions on a pool.

In: Fisher embeddings of a pool. Out: the numbers of q points. The posterior variance
of the linear model, averaged over the pool, is what the points are to make small, so
that they are neither redundant nor outliers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpbridge.acquisition.fisher import whitened
from gpbridge.acquisition.ranking import check_pool
from gpbridge.checks import (
    ShapeError,
    check_count,
    check_finite,
    check_floating,
    check_positive,
    check_tensor,
)


@torch.no_grad()
def select_bait(
    embeddings: Tensor,
    q: int,
    *,
    labelled: Tensor | None = None,
    precision: float = 1.0,
    oversample: float = 2.0,
) -> Tensor:
    r"""Choose a batch by BAIT: greedily more than enough, then greedily fewer.

    .. math::
        \min_S \; \mathrm{tr}\Bigl[\bigl(\lambda I + V_0^\top V_0
            + \sum_{i \in S} V_i^\top V_i\bigr)^{-1}
            \tfrac1n \sum_j V_j^\top V_j\Bigr]

    Each of about (2 oversample - 1) q steps updates, by Woodbury's formula, the m x m
    blocks of every point that a step is judged by: time n m^2 p, or with p > n m twice
    that. No matrix is inverted. Once, the blocks are set up in n m p min(p, n m);
    memory beside the embeddings is min(p^2, 3 q m p).

    Args:
        embeddings: :math:`V_i` of the pool, ``n x m x p``, as of
            :func:`~gpbridge.acquisition.fisher_embeddings`, in which prior and labelled
            points are accounted for.
        q: Points to choose.
        labelled: :math:`V_0`, embeddings ``l x m x p`` of labelled points, if they are
            not accounted for.
        precision: The prior precision :math:`\lambda` of the weights.
        oversample: So many times q points are chosen first. 1 is forward selection.

    Returns:
        Their numbers in the pool, ``q``, in the order in which they were chosen.

    Raises:
        ShapeError: If the embeddings are not of that shape.
        ValueError: If an option is out of range, or the pool has fewer than q points.

    Example:
        >>> V = torch.tensor([[[3.0, 0.0]], [[2.9, 0.0]], [[0.0, 2.0]]])
        >>> select_bait(V, 2)
        tensor([0, 2])

    References:
        Ash, Goel, Krishnamurthy, Kakade, Gone fishing: neural active learning with
        Fisher embeddings, NeurIPS 2021, eq. (2) and algorithm 1.
    """
    check_tensor(embeddings=embeddings)
    check_floating(embeddings=embeddings)
    check_count(q=q)
    check_positive(precision=precision)
    if embeddings.dim() != 3:
        raise ShapeError(
            "embeddings must be ``n x m x p``, but has shape "
            f"{tuple(embeddings.shape)}. For one row per point pass embeddings[:, None]"
            "."
        )
    check_finite(embeddings=embeddings)
    check_pool(len(embeddings), q)
    if not 1 <= oversample < math.inf:
        raise ValueError(
            f"oversample must be at least 1, but is {oversample}. Pass 1 for forward "
            "selection alone."
        )
    V = embeddings.double()
    if labelled is None:
        V = V / precision**0.5
    else:
        V = whitened(V, labelled.to(V), precision)
    first = min(math.ceil(oversample * q), len(V))
    state = _Trace(V, 2 * first - q)
    chosen: list[Tensor] = []
    for _ in range(first):
        chosen.append(state.gains(1.0).argmax())
        state.move(chosen[-1], 1.0)
        state.open[chosen[-1]] = False
    kept = torch.stack(chosen)
    state.restrict(kept)
    for _ in range(first - q):
        place = state.gains(-1.0).argmax()
        state.move(place, -1.0)
        state.open[place] = False
    return kept[state.open]


class _Trace:
    r"""The trace of :math:`M^{-1} F`, point by point, while M gains and loses points.

    ``C`` holds the blocks :math:`V_i M^{-1} V_i^\top`, ``B`` those of
    :math:`V_i M^{-1} F M^{-1} V_i^\top`, both ``n x m x m``; ``open`` marks the points
    that the next step may take.
    """

    def __init__(self, V: Tensor, steps: int) -> None:
        n, m, p = V.shape
        flat = V.flatten(0, 1)
        self.V, self.pool, self.n = V, flat, n
        self.F = flat.mT @ flat / n if p <= n * m else None
        if self.F is not None:
            self.B = (V @ self.F) @ V.mT
        else:  # the Gram matrix, some rows at a time
            parts = V.split(max(1, 2**22 // (n * m * m)))
            grams = [(part @ flat.mT) for part in parts]
            self.B = torch.cat([G @ G.mT for G in grams]) / n
        self.C = V @ V.mT
        self.open = torch.ones(n, dtype=torch.bool, device=V.device)
        # M^-1 itself, or the identity less the columns of all steps.
        self.inverse = torch.eye(p).to(V) if p <= steps * m else None
        self.columns: list[Tensor] = []
        self.scaled: list[Tensor] = []

    def gains(self, sign: float) -> Tensor:
        """By how much each step makes the trace smaller, ``n``."""
        inner = self.C + sign * torch.eye(self.C.shape[-1]).to(self.C)
        gain = torch.linalg.solve(inner, self.B).diagonal(dim1=-2, dim2=-1).sum(-1)
        return gain.masked_fill(~self.open, -math.inf)

    def move(self, point: Tensor, sign: float) -> None:
        """Add a point to M, or take it away."""
        row, m = self.V[point], self.V.shape[1]
        U = self._solve(row.mT)  # p x m
        E = torch.linalg.inv(self.C[point] + sign * torch.eye(m).to(row))
        FU = self.pool.mT @ (self.pool @ U) / self.n if self.F is None else self.F @ U
        W = self._solve(FU)
        both = self.V @ torch.cat([U, W], -1)  # one pass over the pool
        S, T = both[..., :m], both[..., m:]
        SE = S @ E
        cross = SE @ T.mT
        self.B = self.B - cross - cross.mT + SE @ self.B[point] @ SE.mT
        self.C = self.C - SE @ S.mT
        if self.inverse is not None:
            self.inverse = self.inverse - (U @ E) @ U.mT
        else:
            self.columns.append(U)
            self.scaled.append(U @ E)

    def restrict(self, points: Tensor) -> None:
        """From here on these points alone may move, all of them."""
        self.V, self.B, self.C = self.V[points], self.B[points], self.C[points]
        self.open = torch.ones(len(points), dtype=torch.bool, device=self.V.device)

    def _solve(self, rhs: Tensor) -> Tensor:
        """M^-1 times columns ``p x m``."""
        if self.inverse is not None:
            return self.inverse @ rhs
        result = rhs
        for U, scaled in zip(self.columns, self.scaled, strict=True):
            result = result - scaled @ (U.mT @ rhs)
        return result
