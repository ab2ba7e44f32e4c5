"""Dense answers for posterior sampling and iterative evidence, without gpbridge."""

import math

import torch


def matern(X, Z, lengthscale, nu, variance=1.0):
    """Rasmussen and Williams (2006), eqs. (4.14), (4.17) and (4.9) for infinite nu."""
    # Clamped for its derivative, which at equal points is zero for all nu but 1/2.
    r = ((X[:, None] - Z[None]) / lengthscale).square().sum(-1).clamp_min(1e-30).sqrt()
    if nu == math.inf:
        return variance * torch.exp(-0.5 * r**2)
    a = math.sqrt(2 * nu) * r
    polynomial = {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a**2 / 3}[nu]
    return variance * polynomial * torch.exp(-a)


def gp_posterior(K, K_cross, K_test, noise, residual):
    """Rasmussen and Williams (2006), eqs. (2.23) and (2.24); K_cross is ``t x n``."""
    H = K + torch.as_tensor(noise, dtype=K.dtype).expand(len(K)).diag_embed()
    mean = K_cross @ torch.linalg.solve(H, residual)
    return mean, K_test - K_cross @ torch.linalg.solve(H, K_cross.T)


def matheron(f0_test, f0, noise_draw, K, K_cross, noise, y):
    """Wilson et al. (2021), eq. (12), draws in rows: ``s x t`` from ``s x n``."""
    H = K + torch.as_tensor(noise, dtype=K.dtype).expand(len(K)).diag_embed()
    return f0_test + (y - f0 - noise_draw) @ torch.linalg.inv(H) @ K_cross.T


def log_evidence(K, noise, residual):
    """Rasmussen and Williams (2006), eq. (2.30), columns are independent outputs."""
    H = K + torch.as_tensor(noise, dtype=K.dtype).expand(len(K)).diag_embed()
    n, m = residual.shape
    fit = (residual * torch.linalg.solve(H, residual)).sum()
    return -0.5 * (fit + m * torch.logdet(H) + m * n * math.log(2 * math.pi))


def covariance_errors(samples, covariance):
    """Deviation of a known-mean sample covariance, in standard errors per entry.

    ``samples`` are ``s x t``; Var of a product of Gaussians is c_ii c_jj + c_ij^2.
    """
    found = samples.T @ samples / len(samples)
    variance = covariance.diagonal()
    spread = (variance[:, None] * variance + covariance**2).sqrt()
    return (found - covariance) / spread * len(samples) ** 0.5
