r"""What kernels that average over orbits have in common.

In: a base kernel, an augmentation, and functions that average the one over the other.
Out: the contract of a gpytorch kernel, and the cross covariance with the function that
is averaged. Next: ``invariant`` and ``convolutional``, which differ in the functions.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_number,
    check_positive,
)
from gpbridge.kernels.batches import WrappingKernel
from gpbridge.kernels.compositions import draw_feature_map, same_inputs
from gpbridge.kernels.exact_features import has_exact_features, is_isotropic
from gpbridge.kernels.feature_gram import feature_gram
from gpbridge.kernels.orbit_features import OrbitFeatureMap, average_features
from gpbridge.kernels.orbit_sums import OrbitAverage, Sums

MODES = ("auto", "double", "features", "difference")


class OrbitKernel(WrappingKernel):
    """A kernel averaged over orbits; a subclass says by which functions.

    Arguments are those of :class:`~gpbridge.kernels.InvariantKernel`.

    Attributes:
        sums: The functions that average.
    """

    sums: Sums
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
        check_number(memory_budget=memory_budget)
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
        average = self._average(x1 if x1.numel() else x2, law)
        if diag:
            return self.sums.diagonal(average, x1, x2, same)
        K = self.sums.matrix(average, x1, x2, same)
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
        return self.sums.cross(self._average(x), Z, x)

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

    def train(self, mode: bool = True) -> OrbitKernel:
        """Set the mode, and remember the orbits of predictions."""
        # A posterior calls eval() on a model in eval mode, which clears no cache.
        if mode or self.training:
            self._redraws = self.augmentation.redraws
        return super().train(mode)

    def _average(self, x: Tensor, law: DifferenceLaw | None = None) -> OrbitAverage:
        return OrbitAverage(
            self.base_kernel,
            self.augmentation,
            law,
            self._outputs(x),
            self.chunk_size,
            self.memory_budget,
        )

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
    kernel: OrbitKernel, num_inputs: int, num_features: int, generator=None
) -> OrbitFeatureMap:
    width = num_inputs if kernel.active_dims is None else len(kernel.active_dims)
    width = kernel.augmentation.output_width(width)
    base = draw_feature_map(kernel.base_kernel, width, num_features, generator)
    return OrbitFeatureMap(kernel, base)
