r"""Prediction strategies: the posterior of a Gaussian linear model, conditioned once.

With tangent features :math:`\Phi` of the data, the root :math:`R` of the likelihood's
output Hessian and :math:`K = \Phi \Phi^\top`, one operator :math:`A = I + R^\top K R`
carries regression and classification,

.. math::
    \operatorname{cov}(x, x') = k(x, x')
        - k(x, X) R A^{-1} R^\top k(X, x'),

or the same in weight space with :math:`H = I + \Phi^\top R R^\top \Phi`. What depends
on the training data is factorised once, in float64; a call touches the test points
only.

In: features and roots. Out: covariances, posterior mean weights and weight draws, all
in the scaled weights :math:`\omega = S^{-1/2} w`. Next: ``linearized/gp``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.randomness import standard_normal

_SAFE = (
    1e6  # cancellation allowed: eps * prior variance / posterior variance < 1 / _SAFE
)
_MANY_ROWS = 128  # from here on a triangular solve beats the product with an inverse
_BLOCKS = 8  # column blocks of a triangular product
_BASE = 128  # side from which on a triangular inverse is split
_DELICATE = 8  # rows on which float32 products are checked against float64
_LEADING = 32  # directions of A that stay in float64 beside float32 products
_SINGLE_TOLERANCE = 1e-3  # relative error of a variance that a float32 caller accepts


class Projection(NamedTuple):
    """Test points seen through the data: what covariances are made of.

    ``factor`` is the root of the covariance if ``is_root``, else the root of what the
    data subtract from the prior covariance.
    """

    features: TangentFeatures
    factor: Tensor  # batch x (n m) x k
    is_root: bool
    blocks: Tensor  # batch x n x m x m, posterior covariance of each point's outputs


class PredictionStrategy(Protocol):
    """A conditioned linear model."""

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data."""
        ...

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance ``batch x (n m) x (n' m)``, default of all pairs."""
        ...

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights, ``batch x (n m) x p``."""
        ...

    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """Per-point covariances ``t x m x m`` in float32, or None if that is unsafe."""
        ...

    def mean_weights(self, whitened: Tensor) -> Tensor:
        r"""Posterior mean :math:`\Phi^\top R A^{-1} v` for targets ``n x m``, ``p``."""
        ...

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of the scaled weights around their mean, ``s x p``."""
        ...


class FunctionSpaceStrategy:
    r"""Conditioning by the Cholesky factor of the ``n m x n m`` matrix A.

    Covariances are taken as a difference where that loses no digits, and in the root
    form, positive by construction, where it does:

    .. math::
        V = K_* W, \quad \rho = \Phi_* - V W^\top \Phi, \quad U = V L^{-1}, \quad
        \Sigma = \rho \rho^\top + U U^\top, \qquad W = R L^{-\top}.

    Time (n m)^3 / 3 once, then t m (n m)^2 per call, t m n m p in the root form.

    Args:
        features: Features of the training points, unbatched.
        gram: Their Gram matrix, ``(n m) x (n m)``.
        root: The roots R, ``n x m x m``.
    """

    def __init__(self, features: TangentFeatures, gram: Tensor, root: Tensor) -> None:
        self.features = features
        self.root = root.double()
        self.cholesky = factorise(whiten(gram.double(), self.root))
        # Of the Gram matrices before float32 products; once one failed it is not tried.
        self._gram_dtypes = [torch.float32]
        if features.value.dtype == torch.float64:
            self._gram_dtypes.append(torch.float64)

    @cached_property
    def _inverse_root(self) -> Tensor:
        """W = R L^-T."""
        return apply_root(self.root, triangular_inverse(self.cholesky).mT)

    @cached_property
    def _whitened_features(self) -> Tensor:
        """W' Phi, ``(n m) x p``: the only cache that is as large as a Jacobian."""
        return self._inverse_root.mT @ self.features.rows().double()

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data; checks once that nothing cancels."""
        cross = features.gram(self.features).double()  # batch x (t m) x (n m)
        if cross.requires_grad or cross.shape[:-1].numel() < _MANY_ROWS:
            V = cross @ self._inverse_root
        else:
            rows = cross.reshape(-1, cross.shape[-1])
            rhs = apply_root_right(rows, self.root).mT
            V = torch.linalg.solve_triangular(self.cholesky, rhs, upper=False)
            V = V.mT.reshape(cross.shape)
        prior = features.blocks().double()
        per_point = V.unflatten(-2, features.value.shape[-2:])  # batch x t x m x nm
        blocks = prior - per_point @ per_point.mT
        if nothing_cancels(blocks.detach(), prior.detach(), features.value.dtype):
            return Projection(features, V, False, blocks)
        return self._root_form(features, V)

    @torch.no_grad()
    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        r"""Per-point covariances by float32 products, or None if they lose digits.

        A product with the inverse root costs most of a call and is twice as fast in
        float32, but there prior variance and what the data explain would cancel. So the
        leading directions Q of A, which explain nearly all, stay in float64:

        .. math::
            k A^{-1} k^\top = k Q (Q^\top A Q)^{-1} Q^\top k^\top + \|k' L^{-\top}\|^2,
            \qquad k' = k - k Q (Q^\top A Q)^{-1} Q^\top A,

        an identity for any Q; only k, if that suffices, and the small k' are rounded.
        The points that lost most of their prior variance are the most delicate: they
        are computed again in float64, and decide.

        Args:
            features: Features of ``t`` test points, unbatched.

        Returns:
            ``t x m x m`` in float64, or None.
        """
        t, m = features.value.shape
        if t * m < _MANY_ROWS:
            return None
        while self._gram_dtypes:
            blocks = self._rounded_blocks(features, self._gram_dtypes[0])
            if _is_close_where_delicate(self, features, blocks):
                return blocks
            self._gram_dtypes = self._gram_dtypes[1:]
        return None

    def _rounded_blocks(self, features: TangentFeatures, dtype: torch.dtype) -> Tensor:
        train = self._single_features if dtype == torch.float32 else self.features
        cross = features.to(dtype).gram(train).double()
        k = apply_root_right(cross, self.root)
        leading, root, rest = self._leading_directions
        seen = k @ leading  # (t m) x r
        large = torch.linalg.solve_triangular(root, seen.mT, upper=False).mT
        large = large.unflatten(0, features.value.shape)
        small = k.addmm_(seen, rest, alpha=-1.0).float()
        explained = triangular_blocks(small, self._single_inverse, features.value.shape)
        return features.blocks().double() - large @ large.mT - explained.double()

    @cached_property
    def _single_features(self) -> TangentFeatures:
        return self.features.to(torch.float32)

    @cached_property
    def _single_inverse(self) -> Tensor:
        """L^-T in float32."""
        return triangular_inverse(self.cholesky).mT.float()

    @cached_property
    def _leading_directions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q by two steps of subspace iteration, the root of Q'AQ, and (Q'AQ)^-1 Q'A."""
        L = self.cholesky
        generator = torch.Generator(L.device).manual_seed(0)
        shape = (len(L), min(_LEADING, len(L)))
        Q = standard_normal(shape, generator, L)
        for _ in range(2):
            Q = torch.linalg.qr(L @ (L.mT @ Q)).Q
        AQ = L @ (L.mT @ Q)
        root = torch.linalg.cholesky(Q.mT @ AQ)
        return Q, root, torch.cholesky_solve(AQ.mT, root)

    def _root_form(self, features: TangentFeatures, V: Tensor) -> Projection:
        rho = features.rows().double() - V @ self._whitened_features
        L = self.cholesky
        U = torch.linalg.solve_triangular(L, V, upper=False, left=False)
        F = torch.cat([rho, U], dim=-1)
        per_point = F.unflatten(-2, features.value.shape[-2:])
        return Projection(features, F, True, per_point @ per_point.mT)

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        other = left if right is None else right
        if left.is_root or other.is_root:
            left, other = self._as_root(left), self._as_root(other)
            return left.factor @ other.factor.mT
        gram = left.features.gram(None if right is None else right.features)
        return gram.double() - left.factor @ other.factor.mT

    def _as_root(self, projection: Projection) -> Projection:
        if projection.is_root:
            return projection
        return self._root_form(projection.features, projection.factor)

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights: rho of the root form."""
        root = self._as_root(projection).factor
        return root[..., : root.shape[-1] - len(self.cholesky)]

    def mean_weights(self, whitened: Tensor) -> Tensor:
        """Posterior mean of the scaled weights."""
        representer = torch.cholesky_solve(whitened.reshape(-1, 1), self.cholesky)
        representer = apply_root(self.root, representer)
        outputs = representer.reshape(*self.features.value.shape, 1)
        return self.features.t_matmul(outputs.to(self.features.value)).double()[:, 0]

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Matheron's rule in weight space: a prior draw minus what data explain."""
        (n, m), like = self.features.value.shape, self.features.value
        p = self.features.t_matmul(like.new_zeros(n, m, 1)).shape[0]
        prior = standard_normal((num_samples, p), generator, like)
        noise = standard_normal((n * m, num_samples), generator, like)
        values = torch.stack([self.features.matmul(w).reshape(-1) for w in prior], -1)
        seen = apply_root(self.root.mT, values.double()) + noise.double()
        explained = apply_root(
            self.root, torch.cholesky_solve(seen, self.cholesky)
        ).reshape(n, m, num_samples)
        return prior.double() - self.features.t_matmul(explained.to(like)).double().mT


class WeightSpaceStrategy:
    r"""Conditioning by the Cholesky factor of the ``p x p`` matrix H.

    The covariance :math:`\Phi_* H^{-1} \Phi_*^\top` is a product of roots and positive
    by construction. Time n m p^2 + p^3 / 3 once, then t m p^2 per call.

    Args:
        batches: Pairs of features and roots ``b x m x m``, whose rows make up the data;
            one pair at a time is held.
        num_params: The number p.
        precision: :math:`\Phi^\top R R^\top \Phi`, if it is known.

    Raises:
        TypeError: If the batches can be read only once.
    """

    def __init__(
        self,
        batches: Iterable[tuple[TangentFeatures, Tensor]],
        num_params: int,
        precision: Tensor | None = None,
    ) -> None:
        if iter(batches) is batches:
            raise TypeError(
                "batches must be re-iterable, but is a "
                f"{type(batches).__name__}, which can be read once. Pass a list."
            )
        self._batches = batches
        self.num_params = num_params
        if precision is None:
            precision = weight_precision(batches, num_params)
        self.cholesky = factorise(precision)
        # Once float32 products failed they are not tried again.
        self._single_fails = False

    @cached_property
    def _inverse_root(self) -> Tensor:
        return triangular_inverse(self.cholesky).mT

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data."""
        F = triangular_product(features.rows().double(), self._inverse_root)
        per_point = F.unflatten(-2, features.value.shape[-2:])
        return Projection(features, F, True, per_point @ per_point.mT)

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        other = left if right is None else right
        return left.factor @ other.factor.mT

    @torch.no_grad()
    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """Per-point covariances by float32 products, checked on the delicate points.

        A product of roots loses fewer digits than a difference: the check nearly always
        holds.

        Args:
            features: Features of ``t`` test points, unbatched.

        Returns:
            ``t x m x m`` in float64, or None.
        """
        t, m = features.value.shape
        if t * m < _MANY_ROWS or self._single_fails:
            return None
        rows = features.to(torch.float32).rows()
        blocks = triangular_blocks(rows, self._single, (t, m)).double()
        self._single_fails = not _is_close_where_delicate(self, features, blocks)
        return None if self._single_fails else blocks

    @cached_property
    def _single(self) -> Tensor:
        return self._inverse_root.float()

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights."""
        return projection.factor @ self._inverse_root.mT

    def mean_weights(self, whitened: Tensor) -> Tensor:
        """Posterior mean of the scaled weights."""
        pulled = whitened.new_zeros(self.num_params, dtype=torch.float64)
        start = 0
        for features, root in self._batches:
            n = features.value.shape[0]
            rows = whitened[start : start + n].unsqueeze(-1).double()
            outputs = (root.double() @ rows).to(features.value)
            pulled += features.t_matmul(outputs).double()[:, 0]
            start += n
        return torch.cholesky_solve(pulled[:, None], self.cholesky)[:, 0]

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Standard normals through the factor of the posterior covariance."""
        normal = standard_normal(
            (num_samples, self.num_params), generator, self.cholesky
        )
        return normal @ self._inverse_root.mT


def triangular_product(matrix: Tensor, triangular: Tensor) -> Tensor:
    """Product with an upper triangular matrix, without most of its zeros.

    Args:
        matrix: ``... x k``.
        triangular: ``k x k``, zero below its diagonal.

    Returns:
        ``... x k``
    """
    k = triangular.shape[-1]
    if matrix.shape[:-1].numel() < _MANY_ROWS or k < 64 * _BLOCKS:
        return matrix @ triangular
    return torch.cat(list(_column_blocks(matrix, triangular)), dim=-1)


def triangular_blocks(
    matrix: Tensor, triangular: Tensor, per_point: tuple[int, int]
) -> Tensor:
    r"""The blocks :math:`F_i F_i^\top` of such a product F, without holding F.

    Args:
        matrix: ``(t m) x k``.
        triangular: ``k x k``, zero below its diagonal.
        per_point: t and m.

    Returns:
        ``t x m x m``
    """
    total = matrix.new_zeros(*per_point, per_point[-1])
    for F in _column_blocks(matrix, triangular):
        if per_point[-1] == 1:
            total += F.square_().sum(-1)[:, None, None]
        else:
            F = F.unflatten(0, per_point)
            total += F @ F.mT
    return total


def _column_blocks(matrix: Tensor, triangular: Tensor) -> Iterator[Tensor]:
    """The columns of the product, an eighth at a time."""
    k = triangular.shape[-1]
    step = -(-k // _BLOCKS)
    for start in range(0, k, step):
        stop = start + step
        yield matrix[..., :stop] @ triangular[:stop, start:stop]


def triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix ``k x k``, by halves.

    A third of the work of a triangular solve with the identity, all of it products.
    """
    k = len(lower)
    if k <= _BASE:
        eye = torch.eye(k, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = k // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    below = lower[half:, :half] @ inverse[:half, :half]
    torch.neg(inverse[half:, half:] @ below, out=inverse[half:, :half])
    return inverse


def whiten(gram: Tensor, root: Tensor) -> Tensor:
    r"""The whitened prior covariance :math:`R^\top K R`, R block diagonal.

    Args:
        gram: K, ``(n m) x (n m)``.
        root: The blocks of R, ``n x m x m``.

    Returns:
        ``(n m) x (n m)``.
    """
    if root.shape[-1] == 1:
        r = root.reshape(-1)
        return gram * r[:, None] * r
    half = apply_root(root.mT, gram)  # R' K
    return apply_root(root.mT, half.mT)  # R' (R' K)', symmetric


def apply_root(root: Tensor, matrix: Tensor) -> Tensor:
    """Product of a block-diagonal matrix, ``n x m x m``, with ``(n m) x k``."""
    return (root @ matrix.unflatten(0, root.shape[:2])).flatten(0, 1)


def apply_root_right(matrix: Tensor, root: Tensor) -> Tensor:
    """Product of ``k x (n m)`` with a block-diagonal matrix, ``n x m x m``."""
    if root.shape[-1] == 1:
        return matrix * root.reshape(-1)
    return apply_root(root.mT, matrix.mT).mT


def weight_precision(
    batches: Iterable[tuple[TangentFeatures, Tensor]], num_params: int
) -> Tensor:
    r"""The matrix :math:`\Phi^\top R R^\top \Phi`, summed over batches, float64."""
    total = None
    for features, root in batches:
        rows = apply_root(root.double().mT, features.rows().double())
        if total is None:
            total = rows.new_zeros(num_params, num_params)
        add_scatter(total, rows)
    return symmetrise(total)


def add_scatter(total: Tensor, rows: Tensor) -> None:
    """Add ``rows' rows`` to the upper block triangle of ``total``, in place.

    Half of a symmetric product need not be computed; :func:`symmetrise` completes it.
    """
    p = rows.shape[-1]
    step = -(-p // (_BLOCKS if p >= 64 * _BLOCKS else 1))
    for start in range(0, p, step):
        stop = start + step
        total[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:])


def symmetrise(total: Tensor) -> Tensor:
    """Mirror the upper triangle of a square matrix."""
    return total.triu() + total.triu(1).mT


def factorise(matrix: Tensor) -> Tensor:
    """Cholesky factor of I + matrix, for a positive semi-definite ``k x k`` matrix.

    Raises:
        ValueError: If the factorisation fails, which needs NaN or a matrix so large
            that round-off exceeds one.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(shifted)
    # An infinite entry is no failure to LAPACK, and NaN once it is used.
    if bool(info.any()) or not bool(factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        raise ValueError(
            "I + R' K R could not be factorised: its largest entry is "
            f"{matrix.detach().abs().max():.3g}, so the prior variance is too large "
            "for the noise. Standardise the targets, or raise the noise floor."
        )
    return factor


def nothing_cancels(posterior: Tensor, prior: Tensor, dtype: torch.dtype) -> bool:
    """Whether variances that are differences kept their digits.

    Args:
        posterior: Covariances ``... x m x m``.
        prior: What something was subtracted from.
        dtype: The precision of the subtracted products.
    """
    # One comparison per call. What counts is the precision in which k(x, X) was formed.
    variance = posterior.diagonal(dim1=-2, dim2=-1)
    before = prior.diagonal(dim1=-2, dim2=-1)
    return bool((variance > _SAFE * torch.finfo(dtype).eps * before).all())


def _is_close_where_delicate(
    strategy: PredictionStrategy, features: TangentFeatures, blocks: Tensor
) -> bool:
    """Whether rounding spared the points that lost most of their prior variance.

    Variances of all contrasts between outputs count: blocks are compared in the metric
    of the exact ones.
    """
    prior = features.blocks().diagonal(dim1=-2, dim2=-1)
    smallest = torch.linalg.eigvalsh(blocks)[..., 0] if blocks.shape[-1] > 1 else None
    smallest = blocks[:, 0, 0] if smallest is None else smallest
    kept = smallest / prior.amax(-1)
    rows = kept.topk(min(_DELICATE, len(kept)), largest=False).indices
    exact = strategy.project(features.take(rows)).blocks
    root, info = torch.linalg.cholesky_ex(exact)
    change = torch.linalg.solve_triangular(root, blocks[rows] - exact, upper=False)
    change = torch.linalg.solve_triangular(root, change.mT, upper=False)
    error = torch.linalg.matrix_norm(change).amax() + info.amax()
    return bool(error < _SINGLE_TOLERANCE)
