r"""Curvature structures as options: Kronecker factors, a diagonal, a low rank.

Each stands for the exact posterior where that does not fit: covariance and log
determinant come from the structure, the posterior mean is the linear model's own in any
case, by products with the Jacobian.

In: nothing. Out: :class:`Kronecker`, :class:`Diagonal`, :class:`LowRank`.
Next: ``inference`` lists them beside the exact posterior.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from gpbridge.checks import check_choice, check_count, check_positive
from gpbridge.solvers import ConjugateGradients
from gpbridge.types import Solver

KINDS = ("ggn", "monte_carlo", "empirical")


@dataclass(frozen=True, kw_only=True)
class Structure:
    r"""What all curvature structures have in common.

    Args:
        curvature: Of the outputs. ``"ggn"``, the Hessian of the negative log
            likelihood; ``"monte_carlo"``, its average over ``num_samples`` draws,
            which are not needed where one Gaussian noise serves all points: the
            curvature then is ``"ggn"`` itself;
            ``"empirical"``, the outer product of the gradients at the targets, which is
            no estimate of it and listed for comparison.
        num_samples: Draws of the Monte Carlo curvature for each point.
        seed: Of all randomness.
        solver: Of the systems that give the posterior mean of a large problem, which is
            exact to a thousandth of a posterior standard deviation.
        memory_budget: Bytes for the structure, and for features that stay.
        jacobian_dtype: Precision of Jacobians. None is that of the data: a structure is
            an approximation far coarser than float32. Factors are float64.

    Raises:
        ValueError: If an option is not one of those named.
    """

    curvature: str = "ggn"
    num_samples: int = 1
    seed: int = 0
    solver: Solver = field(default_factory=lambda: ConjugateGradients(tolerance=1e-2))
    memory_budget: float = 4 * 2**30
    jacobian_dtype: torch.dtype | None = None

    space: ClassVar[str] = "auto"  # of the dense mode, where the problem is small

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("curvature", self.curvature, KINDS)
        check_choice(
            "jacobian_dtype", self.jacobian_dtype, (None, torch.float32, torch.float64)
        )
        check_count(num_samples=self.num_samples)
        check_positive(memory_budget=self.memory_budget)


@dataclass(frozen=True)
class Kronecker(Structure):
    r"""One Kronecker product for each layer, :math:`M_b \approx G \otimes A / N`.

    A is the second moment of the layer's inputs, G that of the derivatives of the loss
    by its outputs. Exact for one linear layer with one output under one Gaussian noise,
    or with one datum; for layers that share weights over T positions one of two
    averages. Weights of other kinds get the partial traces of their own block, which
    is exact for a vector, such as the scales of a normalisation layer. Memory and time
    of a factorisation :math:`\sum_b o_b^2 + i_b^2` and its 3/2 power.

    Args:
        sharing: ``"expand"`` takes the positions of a layer as so many data,
            ``"reduce"`` sums over them first.
        eigenvalue_correction: Replace the eigenvalues by the exact diagonal of M in the
            eigenbasis (EKFAC), for a second pass over the data: never farther from M in
            Frobenius norm, and with an evidence that is a lower bound of that of M.
        curvature: As the other options, in :class:`Structure`.

    References:
        See :mod:`gpbridge.linearized.curvature_sums`. Ritter, Botev, Barber, A scalable
        Laplace approximation for neural networks, ICLR 2018.
    """

    sharing: str = "expand"
    eigenvalue_correction: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("sharing", self.sharing, ("expand", "reduce"))


@dataclass(frozen=True)
class Diagonal(Structure):
    r"""One variance for each weight, :math:`M \approx \mathrm{diag}(M)`.

    Its log determinant is at least the full one, so that the evidence is a lower bound
    of that of the full Gauss-Newton matrix.
    """


@dataclass(frozen=True)
class LowRank(Structure):
    r"""The leading eigenvectors of M; directions beyond them keep their prior.

    Warns when little of the trace is captured, and when the data determine directions
    beyond the rank: the variances are then too large. What is left out counts in the
    evidence by a bound from its trace: with one prior variance it is a lower bound.

    Args:
        rank: The number r of eigenvectors.
        method: ``"randomised"`` subspace iteration or ``"lanczos"``.
        num_iterations: Of the subspace, or Lanczos steps beyond the rank.
        curvature: As the other options, in :class:`Structure`.
    """

    rank: int = 100
    method: str = "randomised"
    num_iterations: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("method", self.method, ("randomised", "lanczos"))
        check_count(rank=self.rank, num_iterations=self.num_iterations)
