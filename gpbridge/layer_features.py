r"""Features held as layer signals: their Gram matrices without the Jacobian.

A linear layer :math:`z = W a + b` has :math:`\partial f / \partial W = \delta a^\top`
with the back-propagated signal :math:`\delta = \partial f / \partial z`, so its part of
the kernel is the product of two small Gram matrices,

.. math::
    K_l = (\Delta \Delta^\top) \circ (s_W A A^\top + s_b),

at a cost of n^2 (width) instead of n^2 (width)^2. A convolution is such a layer at
every position, summed over pairs of positions.

In: signals of the layers, a matrix of the columns of all other weights. Out:
:class:`LayerFeatures`, which answer what ``features`` asks.
Next: ``layer_gram`` decides which layers are contracted.

References:
    Novak, Sohl-Dickstein, Schoenholz, Fast Finite Width Neural Tangent Kernel, ICML
    2022, section 3.2 (the contraction is their NTK-vector / structured form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.features import DenseFeatures, TangentFeatures, transposed_product
from gpbridge.layer_signals import LayerSignal

_CACHE_ROWS = 64  # rows of the Gram matrix per block, so that temporaries stay in cache


class Columns(NamedTuple):
    """Where the columns of one weight are: ``o`` rows of ``i`` columns of a source.

    ``source`` is the name of a layer, or None for the matrix.
    """

    source: str | None
    start: int
    o: int
    i: int
    first: int  # of the i columns, the weight's own are first .. last - 1
    last: int

    def view(self, source: Tensor) -> Tensor:
        """The weight's columns, ``... x o x (last - first)``."""
        part = source[..., self.start : self.start + self.o * self.i]
        return part.unflatten(-1, (self.o, self.i))[..., self.first : self.last]


