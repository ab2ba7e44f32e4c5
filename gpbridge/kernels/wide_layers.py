r"""Layers of infinitely wide networks, each a map of covariances.

In: the covariance of a layer's inputs at pairs of points. Out: that of its outputs, for
the Gaussian process of a random network (k) and for the tangent kernel (theta).
Next: ``wide_convolutions`` has the layers of images, ``infinite_width`` the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from gpbridge.checks import check_count, check_number, check_sequence
from gpbridge.kernels import dual_activations
from gpbridge.kernels.dual_activations import Dual
from gpbridge.kernels.layer_covariance import LayerCovariance, Signal, Values
from gpbridge.kernels.wide_layer_kinds import Layer, Weighted, require_gaussian


@dataclass(frozen=True)
class Dense(Weighted):
    r"""A fully connected layer: :math:`k' = \sigma_w^2 k + \sigma_b^2`.

    Args:
        weight_variance: Initial :math:`\sigma_w^2`; 2 keeps the scale through ReLUs.
        bias_variance: Initial :math:`\sigma_b^2`; zero for a layer without biases.
    """

    weight_variance: float = 2.0
    bias_variance: float = 0.01

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        if signal.image is not None:
            raise ValueError(
                f"Dense at {path} needs flat inputs, but an image of "
                f"{signal.image[0]} x {signal.image[1]} pixels comes. Put Flatten() or "
                "GlobalAvgPool() before it."
            )
        return Signal(None, gaussian=True, random=True)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        return self.mix(state, values)


class Elementwise(Layer):
    """A nonlinearity of each preactivation."""

    def kept(self, tangent: bool) -> int:
        """Covariances of a tile that its gradient keeps; measured."""
        return 2 + tangent

    def dual(self) -> Dual:
        """Its dual functions F and F'."""
        raise NotImplementedError

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        require_gaussian(self, signal, path)
        return signal._replace(gaussian=False)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        value, derivative = self.dual()(state.k, *state.variances.pair(state))
        theta = None if state.theta is None else derivative * state.theta
        return replace(state, k=value, theta=theta)


@dataclass(frozen=True)
class ReLU(Elementwise):
    """max(x, 0)."""

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return dual_activations.relu


@dataclass(frozen=True)
class LeakyReLU(Elementwise):
    """max(x, 0) + negative_slope min(x, 0)."""

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        check_number(negative_slope=self.negative_slope)

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return partial(dual_activations.leaky_relu, negative_slope=self.negative_slope)


@dataclass(frozen=True)
class Erf(Elementwise):
    """The error function."""

    def kept(self, tangent: bool) -> int:
        """Covariances of a tile that its gradient keeps; measured."""
        return 5 + tangent

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return dual_activations.erf


@dataclass(frozen=True)
class GELU(Elementwise):
    """x times the normal distribution function of x."""

    held = 10

    def kept(self, tangent: bool) -> int:
        """Covariances of a tile that its gradient keeps; measured."""
        return 6 + tangent

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return dual_activations.gelu


@dataclass(frozen=True)
class Tanh(Elementwise):
    """The hyperbolic tangent, as a mixture of error functions."""

    held = 11

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return dual_activations.tanh


