"""Dense float64 formulas of model selection, typed from the papers.

Knows nothing of gpbridge. Networks come as functions of one flat weight vector.
"""

import math

import torch


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
