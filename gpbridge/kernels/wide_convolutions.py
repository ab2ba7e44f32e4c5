r"""Convolution and pooling of infinitely wide networks.

In: covariances at pixels, each with itself (``h x w``), or at all pairs of pixels
(``h x w x h x w``), which pooling and correlated weights need. Out: the same after the
layer. Next: ``infinite_width`` chooses between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpbridge.checks import (
    check_choice,
    check_count,
    check_number,
    check_positive,
    is_whole,
)
from gpbridge.kernels.layer_covariance import LayerCovariance, Signal, Values
from gpbridge.kernels.wide_layer_kinds import Layer, Weighted


@dataclass(frozen=True)
class Conv(Weighted):
    r"""A convolution with square filters of f x f taps, zeros around the image.

    .. math::
        k'(p, p') = \frac{\sigma_w^2}{f^2} \sum_{q, q'} \Sigma(q, q') k(p + q, p' + q')
            + \sigma_b^2

    Taps of a filter are independent, :math:`\Sigma = I`, or, with a tap lengthscale,
    correlated: :math:`\Sigma(q, q') = \exp(-|q - q'|^2 / 2 \ell^2)`, between no pooling
    and mean pooling. The lengthscale is learned; such a network needs the covariances
    of all pairs of pixels, as pooling does.

    Args:
        kernel_size: Taps f along each side.
        stride: Step of the filter.
        padding: Zeros on each side, or ``"same"`` for (f - 1) / 2 of odd filters.
        weight_variance: Initial :math:`\sigma_w^2`, of the sum over a filter.
        bias_variance: Initial :math:`\sigma_b^2`; zero for a layer without biases.
        tap_lengthscale: Initial :math:`\ell` in pixels, or None for independent taps.

    References:
        Novak et al., Bayesian deep convolutional networks with many channels are
        Gaussian processes, ICLR 2019; Garriga-Alonso, van der Wilk, Correlated weights
        in infinite limits of deep convolutional neural networks, UAI 2021.
    """

    kernel_size: int
    stride: int = 1
    padding: int | str = "same"
    weight_variance: float = 2.0
    bias_variance: float = 0.01
    tap_lengthscale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(kernel_size=self.kernel_size, stride=self.stride)
        if isinstance(self.padding, str):
            check_choice("padding", self.padding, ("same",))
            if self.kernel_size % 2 == 0:
                raise ValueError(
                    "padding='same' needs an odd kernel_size, but it is "
                    f"{self.kernel_size}. Give the zeros on each side as a number."
                )
        elif not is_whole(self.padding) or self.padding < 0:
            raise ValueError(
                "padding must be a whole number of zeros, or 'same', on each side, but "
                f"is {self.padding!r}."
            )
        if self.tap_lengthscale is not None:
            check_number(tap_lengthscale=self.tap_lengthscale)
            check_positive(tap_lengthscale=self.tap_lengthscale)

    def initial(self) -> dict[str, float]:
        """Initial values of its hyperparameters."""
        found = super().initial()
        if self.tap_lengthscale is not None:
            found["tap_lengthscale"] = self.tap_lengthscale
        return found

    def kept(self, tangent: bool) -> int:
        """Correlated taps keep one for each pair of taps along each axis."""
        pairs = 0 if self.tap_lengthscale is None else self.kernel_size**2
        return super().kept(tangent) + 2 * pairs

    @property
    def zeros(self) -> int:
        """Zeros on each side."""
        return self.kernel_size // 2 if self.padding == "same" else self.padding

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        sides = _require_image(self, signal, path)
        f, step, zeros = self.kernel_size, self.stride, self.zeros
        image = _window_sides(self, sides, f, step, zeros, path)
        return Signal(image, gaussian=True, random=True)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        f = self.kernel_size
        taps = None
        if self.tap_lengthscale is not None:
            lengthscale = values.take("tap_lengthscale", state)
            apart = torch.arange(f, dtype=state.k.dtype, device=state.k.device)
            apart = (apart[:, None] - apart).square() / 2
            taps = [  # the covariance of taps is a product over the two axes
                torch.exp(-apart[a, b] / lengthscale.square())
                for a in range(f)
                for b in range(f)
            ]

        def mean(k: Tensor) -> Tensor:
            for axis in (2, 1):
                k = _along_axis(k, state.space, axis, self, taps)
            return k / f**2

        return self.mix(state, values, mean)


@dataclass(frozen=True)
class AvgPool(Layer):
    """Means over square windows.

    Args:
        kernel_size: Pixels along each side of a window.
        stride: Step of the window, default its size.
    """

    kernel_size: int
    stride: int | None = None

    def __post_init__(self) -> None:
        check_count(kernel_size=self.kernel_size)
        if self.stride is not None:
            check_count(stride=self.stride)

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        sides = _require_image(self, signal, path)
        step = self.stride or self.kernel_size
        image = _window_sides(self, sides, self.kernel_size, step, 0, path)
        return signal._replace(image=image)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        f = self.kernel_size
        window = Conv(f, self.stride or f, 0)
        ones = [1.0] * f**2

        def mean(k: Tensor) -> Tensor:
            for axis in (2, 1):
                k = _along_axis(k, state.space, axis, window, ones)
            return k / f**4

        return state.map(mean)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean over all pixels: as many units as channels."""

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        _require_image(self, signal, path)
        return signal._replace(image=None)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        return state.map(lambda k: k.mean((-4, -3, -2, -1)), space=0)


