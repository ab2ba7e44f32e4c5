r"""A kernel of patches of images: of their pixels times of their places.

In: two kernels. Out: their product, each of its own columns. Next: ``patch_sums`` adds
it over the patches of images.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from torch import Tensor


class PatchKernel(Kernel):
    r"""A kernel of patches times a kernel of their places.

    .. math::
        k_g\bigl((z, p), (z', p')\bigr) = k_0(z, z')\, k_\ell(p, p')

    Args:
        base_kernel: The kernel k_0 of the first columns.
        location_kernel: The kernel k_l of the last two, row and column in pixels.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> kernel = PatchKernel(RBFKernel(), RBFKernel())
        >>> kernel(torch.zeros(5, 11)).shape
        torch.Size([5, 5])
    """

    has_lengthscale = False

    def __init__(self, base_kernel: Kernel, location_kernel: Kernel, **kwargs) -> None:
        super().__init__(**kwargs)
        self.base_kernel = base_kernel
        self.location_kernel = location_kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        patches = self.base_kernel(x1[..., :-2], x2[..., :-2], diag=diag, **params)
        places = self.location_kernel(x1[..., -2:], x2[..., -2:], diag=diag, **params)
        if diag:
            return patches * places
        return patches.to_dense() * places.to_dense()

    def named_sub_kernels(self):
        """The two kernels: what lies inside them is their own business."""
        yield "base_kernel", self.base_kernel
        yield "location_kernel", self.location_kernel

    def __getitem__(self, index) -> PatchKernel:
        chosen = super().__getitem__(index)
        if chosen is not self:
            # Upstream never shortens the batch shape of a kernel without parameters.
            chosen.batch_shape = torch.broadcast_shapes(
                chosen.base_kernel.batch_shape, chosen.location_kernel.batch_shape
            )
        return chosen
