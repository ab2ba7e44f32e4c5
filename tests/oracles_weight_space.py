"""Dense float64 answers for posteriors over weights, without gpbridge."""

import torch


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
