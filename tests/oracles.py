"""Brute force answers in dense float64, typed from the papers, without gpbridge.

Shapes: J is ``n x m x p``, roots R of output Hessians are ``n x m x m`` with
Lambda = R R', covariances of outputs are ``(n m) x (n m)``, output fastest.
"""

import copy
import math

import mpmath
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def jacobian(module, inputs, names=None, create_graph=False):
    """One point alone and one backward pass per output, ``n x m x p``.

    ``inputs`` have the shape that the module wants; ``names`` picks weights. With
    ``create_graph`` the result can be differentiated in the inputs.
    """
    net = copy.deepcopy(module).eval()
    weights = [
        p
        for name, p in net.named_parameters()
        if p.requires_grad and (names is None or name in names)
    ]
    width = sum(p.numel() for p in weights)
    rows = []
    for x in inputs:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has one derivative only
            outputs = net(x[None]).reshape(-1)
        for output in outputs:
            if not output.requires_grad:
                rows.append(torch.zeros(width, dtype=x.dtype))
                continue
            grads = torch.autograd.grad(
                output,
                weights,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            parts = zip(weights, grads, strict=True)
            row = [torch.zeros_like(p) if g is None else g for p, g in parts]
            rows.append(torch.cat([g.reshape(-1) for g in row]))
    return torch.stack(rows).reshape(len(inputs), -1, width)


def tangent_rows(module, inputs, prior_variance, names=None):
    """Features ``J S^(1/2)``, ``(n m) x p``; the variance is one number or ``p``."""
    std = torch.as_tensor(prior_variance, dtype=torch.float64).sqrt()
    return jacobian(module, inputs, names).flatten(0, 1) * std


def block_diagonal(root):
    """The matrix R of all points, ``(n m) x (n m)``."""
    return torch.block_diag(*root) if len(root) else root.new_zeros(0, 0)


def softmax_root(logits):
    """``R = diag(sqrt p) - p sqrt(p)'``: then R R' = diag(p) - p p'.

    Rasmussen and Williams (2006), eq. (3.38), with the root of section 3.5.
    """
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]


def ggn(J, root):
    """Sum over the data of J' Lambda J, Martens (2020), eq. (9), ``p x p``."""
    return sum(j.T @ r @ r.T @ j for j, r in zip(J, root, strict=True))


def weight_posterior(Phi, root, whitened):
    """Bayesian linear regression in scaled weights: Bishop (2006), (3.50), (3.51).

    Features ``(n m) x p``, a standard normal prior, targets R' (y - offset) ``n m``.
    Returns the mean ``p`` and the covariance ``p x p``.
    """
    R = block_diagonal(root)
    H = torch.eye(Phi.shape[1], dtype=Phi.dtype) + Phi.T @ R @ R.T @ Phi
    covariance = torch.linalg.inv(H)
    return covariance @ Phi.T @ R @ whitened.reshape(-1), covariance


def function_posterior(K, K_cross, K_test, root):
    """Rasmussen and Williams (2006), eqs. (2.24) and (3.27) with W = R R'.

    K - K (K + W^-1)^-1 K, written with B = I + R' K R, since W may be singular.
    """
    R = block_diagonal(root)
    B = torch.eye(len(K), dtype=K.dtype) + R.T @ K @ R
    return K_test - K_cross @ R @ torch.linalg.inv(B) @ R.T @ K_cross.T


def gaussian_evidence(targets, mean, K, noise_variance):
    """Rasmussen and Williams (2006), eq. (2.30), total nats; noise a number or nm."""
    r = (targets - mean).reshape(-1)
    C = K + torch.as_tensor(noise_variance).expand(len(r)).diag_embed()
    fit = r @ torch.linalg.solve(C, r)
    return -0.5 * (fit + torch.logdet(C) + len(r) * math.log(2 * math.pi))


def precise_variances(Phi, Phi_test, noise_variance, digits=60):
    """Posterior variances by exact-arithmetic-like weight space, for noise so small
    that float64 loses digits: phi (I + Phi' Phi / noise)^-1 phi', ``t``."""
    with mpmath.workdps(digits):
        rows = mpmath.matrix(Phi.tolist())
        H = mpmath.eye(Phi.shape[1]) + rows.T * rows / mpmath.mpf(noise_variance)
        inverse = mpmath.inverse(H)
        tests = [mpmath.matrix(row) for row in Phi_test.tolist()]
        return torch.tensor(
            [float((phi.T * inverse * phi)[0]) for phi in tests], dtype=Phi.dtype
        )
