r"""The curvature of an averaged network by blocks of its tangent kernel.

A block's rows, log determinant and gradient are made in one pass, since the log
determinant is a sum over blocks. Which blocks and outputs are drawn, and when the sum
is a bound, ``tangent_blocks`` says.

In: an :class:`~gpbridge.selection.orbit_likelihood.OrbitLikelihood`, data, prior and
noise. Out: the curvature as a function of prior and noise, the misfit, and the gradient
of the evidence in the augmentation's parameters. Next: ``orbit_curvature``.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gpbridge.selection.orbit_likelihood import (
    OrbitData,
    OrbitLikelihood,
    add_gradients,
    no_gradients,
)
from gpbridge.selection.tangent_blocks import (
    BlockCurvature,
    GramBlock,
    TangentBlocks,
    gram_block,
    partition,
)
from gpbridge.types import Params


def measure_blocks(
    model: OrbitLikelihood,
    options: TangentBlocks,
    data: OrbitData,
    prior_variance: Tensor,
    noise_variance: Tensor | None,
    leaves: Params,
    generator: Generator,
) -> tuple[BlockCurvature, Tensor, Params]:
    """Pass over the blocks that are drawn, once.

    Args:
        model: What data say.
        options: Of the blocks.
        data: All rows, with the orbits of this evaluation.
        prior_variance: One per group, float64; the gradient is taken there.
        noise_variance: One per output, or None.
        leaves: Parameters of the augmentation, with ``requires_grad``; may be empty.
        generator: Of the partition, of drawn blocks and outputs.

    Returns:
        The curvature, the misfit, and gradients by name.
    """
    m, num_rows, sampled = model.net.net.num_outputs, len(data.X), "sampled"
    blocks = partition(num_rows, options.block_size, generator)
    total, device = len(blocks), generator.device
    if options.num_blocks is not None and options.num_blocks < total:
        order = torch.randperm(total, generator=generator, device=device)
        blocks = [blocks[i] for i in order[: options.num_blocks].tolist()]
    share = total / len(blocks)
    scale = share * (m if options.outputs == sampled else 1)
    weights = model.weights(prior_variance, noise_variance)
    joint = options.outputs == "joint"
    kept: list[GramBlock] = []
    misfit, gradients = model.no_misfit(), no_gradients(leaves)
    for rows in blocks:
        part = data.take(rows.to(data.X.device))
        chosen = torch.arange(m)
        if options.outputs == sampled:
            chosen = torch.randint(m, (1,), generator=generator, device=device)
        chosen = chosen.to(data.X.device)
        with torch.set_grad_enabled(bool(leaves)):
            value, J = model.jacobian(
                part, leaves, lambda f, c=chosen: model.roots(f)[..., c]
            )
            channels = chosen if model.is_gaussian else 0 * chosen
            gram = gram_block(J, model.net.blocks, model.num_groups, channels, joint)
            if leaves:
                own = BlockCurvature([gram], scale, False)
                complexity = 0.5 * own.logdet(prior_variance, weights)
                fit = share * model.log_likelihood(value, part.Y, noise_variance)
                add_gradients(gradients, fit - complexity, leaves)
        misfit = misfit + share * model.misfit(value.detach(), part.Y)
        kept.append(gram.detach())
    exact = total == 1 and joint
    estimate = options.outputs == sampled or share > 1
    return BlockCurvature(kept, scale, not exact and not estimate), misfit, gradients
