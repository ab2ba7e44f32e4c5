"""Standard normals from an explicit generator, never from the global random state.

In: a shape and a generator, or None for a fresh one. Out: draws, made where the
generator is and moved to where they are needed; also rows of normals that stay what
they are when others are added. Next: likelihoods sample residuals,
kernels their features, posteriors their functions.
"""

from __future__ import annotations

import torch
from torch import Generator, Size, Tensor

from gpbridge.checks import check_kind


def fresh(generator: Generator | None, device: torch.device | str = "cpu") -> Generator:
    """The generator, or one with a seed of its own, so that each call differs."""
    if generator is None:
        generator = Generator(device=device)
        generator.seed()
    check_kind(Generator, "Try torch.Generator().manual_seed(0).", generator=generator)
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


def row_normals(num_rows: int, num_columns: int, seed: int, skip: int = 0) -> Tensor:
    """Standard normals ``n x c`` in which a row depends on its place and the seed only.

    Data that grow keep the noise that was drawn for the old points, and noise for the
    new ones costs what their own blocks of 256 rows cost.

    Args:
        num_rows: The number n of rows.
        num_columns: The number c of columns.
        seed: Below 2^31. Two seeds have independent rows, and so has a generator with
            this seed.
        skip: Rows to leave out before the first.

    Returns:
        The normals, float64 on the CPU.
    """
    generator = Generator()
    first, offset = divmod(skip, _BLOCK)
    blocks = [torch.zeros(0, num_columns, dtype=torch.float64)]
    for block in range(first, -(-(skip + num_rows) // _BLOCK)):
        generator.manual_seed(_block_seed(seed, block))
        # Drawn whole: the last numbers of a call depend on how many there are.
        size = _BLOCK, num_columns
        blocks.append(torch.randn(size, generator=generator, dtype=torch.float64))
    return torch.cat(blocks)[offset : offset + num_rows]


def _block_seed(seed: int, block: int) -> int:
    # Torch's generator on the CPU reads 32 bits. The upper half is for noise: noise
    # that repeats the numbers of a prior draw's weights, drawn from the seed itself,
    # makes posterior covariances wrong. Steps by the golden ratio keep the blocks of a
    # seed away from those of seeds nearby.
    return 2**31 + (seed + block * _GOLDEN) % 2**31


_BLOCK = 256  # rows whose noise is drawn together
_GOLDEN = 1327217885  # odd, so that no two blocks of a seed meet; 2^31 / 1.618...
