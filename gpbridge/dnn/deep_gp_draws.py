r"""Functions drawn from a deep Gaussian process, layer by layer.

Each layer's draw is a prior function pulled to a draw of the inducing values,

.. math:: f(x) = m(x) + p(x) + K_{xu} C^{-\top} \bigl(v - C^{-1} (p(Z) + e)\bigr),
          \qquad v \sim q(v), \quad C C^\top = K_{uu} + \text{jitter},

and e the jitter's noise. It is one function: the same at every call, and consistent
over all inputs. In: a layer. Out: frozen draws, which compose. Next: ``deep_gp``.

References:
    Wilson, Borovitskiy, Terenin, Mostowsky, Deisenroth, Efficiently sampling functions
    from Gaussian process posteriors, ICML 2020, eq. (13).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Generator, Tensor, nn

from gpbridge.dnn.deep_gp_layer import InducingLayer, jitter_of
from gpbridge.inducing_covariances import has_own_domain
from gpbridge.prior_draws import NUM_FEATURES, PriorDraw, check_points, draw_prior
from gpbridge.randomness import standard_normal


class LayerDraw(nn.Module):
    """s frozen functions with h outputs of one layer.

    Args:
        mean_module: Of the layer.
        inducing_points: ``M x d``.
        priors: One prior draw of all outputs, or one for each output's own kernel.
        weights: What pulls them to the inducing values, ``s x M x h``.
    """

    def __init__(
        self,
        mean_module: Mean,
        inducing_points: Tensor,
        priors: Sequence[PriorDraw],
        weights: Tensor,
    ) -> None:
        super().__init__()
        self.mean_module, self.priors = mean_module, nn.ModuleList(priors)
        self.register_buffer("inducing_points", inducing_points)
        self.register_buffer("weights", weights)

    def forward(self, X: Tensor) -> Tensor:
        """Inputs of each draw's own, ``s x ... x n x d`` to ``s x ... x n x h``."""
        rows = X.flatten(0, -2)
        mean = self.mean_module(rows).mT
        parts, first = [], 0
        for prior in self.priors:
            last = first + prior.num_outputs
            cross = prior.kernel(rows, self.inducing_points).to_dense()
            cross = cross.reshape(len(X), -1, cross.shape[-1])
            pulled = cross @ self.weights[..., first:last]
            parts.append(prior.each(X).reshape(pulled.shape) + pulled)
            first = last
        values = torch.cat(parts, -1) + mean.reshape(len(X), -1, mean.shape[-1])
        return values.reshape(*X.shape[:-1], values.shape[-1])


class DeepDraw(nn.Module):
    """Frozen functions of a deep GP: ``... x n x d`` to ``s x ... x n x m``."""

    def __init__(self, layers: Sequence[LayerDraw], num_inputs: int) -> None:
        super().__init__()
        self.layers, self.num_inputs = nn.ModuleList(layers), num_inputs

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, differentiable in X."""
        check_points(X, self.num_inputs)
        return self.each(X.expand(self.num_samples, *X.shape))

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return len(self.layers[0].weights)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        check_points(X, self.num_inputs, self.num_samples)
        values = X.to(self.layers[0].weights)
        for layer in self.layers:
            values = layer(values)
        return values.to(X.dtype)


@torch.no_grad()
def draw_layer(
    layer: InducingLayer,
    num_samples: int,
    generator: Generator,
    num_features: int = NUM_FEATURES,
) -> LayerDraw:
    """Freeze functions of a layer.

    Args:
        layer: Copied.
        num_samples: The number s.
        generator: Source of randomness.
        num_features: Fourier features of each prior draw, where its kernel needs them.

    Returns:
        The draws, in the layer's dtype.

    Raises:
        NotImplementedError: If the kernel has no feature map, or inducing points that
            are other things than inputs.
    """  # noqa: DOC502
    kernel, h = layer.covar_module, layer.output_dims
    if has_own_domain(kernel):
        raise NotImplementedError(
            f"Functions of a {type(kernel).__name__} whose inducing points are no "
            "inputs cannot be drawn pathwise. Try sample_joint(X), which draws values "
            "at given inputs."
        )
    size = {"num_features": num_features, "generator": generator}
    d, q = layer.input_dims, layer.variational_strategy
    Z = q.inducing_points.detach().clone()
    priors = [
        draw_prior(one, d, num_samples, num_outputs=m, **size)
        for one, m in _kernels(kernel, h)
    ]
    covariance, C = layer.inducing_covariance(), layer.prior_factor()
    shape = num_samples, h, len(Z)
    v = q.mean + (q.factor @ standard_normal((*shape, 1), generator, Z))[..., 0]
    at_Z = torch.cat([prior(Z) for prior in priors], -1).mT  # s x h x M
    std = jitter_of(covariance, layer.jitter_share)[..., 0].sqrt()  # (h x) 1
    at_Z = at_Z + std * standard_normal(shape, generator, Z)
    white = torch.linalg.solve_triangular(C, at_Z[..., None], upper=False)
    weights = torch.linalg.solve_triangular(C.mT, v[..., None] - white, upper=True)
    mean = copy.deepcopy(layer.mean_module).requires_grad_(False)
    return LayerDraw(mean, Z, priors, weights[..., 0].mT.contiguous())


def _kernels(kernel: Kernel, h: int) -> list[tuple[Kernel, int]]:
    """Kernels without batch, and of how many outputs each is."""
    if not len(kernel.batch_shape):
        return [(kernel, h)]
    return [(kernel[i], 1) for i in range(h)]
