r"""Representer weights: one linear solve for a posterior mean and its samples.

.. math::
    H [v_y, v_1, \dots, v_s] = [y - m(X), f_1(X) + \epsilon_1, \dots],
    \qquad H = k(X, X) + \Sigma

In: a kernel, data, prior draws, a solver. Out: the posterior mean
:math:`m(x) + k(x, X) v_y` and deviations :math:`f_i(x) - k(x, X) v_i`, which have mean
zero and the posterior covariance. Further observations change both by a Schur
complement in the size of their own number. Next: ``sampled`` makes it a model.

References:
    Lin et al., Sampling from Gaussian process posteriors using stochastic gradient
    descent, NeurIPS 2023, eqs. (6) and (12).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpytorch.means import Mean
from torch import Size, Tensor

from gpbridge.kernel_operator import KernelMatrixOperator, solving_operator
from gpbridge.partial_products import exact_products, full_precision
from gpbridge.posterior_draws import (
    MeanColumns,
    dense,
    kernel_products,
    mean_values,
    solve_columns,
)
from gpbridge.prior_draws import PriorDraw
from gpbridge.randomness import row_normals
from gpbridge.solvers import Cholesky, choose_solver
from gpbridge.solvers.factors import factorise
from gpbridge.types import Solution, Solver


class Data(NamedTuple):
    """Observations: inputs as the kernel sees them, targets, noise variances."""

    X: Tensor  # n x d
    Y: Tensor  # n x m
    noise: Tensor  # n


class Factor:
    """The dense factor of a solved system, made when corrections first ask for it.

    Memory n x n from then on. Copies and pickles leave it behind.
    """

    def __init__(self) -> None:
        self._inverse: Callable[[Tensor], Tensor] | None = None
        self._of: tuple[torch.dtype, torch.device] | None = None

    def solve(self, H: KernelMatrixOperator, rhs: Tensor) -> Tensor:
        """Solve with the operator of the system, the same one at each call."""
        if self._inverse is None or self._of != (H.dtype, H.device):
            with torch.no_grad():
                dense = full_precision(H).to_dense().double()
            self._inverse, self._of = factorise(dense), (H.dtype, H.device)
        return self._inverse(rhs.double()).to(rhs)

    def __reduce__(self) -> tuple[type[Factor], tuple[()]]:
        """A copy is empty."""
        return Factor, ()


class Representers(NamedTuple):
    """The solved system. All in float64, and owned: no hyperparameter reaches it."""

    prior: PriorDraw
    mean: Mean
    data: Data
    mean_weights: Tensor  # n x m
    sample_weights: Tensor  # n x s x m
    seed: int  # of the noise
    solution: Solution  # without its value
    all_outputs: int  # for which noise is drawn
    kept: list[int] | None = None  # of the outputs
    factor: Factor | None = None  # of the system, for solvers that factorise

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        return self.mean_weights.shape[-1]

    def take_outputs(self, outputs: Sequence[int]) -> Representers:
        """The system seen through some of its outputs."""
        kept = list(outputs)
        return self._replace(
            prior=self.prior.take_outputs(kept),
            mean=MeanColumns(self.mean, self.all_outputs, kept),
            mean_weights=self.mean_weights[..., kept],
            sample_weights=self.sample_weights[..., kept],
            kept=kept,
        )

    def noise(self, variance: Tensor) -> Tensor:
        """Noise of the samples at rows beyond the data, ``... x n' x s x m``."""
        shape = self.prior.num_samples, self.all_outputs
        noise = sample_noise(*shape, self.seed, variance, skip=len(self.data.X))
        return noise if self.kept is None else noise[..., self.kept]

    def columns(self) -> Tensor:
        """All weights side by side, ``n x (m + s m)``."""
        return torch.cat([self.mean_weights, self.sample_weights.flatten(1)], -1)

    def moments(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and deviations.

        Args:
            Z: Inputs ``... x t x d``.

        Returns:
            Mean ``... x t x m`` and deviations ``s x ... x t x m``.
        """
        moved = kernel_products(self.prior.kernel, Z, self.data.X, self.columns())
        return self._combine(Z, moved)

    def _combine(self, Z: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        m = self.num_outputs
        mean = mean_values(self.mean, Z, m) + moved[..., :m]
        pulled = moved[..., m:].unflatten(-1, self.sample_weights.shape[1:])
        return mean, self.prior(Z) - pulled.movedim(-2, 0)


def solve_representers(
    prior: PriorDraw,
    mean: Mean,
    data: Data,
    seed: int,
    solver: Solver | None = None,
    initial: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Representers:
    r"""Solve for mean and samples together.

    Args:
        prior: Prior draws with the kernel, float64.
        mean: Mean function, float64.
        data: The observations, float64.
        seed: Of the noise of the samples; a row keeps its noise when data are added.
        solver: Default by size.
        initial: A first guess ``n x (m + s m)``.
        compute_dtype: As in :func:`~gpbridge.kernel_operator.solving_operator`.

    Returns:
        The weights.
    """
    with torch.no_grad():
        rhs = right_hand_sides(prior, mean, data, seed)
        solution = solve_columns(
            prior.kernel, data.X, data.noise, rhs, solver, initial, compute_dtype
        )
    m, value = data.Y.shape[-1], solution.value
    weights = value[:, m:].unflatten(-1, (prior.num_samples, m))
    facts = solution._replace(value=None)
    solved = prior, mean, data, value[:, :m], weights, seed, facts, m
    return Representers(*solved, factor=Factor())


def right_hand_sides(prior: PriorDraw, mean: Mean, data: Data, seed: int) -> Tensor:
    """Residual targets and noisy prior draws, ``n x (m + s m)``."""
    residual = data.Y - mean_values(mean, data.X, data.Y.shape[-1])
    noise = sample_noise(prior.num_samples, prior.num_outputs, seed, data.noise)
    noisy = prior(data.X).movedim(0, 1) + noise
    return torch.cat([residual, noisy.flatten(1)], -1)


def sample_noise(
    num_samples: int, num_outputs: int, seed: int, variance: Tensor, skip: int = 0
) -> Tensor:
    """Noise of the samples for the rows after ``skip``, ``... x n x s x m``."""
    columns = num_samples * num_outputs
    epsilon = row_normals(variance.shape[-1], columns, seed, skip)
    epsilon = epsilon.unflatten(-1, (num_samples, num_outputs)).to(variance)
    return variance.sqrt()[..., None, None] * epsilon


class Correction(NamedTuple):
    r"""What a batch of further observations changes, by Matheron's rule once more.

    With :math:`c(x, x') = k(x, x') - k(x, X) H^{-1} k(X, x')` and
    :math:`C = c(X', X') + \Sigma'`, a posterior function g becomes
    :math:`g(x) + c(x, X') C^{-1} (y' - g(X') - \epsilon')`.
    """

    X: Tensor  # batch x n' x d
    cross_weights: Tensor  # H^-1 k(X, X'), batch x n x n'
    mean_weights: Tensor  # batch' x n' x m
    sample_weights: Tensor  # s x batch x n' x m

    @property
    def batch_shape(self) -> Size:
        """Batch of the observations."""
        return self.mean_weights.shape[:-2]

    def joined(self, base: Representers) -> tuple[Tensor, Tensor]:
        """All inputs of unbatched observations, and the weights of drawn functions.

        Args:
            base: The solved system.

        Returns:
            Inputs ``(n + n') x d`` and weights ``(n + n') x s x m``.
        """
        new = (self.mean_weights + self.sample_weights).movedim(0, 1)  # n' x s x m
        moved = (self.cross_weights @ new.flatten(1)).unflatten(-1, new.shape[1:])
        old = base.mean_weights[:, None] - base.sample_weights - moved
        return torch.cat([base.data.X, self.X]), torch.cat([old, new])

    def moments(self, base: Representers, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Corrected mean and deviations, as :meth:`Representers.moments`."""
        K = dense(base.prior.kernel, Z.reshape(-1, Z.shape[-1]), base.data.X)
        K = K.reshape(*Z.shape[:-1], -1)
        mean, deviations = base._combine(Z, K @ base.columns())
        batch = torch.broadcast_shapes(Z.shape[:-2], self.X.shape[:-2])
        new = dense(
            base.prior.kernel,
            Z.expand(*batch, *Z.shape[-2:]),
            self.X.expand(*batch, *self.X.shape[-2:]),
        )
        c = new - K @ self.cross_weights  # batch x t x n'
        moved = c @ _lead(self.sample_weights, c.dim() + 1)
        deviations = _lead(deviations, moved.dim()) + moved
        return mean + c @ self.mean_weights, deviations


def correct(
    base: Representers,
    data: Data,
    solver: Solver | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Correction:
    r"""Solve for a batch of further observations, differentiable in their inputs.

    One solve with n' right-hand sides per member of the batch, all together, and
    Cholesky factors of size n'. Gradients in X' take another solve. If the solver
    factorises the system, that is done by the first correction, n^3 / 3 once, and the
    factor serves all others and their gradients.

    Args:
        base: The solved system.
        data: ``batch x n' x d`` inputs, ``batch' x n' x m`` targets where ``batch'``
            ends in ``batch``, ``batch x n'`` noise variances.
        solver: As for the base.
        compute_dtype: As for the base.

    Returns:
        The correction.
    """
    kernel = base.prior.kernel
    Z, size = data.X, data.X.shape[-2]
    rows = Z.reshape(-1, Z.shape[-1])
    K = dense(kernel, base.data.X, rows)  # n x (batch n')
    H = solving_operator(kernel, base.data.X, base.data.noise, compute_dtype)
    solver = choose_solver(H) if solver is None else solver
    factor = Factor() if base.factor is None else base.factor

    def solve(rhs: Tensor) -> Tensor:
        if not rhs.numel():
            return rhs.clone()
        if isinstance(solver, Cholesky):
            return factor.solve(H, rhs)
        return solver(H, rhs.contiguous()).value

    W = _ImplicitSolve.apply(K, solve)
    left = K.detach() - exact_products(H, W.detach())  # zero for an exact solver

    def split(columns: Tensor) -> Tensor:
        parts = columns.unflatten(-1, (*Z.shape[:-2], size))
        return parts.movedim(0, -2)  # batch x n x n'

    K, W, left = split(K), split(W), split(left)
    # Twice k - W'k minus k - W'H W: an error of the solve enters by its square.
    C = dense(kernel, Z, Z) - W.mT @ K - (left.mT @ W).detach()
    C = 0.5 * (C + C.mT) + torch.diag_embed(data.noise)
    L = torch.linalg.cholesky(C)
    mean, deviations = base.moments(Z)
    misfit = -deviations - base.noise(data.noise).movedim(-2, 0)
    return Correction(
        Z,
        W,
        torch.cholesky_solve(data.Y - mean, L),
        torch.cholesky_solve(misfit, L),
    )


class _ImplicitSolve(torch.autograd.Function):
    """Solution of a symmetric system as a differentiable function of its columns."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return solve(columns.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.solve(gradient), None


def _lead(deviations: Tensor, dim: int) -> Tensor:
    """Put batch axes of size one behind the sample axis."""
    missing = dim - deviations.dim()
    shape = (len(deviations), *(1,) * missing, *deviations.shape[1:])
    return deviations.reshape(shape) if missing > 0 else deviations
