"""Brute force answers for posteriors over weights and latents, dense, in float64.

Typed from the papers, without gpbridge.
"""

import math

import torch


def gaussian_log_density(y, mean, covariance):
    """Log density of one vector."""
    distribution = torch.distributions.MultivariateNormal(mean, covariance)
    return distribution.log_prob(y)


def linear_elbo_terms(Y, W, b, noise, mean, variance):
    """E_q log N(y | W z + b, noise I) for diagonal q, per datum (rows of Y)."""
    residual = Y - mean @ W.T - b
    spread = variance @ W.square().sum(0)
    return -0.5 * (
        residual.square().sum(-1) / noise
        + spread / noise
        + Y.shape[-1] * math.log(2 * math.pi * noise)
    )


def gp_prior_vae_terms(K, targets, variances):
    """One latent dimension of the GP prior VAE, without inducing points.

    The posterior is the prior times the encoder's factors. Returns its means, variances
    and covariance, and what is added to the expected log likelihood in the bound:
    log Z - E_q sum_i log N(z_i | target_i, variance_i). Pearce (2020), section 3.
    """
    noisy = K + torch.diag(variances)
    gain = K @ torch.linalg.inv(noisy)
    mean, covariance = gain @ targets, K - gain @ K
    log_Z = gaussian_log_density(targets, torch.zeros_like(targets), noisy)
    error = (targets - mean).square() + covariance.diagonal()
    factors = -0.5 * (error / variances + (2 * math.pi * variances).log())
    return mean, covariance, log_Z - factors.sum()


def sparse_gp_moments(K_mm, K_mn, K_nn, targets, variances, weight=1.0):
    """Moments of u and of f at the data: Jazbec et al. (2021), q_S from a batch."""
    precision = torch.diag(weight / variances)
    Sigma = K_mm + K_mn @ precision @ K_mn.T
    mean_u = K_mm @ torch.linalg.solve(Sigma, K_mn @ precision @ targets)
    A = K_mm @ torch.linalg.solve(Sigma, K_mm)
    projection = torch.linalg.solve(K_mm, K_mn).T
    covariance = K_nn - projection @ K_mn + projection @ A @ projection.T
    return mean_u, A, projection @ mean_u, covariance


def hensman_bound(K_mm, K_mn, K_nn, targets, variances, mean_u, A):
    """L_H, the sum over data and the divergence: Hensman et al. (2013), eq. (4)."""
    projection = torch.linalg.solve(K_mm, K_mn).T
    residual = targets - projection @ mean_u
    left = (K_nn - projection @ K_mn).diagonal()
    trace = (projection @ A @ projection.T).diagonal()
    fit = -0.5 * (residual.square() + left + trace) / variances
    fit = fit - 0.5 * (2 * math.pi * variances).log()
    q = torch.distributions.MultivariateNormal(mean_u, A)
    p = torch.distributions.MultivariateNormal(torch.zeros_like(mean_u), K_mm)
    return fit.sum() - torch.distributions.kl_divergence(q, p)
