"""Models with inducing variables below an average, that several test files share."""

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.models import ApproximateGP
from gpytorch.variational import CholeskyVariationalDistribution, LMCVariationalStrategy

from gpbridge.augmentation import FiniteOrbit, Rotation2d
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_strategy import InterdomainVariationalStrategy
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from gpbridge.selection.variational_bound import inducing_strategy

M, N = 6, 5
DOUBLE = torch.float64
NAMES = ["convolutional", "rotation", "turns"]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def rbf(lengthscale=1.5, **options):
    kernel = RBFKernel(**options).double()
    # A Python number would pass through float32.
    kernel.lengthscale = torch.tensor(lengthscale, dtype=DOUBLE)
    return kernel


def convolutional(**options):
    kernel = ConvolutionalKernel(rbf(), (4, 4), (2, 2), **options).double()
    kernel.augmentation.patch_weights.data = 1 + 0.3 * normal(9, seed=9)
    return kernel


def kernels(name):
    """A kernel with orbits, and the widths of its inputs and inducing points."""
    if name == "convolutional":
        return convolutional(), 16, 4
    if name == "rotation":
        kernel = InvariantKernel(rbf(), Rotation2d(num_samples=4).double())
        return kernel, 2, 2
    return InvariantKernel(rbf(), FiniteOrbit.quarter_turns((3, 3))), 9, 9


def settle(model, seed=5):
    """Give a model variational parameters that are not the prior's."""
    strategy = inducing_strategy(model)
    q = strategy._variational_distribution
    q.variational_mean.data = normal(*q.variational_mean.shape, seed=seed)
    if hasattr(q, "chol_variational_covar"):
        root = 0.3 * normal(*q.chol_variational_covar.shape, seed=seed + 1)
        q.chol_variational_covar.data = root.tril() + 0.5 * torch.eye(M, dtype=DOUBLE)
    strategy.variational_params_initialized.fill_(1)
    return model


def sparse(kernel, width, likelihood=None, **options):
    return settle(SparseGP(kernel, normal(M, width, seed=1), likelihood, **options))


def moments(distribution):
    return distribution.mean.detach(), distribution.covariance_matrix.detach()


class LMC(ApproximateGP):
    """Two latent functions mixed into three tasks, as gpytorch's users write it."""

    def __init__(self):
        latent = torch.Size([2])
        q = CholeskyVariationalDistribution(M, latent).double()
        base = InterdomainVariationalStrategy(self, normal(M, 4, seed=1), q)
        super().__init__(LMCVariationalStrategy(base, 3, num_latents=2, latent_dim=-1))
        self.double()
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=latent)
        self.covar_module = ScaleKernel(convolutional(), batch_shape=latent).double()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))
