r"""The Augerino penalty, a baseline for learning augmentations without an evidence.

In: an augmentation. Out: a term for the training loss. Next: a loop of the user's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.augmentation.base import BoundedAugmentation
from gpbridge.checks import check_positive


def augerino_penalty(augmentation: BoundedAugmentation, reg: float = 0.01) -> Tensor:
    r"""Minus the norm of an augmentation's widths, to be added to a loss.

    .. math:: -\lambda\, \lVert \omega \rVert_2, \qquad \omega = 2 b,

    with the widths of the uniform laws, twice our half-widths b. Minimised together
    with the mean negative log likelihood of the averaged network, it finds the widest
    law that does not raise the training loss. What that is depends on :math:`\lambda`
    and on what the network can undo. Do not decay the augmentation's parameters.

    Args:
        augmentation: With uniform laws.
        reg: The factor :math:`\lambda`, in nats per datum.

    Returns:
        A scalar with a gradient in the widths.

    Raises:
        TypeError: If the laws are not uniform.
        ValueError: If ``reg`` is not positive.

    Example:
        >>> from gpbridge.augmentation import Rotation2d
        >>> round(augerino_penalty(Rotation2d(init=0.5), reg=0.1).item(), 3)
        -0.1

    References:
        Benton, Finzi, Izmailov, Wilson, Learning invariances in neural networks from
        training data, NeurIPS 2020, eq. (5).
    """
    if not isinstance(augmentation, BoundedAugmentation):
        raise TypeError(
            "augerino_penalty needs an augmentation with uniform laws, such as "
            f"Rotation2d, but is given {type(augmentation).__name__}."
        )
    check_positive(reg=reg)
    return -reg * torch.linalg.vector_norm(2 * augmentation.bound)
