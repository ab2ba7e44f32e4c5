r"""Tangent features of a whole data set, for products with many vectors.

An iterative solver multiplies with the same Jacobian J again and again. Layer signals
(see ``layer_features``) hold it in n (width) numbers where the matrix has n m p, so
that features of tens of thousands of images fit into memory, and a product with k
vectors is a few matrix products instead of k passes through the network. What does not
fit is computed again at every pass.

In: a network and inputs. Out: :class:`DataFeatures`, and on top of them the two
matrices of the linear model in weights and in outputs. Next: ``linearized/sampling``.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.layer_features import LayerFeatures
from gpbridge.layer_gram import tangent_features
from gpbridge.operators import JacobianOperator
from gpbridge.partial_products import precision, smallest_eigenvalue

_CHUNK_BYTES = 64 * 2**20  # features of one chunk of points
_FEW = 8  # points; where fewer fit into a chunk, products go through the network
_STREAMED = 256  # points of a chunk that goes through the network, in parts that fit


class Batch(NamedTuple):
    """Points of a chunk, by their places in it."""

    chunk: int
    part: slice


class DataFeatures:
    r"""The Jacobian J of a network at a data set, as products with many vectors.

    Rows are point-major, output fastest. Chunks are random sets of points, since data
    may be sorted; rows of products are in the order of the data. Forming the features
    costs about m backward passes per point, once while they fit into the budget. A
    product with k vectors costs n (k + m) (width)^2 operations per layer.

    Args:
        net: The network, probed.
        X: Inputs ``n x d`` of the network's dtype.
        memory_budget: Bytes for features that stay, besides one chunk at work.
        points_per_chunk: Points per chunk; default by their size.

    Attributes:
        numbers_per_point: Memory of the features of one point.
    """

    def __init__(
        self,
        net: FunctionalNet,
        X: Tensor,
        memory_budget: float = 2 * 2**30,
        points_per_chunk: int | None = None,
    ) -> None:
        self.net, self.X = net, X.detach()
        one = X.new_ones((), dtype=net.dtype)
        self._unit = {name: one for name in net.params}
        first = self._form(self.X[:2])
        size = max(1, feature_bytes(first) // max(1, len(first.value)))  # per point
        self.numbers_per_point = size // X.element_size()
        self._streams = size * _FEW > _CHUNK_BYTES
        if points_per_chunk is None:
            fitting = max(_FEW, min(_CHUNK_BYTES // size, 1024))
            points_per_chunk = _STREAMED if self._streams else fitting
        # Data may be sorted, by class or by time: chunks are random sets of points.
        # Rows of products keep the order of the data.
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(X), generator=generator).to(X.device)
        self._chunks = list(order.split(points_per_chunk))
        self._room = memory_budget
        self._held: dict[int, TangentFeatures] = {}
        self._last: tuple[Batch, TangentFeatures] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows n m and weights p."""
        return len(self.X) * self.net.num_outputs, self.net.num_params

    @property
    def num_chunks(self) -> int:
        """The number of chunks that the points are divided into, at random."""
        return len(self._chunks)

    def batches(self, size: int) -> list[Batch]:
        """Random disjoint batches of at most ``size`` points, none across chunks."""
        found = []
        for chunk, rows in enumerate(self._chunks):
            count = -(-len(rows) // size)
            ends = [len(rows) * i // count for i in range(count + 1)]
            found += [
                Batch(chunk, slice(a, b)) for a, b in itertools.pairwise(ends) if b > a
            ]
        return found

    def rows_of(self, batch: Batch) -> Tensor:
        """The row numbers of the points of a batch, in its order."""
        return self._chunks[batch.chunk][batch.part]

    def matmul(self, weights: Tensor, batch: Batch | None = None) -> Tensor:
        """Product ``J W``, ``p x k`` to ``n x m x k``, of one batch or of all."""
        if batch is None:
            shape = len(self.X), self.net.num_outputs, weights.shape[-1]
            result = weights.new_empty(shape)
            for chunk in self._whole_chunks():
                result[self.rows_of(chunk)] = self.matmul(weights, chunk)
            return result
        features = self._features(batch)
        W = weights.to(self.net.dtype)
        if isinstance(features, JacobianOperator):
            product = features._matmul(W).unflatten(0, (-1, self.net.num_outputs))
        else:
            product = features.matmul(W)
        return product.to(weights.dtype)

    def t_matmul(self, outputs: Tensor, batch: Batch | None = None) -> Tensor:
        """Product ``J' U``, ``n x m x k`` to ``p x k``, of one batch or of all."""
        if batch is None:
            total = outputs.new_zeros(self.net.num_params, outputs.shape[-1])
            for chunk in self._whole_chunks():
                total += self.t_matmul(outputs[self.rows_of(chunk)], chunk)
            return total
        features, U = self._features(batch), outputs.to(self.net.dtype)
        if isinstance(features, JacobianOperator):
            product = features._t_matmul(U.flatten(0, 1))
        else:
            product = features.t_matmul(U)
        return product.to(outputs.dtype)

    def _whole_chunks(self) -> list[Batch]:
        return self.batches(len(self.X))

    @torch.no_grad()
    def _form(self, X: Tensor) -> TangentFeatures:
        return tangent_features(self.net, X, self._unit)

    def _features(self, batch: Batch) -> TangentFeatures | JacobianOperator:
        if self._streams:
            return JacobianOperator(self.X[self.rows_of(batch)], net=self.net)
        size = len(self._chunks[batch.chunk])
        whole = range(size)[batch.part] == range(size)
        if batch.chunk in self._held:
            held = self._held[batch.chunk]
            return held if whole else held.take(batch.part)
        if self._last is not None and self._last[0] == batch:
            return self._last[1]  # of the product before, that will be transposed
        self._last = None
        chunk = Batch(batch.chunk, slice(0, size))
        needed = self.numbers_per_point * self.X.element_size() * size
        if whole or needed <= self._room:
            features = self._form(self.X[self.rows_of(chunk)])
            if (needed := feature_bytes(features)) <= self._room:
                self._held[batch.chunk] = features
                self._room -= needed
                return self._features(batch)
        if not whole:
            features = self._form(self.X[self.rows_of(batch)])
        self._last = batch, features
        return features


def feature_bytes(features: TangentFeatures) -> int:
    """Memory that features hold."""
    tensors = [features.value]
    if isinstance(features, LayerFeatures):
        tensors += [features.matrix, *(t for s in features.layers.values() for t in s)]
    else:
        tensors.append(features.rows())
    return sum(t.numel() * t.element_size() for t in tensors)


class _LinearModelOperator:
    """What the two matrices share: data, roots R ``n x m x m``, deviations ``p``.

    Products, shape, dtype and device are all that an iterative solver asks for; nothing
    here is differentiable, so that neither is a LinearOperator.
    """

    batch_shape = torch.Size()

    def __init__(self, root: Tensor, std: Tensor, data: DataFeatures) -> None:
        self.root, self.std, self.data = root, std, data
        self.dtype, self.device = std.dtype, std.device

    def __matmul__(self, rhs: Tensor) -> Tensor:
        return self._matmul(rhs)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs[:, None])[:, 0]
        return rhs + self.curved(rhs)

    def to_outputs(self, omega: Tensor) -> Tensor:
        r"""Product :math:`R^\top J S^{1/2} \omega`, ``p x k`` to ``n x m x k``."""
        return self.root.mT @ self.data.matmul(self.std[:, None] * omega)

    def to_weights(self, outputs: Tensor) -> Tensor:
        r"""Product :math:`S^{1/2} J^\top R u`, ``n x m x k`` to ``p x k``."""
        return self.std[:, None] * self.data.t_matmul(self.root @ outputs)


class PrecisionOperator(_LinearModelOperator):
    r"""Posterior precision of the scaled weights, ``p x p``, positive definite.

    .. math:: H = I + S^{1/2} J^\top R R^\top J S^{1/2}

    One product with k columns is one pass over the data.

    Args:
        root: Roots R of the output Hessians, ``n x m x m``.
        std: Prior standard deviations of the weights, ``p``.
        data: Features of the data.
    """

    @property
    def shape(self) -> torch.Size:
        """``p x p``."""
        return torch.Size((self.std.numel(), self.std.numel()))

    def curved(self, rhs: Tensor) -> Tensor:
        """Product of the matrix without the identity, ``p x k``."""
        total = torch.zeros_like(rhs)
        for chunk in self.batches(len(self.root)):
            total += self.batch_weights(self.batch_outputs(rhs, chunk), chunk)
        return total

    def batches(self, size: int) -> list[Batch]:
        """Random disjoint batches of at most ``size`` points that cover the data."""
        return self.data.batches(size)

    def batch_outputs(self, omega: Tensor, batch: Batch) -> Tensor:
        r"""Product :math:`R^\top J S^{1/2} \omega` of a batch, to ``b x m x k``."""
        root = self.root[self.data.rows_of(batch)]
        return root.mT @ self.data.matmul(self.std[:, None] * omega, batch)

    def batch_weights(self, outputs: Tensor, batch: Batch) -> Tensor:
        r"""Product :math:`S^{1/2} J^\top R u` of a batch, to ``p x k``."""
        root = self.root[self.data.rows_of(batch)]
        return self.std[:, None] * self.data.t_matmul(root @ outputs, batch)


class OutputOperator(_LinearModelOperator):
    r"""The matrix :math:`A = I + R^\top J S J^\top R`, ``(n m) x (n m)``.

    Args:
        root: Roots R of the output Hessians, ``n x m x m``.
        std: Prior standard deviations of the weights, ``p``.
        data: Features of the data.
    """

    @property
    def shape(self) -> torch.Size:
        """``(n m) x (n m)``."""
        rows = self.root.shape[0] * self.root.shape[-1]
        return torch.Size((rows, rows))

    def curved(self, rhs: Tensor) -> Tensor:
        """Product of the matrix without the identity, ``(n m) x k``."""
        outputs = rhs.unflatten(0, (self.root.shape[0], -1))
        return self.to_outputs(self.to_weights(outputs)).flatten(0, 1)


@smallest_eigenvalue.register(_LinearModelOperator)
def _at_least_the_identity(operator: _LinearModelOperator) -> float:
    return 1.0


@precision.register(_LinearModelOperator)
def _of_the_network(operator: _LinearModelOperator) -> float:
    return torch.finfo(operator.data.net.dtype).eps