def needs_pairs(layer: Layer) -> bool:
    """Whether a layer needs the covariances of all pairs of pixels before it."""
    if isinstance(layer, Conv):
        return layer.tap_lengthscale is not None
    return isinstance(layer, AvgPool | GlobalAvgPool)


def _along_axis(
    k: Tensor, space: int, axis: int, window: Conv, taps: list | None
) -> Tensor:
    """Sums over windows along the rows (2) or columns (1) of both images."""
    f, step, zeros = window.kernel_size, window.stride, window.zeros
    if space == 2:
        dims, offsets = (-axis,), [(a,) for a in range(f)]
    elif taps is None:
        dims, offsets = (-axis - 2, -axis), [(a, a) for a in range(f)]
    else:
        dims = (-axis - 2, -axis)
        offsets = [(a, b) for a in range(f) for b in range(f)]
    sides = [_windows(k.shape[dim], f, step, zeros) for dim in dims]
    if taps is None or not isinstance(taps[0], Tensor):
        return _ShiftedSum.apply(k, dims, offsets, sides, step, zeros, False)
    total = None
    for offset, tap in zip(offsets, taps, strict=True):
        term = tap * _ShiftedSum.apply(k, dims, [offset], sides, step, zeros, False)
        total = term if total is None else total + term
    return total


class _ShiftedSum(torch.autograd.Function):
    """The sum of a tensor shifted by several offsets, with zeros around it.

    Slices add into one result; autograd of slices would fill a tensor with zeros for
    each of them. The transposed map is the same with the slices' roles exchanged.
    """

    @staticmethod
    def forward(ctx, k, dims, offsets, sides, step, zeros, transposed):
        ctx.arguments = dims, offsets, step, zeros, transposed
        ctx.before = [k.shape[dim] for dim in dims]
        shape = list(k.shape)
        for dim, side in zip(dims, sides, strict=True):
            shape[dim] = side
        total = k.new_zeros(shape)
        inside, outside = (k, total) if not transposed else (total, k)
        for offset in offsets:
            read, write = inside, outside
            for dim, shift in zip(dims, offset, strict=True):
                n, m = inside.shape[dim], outside.shape[dim]
                # output i reads input i * step + shift - zeros
                low = max(0, -((shift - zeros) // step))
                high = min(m, (n - 1 - shift + zeros) // step + 1)
                count = max(0, high - low)
                start = low * step + shift - zeros if count else 0
                stop = start + (count - 1) * step + 1 if count else 0
                read = _sliced(read, dim, slice(start, stop, step))
                write = _sliced(write, dim, slice(low, low + count))
            (read if transposed else write).add_(write if transposed else read)
        return total

    @staticmethod
    def backward(ctx, grad):
        dims, offsets, step, zeros, transposed = ctx.arguments
        back = _ShiftedSum.apply(
            grad, dims, offsets, ctx.before, step, zeros, not transposed
        )
        return back, None, None, None, None, None, None


def _sliced(k: Tensor, dim: int, part: slice) -> Tensor:
    return k[(Ellipsis, part, *[slice(None)] * (-dim - 1))]


def _windows(side: int, f: int, step: int, zeros: int) -> int:
    return (side + 2 * zeros - f) // step + 1


def _window_sides(
    layer: Layer, sides: tuple[int, int], f: int, step: int, zeros: int, path: str
) -> tuple[int, int]:
    if f > min(sides) + 2 * zeros:
        raise ValueError(
            f"{type(layer).__name__} at {path} has windows of {f} x {f} pixels, but "
            f"its input has {sides[0]} x {sides[1]}. Use smaller windows, or fewer "
            "strides before it."
        )
    return tuple(_windows(side, f, step, zeros) for side in sides)


def _require_image(layer: Layer, signal: Signal, path: str) -> tuple[int, int]:
    if signal.image is None:
        raise ValueError(
            f"{type(layer).__name__} at {path} needs images, but flat inputs come. "
            "Give input_shape=(channels, height, width), and put it before Flatten()."
        )
    return signal.image