@dataclass(frozen=True)
class Smooth(Elementwise):
    """Any smooth activation, by ``dual_activations.hermite_dual``.

    Args:
        function: The activation.
        derivative: Its derivative.
        num_terms: Terms of the expansion.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    num_terms: int = 48

    held_each = 600  # nodes and coefficients

    def __post_init__(self) -> None:
        check_count(num_terms=self.num_terms)

    def kept(self, tangent: bool) -> int:
        """One for each term of F and of F'."""
        return 6 + 2 * self.num_terms

    def dual(self) -> Dual:
        """The dual functions F and F'."""
        return partial(
            dual_activations.hermite_dual,
            function=self.function,
            derivative=self.derivative,
            num_terms=self.num_terms,
        )


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Normalisation over the units, of an image at each pixel: a correlation."""

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        # After a nonlinearity the mean over units, which is subtracted, is not zero.
        require_gaussian(self, signal, path)
        return signal

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        first, second = map(dual_activations.inverse_root, state.variances.pair(state))
        return state.map(lambda k: k * first * second)


@dataclass(frozen=True)
class Flatten(Layer):
    """All pixels side by side, as the units of a dense layer: a mean over pixels."""

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        if signal.image is None:
            return signal
        return signal._replace(image=None, gaussian=False)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        if state.space == 4:
            pixels = state.map(
                lambda k: k.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)
            )
            state = replace(pixels, space=2)
        if state.space == 2:
            state = state.map(lambda k: k.mean((-2, -1)), space=0)
        return state


class Residual(Layer):
    """The sum of a branch that ends in new weights and of a shortcut.

    Args:
        layers: The branch.
        shortcut: Layers of the other path, default the identity.
    """

    def __init__(self, layers: Sequence[Layer], shortcut: Sequence[Layer] = ()) -> None:
        check_sequence(layers=layers, shortcut=shortcut)
        self.layers, self.shortcut = tuple(layers), tuple(shortcut)

    def __repr__(self) -> str:
        return f"Residual({list(self.layers)}, {list(self.shortcut)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Residual) and (self.layers, self.shortcut) == (
            other.layers,
            other.shortcut,
        )

    def __hash__(self) -> int:
        return hash((self.layers, self.shortcut))

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it."""
        branch = trace_all(self.layers, signal._replace(random=False), f"{path}.layers")
        other = trace_all(self.shortcut, signal, f"{path}.shortcut")
        if not (branch.gaussian and branch.random):
            raise ValueError(
                f"The branch of Residual at {path} must end in new weights, or it is "
                "correlated with the shortcut, and covariances do not add. End it with "
                "Dense or Conv."
            )
        if branch.image != other.image:
            raise ValueError(
                f"The paths of Residual at {path} must end in one shape, but the "
                f"branch ends in {_shown(branch)} and the shortcut in {_shown(other)}. "
                "Change stride or padding of one."
            )
        # The shortcut carries what came in: the sum is no new draw.
        return Signal(branch.image, other.gaussian, other.random)

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        branch = apply_all(self.layers, state, values)
        other = apply_all(self.shortcut, state, values)
        theta = branch.theta
        if other.theta is not None:
            theta = theta + other.theta
        return replace(branch, k=branch.k + other.k, theta=theta)


def every_layer(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All layers in the order in which they take their hyperparameters."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from every_layer(layer.layers)
            yield from every_layer(layer.shortcut)


def layers_and_signals(
    layers: Sequence[Layer], signal: Signal
) -> Iterator[tuple[Layer, Signal]]:
    """All layers, as by :func:`every_layer`, with the signal before each."""
    for layer in layers:
        yield layer, signal
        if isinstance(layer, Residual):
            yield from layers_and_signals(layer.layers, signal)
            yield from layers_and_signals(layer.shortcut, signal)
        signal = layer.trace(signal, "")


def trace_all(layers: Sequence[Layer], signal: Signal, path: str) -> Signal:
    """Check a sequence of layers, and name a misplaced one by its path."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise TypeError(
                f"{path}[{i}] must be a layer of gpbridge.kernels.wide_layers, but is "
                f"{type(layer).__name__}. For torch modules try "
                "InfiniteWidthKernel.from_module."
            )
        signal = layer.trace(signal, f"{path}[{i}]")
    return signal


def apply_all(
    layers: Sequence[Layer], state: LayerCovariance, values: Values
) -> LayerCovariance:
    """The covariances after a sequence of layers."""
    for layer in layers:
        state = layer.apply(state, values)
    return state


def _shown(signal: Signal) -> str:
    if signal.image is None:
        return "flat units"
    return f"{signal.image[0]} x {signal.image[1]} pixels"