class LayerFeatures(NamedTuple):
    """Features held as layer signals, and as a matrix where that is cheaper."""

    value: Tensor  # batch x n x m
    layers: dict[str, LayerSignal]  # contracted, by module name
    matrix: Tensor  # batch x (n m) x f, the columns of all other weights
    columns: list[Columns]  # one per weight, in the order of the features

    def gram(self, other: TangentFeatures | None = None) -> Tensor:
        """Kernel matrix with other features, default with these."""
        if isinstance(other, DenseFeatures):
            return self.rows() @ other.matrix.mT
        other = self if other is None else other
        tensors = [self.matrix, other.matrix]
        for name, mine in self.layers.items():
            tensors += [*mine, *other.layers[name]]
        if any(t.requires_grad for t in tensors) and torch.is_grad_enabled():
            return self._gram_block(other)
        if self.value.dim() > 2 or other.value.dim() > 2:
            return self._gram_block(other)
        n, m = self.value.shape
        K = self.value.new_empty(n * m, other.value.numel())
        step = max(1, _CACHE_ROWS // m)
        with torch.no_grad():
            for start in range(0, n, step):
                part = self.take(slice(start, start + step))
                rows = K[start * m : (start + step) * m]
                if other is not self:
                    part._gram_into(other, rows)
                    continue
                # The matrix of a set with itself: the lower blocks, and their mirror.
                seen = self.take(slice(0, start + step))
                part._gram_into(seen, rows[:, : seen.value.numel()])
                K[: start * m, start * m : (start + step) * m] = rows[:, : start * m].mT
        return K

    def _gram_into(self, other: LayerFeatures, out: Tensor) -> None:
        """Write the matrix in place: temporaries are as small as the block."""
        n, m = self.value.shape
        n_other, m_other = other.value.shape
        torch.mm(self.matrix, other.matrix.mT, out=out)
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if mine.inputs.shape[-2] > 1:
                out += _contract_positions(mine, theirs)
                continue
            part = mine.signal.flatten(0, 2) @ theirs.signal.flatten(0, 2).mT
            pairs = mine.inputs[:, 0] @ theirs.inputs[:, 0].mT
            if m == m_other == 1:
                out.addcmul_(part, pairs)
            else:
                by_point = part.view(n, m, n_other, m_other)
                by_point.mul_(pairs[:, None, :, None])
                out += part

    def _gram_block(self, other: LayerFeatures) -> Tensor:
        """The matrix by differentiable operations, batches included."""
        K = self.matrix @ other.matrix.mT
        n, m = self.value.shape[-2:]
        n_other, m_other = other.value.shape[-2:]
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if mine.inputs.shape[-2] == 1:
                part = mine.signal.flatten(-4, -2) @ theirs.signal.flatten(-4, -2).mT
                pairs = mine.inputs[..., 0, :] @ theirs.inputs[..., 0, :].mT
                if m == m_other == 1:
                    K = torch.addcmul(K, part, pairs)
                    continue
                part = part.unflatten(-1, (n_other, m_other)).unflatten(-3, (n, m))
                part = (part * pairs[..., :, None, :, None]).flatten(-2)
                K = K + part.flatten(-3, -2)
            else:
                K = K + _contract_positions(mine, theirs)
        return K

    def take(self, points: Tensor | slice) -> LayerFeatures:
        """The features of some of the points, unbatched sets."""
        matrix = self.matrix.unflatten(0, self.value.shape)[points]
        return LayerFeatures(
            self.value[points],
            {
                name: LayerSignal(s.inputs[points], s.signal[points])
                for name, s in self.layers.items()
            },
            matrix.flatten(0, 1),
            self.columns,
        )

    def to(self, dtype: torch.dtype) -> LayerFeatures:
        """The features in another precision."""
        return LayerFeatures(
            self.value.to(dtype),
            {
                name: LayerSignal(s.inputs.to(dtype), s.signal.to(dtype))
                for name, s in self.layers.items()
            },
            self.matrix.to(dtype),
            self.columns,
        )

    def select(self, outputs: Sequence[int]) -> LayerFeatures:
        """The features of some of the outputs."""
        chosen = list(outputs)
        matrix = self.matrix.unflatten(-2, self.value.shape[-2:])[..., chosen, :]
        return LayerFeatures(
            self.value[..., chosen],
            {
                name: LayerSignal(s.inputs, s.signal[..., chosen, :, :])
                for name, s in self.layers.items()
            },
            matrix.flatten(-3, -2),
            self.columns,
        )

    def blocks(self) -> Tensor:
        """Per-point prior covariance."""
        per_point = self.matrix.unflatten(-2, self.value.shape[-2:])
        total = per_point @ per_point.mT
        for layer in self.layers.values():
            if layer.inputs.shape[-2] == 1:
                delta = layer.signal[..., 0, :]  # batch x n x m x o
                square = layer.inputs.square().sum((-2, -1))
                total = total + (delta @ delta.mT) * square[..., None, None]
            else:
                J = layer.jacobian()
                total = total + J @ J.mT
        return total

    def rows(self) -> Tensor:
        """The dense features, built from the signals."""
        sources: dict[str | None, Tensor] = {
            name: layer.jacobian() for name, layer in self.layers.items()
        }
        sources[None] = self.matrix.unflatten(-2, self.value.shape[-2:])
        parts = [c.view(sources[c.source]) for c in self.columns]
        if any(part.requires_grad for part in parts):
            return torch.cat([p.flatten(-2) for p in parts], dim=-1).flatten(-3, -2)
        p = sum(part.shape[-2:].numel() for part in parts)
        result = self.value.new_empty(*self.value.shape, p)
        start = 0
        for part in parts:  # one copy each, where cat would need two
            size = part.shape[-2:]
            stop = start + size.numel()
            result[..., start:stop].unflatten(-1, size).copy_(part)
            start = stop
        return result.flatten(-3, -2)

    def matmul(self, omega: Tensor) -> Tensor:
        """Product with scaled weights, ``p`` or ``p x k``."""
        if omega.dim() == 1:
            return self.matmul(omega[:, None])[..., 0]
        k = omega.shape[-1]
        widths: dict[str | None, int] = {
            name: layer.signal.shape[-1] * layer.inputs.shape[-1]
            for name, layer in self.layers.items()
        }
        widths[None] = self.matrix.shape[-1]
        parts = {name: omega.new_zeros(k, width) for name, width in widths.items()}
        start = 0
        for c in self.columns:
            view = c.view(parts[c.source])  # k x o x i
            size = view[0].numel()
            view.copy_(omega[start : start + size].mT.reshape(view.shape))
            start += size
        total = (self.matrix @ parts[None].mT).reshape(*self.value.shape, k)
        for name, layer in self.layers.items():
            outputs = layer.signal.shape[-1]
            weight = parts[name].reshape(k, outputs, -1).transpose(0, 1)  # o x k x i
            moved = layer.inputs @ weight.flatten(0, 1).mT  # batch x n x T x (o k)
            moved = moved.unflatten(-1, (outputs, k)).flatten(-3, -2)
            signal = layer.signal.flatten(-2)  # batch x n x m x (T o)
            total = total + signal @ moved
        return total

    def t_matmul(self, outputs: Tensor) -> Tensor:
        """Transposed product, for an unbatched set of points."""
        k = outputs.shape[-1]
        parts = {None: transposed_product(self.matrix, outputs.flatten(0, 1)).mT}
        for name, layer in self.layers.items():
            T, o = layer.signal.shape[-2:]
            pulled = layer.signal.flatten(-2).mT @ outputs  # n x (T o) x k
            pulled = pulled.unflatten(1, (T, o)).flatten(0, 1)  # (n T) x o x k
            weight = pulled.flatten(1).mT @ layer.inputs.flatten(0, 1)  # (o k) x i
            parts[name] = weight.unflatten(0, (o, k)).transpose(0, 1).flatten(1)
        views = [c.view(parts[c.source]).flatten(1) for c in self.columns]  # k x (o i)
        return torch.cat(views, dim=1).mT


def _contract_positions(mine: LayerSignal, theirs: LayerSignal) -> Tensor:
    """Sum over pairs of positions, one position of the first set at a time."""
    m, T = mine.signal.shape[-3:-1]
    m_other = theirs.signal.shape[-3]
    n, n_other = mine.inputs.shape[-3], theirs.inputs.shape[-3]
    their_inputs = theirs.inputs.flatten(-3, -2)  # (n' T') x i
    their_signal = theirs.signal.transpose(-3, -2).flatten(-4, -2)  # (n' T' m) x o
    total = 0.0
    for t in range(T):
        pairs = mine.inputs[..., t, :] @ their_inputs.mT  # n x (n' T')
        part = mine.signal[..., t, :].flatten(-3, -2) @ their_signal.mT
        part = part.unflatten(-1, (n_other, -1, m_other)).unflatten(-4, (n, m))
        pairs = pairs.unflatten(-1, (n_other, -1))[..., :, None, :, :, None]
        total = total + (part * pairs).sum(-2)  # n x m x n' x m
    return total.flatten(-2).flatten(-3, -2)
