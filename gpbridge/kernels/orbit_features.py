r"""Features averaged over orbits, :math:`\bar\phi(x) = \frac1s \sum_a w_a \phi(T_a x)`.

In: the feature map of a base kernel, exact or of random frequencies, and an
augmentation. Out: the feature map of the invariant kernel. Next: ``invariant``.
"""

from __future__ import annotations

import torch
from botorch.sampling.pathwise.features.maps import FeatureMap
from gpytorch.kernels import Kernel
from torch import Size, Tensor, nn

from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import check_memory
from gpbridge.kernels.orbit_blocks import block_sizes, in_blocks


def average_features(
    feature_map: FeatureMap,
    augmentation: Augmentation,
    x: Tensor,
    chunk_size: int | None,
    memory_budget: float,
) -> Tensor:
    """Average a map of transformed inputs over the orbits of inputs.

    Args:
        feature_map: From ``... x n x d'`` to ``... x n x f``.
        augmentation: From ``... x n x d`` to ``... x n x s x d'``.
        x: Inputs ``... x n x d``.
        chunk_size: Points at a time, None for what fits.
        memory_budget: Bytes for the result and the features of one orbit.

    Returns:
        Features ``... x n x f``.

    Raises:
        MemoryError: If they need more than the budget.
    """
    n, s, f = x.shape[-2], augmentation.num_samples, feature_map.num_outputs
    batch = torch.broadcast_shapes(x.shape[:-2], feature_map.batch_shape)
    check_memory(
        f"The {f} averaged features of {n} points",
        x.dtype.itemsize * batch.numel() * (n + s) * f,
        memory_budget,
        "Choose mode='double', fewer features, or a larger memory_budget.",
    )

    def block(points: Tensor) -> Tensor:
        orbits = augmentation(points)
        features = feature_map(orbits.flatten(-3, -2))
        return augmentation.average(features.unflatten(-2, orbits.shape[-3:-1]))

    size, _ = block_sizes(s * f * batch.numel(), 1, chunk_size, x.device)
    return in_blocks(block, (x,), size, dim=-2)


class OrbitFeatureMap(FeatureMap):
    """The averaged feature map of an invariant kernel.

    Args:
        kernel: The invariant kernel; its augmentation and columns are read at each
            call.
        feature_map: That of its base kernel.
    """

    def __init__(self, kernel: Kernel, feature_map: FeatureMap) -> None:
        super().__init__()
        self.kernel = kernel
        self.feature_map = feature_map
        self.num_outputs = feature_map.num_outputs
        # Upstream chains its own transforms to these, so None would not do.
        self.input_transform = nn.Identity()
        self.output_transform = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the averaged features, ``... x n x f``."""
        kernel = self.kernel
        if kernel.active_dims is not None:
            x = x.index_select(-1, kernel.active_dims)
        return average_features(
            self.feature_map,
            kernel.augmentation,
            x,
            kernel.chunk_size,
            kernel.memory_budget,
        )

    @property
    def batch_shape(self) -> Size:
        """The batch shape of the base kernel's map."""
        return self.feature_map.batch_shape
