"""Weight-space answers in dense float64, typed from the papers, without gpbridge."""

import math

import torch

"""Brute force answers for posteriors over weights and latents, dense, in float64.

Typed from the papers, without gpbridge.
"""


def sghmc_stationary_covariance(curvature, lr, alpha, tau):
    """Covariance of (v, theta) of SGHMC on a loss per datum ``h theta^2 / 2``.

    The step v' = (1 - a) v - lr h theta + e, theta' = theta + v', with variance
    2 lr a tau of e and tau = T / N, is linear, z' = A z + B e, so that the covariance
    solves P = A P A' + Q: the discrete Lyapunov equation, by Kronecker products.
    """
    h = float(curvature)
    A = torch.tensor(
        [[1 - alpha, -lr * h], [1 - alpha, 1 - lr * h]], dtype=torch.float64
    )
    B = torch.ones(2, 1, dtype=torch.float64)
    Q = 2 * lr * alpha * tau * B @ B.T
    identity = torch.eye(4, dtype=torch.float64)
    P = torch.linalg.solve(identity - torch.kron(A, A), Q.reshape(-1))
    return P.reshape(2, 2)


def linear_regression_posterior(X, y, noise_variance, prior_variance):
    """Mean and covariance of w in y = X w + e: Rasmussen and Williams (2006), (2.8)."""
    precision = X.T @ X / noise_variance
    precision = precision + torch.eye(X.shape[1], dtype=X.dtype) / prior_variance
    covariance = torch.linalg.inv(precision)
    return covariance @ X.T @ y / noise_variance, covariance


def bezier(points, t):
    """Garipov et al. (NeurIPS 2018), section 3.2: Bernstein form, ``s x p``."""
    n = len(points) - 1
    rows = []
    for time in t.tolist():
        row = torch.zeros_like(points[0])
        for i, point in enumerate(points):
            row = row + math.comb(n, i) * (1 - time) ** (n - i) * time**i * point
        rows.append(row)
    return torch.stack(rows)


def poly_chain(points, t):
    """Garipov et al. (NeurIPS 2018), section 3.2: linear between neighbours."""
    pieces = len(points) - 1
    rows = []
    for time in t.tolist():
        i = min(int(time * pieces), pieces - 1)
        share = time * pieces - i
        rows.append((1 - share) * points[i] + share * points[i + 1])
    return torch.stack(rows)


def curve_rate(share):
    """Rate after a share of the run: Garipov et al., their public training script."""
    if share <= 0.5:
        return 1.0
    return 1 - 0.99 * (share - 0.5) / 0.4 if share <= 0.9 else 0.01


def mean_field_optimum(X, y, noise_variance, prior_variance):
    """The independent normals closest to the posterior of Bayesian linear regression.

    KL(q || p) of Gaussians is smallest at the mean of p and at variances that are one
    over the diagonal of its precision: Bishop (2006), section 10.1.2.
    """
    mean, covariance = linear_regression_posterior(X, y, noise_variance, prior_variance)
    return mean, 1 / torch.linalg.inv(covariance).diagonal()


def linear_regression_evidence_bound(X, y, noise_variance, prior_variance, mean, var):
    """E_q log p(y | w) - KL(q || p) for q = N(mean, diag var), total nats."""
    residual = y - X @ mean
    n = len(y)
    expected = -0.5 * (
        n * torch.log(torch.as_tensor(2 * torch.pi * noise_variance))
        + (residual.square().sum() + (X.square() @ var).sum()) / noise_variance
    )
    q = torch.distributions.Normal(mean, var.sqrt())
    p = torch.distributions.Normal(torch.zeros_like(mean), prior_variance**0.5)
    return expected - torch.distributions.kl_divergence(q, p).sum()


def tempered_regression(features, residual, noise, temperature, prior_std):
    """Bishop (2006), eqs. (3.53) and (3.54), with the likelihood to the power 1 / T.

    Features ``n x r``, residual ``n``; mean ``r`` and covariance of the coefficients.
    """
    identity = torch.eye(features.shape[1], dtype=features.dtype)
    precision = identity / prior_std**2
    precision = precision + features.T @ features / (noise * temperature)
    covariance = torch.linalg.inv(precision)
    return covariance @ features.T @ residual / (noise * temperature), covariance


def mean_field(covariance):
    """Bishop (2006), eq. (10.13): variances of the closest independent Gaussians."""
    return 1 / torch.linalg.inv(covariance).diagonal()


def split_r_hat(samples):
    """Gelman et al. (2013), eqs. (11.1) to (11.4), one coordinate, in loops."""
    halves = [
        part
        for chain in samples.tolist()
        for part in (chain[: len(chain) // 2], chain[len(chain) - len(chain) // 2 :])
    ]
    m, n = len(halves), len(halves[0])
    means = [sum(half) / n for half in halves]
    overall = sum(means) / m
    between = n / (m - 1) * sum((mean - overall) ** 2 for mean in means)
    within = 0.0
    for half, mean in zip(halves, means, strict=True):
        within += sum((value - mean) ** 2 for value in half) / (n - 1) / m
    return (((n - 1) / n * within + between / n) / within) ** 0.5


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
