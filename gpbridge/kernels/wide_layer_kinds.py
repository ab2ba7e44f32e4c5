r"""What layers of infinitely wide networks share: a check, a map, an affine part.

In: the covariance of a layer's inputs at pairs of points. Out: base classes of layers.
Next: ``wide_layers`` and ``wide_convolutions`` have the layers.

Weights are in the tangent parameterisation: a dense layer is
:math:`h' = \sigma_w W h / \sqrt{d} + \sigma_b b` with W and b standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gpbridge.checks import check_number, check_positive
from gpbridge.kernels.layer_covariance import LayerCovariance, Signal, Values


class Layer:
    """One layer: checks when the network is built, and its map of covariances.

    Attributes:
        held: Covariances of a tile that exist at once while it is applied; measured.
        held_each: Numbers for each variance of a single pixel, besides.
    """

    held = 5.5
    held_each = 0

    def kept(self, tangent: bool) -> int:
        """Covariances of a tile that its gradient keeps; measured."""
        return 1 + tangent

    def initial(self) -> dict[str, float]:
        """Initial values of its hyperparameters, by name of the group."""
        return {}

    def trace(self, signal: Signal, path: str) -> Signal:
        """The signal after it; raises ValueError where the limit does not exist."""
        return signal

    def apply(self, state: LayerCovariance, values: Values) -> LayerCovariance:
        """The covariances after it."""
        raise NotImplementedError


class Weighted(Layer):
    """A layer with weights: the affine part that dense and convolution share."""

    def initial(self) -> dict[str, float]:
        """Initial values of its hyperparameters."""
        found = {"weight_variance": self.weight_variance}
        if self.bias_variance > 0:
            found["bias_variance"] = self.bias_variance
        return found

    def __post_init__(self) -> None:
        check_number(
            weight_variance=self.weight_variance, bias_variance=self.bias_variance
        )
        check_positive(weight_variance=self.weight_variance)
        if self.bias_variance != 0:
            check_positive(bias_variance=self.bias_variance)

    def mix(
        self,
        state: LayerCovariance,
        values: Values,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> LayerCovariance:
        """Means over the fan-in, times the weights' variance, plus the biases'."""
        weight = values.take("weight_variance", state)
        bias = None
        if self.bias_variance > 0:
            bias = values.take("bias_variance", state)

        def affine(k: Tensor) -> Tensor:
            k = k if mean is None else mean(k)
            return weight * k if bias is None else torch.addcmul(bias, weight, k)

        if not state.tangent:
            return state.map(affine)
        if state.theta is None:
            mixed = state.map(affine)
            return replace(mixed, theta=mixed.k)
        return replace(state, theta=state.k + state.theta).map(affine)


def require_gaussian(layer: Layer, signal: Signal, path: str) -> None:
    """Require independent Gaussian units, for which dual functions are defined."""
    if not signal.gaussian:
        raise ValueError(
            f"{type(layer).__name__} at {path} needs Gaussian units, but inputs, "
            "flattened pixels or outputs of a nonlinearity come. Put Dense or Conv "
            "before it."
        )
