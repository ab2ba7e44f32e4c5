r"""The weights of a network in blocks, and their Jacobians at some points.

A block is an ``o x i`` array of weights that share a prior variance: weight and bias of
a linear or convolution layer side by side, any other tensor by itself. Its Jacobian is
held as inputs a and signals :math:`\delta` of the layer where there are any, since then
:math:`J = \sum_t \delta_t a_t^\top`, and as columns elsewhere.

In: tangent features. Out: :class:`WeightBlock`, for each its :class:`BlockJacobian`.
Next: ``factored`` keeps a curvature per block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.layer_features import Columns, LayerFeatures
from gpbridge.layer_signals import outer_products


class WeightBlock(NamedTuple):
    """Some weights as an ``o x i`` array.

    ``names`` are the tensors that stand side by side in it, ``widths`` their numbers of
    columns; ``starts`` are where each begins among all p weights.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    starts: tuple[int, ...]
    o: int
    group: int  # of the prior variance

    @property
    def i(self) -> int:
        """Columns of the array."""
        return sum(self.widths)

    @property
    def label(self) -> str:
        """The tensors by name, for messages."""
        return " and ".join(self.names)

    def take(self, flat: Tensor) -> Tensor:
        """The block's entries of ``... x p``, ``... x o x i``."""
        parts = [
            flat[..., start : start + self.o * width].unflatten(-1, (self.o, width))
            for start, width in zip(self.starts, self.widths, strict=True)
        ]
        return torch.cat(parts, -1)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write ``... x o x i`` entries into ``... x p``, in place."""
        first = 0
        for start, width in zip(self.starts, self.widths, strict=True):
            part = values[..., first : first + width].flatten(-2)
            flat[..., start : start + self.o * width] = part
            first += width


class BlockJacobian(NamedTuple):
    """Derivatives of the outputs at some points by the weights of a block.

    Either ``inputs`` and ``signal`` of a layer, or ``columns``.
    """

    inputs: Tensor | None  # batch x n x T x i
    signal: Tensor | None  # batch x n x m x T x o
    columns: Tensor | None  # batch x n x m x o x i

    @property
    def is_rank_one(self) -> bool:
        """Whether the derivatives are one outer product for each output."""
        return self.inputs is not None and self.inputs.shape[-2] == 1

    def dense(self) -> Tensor:
        """The derivatives, ``batch x n x m x o x i``."""
        if self.columns is not None:
            return self.columns
        return outer_products(self.signal, self.inputs)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> BlockJacobian:
        """The derivatives in another basis, ``left' J right``; None is the identity."""
        if self.columns is None:
            inputs = self.inputs if right is None else self.inputs @ right
            signal = self.signal if left is None else self.signal @ left
            return BlockJacobian(inputs, signal, None)
        J = self.columns
        J = J if right is None else J @ right
        return BlockJacobian(None, None, J if left is None else left.mT @ J)

    def weighted(self, root: Tensor) -> BlockJacobian:
        r"""Outputs combined by ``n x m x r`` roots, :math:`R^\top J` at each point."""
        if self.columns is None:
            n, m, T, o = self.signal.shape
            signal = root.mT @ self.signal.flatten(-2)
            return BlockJacobian(self.inputs, signal.reshape(n, -1, T, o), None)
        o, i = self.columns.shape[-2:]
        columns = (root.mT @ self.columns.flatten(-2)).unflatten(-1, (o, i))
        return BlockJacobian(None, None, columns)


def weight_blocks(
    features: TangentFeatures, sizes: Mapping[str, torch.Size], groups: Sequence[set]
) -> list[WeightBlock]:
    """Divide the weights into blocks.

    Args:
        features: Features of some points.
        sizes: Shape of each random weight, in the order of the features.
        groups: Names of the weights that share a prior variance.

    Returns:
        The blocks, together all weights.
    """
    group_of = {name: g for g, names in enumerate(groups) for name in names}
    members: dict[tuple[str | None, str | int], list[str]] = {}
    for name, column in zip(sizes, _columns(features, sizes), strict=True):
        layer = None if column is None else column.source
        key = (None, name) if layer is None else (layer, group_of[name])
        members.setdefault(key, []).append(name)
    starts, start = {}, 0
    for name, shape in sizes.items():
        starts[name], start = start, start + shape.numel()
    blocks = []
    for (layer, _), names in members.items():
        shape = sizes[names[0]]
        o = shape[0] if len(shape) > 1 else 1
        if layer is not None:
            o = features.layers[layer].signal.shape[-1]
        blocks.append(
            WeightBlock(
                names=tuple(names),
                widths=tuple(sizes[name].numel() // o for name in names),
                starts=tuple(starts[name] for name in names),
                o=o,
                group=group_of[names[0]],
            )
        )
    return blocks


def block_jacobian(
    features: TangentFeatures, block: WeightBlock, sizes: Mapping[str, torch.Size]
) -> BlockJacobian:
    """The derivatives by the weights of a block, at the points of some features."""
    columns = dict(zip(sizes, _columns(features, sizes), strict=True))
    own = [columns[name] for name in block.names]
    if own[0] is None:
        rows = features.rows().unflatten(-2, features.value.shape[-2:])
        return BlockJacobian(None, None, block.take(rows))
    if own[0].source is None:
        matrix = features.matrix.unflatten(-2, features.value.shape[-2:])
        parts = [column.view(matrix).flatten(-2) for column in own]
        parts = [part.unflatten(-1, (block.o, -1)) for part in parts]
        return BlockJacobian(None, None, torch.cat(parts, -1))
    layer = features.layers[own[0].source]
    first, last = own[0].first, own[-1].last  # weight before bias, side by side
    return BlockJacobian(layer.inputs[..., first:last], layer.signal, None)


def _columns(
    features: TangentFeatures, sizes: Mapping[str, torch.Size]
) -> list[Columns | None]:
    if isinstance(features, LayerFeatures):
        return list(features.columns)
    return [None] * len(sizes)
