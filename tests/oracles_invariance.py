"""Dense oracles of the evidence of networks averaged over orbits. Float64, loops."""

import math

import torch
from torch.func import functional_call, jacrev


def averaged_jacobian(net, images):
    """Outputs ``n x m`` and Jacobian ``n x m x p`` of a mean over ``n x s`` images."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    values, rows = [], []
    for orbit in images:
        J = jacrev(lambda p, orbit=orbit: functional_call(net, p, (orbit,)).mean(0))(
            params
        )
        rows.append(
            torch.cat([J[name].reshape(len(J[name]), -1) for name in params], -1)
        )
        values.append(functional_call(net, params, (orbit,)).mean(0))
    return torch.stack(values).detach(), torch.stack(rows).detach()


def softmax_hessian(logits):
    """diag(p) - p p' at each point."""
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def softmax_root(logits):
    """S = diag(sqrt p) - p sqrt(p)', with S S' = diag(p) - p p'."""
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]


def averaged_evidence(kind, f, J, Y, w, variance, noise):
    """log p(y|f) - w'S^-1 w / 2 + logdet S^-1 / 2 - logdet(J'LJ + S^-1) / 2."""
    if kind == "softmax":
        fit = torch.log_softmax(f, -1)[torch.arange(len(Y)), Y].sum()
        hessian = softmax_hessian(f)
    else:
        squares = (Y - f).square() / noise + (2 * math.pi * noise).log()
        fit = -0.5 * squares.sum()
        hessian = torch.diag(1 / noise).expand(len(f), -1, -1)
    precision = torch.diag(1 / variance)
    P = precision + torch.einsum("nmp,nml,nlq->pq", J, hessian, J)
    penalty = (w.square() / variance).sum()
    return fit - 0.5 * penalty - 0.5 * (variance.log().sum() + torch.logdet(P))


def output_blocks(J, p):
    """Exact log determinant, its sum over outputs in the root basis, and without it.

    The last takes ``p_c - p_c^2`` for the curvature of output c by itself.
    """
    n, C, P = J.shape
    S = torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]
    A = S.mT @ J
    eye = torch.eye(P, dtype=J.dtype)
    exact = torch.logdet(eye + torch.einsum("ncp,ncq->pq", A, A))
    root, plain = 0.0, 0.0
    for c in range(C):
        root = root + torch.logdet(eye + A[:, c].mT @ A[:, c])
        own = (p[:, c] - p[:, c].square())[:, None] * J[:, c]
        plain = plain + torch.logdet(eye + J[:, c].mT @ own)
    return exact, root, plain
