"""What a linearised GP takes over from a training run: rows, noise, selection.

In: the record of the run, data, options. Out: the data to condition on, the record in
terms of their rows, and the options that follow from it. Next: ``gp`` builds the model
with them, ``persistence`` takes rows out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_same_length,
    check_tensor,
)
from gpbridge.likelihoods import is_gaussian
from gpbridge.types import FitResult


def data_after_training(
    fit_result: FitResult, train_X: Tensor, train_Y: Tensor, rows: str
) -> tuple[FitResult, Tensor, Tensor]:
    """The data to condition on, and the training run in terms of their rows.

    Args:
        fit_result: The training run.
        train_X: All inputs ``n x d``, in the order of the run.
        train_Y: All targets.
        rows: ``"all"``, or ``"fit"`` for those that the run fitted.

    Returns:
        The run, inputs and targets.

    Raises:
        ShapeError: If the rows of the training run are not rows of the data.
    """
    check_choice("rows", rows, ("all", "fit"))
    check_tensor(train_X=train_X, train_Y=train_Y)
    named = torch.cat([fit_result.fit_rows, fit_result.validation_rows])
    if len(named) and int(named.max()) >= len(train_X):
        raise ShapeError(
            f"The fit result names row {int(named.max())}, but train_X has "
            f"{len(train_X)} rows. Pass the data that fit_map was called with."
        )
    if rows == "all":
        return fit_result, train_X, train_Y
    check_same_length(train_X=train_X, train_Y=train_Y)
    chosen = fit_result.fit_rows.to(train_X.device)
    own = restricted(fit_result, chosen, len(train_X))
    return own, train_X[chosen], train_Y[chosen]


def restricted(fit_result: FitResult, rows: Tensor, num_rows: int) -> FitResult:
    """A training run in terms of some of its rows, renumbered in their order."""
    position = torch.full((num_rows,), -1)
    position[rows.cpu()] = torch.arange(len(rows))
    fit, held_out = (
        numbers[numbers >= 0]
        for numbers in (
            position[fit_result.fit_rows.cpu()],
            position[fit_result.validation_rows.cpu()],
        )
    )
    return dataclasses.replace(fit_result, fit_rows=fit, validation_rows=held_out)


def check_training_run(fit_result: FitResult) -> None:
    """Require what ``fit_map`` returns.

    Raises:
        TypeError: If it is something else, such as the network itself.
    """
    if not isinstance(fit_result, FitResult):
        raise TypeError(
            "fit_result must be what gpbridge.dnn.fit_map returned, but is "
            f"{type(fit_result).__name__}. For a network that you trained use "
            "LinearizedGP(network, train_X, train_Y)."
        )


def defaults_after_training(
    fit_result: FitResult,
    train_Y: Tensor,
    likelihood: Likelihood | None,
    noise: str | float | None,
    select: str | None,
    rows: str,
    options: Mapping[str, Any],
) -> tuple[str | float, str | None]:
    """Resolve the options ``noise`` and ``select`` of a model after a training run.

    Args:
        fit_result: The training run.
        train_Y: All targets; labels have no noise to choose.
        likelihood: The user's, or None.
        noise: The option, None for the default.
        select: The option, ``"auto"`` for the default.
        rows: Which rows are conditioned on.
        options: Further options of the constructor.

    Returns:
        Both options of the constructor.

    Raises:
        ValueError: If there are no validation rows to select by.
    """
    check_choice("select", select, ("auto", "validation", None))
    has_validation = len(fit_result.validation_rows) > 0
    if noise is None:
        noise = "learn"
        if not _observes_labels(likelihood, train_Y, fit_result):
            last_layer = options.get("parameters", "all") == "last_layer"
            if options.get("mean") == "network":
                noise = "fit_residual"
            elif last_layer and has_validation:
                noise = "validation"
    if select == "auto":
        free = noise == "learn" and options.get("mean", "auto") == "auto"
        regression = fit_result.validation_variance is not None and rows == "all"
        settable = likelihood is None or isinstance(likelihood, GaussianLikelihood)
        select = "validation" if free and regression and settable else None
    if select == "validation" and rows == "fit":
        raise ValueError(
            "select='validation' compares on the validation rows, which rows='fit' "
            "leaves out. Pass rows='all': the comparison itself does not fit them."
        )
    if select == "validation" and not has_validation:
        raise ValueError(
            "select='validation' needs validation rows, but the fit result has none. "
            "Train with validation_fraction=0.1, or pass select=None."
        )
    return noise, select


def _observes_labels(
    likelihood: Likelihood | None, train_Y: Tensor, fit_result: FitResult
) -> bool:
    """Whether a model after a training run is a classifier."""
    check_tensor(train_Y=train_Y)
    if likelihood is not None:
        return not is_gaussian(likelihood)
    if fit_result.residual_variance is None and train_Y.is_floating_point():
        return bool(((train_Y == 0) | (train_Y == 1)).all())
    return not train_Y.is_floating_point()


def row_numbers(rows: Tensor, num_rows: int) -> Tensor:
    """Numbers of the rows that a vector of numbers or a mask names.

    Raises:
        TypeError: If it is neither.
        ShapeError: If it has another shape.
        ValueError: If it names no row, or one that is not there.
    """
    check_tensor(rows=rows)
    if rows.is_floating_point() or rows.is_complex():
        raise TypeError(
            f"rows must be row numbers or a mask, but is of {rows.dtype}. Try "
            "rows.long()."
        )
    mask = rows.dtype == torch.bool
    if rows.dim() != 1 or (mask and len(rows) != num_rows):
        raise ShapeError(
            f"rows must be a vector of row numbers, or a mask of {num_rows} rows, but "
            f"has shape {tuple(rows.shape)} and {rows.dtype}."
        )
    numbers = rows.nonzero().flatten() if mask else rows.long()
    if not len(numbers) or not bool(((numbers >= 0) & (numbers < num_rows)).all()):
        raise ValueError(
            f"rows must name rows in 0 .. {num_rows - 1}, at least one, but are "
            f"{len(numbers)} between {min(numbers.tolist(), default=None)} and "
            f"{max(numbers.tolist(), default=None)}."
        )
    return numbers
