"""Dense float64 formulas of architecture kernels and deep GPs, retyped from papers."""

import torch
from torch.distributions import MultivariateNormal, kl_divergence


def squared_exponential(X, Z, lengthscale, variance):
    """The kernel ``n x m`` of rows; Rasmussen and Williams 2006, eq. (4.9)."""
    difference = (X[..., :, None, :] - Z[..., None, :, :]) / lengthscale
    return variance * torch.exp(-0.5 * difference.square().sum(-1))


def sparse_posterior(Kuu, Kuf, Kff, mean, covariance):
    """Mean and covariance of f given q(u); Hensman et al., AISTATS 2015, eq. (6)."""
    projection = torch.linalg.solve(Kuu, Kuf).mT
    change = projection @ (Kuu - covariance) @ projection.mT
    return projection @ mean, Kff - change


def sparse_bound(Kuu, Kuf, Kff, mean, covariance, y, noise):
    """The bound of all data in nats; Hensman et al., UAI 2013, eq. (4)."""
    f, V = sparse_posterior(Kuu, Kuf, Kff, mean, covariance)
    normal = torch.distributions.Normal(f, noise**0.5)
    fit = normal.log_prob(y).sum() - V.diagonal().sum() / (2 * noise)
    q = MultivariateNormal(mean, covariance)
    return fit - kl_divergence(q, MultivariateNormal(torch.zeros_like(mean), Kuu))


def sparse_layer_values(X, Z, lengthscale, variance, jitter, m, L, noise):
    """Joint draws ``s x n x h`` of a sparse layer at inputs ``s x n x d``.

    Given whitened means ``h x M``, factors ``h x M x M`` and normals ``s x n x h``.
    Dense and one output at a time; the layer's mean is not in it.
    """
    Kuu = squared_exponential(Z, Z, lengthscale, variance)
    Kuu = Kuu + jitter * variance * torch.eye(len(Z), dtype=Z.dtype)
    Kuf = squared_exponential(Z.expand(len(X), -1, -1), X, lengthscale, variance)
    Kff = squared_exponential(X, X, lengthscale, variance)
    C = torch.linalg.cholesky(Kuu)
    parts = []
    for o in range(len(m)):
        mean, V = sparse_posterior(Kuu, Kuf, Kff, C @ m[o], C @ L[o] @ L[o].mT @ C.mT)
        values, vectors = torch.linalg.eigh(V)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        parts.append(mean + (root @ noise[..., o, None])[..., 0])
    return torch.stack(parts, -1)
