"""GPs of several outputs that share a kernel, exact and sparse.

In: data, a kernel. Out: a model, its posterior mean. ``quality_invariant_gp.py`` fits
them.
"""

from __future__ import annotations

import math

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.models import ExactGP
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Size, Tensor, nn

from gpbridge.inducing_covariances import (
    inducing_covariance,
    inducing_cross_covariance,
)

NOISE_FLOOR = 1e-4  # labels have no noise, and their evidence no maximum without it


class SharedGP(ExactGP):
    """Independent outputs with one kernel, which is evaluated once for all of them.

    Targets are ``m x n``.
    """

    def __init__(self, X: Tensor, Y: Tensor, kernel: Kernel, noise: float) -> None:
        likelihood = GaussianLikelihood(noise_constraint=GreaterThan(NOISE_FLOOR))
        likelihood.noise = noise
        super().__init__(X, Y, likelihood)
        self.mean_module = ZeroMean(batch_shape=Size([len(Y)]))
        self.covar_module = kernel
        self.to(X)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior."""
        return MultivariateNormal(
            self.mean_module(x), self.covar_module(x).evaluate_kernel()
        )


@torch.no_grad()
def posterior_mean(model: SharedGP, X: Tensor) -> Tensor:
    """Of all outputs, ``n x m``, by blocks of X."""
    (train_X,), Y = model.train_inputs, model.train_targets
    K = model.covar_module(train_X).to_dense()
    K = K + model.likelihood.noise * torch.eye(len(K)).to(K)
    weights = torch.cholesky_solve(Y.mT, torch.linalg.cholesky(K))
    kernel = model.covar_module
    return torch.cat([kernel(x, train_X).to_dense() @ weights for x in X.split(100)])


class CollapsedGP(nn.Module):
    """A sparse GP for ten outputs whose inducing variables have their optimum.

    Of all bounds of ``SparseGP`` with these hyperparameters this is the highest, in
    closed form for Gaussian noise (Titsias 2009); inducing variables are values at
    ``Z``, which stays, of f or, for ``elements``, of the base kernel's function.
    """

    def __init__(self, kernel: Kernel, Z: Tensor, elements: bool) -> None:
        super().__init__()
        self.elements = elements
        self.covar_module = kernel.to(Z)
        self.likelihood = GaussianLikelihood(noise_constraint=GreaterThan(NOISE_FLOOR))
        self.likelihood.noise = 0.05
        self.to(Z)
        self.register_buffer("Z", Z)

    def parts(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors of K_uu and of I + A A', A itself, and the noise."""
        noise = self.likelihood.noise
        kernel, Z = self.covar_module, self.Z
        K = inducing_covariance(kernel, Z) if self.elements else kernel(Z).to_dense()
        L = psd_safe_cholesky(K + 1e-6 * torch.eye(len(K)).to(K))
        cross = self.cross(X)
        A = torch.linalg.solve_triangular(L, cross, upper=False) / noise.sqrt()
        B = torch.eye(len(K)).to(K) + A @ A.mT
        return L, torch.linalg.cholesky(B), A, noise

    def cross(self, X: Tensor) -> Tensor:
        """Covariance of the inducing variables and f, ``u x n``."""
        if self.elements:
            return inducing_cross_covariance(self.covar_module, self.Z, X)
        return self.covar_module(self.Z, X).to_dense()

    def bound(self, X: Tensor, Y: Tensor) -> Tensor:
        """Of all outputs ``n x m`` together, total nats."""
        _, root, A, noise = self.parts(X)
        n, m = Y.shape
        c = torch.linalg.solve_triangular(root, A @ Y, upper=False)
        misfit = (Y.square().sum() - c.square().sum()) / noise
        log_det = 2 * root.diagonal().log().sum() + n * (2 * math.pi * noise).log()
        variance = self.covar_module(X, diag=True).sum()
        lost = variance / noise - A.square().sum()
        return -0.5 * (misfit + m * (log_det + lost)).squeeze()

    @torch.no_grad()
    def mean(self, X: Tensor, Y: Tensor, test_X: Tensor) -> Tensor:
        """Posterior means at ``test_X``, by blocks."""
        L, root, A, noise = self.parts(X)
        weights = torch.cholesky_solve(A @ Y, root) / noise.sqrt()
        weights = torch.linalg.solve_triangular(L.mT, weights, upper=True)
        blocks = test_X.split(250)
        return torch.cat([self.cross(x).mT @ weights for x in blocks])
