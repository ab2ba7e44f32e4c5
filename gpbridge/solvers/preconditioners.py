r"""Approximate inverses of a kernel matrix plus noise, by a low-rank part.

In: an operator. Out: a product with an approximate inverse. The randomised Nyström
approximation asks for products, the pivoted Cholesky factor for single columns, which
are cheap where the matrix is made of kernel entries. Next: ``conjugate_gradients``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.partial_products import (
    dense_columns,
    diagonal,
    smallest_eigenvalue,
)
from gpbridge.solvers.factors import raise_indefinite

Preconditioner = Callable[[Tensor], Tensor]

_ROUNDS = 10  # of sampled pivots; each sees what those before explain


def nystrom_preconditioner(
    operator: LinearOperator, rank: int, shift: float = 0.0, seed: int = 0
) -> Preconditioner:
    r"""Approximate inverse of :math:`A = M + \mu I` from a sketch of M.

    With the randomised Nyström approximation :math:`M \approx U \Lambda U^\top`,

    .. math::
        P^{-1} = (\lambda_r + \mu) U (\Lambda + \mu)^{-1} U^\top + (I - U U^\top),

    which removes the largest eigenvalues from the spectrum. Costs one product with
    ``rank`` columns, memory n rank.

    Args:
        operator: A, ``... x n x n``.
        rank: Number of eigenvalues that are removed, r.
        shift: A lower bound :math:`\mu` of the eigenvalues of A.
        seed: Of the sketch.

    Returns:
        The product with the inverse, ``... x n x k`` to ``... x n x k``.

    References:
        Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM Journal on
        Matrix Analysis and Applications 2023, algorithm 2.1 and eq. (1.3).
    """
    n = operator.shape[-1]
    generator = torch.Generator(operator.device).manual_seed(seed)
    sketch = torch.randn(
        *operator.batch_shape,
        n,
        min(rank, n),
        generator=generator,
        dtype=torch.float64,
        device=operator.device,
    )
    with torch.no_grad():
        sketch = torch.linalg.qr(sketch).Q
        seen = operator._matmul(sketch.to(operator.dtype)).double() - shift * sketch
        # M is positive semi-definite up to round-off, which the small shift covers.
        size = torch.linalg.matrix_norm(seen, keepdim=True).clamp_min(1e-290)
        small = torch.finfo(operator.dtype).eps * size
        seen = seen + small * sketch
        core = sketch.mT @ seen
        values, vectors = torch.linalg.eigh(0.5 * (core + core.mT))
        values = torch.maximum(values, small[..., 0])
        root = seen @ (vectors / values.sqrt()[..., None, :])
        U, singular, _ = torch.linalg.svd(root, full_matrices=False)
        spectrum = (singular.square() - small[..., 0]).clamp_min(0.0) + shift
        spectrum = torch.maximum(spectrum, small[..., 0])
        gain = spectrum[..., -1:] / spectrum - 1.0

    def inverse(v: Tensor) -> Tensor:
        return v + U @ (gain[..., :, None] * (U.mT @ v))

    return inverse


def pivoted_cholesky_preconditioner(
    operator: LinearOperator, rank: int, seed: int = 0
) -> Preconditioner:
    r"""Approximate inverse of :math:`H = K + \mu I` from r columns of K.

    Pivots are drawn in rounds with probability proportional to the variance that
    earlier pivots leave; with the partial Cholesky factor :math:`K \approx F F^\top`,

    .. math::
        P^{-1} = \left(I - F (F^\top F + \mu I)^{-1} F^\top\right) / \mu .

    Costs n r entries of H, time n r^2 and memory n r.

    Args:
        operator: H, ``n x n``.
        rank: Number of pivots, r; fewer if they explain everything.
        seed: Of the draw of pivots.

    Returns:
        The product with the inverse, ``n x k`` to ``n x k``.

    References:
        Chen, Epperly, Tropp, Webber, Randomly pivoted Cholesky, Communications on Pure
        and Applied Mathematics 2025, algorithm 2 (blocks).
        Díaz, Epperly, Frangella, Tropp, Webber, Robust, randomized preconditioning for
        kernel ridge regression, 2023 (arXiv:2304.12465), section 2.
    """
    with torch.no_grad():
        shift = smallest_eigenvalue(operator)
        F = partial_cholesky(operator, rank, shift, seed)
        if F.shape[-1] == 0:
            return torch.clone
        mu = max(shift, 1e-9 * F.square().sum(-1).mean().item())
        core = F.mT @ F
        core.diagonal().add_(mu)
        L = torch.linalg.cholesky(core)

    def inverse(v: Tensor) -> Tensor:
        return (v - F @ torch.cholesky_solve(F.mT @ v, L)) / mu

    return inverse


def partial_cholesky(
    operator: LinearOperator, rank: int, shift: float = 0.0, seed: int = 0
) -> Tensor:
    """Randomly pivoted partial Cholesky factor of ``H - shift I``, ``n x r``."""
    n = operator.shape[-1]
    rank = min(rank, n)
    generator = torch.Generator(operator.device).manual_seed(seed)
    left = diagonal(operator).double() - shift
    if bool(left.min() < -1e-6 * left.abs().max()):
        raise_indefinite(f"a diagonal entry of {left.min().item() + shift:.1e}")
    left = left.clamp_min(0.0)
    enough = 1e-6 * left.max()  # a pivot below this is round-off
    F = left.new_zeros(n, rank)
    used, width = 0, -(-rank // _ROUNDS)
    while used < rank:
        candidates = torch.where(left > enough, left, 0.0)
        count = min(width, rank - used, int((candidates > 0).sum()))
        if count == 0:
            break
        pivots = _draw(candidates, count, generator)
        G = dense_columns(operator, pivots).double()
        G[pivots, torch.arange(count, device=G.device)] -= shift
        G.addmm_(F[:, :used], F[pivots, :used].mT, alpha=-1.0)
        core = G[pivots]
        core.diagonal().add_(torch.finfo(core.dtype).eps * core.diagonal().sum())
        L, failed = torch.linalg.cholesky_ex(core)
        if bool(failed):
            break
        new = torch.linalg.solve_triangular(L, G.mT, upper=False).mT
        F[:, used : used + count] = new
        left = (left - new.square().sum(-1)).clamp_min(0.0)
        left[pivots] = 0.0
        used += count
    return F[:, :used]


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Distinct places, drawn with probability proportional to weights.

    The largest of log w + Gumbel noise; ``torch.multinomial`` ends at 2^24 places.
    """
    uniform = torch.rand(
        weights.shape, generator=generator, dtype=weights.dtype, device=weights.device
    )
    keys = weights.log() - uniform.clamp_min(1e-300).log().neg().log()
    return keys.topk(count).indices
