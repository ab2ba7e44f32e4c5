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


def check_categories(X: Tensor, categories: Mapping[int, int]) -> None:
    """Require whole numbers from zero to below the number of categories.

    Args:
        X: Inputs ``n x d``.
        categories: How many there are, by column.

    Raises:
        ValueError: If there is no such column, fewer than two categories, or a value
            that is none of them.
    """
    for column, count in categories.items():
        if not 0 <= column < X.shape[-1]:
            raise ValueError(
                f"categories names column {column}, but the inputs have columns 0 to "
                f"{X.shape[-1] - 1}."
            )
        if count < 2:
            raise ValueError(
                f"categories must say how many values column {column} can have, at "
                f"least 2, but says {count}."
            )
        values = X[..., column]
        wrong = (values != values.round()) | (values < 0) | (values >= count)
        if bool(wrong.any()):
            raise ValueError(
                f"Column {column} is declared to hold the categories 0 to {count - 1}, "
                f"but holds {float(values[wrong][0]):g}. Number the categories from "
                "zero, or leave the column out of categories."
            )


def input_encoding(
    X: Tensor,
    bounds: Tensor | None = None,
    categories: Mapping[int, int] | None = None,
) -> InputTransform:
    r"""The transform from the units of an experiment to those of a network.

    .. math:: z = \sqrt{12}\, (x - \tfrac{l + u}{2}) / (u - l)

    has mean zero and variance one for x uniform between the bounds l and u. A column of
    c categories becomes c indicators, in its place.

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
    parts = {}
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
    if len(parts) == 1:
        return next(iter(parts.values())).eval()
    return ChainedInputTransform(**parts).eval()


def _indicators(values: Tensor, count: int) -> Tensor:
    return one_hot(values.round().long(), count).to(values)
