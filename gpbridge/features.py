r"""Tangent features: rows of :math:`\Phi(x) = J(x) S^{1/2}` and their Gram matrices.

In: a :class:`~gpbridge.functional.FunctionalNet`, inputs, and the prior standard
deviation of its weights. Out: an object that answers what a Gaussian process asks (Gram
matrices, per-point covariances, products), however the features are held. Here they are
held as a dense matrix; ``layer_gram`` holds layer signals instead and never forms them.
Next: ``prediction`` conditions on such features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jacobian

PriorStd = Mapping[str, Tensor]
"""Prior standard deviation by weight name: a number, or one per entry of the weight."""


class TangentFeatures(Protocol):
    r"""Features :math:`\Phi` of ``batch_shape x n`` points with m outputs.

    Rows are point-major, output fastest. ``value`` holds the network's outputs,
    ``batch_shape x n x m``. All products are in the scaled weights
    :math:`\omega = S^{-1/2} w`, whose prior is a standard normal.
    """

    value: Tensor

    def gram(self, other: TangentFeatures | None = None) -> Tensor:
        r"""Kernel matrix :math:`\Phi \Phi'^\top`, ``batch x (n m) x (n' m)``."""
        ...

    def blocks(self) -> Tensor:
        """Prior covariance of the outputs at each point, ``batch x n x m x m``."""
        ...

    def rows(self) -> Tensor:
        """The dense features, ``batch x (n m) x p``."""
        ...

    def matmul(self, omega: Tensor) -> Tensor:
        r"""Product :math:`\Phi \omega`, ``p`` to ``batch x n x m``.

        Columns ``p x k`` become the last axis of the result, ``batch x n x m x k``.
        """
        ...

    def t_matmul(self, outputs: Tensor) -> Tensor:
        r"""Product :math:`\Phi^\top u`, ``n x m x k`` to ``p x k``, unbatched sets."""
        ...

    def select(self, outputs: Sequence[int]) -> TangentFeatures:
        """The features of some of the outputs."""
        ...

    def take(self, points: Tensor) -> TangentFeatures:
        """The features of some of the points, unbatched sets."""
        ...

    def to(self, dtype: torch.dtype) -> TangentFeatures:
        """The features in another precision."""
        ...


class DenseFeatures(NamedTuple):
    """Features held as a matrix: one product per question, memory n m p."""

    value: Tensor  # batch x n x m
    matrix: Tensor  # batch x (n m) x p

    def gram(self, other: TangentFeatures | None = None) -> Tensor:
        """Kernel matrix with other features, default with these."""
        theirs = self.matrix if other is None else other.rows()
        return self.matrix @ theirs.mT

    def blocks(self) -> Tensor:
        """Per-point prior covariance."""
        per_point = self.matrix.unflatten(-2, self.value.shape[-2:])
        return per_point @ per_point.mT

    def rows(self) -> Tensor:
        """The matrix itself."""
        return self.matrix

    def matmul(self, omega: Tensor) -> Tensor:
        """Product with scaled weights, ``p`` or ``p x k``."""
        return (self.matrix @ omega).reshape(*self.value.shape, *omega.shape[1:])

    def t_matmul(self, outputs: Tensor) -> Tensor:
        """Transposed product, for an unbatched set of points."""
        return transposed_product(self.matrix, outputs.flatten(0, 1))

    def select(self, outputs: Sequence[int]) -> DenseFeatures:
        """The features of some of the outputs."""
        chosen = list(outputs)
        matrix = self.matrix.unflatten(-2, self.value.shape[-2:])[..., chosen, :]
        return DenseFeatures(self.value[..., chosen], matrix.flatten(-3, -2))

    def take(self, points: Tensor) -> DenseFeatures:
        """The features of some of the points, unbatched sets."""
        matrix = self.matrix.unflatten(0, self.value.shape)[points]
        return DenseFeatures(self.value[points], matrix.flatten(0, 1))

    def to(self, dtype: torch.dtype) -> DenseFeatures:
        """The features in another precision."""
        return DenseFeatures(self.value.to(dtype), self.matrix.to(dtype))


def transposed_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix' columns`` for a tall matrix and few columns.

    Written so that the long matrix is read along its rows: many times faster.
    """
    return (columns.mT.contiguous() @ matrix).mT


def flat_std(net: FunctionalNet, std: PriorStd) -> Tensor:
    """Spread prior standard deviations over the entries of the weights, ``p``."""
    params = net.params
    return torch.cat(
        [s.expand(params[name].shape).reshape(-1) for name, s in std.items()]
    )


def dense_features(net: FunctionalNet, X: Tensor, std: PriorStd) -> DenseFeatures:
    """Form the features of the weights named in ``std`` by per-sample Jacobians.

    Time n m backward passes, memory n m p.

    Args:
        net: The network.
        X: Inputs ``batch x n x d``.
        std: Prior standard deviations; weights that are not named do not contribute.

    Returns:
        The features of ``batch x n`` points.
    """
    params = net.params
    J = jacobian(net, X, {name: params[name] for name in std})  # batch x n x m x p
    return DenseFeatures(net(X), J.flatten(-3, -2) * flat_std(net, std))
