"""Standard normals from an explicit generator, never from the global random state.

In: a shape and a generator, or None for a fresh one. Out: draws, made where the
generator is and moved to where they are needed. Next: likelihoods sample residuals,
kernels their features, posteriors their functions.
"""

from __future__ import annotations

import torch
from torch import Generator, Size, Tensor


def fresh(generator: Generator | None, device: torch.device | str = "cpu") -> Generator:
    """The generator, or one with a seed of its own, so that each call differs."""
    if generator is None:
        generator = Generator(device=device)
        generator.seed()
    return generator


def standard_normal(
    shape: Size | tuple[int, ...], generator: Generator | None, like: Tensor
) -> Tensor:
    """Standard normals with the dtype and device of another tensor.

    Args:
        shape: Their shape.
        generator: Source of randomness. Without one, draws are fresh on each call.
        like: Says dtype and device.

    Returns:
        The draws.
    """
    generator = fresh(generator, like.device)
    normal = torch.randn(
        shape, generator=generator, dtype=like.dtype, device=generator.device
    )
    return normal.to(like.device)
