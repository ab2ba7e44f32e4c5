r"""Inputs of an experiment as a network likes to see them.

In: bounds of the search space, and which columns are categories. Out: a botorch input
transform to columns of mean zero and variance one over the space, categories as
indicators. Next: every :class:`~gpbridge.surrogates.recipe.Recipe` uses one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from botorch.models.transforms.input import (
    AffineInputTransform,
    ChainedInputTransform,
    InputTransform,
    NumericToCategoricalEncoding,
)
from torch import Tensor
from torch.nn.functional import one_hot

from gpbridge.surrogates.feasibility import FeasibleInputs


def input_encoding(
    X: Tensor,
    bounds: Tensor | None = None,
    categories: Mapping[int, int] | None = None,
) -> InputTransform:
    r"""The transform from the units of an experiment to those of a network.

    .. math:: z = \sqrt{12}\, (x - \tfrac{l + u}{2}) / (u - l)

    has mean zero and variance one for x uniform between the bounds l and u. A column of
    c categories becomes c indicators, in its place. Whatever cannot be is refused on
    the way, see :class:`~gpbridge.surrogates.feasibility.FeasibleInputs`.

    Args:
        X: Inputs ``n x d``, whose range stands for bounds that are not given.
        bounds: ``2 x d``.
        categories: Number of categories, by column.

    Returns:
        The transform, in eval mode.
    """
    categories = dict(categories or {})
    low, high = (X.amin(0), X.amax(0)) if bounds is None else bounds.to(X)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    numbers = [i for i in range(X.shape[-1]) if i not in categories]
    parts: dict[str, InputTransform] = {
        "feasible": FeasibleInputs(X.shape[-1], bounds, categories)
    }
    if numbers:
        parts["scale"] = AffineInputTransform(
            d=X.shape[-1],
            coefficient=width[numbers] / math.sqrt(12),
            offset=(low + high)[numbers] / 2,
            indices=numbers if categories else None,
        )
    if categories:
        parts["indicators"] = NumericToCategoricalEncoding(
            X.shape[-1],
            categories,
            {c: partial(_indicators, count=k) for c, k in categories.items()},
        )
    return ChainedInputTransform(**parts).eval()


def _indicators(values: Tensor, count: int) -> Tensor:
    return one_hot(values.round().long(), count).to(values)
