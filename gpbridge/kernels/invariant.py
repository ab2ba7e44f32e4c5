r"""Invariant kernels: a kernel averaged over the orbits of both its inputs.

In: any kernel, and a distribution over transformations. Out: the kernel of a function
that is the average of another over transformations of its input, with the cross
covariance between the two. Next: ``convolutional`` takes patches as the orbit.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from linear_operator.operators import LinearOperator
from torch import Size, Tensor

from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_memory,
    check_positive,
)
from gpbridge.kernels.compositions import (
    draw_feature_map,
    register_with_botorch,
    same_inputs,
    unbatched_buffers,
)
from gpbridge.kernels.exact_features import has_exact_features, is_isotropic
from gpbridge.kernels.feature_gram import feature_gram
from gpbridge.kernels.orbit_blocks import (
    block_sizes,
    entries_needed,
    in_blocks,
    orbit_diagonal,
    orbit_mean,
    symmetric_in_blocks,
)
from gpbridge.kernels.orbit_features import OrbitFeatureMap, average_features

MODES = ("auto", "double", "features", "difference")


class InvariantKernel(Kernel):
    r"""Covariance of a function averaged over transformations of its input.

    With :math:`g \sim GP(0, k_g)` and :math:`f(x) = \frac1s \sum_a w_a\, g(T_a x)`,

    .. math::
        k(x, x') = \frac{1}{s^2} \sum_{a, a'} w_a w_{a'}\, k_g(T_a x, T_{a'} x').

    All pairs count, also a = a': the matrix is positive semi-definite for any s (a
    V-statistic), and its diagonal is larger than that of the continuous average by
    O(1/s). The width of the augmentation is a hyperparameter like any other, and the
    marginal likelihood has several optima in it: scan it.

    Modes, n and n' points:

    * ``"double"``: the sum above, any base kernel, n n' s² evaluations of it.
    * ``"features"``: for a base kernel of finitely many features, which are averaged.
      n s evaluations of them, then a product. The neural tangent kernel of a network
      has features; its average belongs to the averaged network.
    * ``"difference"``: for a group of isometries and an isotropic base kernel, the
      law of :math:`T_a^{-1} T_{a'}`: n n' times 2 s - 1 evaluations for angles on a
      grid, s for a finite group. The same result as ``"double"``.
    * ``"auto"``: features, else differences, where they are exact; else double.

    The diagonal is not one, and depends on the augmentation. Scale with a
    ``ScaleKernel`` around this kernel. ``active_dims`` of this kernel select columns
    before the transformation. Transformed images have many columns: start the
    lengthscale of a base kernel near
    :func:`gpbridge.augmentation.median_orbit_distance`, or the matrix is the identity,
    whose gradients vanish.

    Orbits must not be redrawn while predictions are made; see
    :meth:`Augmentation.resample <gpbridge.augmentation.Augmentation.resample>`.

    Args:
        base_kernel: The kernel k_g of transformed inputs. Its batch shape is that of
            the whole kernel, all of whose members share the augmentation.
        augmentation: The distribution over transformations; it is used as it is.
        mode: How the average is computed, see above.
        chunk_size: Points whose orbits are compared at a time; default what suits the
            device. Blocks are computed again in the backward pass, not stored.
        memory_budget: Bytes that one matrix may take, its orbits included.
        **kwargs: ``active_dims``, as for any gpytorch kernel.

    Raises:
        TypeError: If the arguments are no kernel and no augmentation.
        ValueError: If the mode does not apply, or ``batch_shape`` is passed.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.augmentation import Rotation2d
        >>> kernel = InvariantKernel(RBFKernel(), Rotation2d(num_samples=8))
        >>> kernel(torch.zeros(5, 2)).shape
        torch.Size([5, 5])

    References:
        van der Wilk et al., Learning invariances using the marginal likelihood, NeurIPS
        2018, eq. (8). Haasdonk and Burkhardt, Invariant kernel functions for pattern
        analysis and machine learning, Machine Learning 2007.
    """

    has_lengthscale = False

    def __init__(
        self,
        base_kernel: Kernel,
        augmentation: Augmentation,
        mode: str = "auto",
        *,
        chunk_size: int | None = None,
        memory_budget: float = 4 * 2**30,
        **kwargs,
    ) -> None:
        if kwargs.get("batch_shape"):
            raise ValueError(
                f"{type(self).__name__} has the batch shape of its base_kernel, but "
                f"got a batch shape of {tuple(kwargs['batch_shape'])}. Pass it to "
                "base_kernel."
            )
        if not isinstance(base_kernel, Kernel):
            raise TypeError(
                "base_kernel must be a gpytorch kernel, but is "
                f"{type(base_kernel).__name__}. Try gpytorch.kernels.RBFKernel()."
            )
        if not isinstance(augmentation, Augmentation):
            raise TypeError(
                "augmentation must be a gpbridge.augmentation.Augmentation, but is "
                f"{type(augmentation).__name__}."
            )
        check_choice("mode", mode, MODES)
        check_positive(memory_budget=memory_budget)
        if chunk_size is not None:
            check_count(chunk_size=chunk_size)
        super().__init__(**kwargs)
        self.base_kernel = base_kernel
        self.augmentation = augmentation
        self.mode = mode
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self._num_outputs: int | None = None
        self._redraws = augmentation.redraws
        if mode == "features" and not has_exact_features(base_kernel):
            raise ValueError(
                f"{type(base_kernel).__name__} has no exact features to average. "
                "Choose mode='double', or a base kernel that has them, such as "
                "gpbridge.kernels.FeatureKernel or gpytorch.kernels.RFFKernel."
            )
        if mode == "difference":
            self._check_differences()

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params
    ) -> Tensor | LinearOperator:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.pop("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        self._check_orbit()
        same = same_inputs(x1, x2)
        mode = self.resolved_mode(x1 if x1.numel() else x2)
        if mode == "features":
            left = self.features(x1)
            right = left if same else self.features(x2)
            if diag:
                return (left * right).sum(-1)
            return feature_gram(left, None if same else right)
        law = self.augmentation.difference_law() if mode == "difference" else None
        if diag:
            return self._diagonal(x1, x2, same, law)
        K = self._matrix(x1, x2, same, law)
        # One-sided averages of the same points agree up to rounding only.
        return (K + K.mT) / 2 if same and law is not None else K

    def features(self, x: Tensor) -> Tensor:
        r"""Averaged features :math:`\frac1s \sum_a w_a\, \phi(T_a x)`, ``... x n x f``.

        Args:
            x: Inputs ``... x n x d``, the columns already selected.

        Returns:
            Features; ``batch_shape`` comes first if the base kernel has one.

        Raises:
            MemoryError: If they need more than the budget.
        """
        width = self.augmentation.output_width(x.shape[-1])
        feature_map = draw_feature_map(self.base_kernel, width, 0)
        return average_features(
            feature_map, self.augmentation, x, self.chunk_size, self.memory_budget
        )

    def base_cross(self, Z: Tensor, x: Tensor) -> Tensor:
        r"""Cross covariance of g and f, :math:`\frac1s \sum_a w_a\, k_g(z, T_a x)`.

        The single sum that inducing variables in the space of the base kernel need:
        they are ``g(Z)``, with covariance ``base_kernel(Z)``.

        Args:
            Z: Transformed inputs ``... x u x d'``, such as patches.
            x: Inputs ``... x n x d``, all columns.

        Returns:
            The covariance, ``... x (u m) x (n m)``.

        Raises:
            ShapeError: If Z has another width than orbits have.
        """
        x = self._select(x)
        self._check_orbit()
        self._check_inducing(Z, x)
        m = self._outputs(x)
        u, s = Z.shape[-2], self.augmentation.num_samples
        batch = torch.broadcast_shapes(Z.shape[:-2], x.shape[:-2], self.batch_shape)
        self._check_memory(batch, (u, x.shape[-2]), (1, s), m, x)
        weights = self.augmentation.coefficients(x)

        def block(points: Tensor) -> Tensor:
            orbits = self.augmentation(points)
            one = weights.new_ones(1)
            return orbit_mean(
                self.base_kernel, Z[..., None, :], orbits, one, weights, m
            )

        size, _ = self._block(s * m**2 * batch.numel(), u, x)
        return in_blocks(block, (x,), size, dim=-1)

    def resolved_mode(self, x: Tensor) -> str:
        """The mode in which inputs like these are treated."""
        if self.mode != "auto":
            return self.mode
        if has_exact_features(self.base_kernel) and self._outputs(x) == 1:
            return "features"
        if is_isotropic(self.base_kernel):
            if self.augmentation.difference_law() is not None:
                return "difference"
        return "double"

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """That of the base kernel."""
        return self._outputs(x1 if x1.numel() else x2)

    def train(self, mode: bool = True) -> InvariantKernel:
        """Set the mode, and remember the orbits of predictions."""
        # A posterior calls eval() on a model in eval mode, which clears no cache.
        if mode or self.training:
            self._redraws = self.augmentation.redraws
        return super().train(mode)

    def named_sub_kernels(self):
        """The base kernel only: what lies inside it is its own business."""
        yield "base_kernel", self.base_kernel

    def expand_batch(self, *sizes) -> InvariantKernel:
        """Repeat the base kernel along new batch dimensions."""
        with unbatched_buffers(self):
            expanded = super().expand_batch(*sizes)
        if expanded is not self:
            expanded.active_dims = self.active_dims
        return expanded

    def __getitem__(self, index) -> InvariantKernel:
        with unbatched_buffers(self):
            chosen = super().__getitem__(index)
        if chosen is not self:
            chosen.active_dims = self.active_dims
            # Upstream never shortens the batch shape of a kernel without parameters.
            chosen.batch_shape = chosen.base_kernel.batch_shape
        return chosen

    def _matrix(
        self, x1: Tensor, x2: Tensor, same: bool, law: DifferenceLaw | None
    ) -> Tensor:
        """The average over both orbits, or over differences."""
        m, s = self._outputs(x1 if x1.numel() else x2), self.augmentation.num_samples
        n1, n2 = x1.shape[-2], x2.shape[-2]
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self.batch_shape)
        s1, s2 = (s, s) if law is None else (1, len(law.weights))
        self._check_memory(batch, (n1, n2), (s1, s2), m, x1)
        rows, columns, v, w = self._sides(x2, law)
        pair = s1 * s2 * m**2 * batch.numel()
        size, across = self._block(pair, n2, x1)
        if same and law is None and across >= n2 > 0:
            orbits = columns(x2)

            def upper(start: int, stop: int) -> Tensor:
                left, right = orbits[..., start:stop, :, :], orbits[..., start:, :, :]
                return orbit_mean(self.base_kernel, left, right, v, w, m)

            return symmetric_in_blocks(upper, n1, size, m)

        def against(part: Tensor) -> Tensor:
            others = columns(part)

            def block(points: Tensor) -> Tensor:
                return orbit_mean(self.base_kernel, rows(points), others, v, w, m)

            return in_blocks(block, (x1,), size, dim=-2)

        if across >= n2:
            return against(x2)
        return torch.cat([against(part) for part in x2.split(across, -2)], -1)

    def _diagonal(
        self, x1: Tensor, x2: Tensor, same: bool, law: DifferenceLaw | None
    ) -> Tensor:
        m = self._outputs(x1 if x1.numel() else x2)
        rows, columns, v, w = self._sides(x1, law)

        def block(points: Tensor, others: Tensor) -> Tensor:
            right = columns(others)
            left = right if same and law is None else rows(points)
            return orbit_diagonal(self.base_kernel, left, right, v, w, m)

        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self.batch_shape)
        pair = len(v) * len(w) * m**2 * batch.numel()
        size, _ = self._block(pair, 1, x1)
        return in_blocks(block, (x1, x2), size, dim=-1)

    def _sides(self, like: Tensor, law: DifferenceLaw | None):
        """Orbits of rows and of columns as functions, and their weights."""
        if law is None:
            weights = self.augmentation.coefficients(like)
            return self.augmentation, self.augmentation, weights, weights
        return lambda x: x[..., None, :], law.orbit, like.new_ones(1), law.weights

    def _block(self, pair: int, num_columns: int, x: Tensor) -> tuple[int, int]:
        return block_sizes(pair, num_columns, self.chunk_size, x.device)

    def _outputs(self, x: Tensor) -> int:
        if self._num_outputs is None:
            with torch.no_grad():
                point = self.augmentation(x[..., :1, :])[..., 0, :]
            self._num_outputs = self.base_kernel.num_outputs_per_input(point, point)
        return self._num_outputs

    def _select(self, x: Tensor) -> Tensor:
        if self.active_dims is None:
            return x
        return x.index_select(-1, self.active_dims)

    def _check_orbit(self) -> None:
        if not self.training and self._redraws != self.augmentation.redraws:
            raise RuntimeError(
                "The orbit was redrawn while this kernel was in eval mode. What was "
                "computed for predictions belongs to the old one, and variances would "
                "turn negative. Call train() and eval() on the whole model."
            )

    def _check_inducing(self, Z: Tensor, x: Tensor) -> None:
        width = self.augmentation.output_width(x.shape[-1])
        if Z.dim() < 2 or Z.shape[-1] != width:
            raise ShapeError(
                f"Z must be ``... x u x {width}``, as the orbits of inputs with "
                f"{x.shape[-1]} columns are, but has shape {tuple(Z.shape)}."
            )

    def _check_memory(
        self,
        batch: Size,
        points: tuple[int, int],
        orbits: tuple[int, int],
        m: int,
        x: Tensor,
    ) -> None:
        width = self.augmentation.output_width(x.shape[-1])
        needed = entries_needed(points, orbits, m, width, self.chunk_size, x.device)
        check_memory(
            f"The average over orbits of {orbits[0]} and {orbits[1]} elements, for "
            f"{points[0]} and {points[1]} points,",
            x.dtype.itemsize * batch.numel() * needed,
            self.memory_budget,
            "Take fewer samples, inducing variables (base_cross), a base kernel with "
            "features, or a larger memory_budget.",
        )

    def _check_differences(self) -> None:
        if self.augmentation.difference_law() is None:
            raise ValueError(
                f"{type(self.augmentation).__name__} has no law of differences: it "
                "needs a whole group of isometries, and a grid if that is continuous. "
                "Choose mode='double'."
            )
        if not is_isotropic(self.base_kernel):
            raise ValueError(
                "mode='difference' needs a base kernel of the distance only, such as "
                "RBFKernel without ARD, but it is "
                f"{type(self.base_kernel).__name__}. Choose mode='double'."
            )


@draw_feature_map.register
def _draw_orbit(
    kernel: InvariantKernel, num_inputs: int, num_features: int, generator=None
) -> OrbitFeatureMap:
    width = num_inputs if kernel.active_dims is None else len(kernel.active_dims)
    width = kernel.augmentation.output_width(width)
    base = draw_feature_map(kernel.base_kernel, width, num_features, generator)
    return OrbitFeatureMap(kernel, base)


register_with_botorch(InvariantKernel)
