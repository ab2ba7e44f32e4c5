"""Likelihoods and links in dense float64, point by point, typed from the papers."""

import math

import numpy as np
import torch


def gaussian_log_density(y, f, covariance):
    """Rasmussen and Williams (2006), eq. (A.6)."""
    m = len(y)
    quadratic = (y - f) @ torch.linalg.inv(covariance) @ (y - f)
    return -0.5 * (quadratic + torch.logdet(covariance) + m * math.log(2 * math.pi))


def softmax_log_density(y, f):
    """Rasmussen and Williams (2006), eq. (3.34)."""
    return f[y] - torch.log(torch.exp(f).sum())


def logistic_log_density(y, f):
    """Rasmussen and Williams (2006), eq. (3.2), with a sign for the label."""
    return -torch.log1p(torch.exp(-(2 * y - 1) * f)).sum()


def probit_log_density(y, f):
    """Rasmussen and Williams (2006), eq. (3.7)."""
    return torch.log(0.5 * torch.erfc(-(2 * y - 1) * f / math.sqrt(2))).sum()


def score(log_density, y, f):
    """First derivative in f by one backward pass."""
    return torch.func.grad(lambda f: log_density(y, f))(f)


def curvature(log_density, y, f):
    """Negative second derivative in f."""
    return -torch.func.hessian(lambda f: log_density(y, f))(f)


def fisher(log_density, labels, f):
    """Sum over labels of p(y | f) times the outer product of the scores."""
    total = 0
    for y in labels:
        g = score(log_density, y, f)
        total = total + torch.exp(log_density(y, f)) * torch.outer(g, g)
    return total


def log_normal_tail(x, terms=400):
    """log (1 - Phi(x)) by Laplace's continued fraction, for x > 2.

    Abramowitz and Stegun (1964), eq. 26.2.14.
    """
    fraction = x
    for k in range(terms, 0, -1):
        fraction = x + k / fraction
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi) - math.log(fraction)


def logistic_average(f, v, nodes=200):
    """Integral of the logistic function over N(f, v) by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite.hermgauss(nodes)
    values = 1 / (1 + np.exp(-(f + math.sqrt(2 * v) * x)))
    return float((w * values).sum() / math.sqrt(math.pi))


def probit_average(f, v):
    """Rasmussen and Williams (2006), eq. (3.82)."""
    return 0.5 * math.erfc(-f / math.sqrt(2 * (1 + v)))


def pairwise_link(f, S):
    """One minus the odds against each class, by loops."""
    C = len(f)
    q = torch.zeros(C, dtype=f.dtype)
    for c in range(C):
        for j in range(C):
            v = S[c, c] + S[j, j] - S[c, j] - S[j, c]
            q[c] += torch.exp(-(f[c] - f[j]) / torch.sqrt(1 + math.pi / 8 * v))
        q[c] = 1 / q[c]
    return q / q.sum()


def probit_link(f, S):
    """Gibbs (1997): softmax of f / sqrt(1 + pi / 8 diag S)."""
    e = torch.exp(f / torch.sqrt(1 + math.pi / 8 * torch.diag(S)))
    return e / e.sum()


def centred(f, S):
    """Moments of P f with P = I - 11' / C."""
    C = len(f)
    P = torch.eye(C, dtype=f.dtype) - torch.ones(C, C, dtype=f.dtype) / C
    return P @ f, P @ S @ P


def bridge_link(f, S):
    """Hobbhahn, Kristiadi and Hennig (2022): zero-sum correction, then their map."""
    C = len(f)
    one = torch.ones(C, dtype=f.dtype)
    total = one @ S @ one
    f = f - S @ one * (one @ f) / total
    S = S - torch.outer(S @ one, S @ one) / total
    alpha = torch.zeros(C, dtype=f.dtype)
    for k in range(C):
        inner = 1 - 2 / C + torch.exp(f[k]) / C**2 * torch.exp(-f).sum()
        alpha[k] = inner / S[k, k]
    return alpha / alpha.sum()


def sampled_link(f, S, num_samples, seed=0):
    """Average of softmax over samples, with its standard error."""
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_samples, len(f), generator=generator, dtype=f.dtype)
    e = torch.softmax(f + normal @ root.T, -1)
    return e.mean(0), e.std(0) / math.sqrt(num_samples)
