r"""Jacobian products of a network as matrices that are never formed.

With tangent features :math:`\Phi = J S^{1/2}` of the points in ``X`` and the roots R of
the likelihood's output Hessian, a product with :math:`\Phi` is one forward-mode pass, a
product with :math:`\Phi^\top` one backward pass, for all columns at once. From these
two follow the Gauss-Newton matrix and the whitened kernel matrix.

In: a :class:`~gpbridge.functional.FunctionalNet` and inputs. Out: linear operators.
Next: ``matrix_free`` conditions on data by products only.

References:
    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    Schraudolph, Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 2002, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from linear_operator import LinearOperator
from torch import Tensor
from torch.func import vmap

from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import JACOBIAN_BYTES, jacobian, jvp, vjp

_ALL = slice(None)


class _Held(NamedTuple):
    # LinearOperator.to(...) and its kin call .to on whatever has one, which would
    # convert the caller's network in place.
    net: FunctionalNet


class _TangentOperator(LinearOperator):
    """Arguments ``X`` (and a root) carry the batch; the weights are shared by it.

    Upstream indexes, expands and permutes every argument alike, hence the overrides.
    """

    BATCHED: tuple[int, ...]  # how many axes of an argument are no batch; 0 if shared

    def _on_batch(self, change: Callable[[Tensor, int], Tensor]) -> _TangentOperator:
        args = [
            change(arg, own) if own else arg
            for arg, own in zip(self._args, self.BATCHED, strict=True)
        ]
        return self.__class__(*args, **self._kwargs)

    def _expand_batch(self, batch_shape):
        return self._on_batch(lambda a, own: a.expand(*batch_shape, *a.shape[-own:]))

    def _unsqueeze_batch(self, dim):
        return self._on_batch(lambda a, own: a.unsqueeze(dim))

    def _permute_batch(self, *dims):
        return self._on_batch(
            lambda a, own: a.permute(*dims, *range(len(dims), a.dim()))
        )

    def _getitem(self, row_index, col_index, *batch_indices):
        chosen = self
        if any(not _takes_all(index) for index in batch_indices):
            chosen = self._on_batch(lambda a, own: a[batch_indices])
        return chosen._getitem_matrix(row_index, col_index)

    def _getitem_matrix(self, row_index, col_index):
        if _takes_all(row_index) and _takes_all(col_index):
            return self
        batch = [_ALL] * self.batch_dim
        return super()._getitem(row_index, col_index, *batch)


class JacobianOperator(_TangentOperator):
    r"""The tangent features :math:`\Phi = J(X) S^{1/2}` as a rectangular operator.

    Rows are point-major, output fastest. Products with k columns cost about k forward
    or backward passes; memory is k numbers per row and column, plus a workspace of
    ``JACOBIAN_BYTES``. Differentiable in every argument. Where torch.func cannot trace
    the network, products form the Jacobian of a few points at a time.

    Args:
        X: Inputs ``batch_shape x n x d``.
        theta: The random weights as one vector ``p``; default those of the network.
        std: Prior standard deviations of the weights, ``p`` or one number; default one.
        net: The network, probed.
        transposed: Represent the transposed matrix.
    """

    BATCHED = (2, 0, 0)

    def __init__(
        self,
        X: Tensor,
        theta: Tensor | None = None,
        std: Tensor | None = None,
        *,
        net: FunctionalNet | _Held,
        transposed: bool = False,
    ) -> None:
        held = net if isinstance(net, _Held) else _Held(net)
        theta, std = _shared(X, theta, std, held.net)
        super().__init__(X, theta, std, net=held, transposed=transposed)
        self.X, self.theta, self.std = X, theta, std
        self.net, self.transposed = held.net, transposed

    def _size(self):
        sizes = self.X.shape[-2] * self.net.num_outputs, self.theta.numel()
        return torch.Size(
            (
                *self.X.shape[:-2],
                *(reversed(sizes) if self.transposed else sizes),
            )
        )

    def _transpose_nonbatch(self):
        return JacobianOperator(
            *self._args, net=self._kwargs["net"], transposed=not self.transposed
        )

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._matmul(rhs[:, None])[:, 0]
        if self.transposed:
            return self._products(rhs, self._pull) * self.std.reshape(-1, 1)
        return self._products(self.std.reshape(-1, 1) * rhs, self._push)

    def _products(self, rhs: Tensor, product: Callable) -> Tensor:
        """Apply ``product(X, rhs, chunk)`` of one set of points to a batch of them."""
        batch = torch.broadcast_shapes(self.X.shape[:-2], rhs.shape[:-2])
        chunk = self._points_per_pass(rhs.shape[-1] * batch.numel())
        if not batch:
            return product(self.X, rhs, chunk)
        if self.X.dim() == 2:  # one set of points: the batch is more columns
            columns = rhs.reshape(-1, *rhs.shape[-2:]).permute(1, 0, 2)
            result = product(self.X, columns.flatten(1), chunk)
            result = result.unflatten(1, (-1, rhs.shape[-1])).permute(1, 0, 2)
            return result.reshape(*batch, *result.shape[1:])
        X = self.X.expand(*batch, *self.X.shape[-2:])
        if rhs.dim() == 2 and not self.transposed:  # one tangent: more points
            result = product(X.flatten(0, -2), rhs, chunk * batch.numel())
            return result.reshape(*batch, -1, rhs.shape[-1])
        if 0 in (*X.shape[:-1], rhs.shape[-1]):
            return rhs.new_zeros(*batch, self.shape[-2], rhs.shape[-1])
        X = X.reshape(-1, *X.shape[-2:])
        rhs = rhs.expand(*batch, *rhs.shape[-2:]).reshape(-1, *rhs.shape[-2:])
        if self.net.vectorized:
            result = vmap(lambda x, columns: product(x, columns, chunk))(X, rhs)
        else:
            result = torch.stack(
                [product(x, columns, chunk) for x, columns in zip(X, rhs, strict=True)]
            )
        return result.reshape(*batch, *result.shape[1:])

    def _push(self, X: Tensor, tangents: Tensor, chunk: int) -> Tensor:
        """``n x d`` points and ``p x k`` tangents to ``(n m) x k``."""
        params = self.net.unflatten(self.theta)
        if not self.net.vectorized:
            parts = [
                jacobian(self.net, x, params).flatten(0, 1) @ tangents
                for x in X.split(chunk)
            ]
            return torch.cat(parts)

        def outputs(x: Tensor) -> Tensor:
            push = vmap(lambda v: jvp(self.net, x, v, params))
            return push(tangents.mT).flatten(1).mT  # (b m) x k

        if 0 in (X.shape[0], tangents.shape[-1]):
            return tangents.new_zeros(
                X.shape[0] * self.net.num_outputs, tangents.shape[-1]
            )
        return torch.cat([outputs(x) for x in X.split(chunk)])

    def _pull(self, X: Tensor, cotangents: Tensor, chunk: int) -> Tensor:
        """``n x d`` points and ``(n m) x k`` cotangents to ``p x k``."""
        params = self.net.unflatten(self.theta)
        m = self.net.num_outputs
        total = cotangents.new_zeros(self.theta.numel(), cotangents.shape[-1])
        if 0 in cotangents.shape:
            return total
        per_point = cotangents.unflatten(0, (-1, m))  # n x m x k
        for x, u in zip(X.split(chunk), per_point.split(chunk), strict=True):
            if self.net.vectorized:
                pull = vmap(
                    lambda u, x=x: vjp(self.net, x, u, params), in_dims=-1, out_dims=-1
                )
                total = total + pull(u)
            else:
                J = jacobian(self.net, x, params)
                total = total + J.flatten(0, 1).mT @ u.flatten(0, 1)
        return total

    def _points_per_pass(self, columns: int) -> int:
        net = self.net
        numbers = 2 * max(columns, 1) * (net.num_activations + net.num_outputs)
        if not net.vectorized:
            numbers = net.num_outputs * self.theta.numel()
        return max(1, int(JACOBIAN_BYTES // (numbers * self.X.element_size())))

    def _getitem_matrix(self, row_index, col_index):
        m = self.net.num_outputs
        points, weights = row_index, col_index
        if self.transposed:
            points, weights = weights, points
        if _takes_all(weights) and isinstance(points, slice):
            start, stop, step = points.indices(self.X.shape[-2] * m)
            if step == 1 and start % m == 0 and stop % m == 0:
                return self._on_batch(lambda a, own: a[..., start // m : stop // m, :])
        return super()._getitem_matrix(row_index, col_index)

    def rows(self, start: int, stop: int) -> Tensor:
        """The dense rows of points ``start`` to ``stop``, ``batch x b x m x p``."""
        params = self.net.unflatten(self.theta)
        return jacobian(self.net, self.X[..., start:stop, :], params) * self.std


class _SquareOperator(_TangentOperator):
    """What the two symmetric operators share: features, roots, dense rows by parts."""

    BATCHED = (2, 3, 0, 0)

    def __init__(
        self,
        X: Tensor,
        root: Tensor,
        theta: Tensor | None = None,
        std: Tensor | None = None,
        *,
        net: FunctionalNet | _Held,
    ) -> None:
        self.features = JacobianOperator(X, theta, std, net=net)
        batch = torch.broadcast_shapes(X.shape[:-2], root.shape[:-3])
        if X.shape[:-2] != batch:
            X = X.expand(*batch, *X.shape[-2:])
        if root.shape[:-3] != batch:
            root = root.expand(*batch, *root.shape[-3:])
        self.root = root
        super().__init__(
            X,
            root,
            self.features.theta,
            self.features.std,
            net=self.features._kwargs["net"],
        )

    def _transpose_nonbatch(self):
        return self

    def _apply_root(self, rhs: Tensor, transpose: bool = False) -> Tensor:
        """Product of the block-diagonal R or R' with ``batch x (n m) x k``."""
        root = self.root.mT if transpose else self.root
        per_point = rhs.unflatten(-2, root.shape[-3:-1])
        return (root @ per_point).flatten(-3, -2)

    def _whitened_rows(self):
        """Dense ``R' Phi`` of a few points at a time, ``batch x b x m x p``."""
        X, net = self.features.X, self.features.net
        per_point = net.num_outputs * self.features.theta.numel() * X.element_size()
        step = max(1, JACOBIAN_BYTES // (per_point * max(1, X.shape[:-2].numel())))
        for start in range(0, X.shape[-2], step):
            stop = start + step
            J = self.features.rows(start, stop)
            yield self.root[..., start:stop, :, :].mT @ J


class GGNOperator(_SquareOperator):
    r"""The generalised Gauss-Newton matrix :math:`\Phi^\top R R^\top \Phi`, ``p x p``.

    The sum over data of :math:`J^\top \Lambda J` in the scaled weights, without the
    prior. One product with k columns costs 2 k passes over the data.

    Args:
        X: Inputs ``batch_shape x n x d``.
        root: Roots R of the output Hessians, ``batch_shape x n x m x m``.
        theta: The random weights as one vector ``p``; default those of the network.
        std: Prior standard deviations of the weights, ``p`` or one number; default one.
        net: The network, probed.
    """

    def _size(self):
        p = self.features.theta.numel()
        return torch.Size((*self.root.shape[:-3], p, p))

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._matmul(rhs[:, None])[:, 0]
        seen = self._apply_root(self.features._matmul(rhs), transpose=True)
        return self.features._t_matmul(self._apply_root(seen))

    def _diagonal(self):
        total = self.root.new_zeros(self.shape[:-1])
        for rows in self._whitened_rows():
            total = total + rows.square().sum((-3, -2))
        return total


class WhitenedKernelOperator(_SquareOperator):
    r"""The operator :math:`A = I + R^\top K R` with :math:`K = \Phi \Phi^\top`.

    The one matrix that carries regression and classification, ``(n m) x (n m)``; its
    eigenvalues are at least one. One product with k columns costs 2 k passes over the
    data and memory k (p + n m).

    Args:
        X: Inputs ``batch_shape x n x d``.
        root: Roots R of the output Hessians, ``batch_shape x n x m x m``.
        theta: The random weights as one vector ``p``; default those of the network.
        std: Prior standard deviations of the weights, ``p`` or one number; default one.
        net: The network, probed.
    """

    def _size(self):
        rows = self.root.shape[-3] * self.root.shape[-1]
        return torch.Size((*self.root.shape[:-3], rows, rows))

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._matmul(rhs[:, None])[:, 0]
        return rhs + self.to_outputs(self.to_weights(rhs))

    def to_weights(self, rhs: Tensor) -> Tensor:
        r"""Product :math:`\Phi^\top R v`, ``... x (n m) x k`` to ``... x p x k``."""
        return self.features._t_matmul(self._apply_root(rhs))

    def to_outputs(self, rhs: Tensor) -> Tensor:
        r"""Product :math:`R^\top \Phi w`, ``... x p x k`` to ``... x (n m) x k``."""
        return self._apply_root(self.features._matmul(rhs), transpose=True)

    def _diagonal(self):
        parts = [rows.square().sum(-1).flatten(-2) for rows in self._whitened_rows()]
        return 1 + torch.cat([self.root.new_zeros(*self.batch_shape, 0), *parts], -1)


def _shared(
    X: Tensor, theta: Tensor | None, std: Tensor | None, net: FunctionalNet
) -> tuple[Tensor, Tensor]:
    theta = net.flatten(net.params) if theta is None else theta
    std = X.new_ones(()) if std is None else std
    return theta.to(X), std.to(X)


def _takes_all(index: object) -> bool:
    return isinstance(index, slice) and index == _ALL
