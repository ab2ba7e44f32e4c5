"""The tangent model of a network in dense float64, typed from the papers.

A network at its inputs is a :class:`Tangent`; a prior variance of the weights, one
number or ``p`` of them, makes it a Gaussian process. Everything is one matrix of all
points, with no chunks, no layers and no choice of space.
"""

import math
from typing import NamedTuple

import mpmath
import numpy as np
import scipy.optimize
import torch
from torch.distributions import MultivariateNormal

from tests import oracles


class Tangent(NamedTuple):
    """A network to first order in its weights, output fastest."""

    value: torch.Tensor  # (n m)
    J: torch.Tensor  # (n m) x p
    weights: torch.Tensor  # p

    def mean(self, offset=True):
        """Prior mean of the outputs: f - J w* for a prior centred at w = 0."""
        if not offset:
            return torch.zeros_like(self.value)
        return self.value - self.J @ self.weights

    def features(self, prior_variance):
        """J S^(1/2)."""
        std = torch.as_tensor(prior_variance, dtype=torch.float64).sqrt()
        return self.J * std


def tangent(module, inputs, names=None):
    """Evaluate and differentiate a module, one point alone at a time."""
    J = oracles.jacobian(module, inputs, names).flatten(0, 1)
    training = module.training
    with torch.no_grad():
        module.eval()
        value = torch.cat([module(x[None]).reshape(-1) for x in inputs])
        module.train(training)
    weights = [
        p.detach().reshape(-1)
        for name, p in module.named_parameters()
        if p.requires_grad and (names is None or name in names)
    ]
    return Tangent(value, J, torch.cat(weights))


def gaussian_posterior(train, test, variance, noise, y, offset=True):
    """Rasmussen and Williams (2006), eqs. (2.23), (2.24) and (2.38).

    ``noise`` is the covariance of all targets, ``(n m) x (n m)``. Returns the mean
    ``(t m)`` and the covariance ``(t m) x (t m)``.
    """
    Phi, Phi_test = train.features(variance), test.features(variance)
    C = Phi @ Phi.T + noise
    cross = Phi_test @ Phi.T
    gain = cross @ torch.linalg.inv(C)
    mean = test.mean(offset) + gain @ (y.reshape(-1) - train.mean(offset))
    return mean, Phi_test @ Phi_test.T - gain @ cross.T


def gaussian_log_evidence(train, variance, noise, y, offset=True):
    """Log density of all targets under the prior with noise, total nats."""
    Phi = train.features(variance)
    law = MultivariateNormal(train.mean(offset), Phi @ Phi.T + noise)
    return law.log_prob(y.reshape(-1))


def precise_gaussian(train, test, variance, noise_variance, y, digits=60):
    """The same three in 60 digits by weight space, for noise that eats digits.

    Bishop (2006), eqs. (3.50), (3.51) and (3.86), with standard normal weights.
    Returns mean and variances ``t`` and the log evidence.
    """
    with mpmath.workdps(digits):
        Phi = mpmath.matrix(train.features(variance).tolist())
        Phi_test = mpmath.matrix(test.features(variance).tolist())
        r = mpmath.matrix((y.reshape(-1) - train.mean()).tolist())
        noise = mpmath.mpf(noise_variance)
        H = mpmath.eye(Phi.cols) + Phi.T * Phi / noise
        inverse = mpmath.inverse(H)
        w = inverse * (Phi.T * r) / noise
        mean = Phi_test * w
        variances = [
            (Phi_test[i, :] * inverse * Phi_test[i, :].T)[0]
            for i in range(Phi_test.rows)
        ]
        L = mpmath.cholesky(H)
        half_logdet = mpmath.fsum(mpmath.log(L[i, i]) for i in range(L.rows))
        misfit = r - Phi * w
        energy = (misfit.T * misfit)[0] / noise / 2 + (w.T * w)[0] / 2
        evidence = (
            -energy - half_logdet - len(r) * mpmath.log(2 * mpmath.pi * noise) / 2
        )
        return (
            test.mean() + torch.tensor([float(v) for v in mean], dtype=torch.float64),
            torch.tensor([float(v) for v in variances], dtype=torch.float64),
            float(evidence),
        )


def output_curvature(log_density, y, f, labels=None):
    """Block diagonal of the curvatures of -log p(y_i | f_i), ``(n m) x (n m)``.

    With ``labels`` the expectation over them, the Fisher information.
    """
    blocks = []
    for y_i, f_i in zip(y, f, strict=True):
        if labels is None:
            block = -torch.func.hessian(lambda f, y=y_i: log_density(y, f))(f_i)
        else:
            block = 0.0
            for label in labels:
                g = torch.func.grad(lambda f, y=label: log_density(y, f))(f_i)
                block = block + log_density(label, f_i).exp() * torch.outer(g, g)
        blocks.append(block)
    return torch.block_diag(*blocks)


def laplace_covariance(train, test, variance, curvature):
    """Immer, Korzepa and Bauer (2021), eq. (8): inverse of GGN plus prior precision."""
    Phi, Phi_test = train.features(variance), test.features(variance)
    H = torch.eye(Phi.shape[1], dtype=Phi.dtype) + Phi.T @ curvature @ Phi
    return Phi_test @ torch.linalg.inv(H) @ Phi_test.T


def laplace_mode(train, variance, log_density, y, m):
    """Scaled weights of the linear model without offset that maximise

    sum_i log p(y_i | J_i w) - w' S^-1 w / 2, found by a generic optimiser.
    """
    Phi = train.features(variance)

    def loss(v):
        f = (Phi @ v).reshape(-1, m)
        fit = sum(log_density(y_i, f_i) for y_i, f_i in zip(y, f, strict=True))
        return 0.5 * v @ v - fit

    def of(function):
        return lambda v: function(loss)(torch.from_numpy(v)).numpy()

    found = scipy.optimize.minimize(
        lambda v: float(loss(torch.from_numpy(v))),
        np.zeros(Phi.shape[1]),
        jac=of(torch.func.grad),
        hess=of(torch.func.hessian),
        method="trust-exact",
        options={"gtol": 1e-11},
    )
    v = torch.from_numpy(found.x)
    assert torch.func.grad(loss)(v).abs().max() < 1e-8
    return v, float(-loss(v))


def laplace_log_evidence(train, variance, log_density, y, m, curvature):
    """MacKay (1992), eq. (9): log joint at the optimum minus half a log determinant.

    The determinant is that of ``I + S^(1/2) J' Lambda J S^(1/2)``, so that the prior's
    constants cancel.
    """
    _, joint = laplace_mode(train, variance, log_density, y, m)
    Phi = train.features(variance)
    H = torch.eye(Phi.shape[1], dtype=Phi.dtype) + Phi.T @ curvature @ Phi
    return joint - 0.5 * float(torch.logdet(H))


def evidence_at_weights(train, variance, noise_variance, y, weights, value):
    """Immer et al. (2021, ICML), eq. (4), at given weights and their outputs.

    What post-hoc Laplace maximises; equal to the exact evidence at the optimum of the
    linear model, with the linear model's own fit.
    """
    y, n = y.reshape(-1), len(y)
    Phi = train.features(variance)
    fit = -0.5 * ((y - value) ** 2).sum() / noise_variance
    fit = fit - 0.5 * n * math.log(2 * math.pi * noise_variance)
    K = torch.eye(n, dtype=Phi.dtype) + Phi @ Phi.T / noise_variance
    norm = (weights**2 / torch.as_tensor(variance, dtype=y.dtype)).sum()
    return fit - 0.5 * norm - 0.5 * torch.logdet(K)
