"""How the posterior of the linear model is computed, as an object with its options.

In: nothing. Out: :class:`Exact` and :class:`Sampled`, beside the structures of
``structures``.
Next: ``problem`` obeys these options.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gpbridge.checks import check_choice, check_positive
from gpbridge.linearized.structures import Structure
from gpbridge.solvers import ConjugateGradients
from gpbridge.types import Solver


@dataclass(frozen=True)
class Exact:
    """The full posterior, by dense factors where they fit and matrix-free beyond.

    Args:
        space: ``"weight"`` factorises a ``p x p`` matrix, ``"function"`` an
            ``n m x n m`` one; both give the same answer and ``"auto"`` takes the
            smaller. ``"matrix_free"`` solves by conjugate gradients and holds neither.
        memory_budget: Bytes for the matrix, its factor and its workspace. Beyond it,
            ``"auto"`` becomes matrix-free, the evidence is refused.
        jacobian_dtype: Precision of Jacobians. None is float64 on the CPU and the
            caller's dtype on an accelerator. Factors are float64 in any case.
        tolerance: Relative residual of the matrix-free solves.

    Raises:
        ValueError: If an option is not one of those named.
    """

    space: str = "auto"
    memory_budget: float = 4 * 2**30
    jacobian_dtype: torch.dtype | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("space", self.space, ("auto", "weight", "function", "matrix_free"))
        check_choice(
            "jacobian_dtype", self.jacobian_dtype, (None, torch.float32, torch.float64)
        )
        check_positive(memory_budget=self.memory_budget, tolerance=self.tolerance)


@dataclass(frozen=True)
class Sampled:
    r"""The posterior by draws of the weights, for n m and p both beyond a dense matrix.

    A draw is the optimum of a randomised least-squares problem, found by an iterative
    solver for all draws at once. Means, variances and joint covariances are those of
    the draws, so that a variance has a relative standard deviation of
    :math:`\sqrt{2 / s}` and a joint covariance rank s. Memory is p s and the features
    that the budget holds.

    Args:
        num_samples: The number s of draws.
        solver: Of the systems. Default: conjugate gradients, to a relative residual of
            0.01 and as far beyond it as keeps the mean within a tenth of a posterior
            standard deviation everywhere, and the draws within a tenth of the root of
            their effective dimension.
        seed: Of the draws, which stay the same while hyperparameters change.
        space: ``"weight"`` solves ``p x p`` systems, ``"function"`` those of
            ``n m x n m``; both have the same draws as solutions and ``"auto"`` takes
            the smaller.
        memory_budget: Bytes for features that stay; what does not fit is computed at
            every pass. The exact evidence is refused beyond it.
        jacobian_dtype: Precision of products with the Jacobian, as in :class:`Exact`.

    Raises:
        ValueError: If an option is not one of those named.

    References:
        Matthews, Hron, Turner, Ghahramani, Sample-then-optimize posterior sampling for
        Bayesian linear models, 2017. Antorán, Padhy, Barbano, Nalisnick, Janz,
        Hernández-Lobato, Sampling-based inference for large linear models, with
        application to linearised Laplace, ICLR 2023, section 3.
    """

    num_samples: int = 64
    solver: Solver = field(default_factory=lambda: ConjugateGradients(tolerance=1e-2))
    seed: int = 0
    space: str = "auto"
    memory_budget: float = 2 * 2**30
    jacobian_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("space", self.space, ("auto", "weight", "function"))
        check_choice(
            "jacobian_dtype", self.jacobian_dtype, (None, torch.float32, torch.float64)
        )
        check_positive(num_samples=self.num_samples, memory_budget=self.memory_budget)


Inference = Exact | Sampled | Structure
"""How a posterior may be computed."""
