"""Answers in dense float64, typed from the papers; imports nothing of gpbridge."""

import math

import numpy as np
import torch
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal, kl_divergence


def prefix_prediction(mean, covariance, noise, y, seen, new):
    """Rasmussen and Williams (2006), (2.23), (2.24): residual and covariance of f.

    ``seen`` and ``new`` are lists of rows of y; f has the given moments a priori.
    """
    residual, V = (y - mean)[new], covariance[new][:, new]
    if seen:
        cross = covariance[new][:, seen]
        C = covariance[seen][:, seen] + noise[seen][:, seen]
        gain = cross @ torch.linalg.inv(C)
        residual = residual - gain @ (y - mean)[seen]
        V = V - gain @ cross.T
    return residual, V


def expected_log_density(residual, V, noise):
    """E log N(y; f, noise) over f with covariance V: (3) of Lyle et al. (2020)."""
    law = MultivariateNormal(torch.zeros_like(residual), noise)
    trace = torch.trace(torch.linalg.solve(noise, V))
    return law.log_prob(residual) - 0.5 * trace


def one_draw_terms(mean, covariance, noise, y, blocks):
    """Terms of L_1 when blocks of rows arrive one after the other."""
    seen, terms = [], []
    for new in blocks:
        r, V = prefix_prediction(mean, covariance, noise, y, seen, new)
        terms.append(expected_log_density(r, V, noise[new][:, new]))
        seen = [*seen, *new]
    return torch.stack(terms)


def evidence_terms(mean, covariance, noise, y, blocks):
    """The chain rule: log densities of blocks given those before."""
    seen, terms = [], []
    for new in blocks:
        r, V = prefix_prediction(mean, covariance, noise, y, seen, new)
        law = MultivariateNormal(torch.zeros_like(r), V + noise[new][:, new])
        terms.append(law.log_prob(r))
        seen = [*seen, *new]
    return torch.stack(terms)


def two_draw_terms(mean, covariance, noise, y, nodes=60):
    """Terms of L_2 for one output, by Gauss-Hermite quadrature over both draws."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights)
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    terms = []
    for i in range(len(y)):
        r, V = prefix_prediction(mean, covariance, noise, y, list(range(i)), [i])
        off = r - V[0].sqrt() * points
        s2 = noise[i, i]
        log_p = -0.5 * off**2 / s2 - 0.5 * torch.log(2 * math.pi * s2)
        both = torch.logaddexp(log_p[:, None], log_p[None]) - math.log(2)
        terms.append((weights * both).sum())
    return torch.stack(terms)


def gap_of_one_draw(residual, variance, noise_variance):
    """What L_1 misses at one datum: predictive residual r and variance v of f."""
    v, r2, s2 = variance, residual**2, noise_variance
    return 0.5 * ((v + r2) / s2 - r2 / (v + s2) - math.log((v + s2) / s2))


def moving_average(losses, gamma):
    """Of the last loss, by recursion: the normalised form of TSE-EMA of Ru et al."""
    total, weight = 0.0, 0.0
    for loss in losses:
        total, weight = gamma * total + loss, gamma * weight + 1.0
    return total / weight


def ridge_weights(X, y, decay):
    """Minimum of |y - X w|^2 / (2 n) + sum_j decay_j w_j^2 / 2."""
    return torch.linalg.solve(ridge_hessian(X, decay), X.mT @ y / len(X))


def ridge_hessian(X, decay):
    """X'X / n + diag(decay)."""
    return X.mT @ X / len(X) + torch.diag(decay.expand(X.shape[1]))


def ridge_hypergradient(X, y, X_val, y_val, decay):
    """Gradient of |y_val - X_val w|^2 / (2 n_val) in each decay of its own feature.

    w = H^-1 b and dH / d decay_j = e_j e_j', so dw / d decay_j = -w_j H^-1 e_j.
    """
    w = ridge_weights(X, y, decay)
    slope = X_val.mT @ (X_val @ w - y_val) / len(X_val)
    return -w * torch.linalg.solve(ridge_hessian(X, decay), slope)


def neumann_inverse(H, num_terms, step):
    """H^-1 (I - (I - a H)^(K + 1)), a geometric sum; Lorraine et al. (2020)."""
    values, vectors = torch.linalg.eigh(H)
    weights = (1 - (1 - step * values) ** (num_terms + 1)) / values
    return vectors @ torch.diag(weights) @ vectors.mT


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
    # A list of floats would pass through float32.
    values = torch.tensor(values, dtype=torch.float64)
    return values, torch.stack(means), torch.stack(variances)


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


