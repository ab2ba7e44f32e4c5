r"""One layer of a deep Gaussian process: h functions with shared inducing points.

In: a kernel, a mean, inducing points. Out: marginals, joint distributions and pathwise
draws of the layer's outputs at any inputs. Next: ``deep_gp`` composes layers.

References:
    Hensman, Matthews, Ghahramani, Scalable variational Gaussian process classification,
    AISTATS 2015, eq. (6) and (18), whitened.
"""

from __future__ import annotations

import math

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from gpytorch.models.deep_gps import DeepGPLayer
from gpytorch.settings import variational_cholesky_jitter
from gpytorch.variational import CholeskyVariationalDistribution
from linear_operator.operators import DiagLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Size, Tensor, nn

from gpbridge.checks import ShapeError
from gpbridge.inducing_covariances import (
    inducing_covariance,
    inducing_cross_covariance,
)


class FixedLinearMean(Mean):
    """The mean W x of h functions, with weights ``h x d`` that are never trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, X: Tensor) -> Tensor:
        """Rows ``n x d`` to ``h x n``."""
        return self.weight @ X.mT


class WhitenedInducingValues(gpytorch.Module):
    r"""The variational posterior :math:`q(v) = N(m, L L^\top)` of h whitened vectors.

    Inducing values are u = C v, :math:`C C^\top = K_{uu}`, with standard normal prior
    of v. It stands where gpytorch's layers have their variational strategy.

    Args:
        points: Inducing points ``M x e``, shared by the h functions.
        num_outputs: The number h.
        std: The first standard deviation of each v.
    """

    def __init__(self, points: Tensor, num_outputs: int, std: float = 1.0) -> None:
        super().__init__()
        self.inducing_points = nn.Parameter(points.detach().clone())
        # Upstream's has noise from the global state in its first call; this has none.
        q = CholeskyVariationalDistribution(len(points), Size([num_outputs])).to(points)
        q.chol_variational_covar.data.mul_(std)
        self.distribution = q

    @property
    def mean(self) -> Tensor:
        """``h x M``."""
        return self.distribution.variational_mean

    @property
    def factor(self) -> Tensor:
        """The lower triangular L, ``h x M x M``."""
        return self.distribution.chol_variational_covar.tril()

    def kl_divergence(self) -> Tensor:
        """From the prior, nats, ``h``."""
        L = self.factor
        log_det = 2 * L.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        squares = L.square().sum((-2, -1)) + self.mean.square().sum(-1)
        return 0.5 * (squares - L.shape[-1] - log_det)


class InducingLayer(DeepGPLayer):
    r"""A sparse GP with h outputs that are independent given the inputs.

    With :math:`A = C^{-1} K_{ux}` of the whitened inducing values,

    .. math::
        \mu = m(x) + A^\top m, \qquad
        \Sigma = K_{xx} - A^\top A + A^\top L L^\top A .

    :math:`K_{uu}` has a jitter of ``variational_cholesky_jitter`` times its mean
    diagonal: upstream's, which is not relative, is as large as the first variance of a
    hidden layer in float64, and a hundred times it in float32. The jitter belongs to
    the prior of u only; the function has none.

    One factorisation serves all outputs and samples if the kernel has no batch:
    M^3 + M^2 N (1 + h) for N rows, samples included.

    Args:
        covar_module: One kernel for all outputs, or one for each with batch shape h.
        mean_module: Maps rows ``N x d`` to ``h x N``.
        inducing_points: ``M x e``, patches for a kernel of patches.
        num_inputs: The number d.
        num_outputs: The number h.
        std: The first standard deviation of the whitened inducing values.

    Raises:
        ShapeError: If the kernel has another batch shape.
    """

    def __init__(
        self,
        covar_module: Kernel,
        mean_module: Mean,
        inducing_points: Tensor,
        num_inputs: int,
        num_outputs: int,
        std: float = 1.0,
    ) -> None:
        values = WhitenedInducingValues(inducing_points, num_outputs, std)
        super().__init__(values, num_inputs, num_outputs)
        if covar_module.batch_shape not in (Size(), Size([num_outputs])):
            raise ShapeError(
                "A layer's kernel must have an empty batch_shape, or one kernel for "
                f"each of its {num_outputs} outputs, but has batch_shape "
                f"{tuple(covar_module.batch_shape)}."
            )
        self.covar_module, self.mean_module = covar_module, mean_module
        # Whitened values are those of this prior: another dtype must not change it.
        share = variational_cholesky_jitter.value(inducing_points.dtype)
        self.register_buffer("jitter_share", inducing_points.new_tensor(share))

    def __call__(self, inputs: Tensor) -> MultitaskMultivariateNormal:
        """Marginals as gpytorch has them, ``... x n x h``, without covariances.

        Upstream's layers take distributions and draw from the global state, or
        ``are_samples``; this one takes values alone.

        Raises:
            TypeError: If inputs are a distribution.
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"A layer takes values ``... x n x {self.input_dims}``, but inputs is "
                f"a {type(inputs).__name__}. Draw from it, as inputs.rsample()."
            )
        mean, variance = self.marginals(inputs)
        covariance = DiagLinearOperator(variance.flatten(-2))
        return MultitaskMultivariateNormal(mean, covariance)

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances at each point, ``... x n x d`` to ``... x n x h``."""
        rows = X.reshape(-1, X.shape[-1])
        A, q = self._whitened(rows), self.variational_strategy
        prior = self.covar_module(rows, diag=True)  # (h x) N
        mean = self.mean_module(rows) + (A.mT @ q.mean[..., None])[..., 0]
        seen = (q.factor.mT @ A).square().sum(-2)
        variance = prior - A.square().sum(-2) + seen  # h x N
        # A difference: rounding may leave it below zero where points are dense.
        variance = torch.maximum(variance, torch.finfo(prior.dtype).eps * prior)
        shape = *X.shape[:-1], self.output_dims
        return mean.mT.reshape(shape), variance.mT.reshape(shape)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``... x n x h``, covariances over points ``... x h x n x n``."""
        batch, n = X.shape[:-2], X.shape[-2]
        rows, q = X.reshape(-1, X.shape[-1]), self.variational_strategy
        A = self._whitened(rows)
        mean = self.mean_module(rows) + (A.mT @ q.mean[..., None])[..., 0]
        # Rows apart again: ... x (h or 1) x M x n.
        A = A.expand(A.shape[0] if A.dim() == 3 else 1, *A.shape[-2:])
        A = A.unflatten(-1, (math.prod(batch), n)).permute(2, 0, 1, 3)
        A = A.reshape(*batch, *A.shape[1:])
        each = X.unsqueeze(-3) if len(self.covar_module.batch_shape) else X
        prior = self.covar_module(each).to_dense()
        if not len(self.covar_module.batch_shape):
            prior = prior.unsqueeze(-3)
        seen = q.factor.mT @ A
        covariance = prior - A.mT @ A + seen.mT @ seen
        return mean.mT.reshape(*batch, n, self.output_dims), covariance

    def sample_joint(self, X: Tensor, noise: Tensor) -> Tensor:
        """Values ``s x ... x n x h`` drawn jointly over points, from standard normals.

        Args:
            X: ``... x n x d``, or ``s x ... x n x d`` of each draw's own.
            noise: ``s x ... x n x h``.
        """
        mean, covariance = self.joint(X)
        root = stable_root(covariance)
        return mean + (root @ noise.mT.unsqueeze(-1)).squeeze(-1).mT

    def _whitened(self, rows: Tensor) -> Tensor:
        """Cross covariances with the whitened inducing values, ``(h x) M x N``."""
        cross = inducing_cross_covariance(
            self.covar_module, self.variational_strategy.inducing_points, rows
        )
        return torch.linalg.solve_triangular(self.prior_factor(), cross, upper=False)

    def prior_factor(self) -> Tensor:
        """The lower Cholesky factor C of the prior of u, jitter included."""
        return stable_root(self.inducing_covariance(), self.jitter_share)

    def inducing_covariance(self) -> Tensor:
        """Prior covariance of the inducing values, ``(h x) M x M``, no jitter."""
        Z = self.variational_strategy.inducing_points
        return inducing_covariance(self.covar_module, Z)


def jitter_of(covariance: Tensor, share: Tensor) -> Tensor:
    """What is added to the diagonal: a share of its mean, ``... x 1 x 1``."""
    return share.to(covariance) * _mean_variance(covariance)


def stable_root(covariance: Tensor, share: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor after a jitter relative to the mean variance."""
    # Upstream's further attempts add what is small beside one.
    scale = _mean_variance(covariance)
    scale = torch.where(scale > 0, scale, 1.0)
    if share is None:
        share = variational_cholesky_jitter.value(covariance.dtype)
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    return scale.sqrt() * psd_safe_cholesky(covariance / scale + share * identity)


def _mean_variance(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
