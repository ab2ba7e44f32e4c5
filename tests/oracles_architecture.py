"""Dense float64 forms of invariant and convolutional kernels, retyped from the papers.

Nothing here imports gpbridge.
"""

import itertools
import math

import torch


def squared_exponential(x, z, lengthscale):
    """exp(-|x - z|^2 / (2 l^2)), for two points."""
    return torch.exp(-0.5 * ((x - z) / lengthscale).square().sum())


def double_orbit_sum(base, orbit1, orbit2, weights):
    """sum_{a,a'} w_a w_a' k(x_a, x'_a'), point by point, orbits ``n x s x d``."""
    K = torch.zeros(len(orbit1), len(orbit2), dtype=torch.float64)
    for i, j in itertools.product(range(len(orbit1)), range(len(orbit2))):
        for a, b in itertools.product(range(len(weights)), range(len(weights))):
            K[i, j] += weights[a] * weights[b] * base(orbit1[i, a], orbit2[j, b])
    return K


def rotated(x, angle):
    """A point of the plane turned by an angle."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([c * x[0] - s * x[1], s * x[0] + c * x[1]])


def smoothed_squared_exponential(x, z, lengthscale, noise_variance):
    """E k(x + e, z + e') for independent normal e, e' of variance v in each column.

    A squared exponential of l'^2 = l^2 + 2 v, times (l / l')^d.
    """
    wide = (lengthscale**2 + 2 * noise_variance) ** 0.5
    shrink = (lengthscale / wide) ** len(x)
    return shrink * squared_exponential(x, z, wide)


def convolutional_kernel(images1, images2, patch_shape, weights, lengthscale):
    """P^-2 sum_{p,p'} w_p w_p' k(x[p], x'[p']) by loops; images ``n x c x h x w``."""
    h, w = patch_shape

    def patches(image):
        rows = range(image.shape[-2] - h + 1)
        columns = range(image.shape[-1] - w + 1)
        return [
            image[:, r : r + h, c : c + w].flatten()
            for r, c in itertools.product(rows, columns)
        ]

    K = torch.zeros(len(images1), len(images2), dtype=torch.float64)
    for i, j in itertools.product(range(len(images1)), range(len(images2))):
        mine, theirs = patches(images1[i]), patches(images2[j])
        for (p, x), (q, z) in itertools.product(enumerate(mine), enumerate(theirs)):
            value = squared_exponential(x, z, lengthscale)
            K[i, j] += weights[p] * weights[q] * value
    return K / len(weights) ** 2


def squared_exponential_gram(X, Z, lengthscale):
    """Rows against rows, ``n x d`` and ``m x d`` to ``n x m``."""
    distances = (X[:, None] - Z[None]).square().sum(-1)
    return torch.exp(-0.5 * distances / lengthscale**2)


def sparse_posterior(K_uu, K_uf, K_ff, mean, covariance, jitter):
    """Whitened sparse posterior of a zero mean GP (Hensman et al. 2015), dense."""
    identity = torch.eye(len(K_uu), dtype=K_uu.dtype)
    L = torch.linalg.cholesky(K_uu + jitter * K_uu.diagonal().mean() * identity)
    A = torch.linalg.solve(L, K_uf)
    return A.T @ mean, K_ff + A.T @ (covariance - identity) @ A


def averaged_sparse_posterior(k, Z, orbits, weights, mean, covariance, jitter):
    """The posterior of g at all orbit points, ``n x s x d``, then averaged."""
    n, s, _ = orbits.shape
    flat = orbits.reshape(n * s, -1)
    average = torch.kron(torch.eye(n, dtype=Z.dtype), weights[None] / s)  # n x n s
    K = k(Z, Z), k(Z, flat), k(flat, flat)
    m, S = sparse_posterior(*K, mean, covariance, jitter)
    return average @ m, average @ S @ average.T


def polya_gamma_bound(f, sign, c):
    """Jaakkola and Jordan (2000): below log sigma(sign f) for any c > 0."""
    curvature = math.tanh(c / 2) / (4 * c)
    sigma = 1 / (1 + math.exp(-c))
    return math.log(sigma) + (sign * f - c) / 2 - curvature * (f**2 - c**2)
