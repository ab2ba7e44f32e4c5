"""How the posterior of the linear model is computed, as an object with its options.

In: nothing. Out: :class:`Exact`. Other curvature structures are further classes here.
Next: ``problem`` obeys these options.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpbridge.checks import check_choice, check_positive


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
