r"""The covariance of an infinitely wide network's outputs, layer by layer.

In: layers, inputs, and the values of the layers' hyperparameters. Out: the covariance
of all pairs, tile by tile, or of matched rows. Next: ``infinite_width`` makes the
values learnable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_memory,
    check_number,
    check_positive,
    check_sequence,
)
from gpbridge.kernels.layer_covariance import (
    LayerCovariance,
    RecordedVariances,
    Signal,
    Values,
    Variances,
)
from gpbridge.kernels.tiled_gram import tile_rows, tiled_gram
from gpbridge.kernels.wide_convolutions import needs_pairs
from gpbridge.kernels.wide_layer_kinds import Layer
from gpbridge.kernels.wide_layers import (
    apply_all,
    every_layer,
    layers_and_signals,
    trace_all,
)
from gpbridge.kernels.wide_shapes import checked_input_shape

KINDS = ("nngp", "ntk")
GROUPS = ("weight_variance", "bias_variance", "tap_lengthscale")

Hyperparameters = Sequence[Tensor | None]  # of each group, or None without any


class WideNetwork:
    """Layers that fit together, and the maps from inputs to covariances.

    Variances of single points come first, by a pass over points with themselves; the
    pass over pairs then has none but large elementwise steps.

    Args:
        layers: The layers.
        kind: ``"nngp"`` or ``"ntk"``.
        input_shape: (channels, height, width), or None for flat inputs.
        memory_budget: Bytes for one tile of images.

    Attributes:
        num_inputs: Columns of flat inputs, where they are known.
        pairs: Covariances of all pairs of pixels are needed.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kind: str,
        input_shape: Sequence[int] | None,
        memory_budget: float,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_number(memory_budget=memory_budget)
        check_positive(memory_budget=memory_budget)
        check_sequence(layers=layers)
        self.layers, self.tangent = tuple(layers), kind == "ntk"
        self.input_shape = checked_input_shape(input_shape)
        self.num_inputs: int | None = None
        self.memory_budget = memory_budget
        image = None if self.input_shape is None else self.input_shape[1:]
        last = trace_all(self.layers, Signal(image), "layers")
        if not (last.gaussian and last.random and last.image is None):
            raise ValueError(
                "The network must end in flat Gaussian outputs, but its last layer is "
                f"{self.layers[-1] if self.layers else None}. Add Dense() at the end."
            )
        flat = every_layer(self.layers)
        self.pairs = image is not None and any(map(needs_pairs, flat))

    def gram(self, x1: Tensor, x2: Tensor | None, values: Hyperparameters) -> Tensor:
        """Covariance of all pairs, of x1 with itself if x2 is None."""
        rows = self._tile_rows(x1, x1 if x2 is None else x2, values)
        *first, own = self._points(x1, values, rows**2)
        rows1 = rows2 = x1, *first
        if x2 is not None:
            *second, _ = self._points(x2, values, rows**2)
            rows2, own = (x2, *second), None
        return tiled_gram(self._block, rows1, rows2, values, own, rows)

    def matched(self, x1: Tensor, x2: Tensor, values: Hyperparameters) -> Tensor:
        """Covariance of pairs of the same row, ``... x n``."""
        rows = self._tile_rows(x1, x2, values) ** 2
        *first, own = self._points(x1, values, rows)
        if x2 is x1:
            return own
        *second, _ = self._points(x2, values, rows)
        count = 1 + len(first)

        def between(*tensors: Tensor | None) -> tuple[Tensor]:
            (x1, *first), (x2, *second) = tensors[:count], tensors[count : 2 * count]
            k = self._matched_products(x1, x2)
            variances = RecordedVariances(first, second)
            return (self._run(k, variances, tensors[2 * count :], aligned=True),)

        tensors = [x1, *first, x2, *second]
        return self._by_rows(between, tensors, values, rows)[0][..., 0]

    def _run(
        self,
        k: Tensor,
        variances: Variances | RecordedVariances,
        values: Hyperparameters,
        aligned: bool,
    ) -> Tensor:
        """The kernel of the outputs, from the covariance of the inputs."""
        space = 0 if self.input_shape is None else 4 if self.pairs else 2
        state = LayerCovariance(k, None, variances, space, aligned, self.tangent)
        held = Values(**dict(zip(GROUPS, values, strict=True)))
        state = apply_all(self.layers, state, held)
        return state.theta if self.tangent else state.k

    def _points(self, x: Tensor, values: Hyperparameters, rows: int) -> list[Tensor]:
        """Of each point: variances ``... x n x P``, and the kernel ``... x n``."""

        def record(x: Tensor, *values: Tensor | None) -> tuple[Tensor, ...]:
            variances = Variances()
            k = self._matched_products(x, x)
            own = self._run(k, variances, values, aligned=True)
            return *variances.recorded, own

        *variances, own = self._by_rows(record, [x], values, rows)
        return [*variances, own[..., 0]]

    def _by_rows(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        tensors: Sequence[Tensor],
        values: Hyperparameters,
        rows: int,
    ) -> list[Tensor]:
        """A function of matched rows, which for pairs of pixels keeps few at a time."""
        if not self.pairs or tensors[0].shape[-2] <= rows:
            return list(function(*tensors, *values))
        splits = zip(*(t.split(rows, -2) for t in tensors), strict=True)
        parts = [
            checkpoint(function, *part, *values, use_reentrant=False) for part in splits
        ]
        return [torch.cat(found, -2) for found in zip(*parts, strict=True)]

    def _block(
        self,
        rows1: Sequence[Tensor],
        rows2: Sequence[Tensor],
        values: Hyperparameters,
    ) -> Tensor:
        """One block of the matrix, ``... x n1 x n2``."""
        (x1, *first), (x2, *second) = rows1, rows2
        if self.input_shape is None:
            k = (x1 / x1.shape[-1]) @ x2.mT
        else:
            c, h, w = self.input_shape
            a, b = x1.unflatten(-1, (c, h, w)) / c, x2.unflatten(-1, (c, h, w))
            formula = "...ichw,...jchw->...ijhw"
            if self.pairs:
                formula = "...ichw,...jcuv->...ijhwuv"
            k = torch.einsum(formula, a, b).contiguous()
        variances = RecordedVariances(first, second)
        return self._run(k, variances, values, aligned=False)

    def _matched_products(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Inner products of matched inputs, divided by their number."""
        if self.input_shape is None:
            return (x1 * x2).sum(-1, keepdim=True) / x1.shape[-1]
        c, h, w = self.input_shape
        a, b = x1.unflatten(-1, (c, h, w)) / c, x2.unflatten(-1, (c, h, w))
        if self.pairs:
            k = torch.einsum("...chw,...cuv->...hwuv", a, b)
            return k.unsqueeze(-5)
        return (a * b).sum(-3).unsqueeze(-3)

    def _numbers_per_pair(self) -> int:
        if self.input_shape is None:
            return 1
        pixels = self.input_shape[1] * self.input_shape[2]
        return pixels**2 if self.pairs else pixels

    def check_width(self, x: Tensor) -> None:
        """Require as many columns as the images have numbers, or the network inputs."""
        if self.input_shape is None:
            if self.num_inputs not in (None, x.shape[-1]):
                raise ShapeError(
                    f"The network takes {self.num_inputs} inputs, but the inputs have "
                    f"{x.shape[-1]} columns (shape {tuple(x.shape)}). Pass what the "
                    "network takes, or choose columns by active_dims."
                )
            return
        c, h, w = self.input_shape
        if x.shape[-1] != c * h * w:
            raise ShapeError(
                f"Images of input_shape {self.input_shape} have {c * h * w} columns, "
                f"but the inputs have {x.shape[-1]} (shape {tuple(x.shape)}). Flatten "
                "images to ``... x n x d``, or give their input_shape."
            )

    def _tile_rows(self, x1: Tensor, x2: Tensor, values: Hyperparameters) -> int:
        """Rows and columns of a tile, refused beyond the budget."""
        batch = torch.broadcast_shapes(
            x1.shape[:-2], x2.shape[:-2], values[0].shape[:-1]
        )
        per_pair = self._numbers_per_pair() * batch.numel()
        rows = min(tile_rows(per_pair), max(x1.shape[-2], x2.shape[-2], 1))
        if self.input_shape is None:
            return rows
        _, h, w = self.input_shape
        image = Signal((h, w))
        each = list(layers_and_signals(self.layers, image))
        held = max(layer.held for layer, _ in each)
        singles = max(layer.held_each for layer, _ in each) * h * w * batch.numel()
        if torch.is_grad_enabled():
            power = 2 if self.pairs else 1
            for layer, signal in each:  # smaller after pooling and strides
                height, width = signal.image or (1, 1)
                share = (height * width / (h * w)) ** power
                held += share * layer.kept(self.tangent)
        check_memory(
            f"One tile of {rows} x {rows} inputs with "
            f"{'all pairs of' if self.pairs else 'the'} {h} x {w} pixels",
            # pairs, and inputs with themselves
            (per_pair * held * (rows**2 + 2 * rows) + 2 * rows * singles)
            * x1.element_size(),
            self.memory_budget,
            "Use smaller images, Flatten() in place of pooling and no tap_lengthscale "
            "(then pixels need no pairs), or a larger memory_budget.",
        )
        return rows
