r"""Sums over data of which curvature structures are made.

The Gauss-Newton matrix is :math:`M = \sum_n J_n^\top R_n R_n^\top J_n`. With
:math:`g = R^\top \delta` the signals of a layer and a its inputs, a structure needs

.. math::
    \text{Kronecker, expand:} \quad & A = \sum_{n,t} a_t a_t^\top, \quad
        G = \sum_{n,t} g_t g_t^\top, \quad M_b \approx \tfrac{1}{N T} G \otimes A \\
    \text{Kronecker, reduce:} \quad & A = \sum_n \bar a \bar a^\top, \quad
        G = \sum_n \big(\textstyle\sum_t g_t\big) \big(\sum_t g_t\big)^\top, \quad
        M_b \approx \tfrac1N G \otimes A \\
    \text{in a basis:} \quad & \lambda = \sum_n \big((Q^\top J_n P)\big)^2 .

Where a block has no inputs and signals (tied weights, norms, a layer of another kind)
A and G are the partial traces of its part of M over the trace: exact for a vector. All
sums are linear in the data, so that they add over minibatches.

In: derivatives of one chunk. Out: its part of the sums. Next:
``data_curvature`` adds them.

References:
    Martens, Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, ICML 2015. Eschenhagen, Immer, Turner, Schneider, Hennig,
    Kronecker-factored approximate curvature for modern neural network architectures,
    NeurIPS 2023, eqs. (12) and (16). George, Laurent, Bouthillier, Ballas, Vincent,
    Fast approximate natural gradient descent in a Kronecker-factored eigenbasis,
    NeurIPS 2018.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.linearized.weight_blocks import BlockJacobian


class KroneckerSums(NamedTuple):
    """Factors of one block, summed over data; M is ``G x A / count`` per channel."""

    A: Tensor  # c or 1 x i x i
    G: Tensor  # c x o x o
    count: Tensor  # c or 1

    def add(self, other: KroneckerSums) -> KroneckerSums:
        """The sums over both sets of data."""
        return KroneckerSums(*(a + b for a, b in zip(self, other, strict=True)))


def kronecker_sums(
    J: BlockJacobian, channels: int, sharing: str = "expand"
) -> KroneckerSums:
    r"""Kronecker factors of one chunk of data.

    Args:
        J: Derivatives of :math:`R^\\top f`, ``n x r`` of them.
        channels: 1 to sum over all r, r to keep them apart.
        sharing: What becomes of the T positions of a layer, ``"expand"`` or
            ``"reduce"``; the same where T is one.

    Returns:
        The sums, float64.
    """
    if J.columns is not None:
        columns = J.columns.double()  # n x r x o x i
        columns = columns if channels > 1 else columns.flatten(0, 1).unsqueeze(1)
        A = torch.einsum("nroi,nroj->rij", columns, columns)
        G = torch.einsum("nroi,nrqi->roq", columns, columns)
        return KroneckerSums(A, G, A.diagonal(dim1=-2, dim2=-1).sum(-1))
    inputs, signal = J.inputs, J.signal  # n x T x i, n x r x T x o
    if sharing == "reduce":
        inputs, signal = inputs.mean(1, keepdim=True), signal.sum(2, keepdim=True)
    signal = signal.movedim(1, 0) if channels > 1 else signal.flatten(0, 1)[None]
    A, G = _scatter(inputs[None]), _scatter(signal)
    number = float(inputs.shape[:2].numel())
    return KroneckerSums(A, G, A.new_tensor([number]))


def _scatter(rows: Tensor) -> Tensor:
    """Sums of outer products of ``c x n x T x d`` rows, ``c x d x d``, float64."""
    T, d = rows.shape[-2:]
    if d <= T:  # a product for each point: a convolution's rows are not side by side
        return (rows.mT @ rows).sum(1).double()
    flat = rows.flatten(1, 2)
    return (flat.mT @ flat).double()


def squares_in_basis(J: BlockJacobian, channels: int) -> Tensor:
    r"""Diagonal of M in the basis that the derivatives are given in, ``c x o x i``.

    Args:
        J: Derivatives of :math:`R^\\top f` in that basis, ``n x r`` of them.
        channels: 1 to sum over all r, r to keep them apart.

    Returns:
        The sums, float64.
    """
    if J.is_rank_one:
        a = J.inputs[:, 0].square()  # n x i
        g = J.signal[:, :, 0].square()  # n x r x o
        g = g.movedim(1, 0) if channels > 1 else g.sum(1).unsqueeze(0)
        return (g.mT @ a).double()
    squares = J.dense().square().sum(0).double()  # r x o x i
    return squares if channels > 1 else squares.sum(0, keepdim=True)
