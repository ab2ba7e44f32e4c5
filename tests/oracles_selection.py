"""Model selection in closed form: dense, float64, from the papers. No gpbridge here."""

import torch


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
