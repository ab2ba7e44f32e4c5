r"""What passes between the layers of an infinitely wide network.

In: the covariance of inputs at pairs of points. Out: the state that layers map, with
the variances of single points that nonlinearities need. Next: ``wide_layer_kinds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Signal(NamedTuple):
    """What passes between two layers, for checks when a network is put together.

    ``image`` is (height, width), or None for flat inputs. ``gaussian``: its channels
    are independent draws of one Gaussian. ``random``: weights stand before it.
    """

    image: tuple[int, int] | None
    gaussian: bool = False
    random: bool = False


class Variances:
    """Variances of single points at every nonlinearity.

    Each is ``... x n x pixels``, one pixel for flat layers. A pass over points with
    themselves records them; the pass over pairs reads them in the same order.
    """

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []

    def pair(self, state: LayerCovariance) -> tuple[Tensor, Tensor]:
        """Record, and broadcast against k."""
        q = state.k
        if state.space == 4:
            q = q.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)
        if state.space > 0:
            q = q.flatten(-2).squeeze(-2)
        self.recorded.append(q)
        return _against(q, state), _against(q, state, second=True)


class RecordedVariances:
    """Variances of two sets of points, recorded before."""

    def __init__(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self.rest = iter(zip(first, second, strict=True))

    def pair(self, state: LayerCovariance) -> tuple[Tensor, Tensor]:
        """The next ones, broadcast against k."""
        first, second = next(self.rest)
        return _against(first, state), _against(second, state, second=True)


@dataclass(frozen=True)
class LayerCovariance:
    """Covariances between two sets of points at one layer.

    Attributes:
        k: ``... x n1 x n2 x space``; ``... x n x 1 x space`` if aligned.
        theta: The tangent kernel, likewise; None where no weights stand before.
        variances: Of single points, for nonlinearities.
        space: 0 for flat layers, 2 for ``h x w`` pixels, each with itself, and 4 for
            ``h x w x h x w`` pairs of pixels.
        aligned: The two sets are matched row by row.
        tangent: Whether theta is asked for.
    """

    k: Tensor
    theta: Tensor | None
    variances: Variances | RecordedVariances
    space: int
    aligned: bool
    tangent: bool

    def map(self, function: Callable[[Tensor], Tensor], **changes) -> LayerCovariance:
        """Apply a linear map to k and theta."""
        k = function(self.k)
        theta = self.theta
        if theta is not None:
            theta = k if theta is self.k else function(theta)
        return replace(self, k=k, theta=theta, **changes)


def _against(q: Tensor, state: LayerCovariance, second: bool = False) -> Tensor:
    across = second and not state.aligned
    if state.space == 0:
        return q.mT if across else q
    q = q.unflatten(-1, state.k.shape[-2:]).unsqueeze(-4 if across else -3)
    if state.space == 4:
        q = q[..., None, None, :, :] if second else q[..., None, None]
    return q


class Values:
    """The values of a network's hyperparameters, in the order of its layers."""

    def __init__(self, **groups: Tensor | None) -> None:
        self.groups: dict[str, Iterator[Tensor]] = {
            name: iter(values.unbind(-1))
            for name, values in groups.items()
            if values is not None
        }

    def take(self, name: str, state: LayerCovariance) -> Tensor:
        """The next value, ``batch_shape``, to broadcast against covariances."""
        value = next(self.groups[name])
        return value.reshape(*value.shape, *[1] * (2 + state.space))
