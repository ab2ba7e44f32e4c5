r"""The average of a network over orbits of its inputs.

In: a network and an augmentation. Out: the invariant network, a module like any other.
Its tangent kernel is the orbit average of the network's.
Next: ``kernels.invariant`` averages kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import ShapeError, check_kind, checked_shape


class AveragedNetwork(nn.Module):
    r"""A network averaged over the orbits of its inputs.

    .. math:: \bar f(x) = \frac1s \sum_a w_a\, f(T_a x)

    Its Jacobian is the average of the network's, so that its neural tangent kernel is
    ``InvariantKernel(NeuralTangentKernel(network), augmentation)``. A forward pass
    costs s passes of the network. For classification these are averaged logits.

    Both modules are used as they are, not copied. Where weights are to be random, name
    those of the network (``parameters=lambda name: name.startswith("network.")``):
    the augmentation has parameters too.

    Args:
        network: The network, from ``n x d`` (or ``n x input_shape``) to ``n x m``.
        augmentation: Of flat inputs ``n x d``.
        input_shape: Shape of one input of the network, as (c, h, w).

    Raises:
        TypeError: If the arguments are no network and no augmentation.
        ShapeError: If ``input_shape`` is no shape; in a call, if it is of another
            number of columns.

    Example:
        >>> import torch
        >>> from gpbridge.augmentation import FiniteOrbit
        >>> flips = FiniteOrbit.flips((4, 4))
        >>> AveragedNetwork(torch.nn.Linear(16, 3), flips)(torch.zeros(5, 16)).shape
        torch.Size([5, 3])

    References:
        Immer et al., Invariance learning in deep neural networks with differentiable
        Laplace approximations, NeurIPS 2022, eq. (6).
    """

    def __init__(
        self,
        network: nn.Module,
        augmentation: Augmentation,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_kind(nn.Module, network=network)
        check_kind(Augmentation, augmentation=augmentation)
        self.network = network
        self.augmentation = augmentation
        self.input_shape = checked_shape("input_shape", input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """The mean output, ``n x d`` to ``n x m``."""
        orbits = self.augmentation(x)
        shape = self.input_shape or orbits.shape[-1:]
        if math.prod(shape) != orbits.shape[-1]:
            raise ShapeError(
                f"Inputs of shape {self.input_shape} have {math.prod(shape)} columns, "
                f"but those of the orbits have {orbits.shape[-1]}. Pass another "
                "input_shape."
            )
        outputs = self.network(orbits.reshape(-1, *shape))
        outputs = outputs.reshape(*orbits.shape[:-1], *outputs.shape[1:])
        return self.augmentation.average(outputs, dim=orbits.dim() - 2)
