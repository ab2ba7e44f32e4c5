r"""What a search space allows: bounds, categories, experiments, candidates.

In: what the user declared and passed. Out: nothing, or an error or a warning that names
it. Next: ``encoding`` asks of all inputs of a model, ``recipe`` of the experiments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from botorch.models.transforms.input import InputTransform
from torch import Tensor

from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_bounds,
    check_finite,
    check_inputs,
    check_same_device,
    check_same_length,
    warn_user,
)

SMALLEST_SPREAD = 1e-8  # botorch's Standardize takes less for a constant
OUTSIDE = 1e-6  # of the width of bounds; optimisers overstep by rounding


def check_categories(X: Tensor, categories: Mapping[int, int]) -> None:
    """Require whole numbers from zero to below the number of categories.

    Args:
        X: Inputs ``n x d``.
        categories: How many there are, by column.

    Raises:
        TypeError: If ``categories`` is no mapping of whole numbers.
        ValueError: If there is no such column, fewer than two categories, or a value
            that is none of them.
    """
    if not isinstance(categories, Mapping):
        raise TypeError(
            "categories must map columns to their numbers of categories, as {0: 3}, "
            f"but is a {type(categories).__name__}."
        )
    for column, count in categories.items():
        for what, number in (("a column", column), ("a number of categories", count)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(
                    "categories must map columns to their numbers of categories, as "
                    f"{{0: 3}}, but has {number!r} for {what}. A column of True and "
                    "False has 2."
                )
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


def check_experiments(
    X: Tensor, Y: Tensor, bounds: Tensor | None, categories: Mapping[int, int] | None
) -> None:
    """Require experiments that a surrogate can be fitted to.

    Args:
        X: Inputs ``n x d``.
        Y: Outcomes ``n x m``.
        bounds: The search space, ``2 x d``.
        categories: Number of categories, by column.

    Raises:
        ShapeError: If shapes are not those, or disagree.
        TypeError: If they are not floating point tensors.
        ValueError: If there is one observation only, a value is not finite, bounds are
            reversed, or a column of categories holds something else.

    Warns:
        ReliabilityWarning: If all outcomes are the same.
    """
    check_inputs(X)
    if isinstance(Y, Tensor) and Y.dim() == 1:
        raise ShapeError(
            f"train_Y must be ``n x m``, but has shape {tuple(Y.shape)}. For one "
            "outcome try train_Y[:, None]."
        )
    check_inputs(Y, "train_Y")
    check_same_length(train_X=X, train_Y=Y)
    check_same_device(train_X=X, train_Y=Y)
    if X.dim() != 2 or Y.dim() != 2:
        raise ShapeError(
            "train_X must be ``n x d`` and train_Y ``n x m``, but they have shapes "
            f"{tuple(X.shape)} and {tuple(Y.shape)}."
        )
    if len(X) < 2:
        raise ValueError(
            f"A surrogate needs at least 2 observations, but there are {len(X)}. "
            "Begin with a design, as botorch.utils.sampling.draw_sobol_samples."
        )
    if bounds is not None:
        check_bounds(bounds)
        if bounds.shape[-1] != X.shape[-1]:
            raise ShapeError(
                f"bounds are of {bounds.shape[-1]} columns, but train_X has "
                f"{X.shape[-1]}."
            )
    check_categories(X, {} if categories is None else categories)
    constant = (Y == Y[0]).all(0)
    small = ~constant & (Y.std(0) < SMALLEST_SPREAD)
    if bool(small.any()):
        column = int(small.nonzero()[0])
        raise ValueError(
            f"Outcome {column} has standard deviation {float(Y[:, column].std()):.2g}, "
            f"but below {SMALLEST_SPREAD:g} upstream does not standardise. Pass "
            "train_Y in smaller units, such as train_Y * 1e9."
        )
    if bool(constant.any()):
        column = int(constant.nonzero()[0])
        warn_user(
            f"All {len(Y)} values of outcome {column} are {float(Y[0, column]):g}: "
            "they tell a surrogate nothing about where to look, nor how large "
            "outcomes may be. Observe elsewhere before you trust it.",
            ReliabilityWarning,
        )


class FeasibleInputs(InputTransform):
    r"""Changes nothing, and names inputs that cannot be: candidates, X_pending, data.

    A model of an acquisition function sees pending points as it sees candidates, in one
    tensor; a wrong one would be a NaN at best. Fractions in a column of categories are
    left to rounding, since relaxed optimisers pass them.

    Args:
        num_inputs: Columns that inputs must have.
        bounds: Declared bounds ``2 x d``, or None.
        categories: Number of categories, by column.
    """

    transform_on_train = True
    transform_on_eval = True
    transform_on_fantasize = True

    def __init__(
        self, num_inputs: int, bounds: Tensor | None, categories: Mapping[int, int]
    ) -> None:
        super().__init__()
        self.num_inputs, self.categories = num_inputs, dict(categories)
        self.register_buffer("bounds", bounds)

    def transform(self, X: Tensor) -> Tensor:
        """The inputs ``... x n x d`` as they are.

        Raises:
            InputDataError: If one is not finite.
            ShapeError: If they have another number of columns.
            ValueError: If a category does not exist.

        Warns:
            ReliabilityWarning: If one is outside of the declared bounds.
        """
        with torch.no_grad():
            self._check(X)
        return X

    def untransform(self, X: Tensor) -> Tensor:
        """The inputs as they are."""
        return X

    def _check(self, X: Tensor) -> None:
        if X.shape[-1] != self.num_inputs:
            raise ShapeError(
                f"X (candidates and X_pending) must have {self.num_inputs} columns as "
                f"train_X has, but has shape {tuple(X.shape)}."
            )
        rows = X.detach().flatten(0, -2)
        check_finite(**{"X (candidates and X_pending)": rows})
        for column, count in self.categories.items():
            values = rows[:, column]
            wrong = (values.round() < 0) | (values.round() >= count)
            if bool(wrong.any()):
                raise ValueError(
                    f"X (candidates and X_pending) must hold the categories 0 to "
                    f"{count - 1} in column {column}, but holds "
                    f"{float(values[wrong][0]):g}."
                )
        if self.bounds is None:
            return
        low, high = self.bounds.to(rows)
        slack = OUTSIDE * (high - low)
        outside = (rows < low - slack) | (rows > high + slack)
        outside[:, list(self.categories)] = False
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            warn_user(
                "X (candidates and X_pending) leaves the bounds of the recipe: column "
                f"{column} holds {float(rows[row, column]):g}, which is not in "
                f"[{float(low[column]):g}, {float(high[column]):g}]. Surrogates are "
                "not to be trusted there.",
                ReliabilityWarning,
            )
