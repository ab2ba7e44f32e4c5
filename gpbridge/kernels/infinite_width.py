r"""The Gaussian process of an infinitely wide network, and its tangent kernel.

In: a list of layers, or a ``torch.nn.Sequential`` to read them from. Out: a gpytorch
kernel whose hyperparameters are the variances of the weights and biases of each layer.
Next: any GP; ``linearized`` has the tangent kernel of a network of finite width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import Interval
from torch import Tensor, nn

from gpbridge.checks import check_number, check_positive
from gpbridge.kernels.batches import BatchKernel
from gpbridge.kernels.compositions import same_inputs
from gpbridge.kernels.wide_layer_kinds import Layer
from gpbridge.kernels.wide_layers import every_layer
from gpbridge.kernels.wide_modules import layers_of, num_inputs
from gpbridge.kernels.wide_network import GROUPS, WideNetwork

BOUNDS = (1e-8, 1e8)  # of a variance
LENGTHSCALE_BOUNDS = (0.05, 1e3)  # pixels


class InfiniteWidthKernel(BatchKernel):
    r"""Covariance of a randomly initialised network as its layers grow wide.

    ``kind="nngp"`` is the covariance of the outputs over random weights,
    :math:`k(x, x') = E\, f(x) f(x')`: the prior of a Bayesian network. ``kind="ntk"``
    is the limit of the Gram matrix of Jacobians,
    :math:`E\, \nabla_w f(x) \cdot \nabla_w f(x')`: the GP that gradient descent on all
    weights follows.
    Layers come from :mod:`gpbridge.kernels.wide_layers` and
    :mod:`gpbridge.kernels.wide_convolutions`; each with weights has a variance of its
    weights and of its biases, learned by marginal likelihood. Without biases, ReLU
    networks depend on the product of the weight variances only.

    Inputs are divided by the square root of their number in the first layer: scale
    them to mean zero and variance one. Deep ReLU networks make all inputs alike:
    use float64, and biases.

    Cost of n² entries: one arc tangent per pair and ReLU layer, 36 for Tanh, and some
    hundred products for SiLU and Softplus, whose series wants variances below 30 (see
    :func:`~gpbridge.kernels.dual_activations.hermite_dual`); images multiply it by
    the number P of pixels, and pooling or correlated filters by P² (a convolutional
    network of 8 x 8 images with pooling costs 4096 times a dense one). Memory is the
    matrix itself and one tile of pairs, also in the backward pass, which computes the
    tile again.

    Args:
        layers: The layers, the last one with weights or a pooling of such.
        kind: ``"nngp"`` or ``"ntk"``.
        input_shape: (channels, height, width) for images, whose columns ``d`` are then
            the flattened pixels.
        variance_constraint: Bounds of weight and bias variances.
        lengthscale_constraint: Bounds of the lengthscales of correlated filters.
        memory_budget: Bytes for one tile; networks that need more for a single pair of
            inputs are refused.
        **kwargs: ``batch_shape`` and ``active_dims``, as for any gpytorch kernel.

    Attributes:
        weight_variance: ``batch_shape x (layers with weights)``, in their order, a
            residual branch before its shortcut.
        bias_variance: The same for layers with biases; absent without any.
        tap_lengthscale: The same for convolutions with correlated filters.

    Example:
        >>> from gpbridge.kernels.wide_layers import Dense, ReLU
        >>> kernel = InfiniteWidthKernel([Dense(), ReLU(), Dense()], kind="ntk")
        >>> kernel(torch.randn(4, 3)).shape
        torch.Size([4, 4])

    References:
        Lee et al., Deep neural networks as Gaussian processes, ICLR 2018; Jacot,
        Gabriel, Hongler, Neural tangent kernel, NeurIPS 2018, theorem 1; Arora et al.,
        On exact computation with an infinitely wide neural net, NeurIPS 2019.
    """

    has_lengthscale = False

    def __init__(
        self,
        layers: Sequence[Layer],
        kind: str = "nngp",
        *,
        input_shape: Sequence[int] | None = None,
        variance_constraint: Interval | None = None,
        lengthscale_constraint: Interval | None = None,
        memory_budget: float = 4 * 2**30,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.network = WideNetwork(layers, kind, input_shape, memory_budget)
        flat = list(every_layer(self.network.layers))
        for group in GROUPS:
            initial = [layer.initial().get(group) for layer in flat]
            initial = [value for value in initial if value is not None]
            if not initial:
                continue
            given, bounds = variance_constraint, BOUNDS
            if group == "tap_lengthscale":
                given, bounds = lengthscale_constraint, LENGTHSCALE_BOUNDS
            # Whole numbers would make a tensor of these.
            initial = torch.tensor(initial, dtype=torch.get_default_dtype())
            initial = initial.expand(*self._batch_shape, -1)
            name = f"raw_{group}"
            self.register_parameter(name, nn.Parameter(torch.zeros_like(initial)))
            constraint = LogTransformedInterval(*bounds) if given is None else given
            self.register_constraint(name, constraint)
            self._set(group, initial)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        kind: str = "nngp",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.01,
        **kwargs,
    ) -> InfiniteWidthKernel:
        """The kernel of a network's architecture; its weights are not read.

        The scale and the shift of a LayerNorm count as constants, one and zero, also
        for ``kind="ntk"``.

        Args:
            module: A ``torch.nn.Sequential``, nested or not, of modules with a limit.
            kind: ``"nngp"`` or ``"ntk"``.
            weight_variance: Initial variance of the weights of every layer.
            bias_variance: Initial variance of the biases, where a module has some.
            **kwargs: As for the class; ``input_shape`` for images.

        Returns:
            The kernel.

        Raises:
            ValueError: For modules without a limit, named by their path.
            ShapeError: If modules that follow each other do not fit in width, channels
                or pixels; and in a call, if inputs have other columns than the network.
            TypeError: If ``module`` is none.

        Example:
            >>> net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 1))
            >>> InfiniteWidthKernel.from_module(net).weight_variance.shape
            torch.Size([2])
        """
        check_number(weight_variance=weight_variance, bias_variance=bias_variance)
        check_positive(weight_variance=weight_variance, bias_variance=bias_variance)
        input_shape = kwargs.get("input_shape")
        layers = layers_of(module, weight_variance, bias_variance, input_shape)
        kernel = cls(layers, kind, **kwargs)
        if input_shape is None:
            kernel.network.num_inputs = num_inputs(module)
        return kernel

    @property
    def weight_variance(self) -> Tensor:
        """Variances of the weights, ``batch_shape x (layers with weights)``."""
        return self._get("weight_variance")

    @weight_variance.setter
    def weight_variance(self, value: float | Tensor) -> None:
        self._set("weight_variance", value)

    @property
    def bias_variance(self) -> Tensor | None:
        """Variances of the biases, or None in a network without any."""
        return self._get("bias_variance")

    @bias_variance.setter
    def bias_variance(self, value: float | Tensor) -> None:
        self._set("bias_variance", value)

    @property
    def tap_lengthscale(self) -> Tensor | None:
        """Lengthscales of correlated filters in pixels, or None without any."""
        return self._get("tap_lengthscale")

    @tap_lengthscale.setter
    def tap_lengthscale(self, value: float | Tensor) -> None:
        self._set("tap_lengthscale", value)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.get("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        self.network.check_width(x1)
        same = same_inputs(x1, x2)
        values = [self._get(group) for group in GROUPS]
        values = [None if value is None else value.to(x1) for value in values]
        if diag:
            return self.network.matched(x1, x1 if same else x2, values)
        return self.network.gram(x1, None if same else x2, values)

    def _get(self, group: str) -> Tensor | None:
        raw = self._parameters.get(f"raw_{group}")
        if raw is None:
            return None
        return getattr(self, f"raw_{group}_constraint").transform(raw)

    def _set(self, group: str, value: float | Tensor) -> None:
        raw = self._parameters.get(f"raw_{group}")
        if raw is None:
            raise AttributeError(
                f"This network has no {group}: none of its layers was given one."
            )
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        check_positive(**{group: value})
        constraint = getattr(self, f"raw_{group}_constraint")
        raw_value = constraint.inverse_transform(value).expand_as(raw)
        if not constraint.check_raw(raw_value):
            lower, upper = constraint.lower_bound, constraint.upper_bound
            raise ValueError(
                f"{group} must lie in ({float(lower):.3g}, {float(upper):.3g}), but is "
                f"{value.tolist()}. Give the kernel other bounds, by a constraint."
            )
        self.initialize(**{f"raw_{group}": raw_value})
