r"""Factors of small dense matrices that may be singular, but not indefinite.

In: a symmetric matrix. Out: products with its (pseudo-)inverse. Repeated points without
noise make a block of a kernel matrix singular; directions without variance are dropped.
Next: ``cholesky``, ``alternating_projections``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.exceptions.errors import InputDataError
from torch import Tensor


class IndefiniteError(ValueError):
    """An operator is not positive semi-definite."""


def factorise(block: Tensor) -> Callable[[Tensor], Tensor]:
    """Product with the inverse of a positive semi-definite matrix.

    Args:
        block: Symmetric, ``... x b x b``; overwritten or not.

    Returns:
        ``... x b x k`` to ``... x b x k``: by a Cholesky factor, or, where that fails,
        by the eigenvectors of positive eigenvalue.

    Raises:
        IndefiniteError: If the matrix is indefinite beyond round-off.
    """
    check_entries(block)
    L, failed = torch.linalg.cholesky_ex(block)
    if not bool(failed.any()):
        return lambda rhs: torch.cholesky_solve(rhs, L)
    values, vectors = torch.linalg.eigh(block)
    size = values.abs().amax(-1, keepdim=True)
    unit = block.shape[-1] * torch.finfo(block.dtype).eps * size
    if bool((values[..., :1] < -100 * unit).any()):
        raise_indefinite(f"an eigenvalue of {values.min().item():.1e}")
    weights = torch.where(values > unit, values, torch.inf).reciprocal()
    return lambda rhs: vectors @ (weights[..., None] * (vectors.mT @ rhs))


def check_entries(block: Tensor) -> None:
    """Refuse NaN in what an operator gave."""
    if not bool(torch.isfinite(block).all()):
        raise InputDataError(
            "operator contains NaN or Inf: check the hyperparameters of the kernel and "
            "the inputs."
        )


def raise_indefinite(what: str) -> None:
    """Name an operator that is not positive semi-definite."""
    raise IndefiniteError(
        f"operator must be symmetric and positive semi-definite, but {what} was found. "
        "Check that the kernel is one and that noise variances were added, not "
        "subtracted; in float32 try float64."
    )
