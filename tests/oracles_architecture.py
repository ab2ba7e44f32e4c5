"""Dense float64 forms of kernels and deep Gaussian processes, retyped from the papers.

Nothing here imports gpbridge.
"""

import itertools

import torch
from torch.distributions import MultivariateNormal, kl_divergence


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


def squared_exponential_gram(X, Z, lengthscale, variance):
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
    Kuu = squared_exponential_gram(Z, Z, lengthscale, variance)
    Kuu = Kuu + jitter * variance * torch.eye(len(Z), dtype=Z.dtype)
    Kuf = squared_exponential_gram(Z.expand(len(X), -1, -1), X, lengthscale, variance)
    Kff = squared_exponential_gram(X, X, lengthscale, variance)
    C = torch.linalg.cholesky(Kuu)
    parts = []
    for o in range(len(m)):
        mean, V = sparse_posterior(Kuu, Kuf, Kff, C @ m[o], C @ L[o] @ L[o].mT @ C.mT)
        values, vectors = torch.linalg.eigh(V)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        parts.append(mean + (root @ noise[..., o, None])[..., 0])
    return torch.stack(parts, -1)
