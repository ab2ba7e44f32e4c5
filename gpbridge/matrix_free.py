r"""Conditioning by products only, where no matrix of the data fits into memory.

Solves with :math:`A = I + R^\top K R` are preconditioned conjugate gradients on
:class:`~gpbridge.operators.WhitenedKernelOperator`. With approximate solutions T of
:math:`A T = R^\top K_*^\top` the root form of the covariance reads

.. math::
    \rho = \Phi_* - T^\top R^\top \Phi, \qquad
    \hat\Sigma = \rho \rho^\top + T^\top T
        = \Sigma + (A T - R^\top K_*^\top)^\top A^{-1} (A T - R^\top K_*^\top),

so that variances are positive by construction, never too small, and wrong by at most
the squared norm of the residual: the solver is asked for as much as that needs.

In: a network, data and roots. Out: a prediction strategy. Next: ``linearized``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from gpbridge.features import PriorStd, TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.operators import WhitenedKernelOperator
from gpbridge.prediction import Projection
from gpbridge.randomness import standard_normal
from gpbridge.solvers import ConjugateGradients, nystrom_preconditioner

_COLUMN_BYTES = 256 * 2**20  # vectors that conjugate gradients hold at a time
_ROUNDS = 3  # of asking the solver for more, where a variance needs it


class MatrixFreeStrategy:
    r"""Conditioning by conjugate gradients, for n m and p both beyond a dense matrix.

    Memory k (n m + p) for k test outputs, right-hand sides or draws, and n m times the
    rank of the preconditioner; neither the Jacobian nor a matrix of the data is formed.
    Every iteration costs two passes over the data.

    Errors are controlled in units of the posterior: variances are at most
    ``solver.tolerance`` too large, relatively, and means and draws are wrong by at most
    ``sqrt(solver.tolerance)`` posterior standard deviations, at any test point (the
    error of a mean at x is :math:`T_x^\top r` with residual r, and the variance is at
    least :math:`\|T_x\|^2`). First derivatives in test points are those of the exact
    solution up to the residual; second derivatives are not.

    Args:
        net: The network, probed.
        X: Training inputs ``n x d``.
        std: Prior standard deviations of the weights that contribute.
        root: The roots R, ``n x m x m``.
        solver: Tolerance, iterations, and rank of the preconditioner.
    """

    def __init__(
        self,
        net: FunctionalNet,
        X: Tensor,
        std: PriorStd,
        root: Tensor,
        solver: ConjugateGradients | None = None,
    ) -> None:
        self.solver = ConjugateGradients() if solver is None else solver
        self._index, full_std = _order(net, std)
        self.operator = WhitenedKernelOperator(
            X.detach().double(),
            root.detach().double(),
            net.flatten(net.params).detach().double(),
            full_std.detach().double(),
            net=net,
        )

    @property
    def num_params(self) -> int:
        """The number p of weights that contribute."""
        return len(self._index)

    @cached_property
    def _preconditioner(self):
        rank = self.solver.preconditioner_rank
        if rank == 0:
            return lambda v: v.clone()
        return nystrom_preconditioner(self.operator, rank, 1.0, self.solver.seed)

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data.

        Memory is k (n m + p) for k = t m outputs in all; project a few hundred at a
        time.

        Args:
            features: Features of ``batch x t`` points.

        Returns:
            The projection in root form.
        """
        rows = features.rows().double()  # batch x (t m) x p
        flat = rows.reshape(-1, rows.shape[-1])
        with torch.no_grad():
            parts = [self._see(part.detach()) for part in self._columns(flat)]
            solved = torch.cat([T for T, _ in parts])  # k x (n m)
            explained = torch.cat([pulled for _, pulled in parts])  # k x p
        # T minimises the variance, so that the derivative through it vanishes.
        factor = torch.cat([flat - explained, solved], dim=-1)
        factor = factor.reshape(*rows.shape[:-1], factor.shape[-1])
        per_point = factor.unflatten(-2, features.value.shape[-2:])
        return Projection(features, factor, True, per_point @ per_point.mT)

    def _see(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for ``k x p`` rows: T' and T' R' Phi."""
        rhs = self.operator.to_outputs(self._spread(rows.mT))
        norms = rhs.norm(dim=0).clamp_min(torch.finfo(rhs.dtype).tiny)
        solved = self._solve(rhs, self.solver.tolerance)
        for _ in range(_ROUNDS):
            explained = self._gather(self.operator.to_weights(solved))
            variance = (rows - explained.mT).square().sum(-1) + solved.square().sum(0)
            residual = (rhs - self.operator._matmul(solved)).norm(dim=0)
            allowed = (self.solver.tolerance * variance).sqrt()
            short = (residual > allowed).nonzero()[:, 0]
            if len(short) == 0:
                break
            tolerance = 0.5 * (allowed[short] / norms[short]).min().item()
            # Below this, round-off in float64 is all that is left to be removed.
            tolerance = max(tolerance, 4 * torch.finfo(rhs.dtype).eps)
            solved[:, short] = self._solve(rhs[:, short], tolerance, solved[:, short])
        else:
            explained = self._gather(self.operator.to_weights(solved))
        return solved.mT, explained.mT

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        other = left if right is None else right
        return left.factor @ other.factor.mT

    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """None: certified solves want float64."""
        return None

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights: rho of the root form."""
        return projection.factor[..., : self.num_params]

    def mean_weights(self, whitened: Tensor) -> Tensor:
        """Posterior mean of the scaled weights."""
        rhs = whitened.detach().double().reshape(-1, 1)
        return self._explain(rhs)[:, 0]

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Matheron's rule in weight space: a prior draw minus what the data explain."""
        like, outputs = self.operator.root, self.operator.shape[-1]
        prior = standard_normal((num_samples, self.num_params), generator, like)
        noise = standard_normal((num_samples, outputs), generator, like)
        draws = []
        for w, e in zip(self._columns(prior), self._columns(noise), strict=True):
            seen = self.operator.to_outputs(self._spread(w.mT)) + e.mT
            draws.append(w - self._explain(seen).mT)
        return torch.cat(draws)

    def _explain(self, rhs: Tensor) -> Tensor:
        """Weights ``Phi' R A^-1 v`` for ``(n m) x k`` vectors v, ``p x k``."""
        with torch.no_grad():
            largest = rhs.norm(dim=0).max().clamp_min(1e-300).item()
            needed = math.sqrt(self.solver.tolerance) / largest
            solved = self._solve(rhs, min(self.solver.tolerance, needed))
            return self._gather(self.operator.to_weights(solved))

    def _solve(
        self, rhs: Tensor, tolerance: float, initial: Tensor | None = None
    ) -> Tensor:
        solver = replace(self.solver, tolerance=tolerance)
        return solver(self.operator, rhs, initial, self._preconditioner).value

    def _columns(self, rows: Tensor) -> Iterator[Tensor]:
        numbers = 10 * self.operator.shape[-1] + 4 * self.operator.features.shape[-1]
        return iter(rows.split(max(1, _COLUMN_BYTES // (8 * numbers))))

    def _spread(self, weights: Tensor) -> Tensor:
        """Contributing weights ``p x k`` among all random weights of the network."""
        full = weights.new_zeros(self.operator.features.shape[-1], weights.shape[-1])
        full[self._index] = weights
        return full

    def _gather(self, weights: Tensor) -> Tensor:
        return weights[self._index]


def _order(net: FunctionalNet, std: PriorStd) -> tuple[Tensor, Tensor]:
    """Places of the weights of ``std`` among all, and the deviations of all, ``p``."""
    params = net.params
    like = next(iter(std.values()))
    places: dict[str, Tensor] = {}
    full = []
    start = 0
    for name, p in params.items():
        places[name] = torch.arange(start, start + p.numel(), device=like.device)
        start += p.numel()
        own = std[name] if name in std else like.new_zeros(())
        full.append(own.expand(p.shape).reshape(-1))
    return torch.cat([places[name] for name in std]), torch.cat(full)
