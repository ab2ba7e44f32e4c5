r"""Batches of kernels: expanding and indexing them, columns selected or not.

In: a kernel with a batch of hyperparameters. Out: the same with another batch shape, or
some of its members. Next: most kernels of ours are one of these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from gpytorch.kernels import Kernel


@contextmanager
def unbatched_buffers(kernel: Kernel) -> Iterator[None]:
    """Hide ``active_dims`` while upstream indexes or expands a kernel's batch.

    Upstream treats every buffer as batched, the selected columns too (gpytorch issue
    2591), so that a batch of kernels with ``active_dims`` cannot be indexed.
    """
    active_dims = kernel.active_dims
    kernel.active_dims = None
    try:
        yield
    finally:
        kernel.active_dims = active_dims


class BatchKernel(Kernel):
    """A kernel whose batch can be expanded and indexed, whatever columns it selects."""

    def expand_batch(self, *sizes) -> Self:
        """Repeat the hyperparameters along new batch dimensions."""
        with unbatched_buffers(self):
            expanded = super().expand_batch(*sizes)
        if expanded is not self:
            expanded.active_dims = self.active_dims
        return expanded

    def __getitem__(self, index) -> Self:
        """Some members of the batch."""
        with unbatched_buffers(self):
            chosen = super().__getitem__(index)
        if chosen is not self:
            chosen.active_dims = self.active_dims
        return chosen


class WrappingKernel(BatchKernel):
    """A kernel without a batch of its own: it has that of its ``base_kernel``."""

    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        """The base kernel only: what lies inside it is its own business."""
        yield "base_kernel", self.base_kernel

    def __getitem__(self, index) -> Self:
        """Some members of the batch."""
        chosen = super().__getitem__(index)
        if chosen is not self:
            # Upstream never shortens the batch shape of a kernel without parameters.
            chosen.batch_shape = chosen.base_kernel.batch_shape
        return chosen
