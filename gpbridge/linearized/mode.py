r"""The optimum of the linear model, a convex problem.

.. math:: \hat w = \arg\max_w \; \log p(y \mid m + J w)
          - \tfrac12 w^\top S^{-1} w .

In: a :class:`~gpbridge.linearized.problem.TangentProblem` and prior variances. Out: the
latent values at the optimum and the squared norms of its weights. Gaussian noise needs
one solve; other likelihoods Newton steps with a line search, by Cholesky factors in
function space and by preconditioned conjugate gradients in weight space.
Next: ``evidence`` evaluates the Laplace approximation there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.checks import NotConvergedWarning, warn_user
from gpbridge.likelihoods import is_gaussian, residual
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Structure
from gpbridge.prediction import apply_root, factorise, whiten

Objective = Callable[[Tensor, Tensor], Tensor]

_DENSE = 2000  # side of a matrix that a structured problem factorises for its optimum
_STEPS = 60  # Newton steps; a well-posed problem takes about ten
_INNER = 50  # conjugate gradient steps per Newton step
_INNER_TOLERANCE = 1e-4  # of the squared preconditioned residual
_TOLERANCE = 1e-11  # of the objective, relative to its size and to one nat


class Mode(NamedTuple):
    """The optimum of the linear model.

    ``weights`` are in units of the unit prior scale (``w / unit_scale``), so that the
    prior term is ``sum_g norms_g / (2 s_g)``.
    """

    values: Tensor  # latent values f at the data, n x m
    weights: Tensor  # p
    norms: Tensor  # squared norm of the weights of each group


@torch.no_grad()
def find_mode(
    problem: TangentProblem, prior_variance: Tensor, start: Mode | None = None
) -> Mode:
    """Optimise the weights of the linear model.

    Args:
        problem: The linear model.
        prior_variance: One variance per group.
        start: A nearby optimum to start from, where the solution is iterative.

    Returns:
        The optimum.

    Warns:
        NotConvergedWarning: If the Newton steps run out.
    """
    variance = prior_variance.detach().double()
    if isinstance(problem.inference, Structure) and problem.size > _DENSE:
        return _by_products(problem, variance, start)
    if is_gaussian(problem.likelihood):
        solve = _gaussian_function if problem.space == "function" else _gaussian_weight
        return solve(problem, variance)
    solve = _newton_function if problem.space == "function" else _newton_weight
    return solve(problem, variance, start)


def _by_products(problem: TangentProblem, variance: Tensor, start: Mode | None) -> Mode:
    root = problem.expand(variance.sqrt())
    omega = None if start is None else start.weights / root
    if is_gaussian(problem.likelihood):
        misfit = (problem.Y.double() - problem.prior_mean)[..., None]
        whitened = (problem.root().mT @ misfit)[..., 0]
        weights = root * problem.solve_mean(variance, whitened, omega)
    else:
        weights = root * problem.mode_by_products(variance, omega).omega
    # By the features that are held, not by a dense Jacobian.
    moved = problem.data.matmul((problem.unit_scale() * weights)[:, None])[..., 0]
    return _mode_at(problem, weights, moved)


def _gaussian_function(problem: TangentProblem, variance: Tensor) -> Mode:
    root = problem.root()
    gram = problem.gram(variance)
    targets = (problem.Y.double() - problem.prior_mean).reshape(-1, 1)
    L = factorise(whiten(gram, root))
    whitened = apply_root(root.mT, targets)
    representer = apply_root(root, torch.cholesky_solve(whitened, L))[:, 0]
    return _from_representer(problem, variance, representer)


def _from_representer(
    problem: TangentProblem, variance: Tensor, representer: Tensor
) -> Mode:
    """The optimum :math:`w = S J' a` of a representer a, ``n m``."""
    products = [gram @ representer for gram in problem.grams()]
    norms = torch.stack(
        [s**2 * (representer @ v) for s, v in zip(variance, products, strict=True)]
    )
    shift = sum(s * v for s, v in zip(variance, products, strict=True))
    values = problem.prior_mean + shift.reshape(problem.outputs.shape)
    pulled = problem.t_matmul(representer.reshape(problem.outputs.shape))
    return Mode(values, problem.expand(variance) * pulled, norms)


def _gaussian_weight(problem: TangentProblem, variance: Tensor) -> Mode:
    root = problem.root()
    scale = problem.expand(variance.sqrt())
    L = factorise(problem.precision() * scale * scale[:, None])
    targets = (problem.Y.double() - problem.prior_mean).reshape(-1, 1)
    weights = torch.zeros_like(scale)
    # The second pass corrects the round-off of the first: the matrix of an almost
    # noise-free problem has a condition number near 1 / eps.
    for _ in range(2):
        misfit = targets - problem.matmul(weights).reshape(-1, 1)
        curved = apply_root(root, apply_root(root.mT, misfit))
        pulled = problem.t_matmul(curved.reshape(problem.outputs.shape))
        gradient = pulled - weights / scale**2
        weights = weights + scale * _solve(L, scale * gradient)
    return _from_weights(problem, weights)


def _from_weights(problem: TangentProblem, weights: Tensor) -> Mode:
    return _mode_at(problem, weights, problem.matmul(weights))


def _mode_at(problem: TangentProblem, weights: Tensor, moved: Tensor) -> Mode:
    one = torch.eye(len(problem.groups), dtype=torch.bool, device=weights.device)
    members = torch.stack([problem.expand(row) for row in one])  # groups x p
    norms = (members * weights.square()).sum(-1)
    return Mode(problem.prior_mean + moved, weights, norms)


def _newton_function(
    problem: TangentProblem, variance: Tensor, start: Mode | None
) -> Mode:
    """Rasmussen and Williams (2006), algorithm 3.3, with full output Hessians."""
    gram, m0 = problem.gram(variance), problem.prior_mean
    shape = m0.shape
    a = residual(problem.likelihood, m0 if start is None else start.values, problem.Y)
    a = torch.zeros_like(m0).reshape(-1) if start is None else a.reshape(-1)

    def objective(a: Tensor, shift: Tensor) -> Tensor:
        return problem.log_prob(m0 + shift.reshape(shape)) - 0.5 * a @ shift

    shift = gram @ a
    value = objective(a, shift)
    for _ in range(_STEPS):
        f = m0 + shift.reshape(shape)
        root = problem.root(f)
        gradient = residual(problem.likelihood, f, problem.Y).reshape(-1)
        curved = apply_root(root, apply_root(root.mT, shift[:, None]))[:, 0]
        b = (curved + gradient)[:, None]
        L = factorise(whiten(gram, root))
        inner = torch.cholesky_solve(apply_root(root.mT, gram @ b), L)
        step = (b - apply_root(root, inner))[:, 0] - a
        moved = gram @ step
        along = partial(_along, objective, (a, shift), (step, moved))
        t, new = _line_search(along, value)
        a, shift = a + t * step, shift + t * moved
        converged = new - value <= _TOLERANCE * (1 + value.abs())
        stuck = t == 0 and bool(moved @ (gradient - a) > 1e-6 * (1 + value.abs()))
        value = new
        if converged:
            if stuck:
                _warn_not_converged(value)
            break
    else:
        _warn_not_converged(value)
    # At the optimum the representer is the gradient of the log likelihood.
    return _from_representer(problem, variance, a)


def _newton_weight(
    problem: TangentProblem, variance: Tensor, start: Mode | None
) -> Mode:
    scale = problem.expand(variance.sqrt())
    frozen = factorise(problem.precision() * scale * scale[:, None])
    v = torch.zeros_like(scale) if start is None else start.weights.clone()
    shift = problem.matmul(v)
    m0 = problem.prior_mean

    def objective(v: Tensor, shift: Tensor) -> Tensor:
        return problem.log_prob(m0 + shift) - 0.5 * (v / scale).square().sum()

    value = objective(v, shift)
    for _ in range(_STEPS):
        f = m0 + shift
        root = problem.root(f)
        g = residual(problem.likelihood, f, problem.Y)
        gradient = problem.t_matmul(g) - v / scale**2

        def curvature(x: Tensor, root: Tensor = root) -> Tensor:
            seen = problem.matmul(x).reshape(-1, 1)
            curved = apply_root(root, apply_root(root.mT, seen))
            return problem.t_matmul(curved.reshape(m0.shape)) + x / scale**2

        step = _conjugate_gradients(
            curvature, gradient, lambda x: scale * _solve(frozen, scale * x)
        )
        moved = problem.matmul(step)
        along = partial(_along, objective, (v, shift), (step, moved))
        t, new = _line_search(along, value)
        v, shift = v + t * step, shift + t * moved
        converged = new - value <= _TOLERANCE * (1 + value.abs())
        stuck = t == 0 and bool(step @ gradient > 1e-6 * (1 + value.abs()))
        value = new
        if converged:
            if stuck:
                _warn_not_converged(value)
            break
    else:
        _warn_not_converged(value)
    return _from_weights(problem, v)


def _solve(L: Tensor, rhs: Tensor) -> Tensor:
    return torch.cholesky_solve(rhs[:, None], L)[:, 0]


def _along(
    objective: Objective,
    start: tuple[Tensor, Tensor],
    step: tuple[Tensor, Tensor],
    t: float,
) -> Tensor:
    """The objective at a fraction t of a step in weights and latent values."""
    return objective(*(x + t * dx for x, dx in zip(start, step, strict=True)))


def _line_search(
    objective: Callable[[float], Tensor], value: Tensor
) -> tuple[float, Tensor]:
    """Halve the step until the concave objective rises; a zero step ends the search."""
    t = 1.0
    while t > 1e-6:
        new = objective(t)
        if bool(new >= value):
            return t, new
        t /= 2
    return 0.0, value


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor],
) -> Tensor:
    """Preconditioned CG for one right-hand side, to a tolerance that suits Newton."""
    x = torch.zeros_like(rhs)
    r, z = rhs, precondition(rhs)
    direction, rz = z, rhs @ z
    first = rz
    for _ in range(_INNER):
        if bool(rz <= _INNER_TOLERANCE * first):
            break
        image = operator(direction)
        alpha = rz / (direction @ image)
        x, r = x + alpha * direction, r - alpha * image
        z = precondition(r)
        new = r @ z
        direction, rz = z + (new / rz) * direction, new
    return x


def _warn_not_converged(value: Tensor) -> None:
    warn_user(
        "The optimum of the linear model was not reached by Newton's method in up to "
        f"{_STEPS} steps (log joint density {value:.6g}). The evidence is not exact; "
        "the prior variance may be extreme, or the labels separable without noise.",
        NotConvergedWarning,
    )
