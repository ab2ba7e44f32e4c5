"""Evidence, bounds and selection in dense float64, typed from the papers."""

import torch
from torch.distributions import MultivariateNormal, kl_divergence


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
