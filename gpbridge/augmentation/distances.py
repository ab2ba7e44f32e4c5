r"""Distances of transformed inputs, from which a lengthscale starts.

In: an augmentation and inputs. Out: the median distance. Next: the base kernel of an
invariant kernel, in ``kernels.invariant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import check_count, check_inputs, check_kind


def median_orbit_distance(
    augmentation: Augmentation, X: Tensor, num_points: int = 200
) -> Tensor:
    """The median distance of transformed inputs: a start for a lengthscale.

    Args:
        augmentation: The augmentation of an invariant kernel.
        X: Inputs ``n x d``.
        num_points: Compare so many transformed inputs, evenly spaced among all.

    Returns:
        A number without gradient.

    Raises:
        ValueError: If all transformed inputs are alike, or ``num_points`` is no count.
        TypeError: If the arguments are no augmentation and no tensor.

    Example:
        >>> from gpbridge.augmentation import PatchAugmentation
        >>> images = torch.arange(32.0).reshape(2, 16)
        >>> median_orbit_distance(PatchAugmentation((4, 4), (2, 2)), images)
        tensor(18.)
    """
    check_kind(Augmentation, augmentation=augmentation)
    check_inputs(X, "X")
    check_count(num_points=num_points)
    with torch.no_grad():
        rows = torch.linspace(0, len(X) - 1, min(len(X), num_points)).long()
        orbits = augmentation(X[rows])
        # Each row shows another member of its orbit, or as many as there is room for.
        points = orbits.flatten(0, 1)
        places = torch.linspace(0, len(points) - 1, min(len(points), num_points))
        points = points[places.long()]
        distances = torch.pdist(points)
        distances = distances[distances > 0]
        if not len(distances):
            raise ValueError(
                f"The {len(points)} transformed inputs that were compared are all "
                f"alike, of {len(X)} inputs: no distance is above zero. Set the "
                "lengthscale by hand, or pass inputs that differ."
            )
        return distances.median()