def refined_laplace(J, f, trained, precision, curvature, log_density, y, normals, rhos):
    """Natural-gradient steps on the bound of a linear model, from Laplace's posterior.

    Khan and Lin (2017): the precision moves to the expected curvature, then the mean
    along the expected gradient. ``J`` is (n m) x p with outputs fastest, ``f`` n x m,
    ``precision`` the prior's, p; ``curvature`` a list of n blocks at the network's
    outputs; ``normals`` n x k x m, of which both signs are used; ``rhos`` the step
    sizes. Returns mean and covariance of the weights, the bounds and the mean gradient
    at the last point.
    """
    n, m = f.shape
    J = J.reshape(n, m, -1)
    prior = torch.diag(precision)
    w, M = trained.clone(), sum(J[i].T @ curvature[i] @ J[i] for i in range(n))
    bounds = []
    for rho in (*rhos, None):
        Sigma = torch.linalg.inv(M + prior)
        fit, gradient, expected = 0.0, -precision * w, 0.0
        for i in range(n):
            mean = f[i] + J[i] @ (w - trained)
            S = J[i] @ Sigma @ J[i].T
            if m > 1:  # a softmax ignores a common shift
                P = torch.eye(m, dtype=S.dtype) - 1 / m
                S = P @ S @ P
            values, vectors = torch.linalg.eigh(S)
            root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
            moved = normals[i] @ root
            samples = torch.cat([mean + moved, mean - moved])

            def density(value, label=y[i]):
                return log_density(label, value)

            fit = fit + torch.func.vmap(density)(samples).mean()
            g = torch.func.vmap(torch.func.grad(density))(samples).mean(0)
            B = -torch.func.vmap(torch.func.hessian(density))(samples).mean(0)
            gradient = gradient + J[i].T @ g
            expected = expected + J[i].T @ B @ J[i]
        posterior = MultivariateNormal(w, precision_matrix=M + prior)
        prior_law = MultivariateNormal(torch.zeros_like(w), precision_matrix=prior)
        bounds.append(fit - kl_divergence(posterior, prior_law))
        if rho is not None:
            M = (1 - rho) * M + rho * expected
            w = w + rho * torch.linalg.solve(M + prior, gradient)
    return w, Sigma, torch.stack(bounds), gradient


def dimensions_of_groups(J, sizes, variances, noise):
    """MacKay (1992), eq. (4.8), group by group: |g| - tr(Sigma_gg) / s_g.

    ``J`` is ``n x p`` with groups of weights side by side, ``noise`` one variance.
    """
    parts = [torch.full((k,), s) for k, s in zip(sizes, variances, strict=True)]
    prior = torch.cat(parts).to(J)
    posterior = torch.linalg.inv(J.T @ J / noise + torch.diag(1 / prior))
    left = 1 - posterior.diagonal() / prior
    return torch.stack([part.sum() for part in left.split(list(sizes))])


def output_curvature(kind, f, noise=None):
    """Negative second derivative of the log density by the outputs, n x m x m."""
    if kind == "gaussian":
        return torch.diag(1 / noise).expand(len(f), -1, -1)
    if kind == "softmax":
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    p = torch.sigmoid(f)
    return (p * (1 - p))[:, :, None]


def log_likelihood(kind, f, y, noise=None):
    """Total log density of the targets, in nats."""
    if kind == "gaussian":
        squares = (y - f) ** 2 / noise
        return -0.5 * (squares + torch.log(2 * math.pi * noise)).sum()
    if kind == "softmax":
        return f.log_softmax(-1)[torch.arange(len(f)), y].sum()
    return (y * f - torch.nn.functional.softplus(f)).sum()


def online_evidence(kind, f, J, y, w, precision, noise=None, diagonal=False):
    """Immer, Bauer, Fortuin, Raetsch, Khan, ICML 2021, eq. (5): at the weights w.

    f is n x m, J n x m x p, precision the prior precision of each weight.
    """
    Lam = output_curvature(kind, f, noise)
    M = torch.einsum("nip,nij,njq->pq", J, Lam, J)
    if diagonal:
        M = torch.diag(M.diagonal())
    D = torch.diag(precision)
    return (
        log_likelihood(kind, f, y, noise)
        - 0.5 * w @ D @ w
        + 0.5 * torch.logdet(D)
        - 0.5 * torch.logdet(M + D)
    )
