r"""Kernels of finitely many features, :math:`k(x, x') = s\, \phi(x) \phi(x')^\top`.

In: any feature map, a botorch ``FeatureMap``, a function, or a network, which is
wrapped in a :class:`NetworkMap`: a copy in eval mode that sees plain rows.
Out: a gpytorch kernel whose matrices stay low rank, and its exact feature map.
Next: ``deep`` uses a network as the input of another kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from botorch.sampling.pathwise.features.maps import FeatureMap
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from linear_operator.operators import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call

from gpbridge.checks import ShapeError, check_number, check_positive, checked_shape
from gpbridge.frozen import copy_without_hooks
from gpbridge.kernels.batches import BatchKernel
from gpbridge.kernels.compositions import (
    ExactFeatureMap,
    draw_feature_map,
    register_with_botorch,
    same_inputs,
)
from gpbridge.kernels.feature_gram import feature_gram

VARIANCE_BOUNDS = (1e-8, 1e6)


class NetworkMap(nn.Module):
    r"""A network as a fixed map of inputs, ``... x n x d`` to ``... x n x f``.

    Owns a deep copy of ``network`` without the caller's hooks. The copy stays in eval
    mode when a GP that contains it is trained: a kernel must be a function of its two
    inputs, and batch statistics or dropout would make it depend on the batch and on
    chance. Running statistics therefore never drift, also while the weights are learnt.
    ``scale`` is a constant factor of the features, a buffer.
    The network sees plain rows ``n x d``, since layers such as batch normalisation and
    convolution read leading dimensions as something else.

    Args:
        network: Any module that maps ``n x d`` (or ``n x input_shape``) to ``n x f``.
        freeze: Whether the weights are constants. False leaves every weight as it was;
            those without ``requires_grad`` stay constants.
        input_shape: Shape of one input, to unflatten the d columns, as (c, h, w).
        spectral_norm: Upper bound c on the spectral norm of each Linear and Conv weight
            (as a matrix, output channels by the rest): :math:`W \min(1, c/\sigma(W))`.
            The norm is exact. Power iteration, as in torch's parametrisation, would
            stand still in eval mode and lose the bound as soon as the weights move.

    Raises:
        TypeError: If ``network`` is not a module.
    """

    def __init__(
        self,
        network: nn.Module,
        freeze: bool = True,
        input_shape: Sequence[int] | None = None,
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network must be a torch.nn.Module, but is {type(network).__name__}."
            )
        if spectral_norm is not None:
            check_number(spectral_norm=spectral_norm)
            check_positive(spectral_norm=spectral_norm)
        self.network = copy_without_hooks(network)
        if freeze:
            self.network.requires_grad_(False)
        self.freeze = freeze
        self.input_shape = checked_shape("input_shape", input_shape)
        self.spectral_norm = spectral_norm
        like = next(self.network.parameters(), torch.ones(()))
        self.register_buffer("scale", like.new_ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            x: Inputs ``... x n x d``.

        Returns:
            Features ``... x n x f``, times ``scale``.

        Raises:
            ShapeError: If the network does not return one row per point.
        """
        shape = self.input_shape or x.shape[-1:]
        if math.prod(shape) != x.shape[-1]:
            raise ShapeError(
                f"Inputs of input_shape {shape} have {math.prod(shape)} columns, but x "
                f"has {x.shape[-1]} (shape {tuple(x.shape)})."
            )
        rows = x.reshape(-1, *shape)
        if self.spectral_norm is None:
            features = self.network(rows)
        else:
            features = functional_call(self.network, self._bounded_weights(), (rows,))
        if features.dim() == 1:
            features = features[:, None]
        if features.dim() != 2 or len(features) != len(rows):
            raise ShapeError(
                f"The network must return ``n x f`` features, but {len(rows)} inputs "
                f"of shape {tuple(rows.shape[1:])} gave {tuple(features.shape)}. End "
                "it with torch.nn.Flatten(), or pass input_shape for images."
            )
        return self.scale * features.reshape(*x.shape[:-1], features.shape[-1])

    def train(self, mode: bool = True) -> NetworkMap:
        """Set the mode of everything but the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def _bounded_weights(self) -> dict[str, Tensor]:
        layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        bounded = {}
        for name, module in self.network.named_modules():
            if isinstance(module, layers):
                weight = module.weight
                norm = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
                factor = (self.spectral_norm / norm).clamp(max=1.0)
                bounded[f"{name}.weight" if name else "weight"] = factor * weight
        return bounded


class FeatureKernel(BatchKernel):
    r"""Covariance of a linear model in given features.

    .. math:: k(x, x') = s\, \phi(x) \phi(x')^\top,

    that is :math:`f(x) = \phi(x) w` with :math:`w \sim N(0, s I_f)`. Use it for a last
    layer, for a random network, for any basis. Matrices are never formed: with fewer
    features than points, solving costs n f² and memory is n f. Sums and products with
    other kernels can be sampled as functions, exactly.

    Features that were fitted to the same targets make the evidence blind to
    overfitting: take the noise from validation data then.

    Args:
        feature_map: A botorch ``FeatureMap`` without batch, or any function from
            ``... x n x d`` to ``... x n x f``; it is used as it is. Any other
            ``nn.Module`` is copied into a :class:`NetworkMap`. A ``FeatureMap`` is
            copied too.
        freeze: Whether the weights inside ``feature_map`` are constants. If not, every
            optimiser of the kernel's hyperparameters moves them too.
        input_shape: For a network, the shape of one input, as (c, h, w).
        variance_prior: Prior of s.
        variance_constraint: Bounds of s; default 1e-8 to 1e6, starting from 1.
        **kwargs: ``batch_shape`` and ``active_dims``, as for any gpytorch kernel. All
            kernels of a batch share the features.

    Raises:
        TypeError: If ``feature_map`` is not callable.
        ValueError: If ``feature_map`` has a batch shape.

    Example:
        >>> kernel = FeatureKernel(torch.nn.Linear(3, 2))
        >>> kernel(torch.zeros(5, 3)).shape
        torch.Size([5, 5])

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006,
        eq. (2.12).
    """

    has_lengthscale = False

    def __init__(
        self,
        feature_map: FeatureMap | nn.Module | Callable[[Tensor], Tensor],
        *,
        freeze: bool = True,
        input_shape: Sequence[int] | None = None,
        variance_prior: Prior | None = None,
        variance_constraint: Interval | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if not callable(feature_map):
            raise TypeError(
                "feature_map must be a function, a torch.nn.Module or a botorch "
                f"FeatureMap, but is {type(feature_map).__name__}."
            )
        if isinstance(feature_map, FeatureMap):
            if len(feature_map.batch_shape):
                raise ValueError(
                    "feature_map must have no batch, but has batch_shape "
                    f"{tuple(feature_map.batch_shape)}. A batch of FeatureKernels "
                    "shares its features; build one kernel per map instead."
                )
            feature_map = copy.deepcopy(feature_map)
            if freeze:
                feature_map.requires_grad_(False)
        elif isinstance(feature_map, nn.Module):
            feature_map = NetworkMap(feature_map, freeze, input_shape)
        self.feature_map = feature_map
        self.register_parameter(
            "raw_variance", nn.Parameter(torch.zeros(self._batch_shape))
        )
        if variance_prior is not None:
            self.register_prior(
                "variance_prior", variance_prior, _get_variance, _set_variance
            )
        if variance_constraint is None:
            variance_constraint = LogTransformedInterval(
                *VARIANCE_BOUNDS, initial_value=1.0
            )
        self.register_constraint("raw_variance", variance_constraint)

    @property
    def variance(self) -> Tensor:
        """Prior variance s of each weight, ``batch_shape``."""
        return self.raw_variance_constraint.transform(self.raw_variance)

    @variance.setter
    def variance(self, value: float | Tensor) -> None:
        like = self.raw_variance
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        raw = self.raw_variance_constraint.inverse_transform(value)
        self.initialize(raw_variance=raw)

    def features(self, x: Tensor) -> Tensor:
        r"""Features :math:`\sqrt{s}\, \phi(x)`, ``... x n x f``.

        Args:
            x: Inputs ``... x n x d``, the columns already selected.

        Returns:
            Features; ``batch_shape`` comes first if the kernel has one.
        """
        return self._basis(x) * self.variance.sqrt()[..., None, None]

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params
    ) -> Tensor | LinearOperator:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.get("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        same = same_inputs(x1, x2)
        if diag:
            basis = self._basis(x1)
            other = basis if same else self._basis(x2)
            return (basis * other).sum(-1) * self.variance[..., None]
        root = self.features(x1)
        return feature_gram(root, None if same else self.features(x2))

    def named_sub_kernels(self):
        """None: a kernel inside the feature map is not part of this one's batch."""
        return iter(())

    def _basis(self, x: Tensor) -> Tensor:
        basis = self.feature_map(x)
        if not isinstance(basis, Tensor) or basis.shape[:-1] != x.shape[:-1]:
            came = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis)
            raise ShapeError(
                "feature_map must map ``... x n x d`` to ``... x n x f``, but inputs "
                f"of shape {tuple(x.shape)} gave {came}."
            )
        return basis


def _get_variance(kernel: FeatureKernel) -> Tensor:
    return kernel.variance


def _set_variance(kernel: FeatureKernel, value: Tensor) -> None:
    kernel.variance = value


@draw_feature_map.register
def _exact_features(
    kernel: FeatureKernel, num_inputs: int, num_features: int, generator=None
) -> ExactFeatureMap:
    width = num_inputs if kernel.active_dims is None else len(kernel.active_dims)
    with torch.no_grad():
        point = kernel.raw_variance.new_zeros(1, width)
        return ExactFeatureMap(kernel, kernel.features(point).shape[-1])


register_with_botorch(FeatureKernel)
