"""Model selection typed from the papers, dense and in float64."""

import numpy as np
import torch
from scipy.stats import multivariate_normal


def log_density(y, mean, covariance):
    """Of a multivariate normal, in total nats."""
    return float(
        multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(y.numpy())
    )


def conditional(y, mean, covariance, seen, rest):
    """Rasmussen and Williams (2006), eq. (A.6): the rest given what was seen."""
    K = covariance[seen][:, seen]
    cross = covariance[rest][:, seen]
    gain = torch.linalg.solve(K, cross.T).T
    mu = mean[rest] + gain @ (y[seen] - mean[seen])
    return mu, covariance[rest][:, rest] - gain @ cross.T


def leave_one_out(y, mean, covariance, m=1):
    """Refit without each point, which is m neighbouring targets, and predict it."""
    n = len(y) // m
    values, means, variances = [], [], []
    for i in range(n):
        rest = torch.arange(i * m, (i + 1) * m)
        seen = torch.tensor([j for j in range(n * m) if j // m != i])
        mu, cov = conditional(y, mean, covariance, seen, rest)
        values.append(log_density(y[rest], mu, cov))
        means.append(mu)
        variances.append(cov.diagonal())
    return torch.tensor(values).double(), torch.stack(means), torch.stack(variances)


def collapsed_bound(y, K, K_uu, K_uf, noise):
    """Titsias, Variational learning of inducing variables, AISTATS 2009, eq. (9)."""
    Q = K_uf.T @ torch.linalg.solve(K_uu, K_uf)
    eye = torch.eye(len(y)).double()
    fit = log_density(y, torch.zeros_like(y), Q + noise * eye)
    return fit - float((K - Q).diagonal().sum()) / (2 * noise)


def best_whitened(y, K_uu, K_uf, noise):
    """Titsias (2009), eq. (10), for v = L^-1 u: mean and covariance of the best q."""
    L = torch.linalg.cholesky(K_uu)
    A = torch.linalg.solve_triangular(L, K_uf, upper=False)
    precision = torch.eye(len(L)).double() + A @ A.T / noise
    covariance = torch.linalg.inv(precision)
    return covariance @ A @ y / noise, covariance


def complexity_and_dimension(K, noise):
    """Half log det (I + N^-1 K) and trace of K (K + N)^-1, Rasmussen and Williams."""
    n = len(K)
    ratio = torch.eye(n).double() + torch.linalg.solve(noise, K)
    complexity = 0.5 * float(np.linalg.slogdet(ratio.numpy())[1])
    return complexity, float(torch.linalg.solve(K + noise, K).diagonal().sum())
