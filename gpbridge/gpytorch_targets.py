"""Targets as gpytorch's likelihoods take them: their shape, and which labels there are.

They are vectors ``n`` for one output, where ``targets`` has columns for the outputs of
a network.

In: a likelihood, targets. Out: nothing, or an error that says what to do.
Next: ``selection.elbo`` and ``selection.sparse_fit`` call these functions.
"""

from __future__ import annotations

from gpytorch.likelihoods import (
    BernoulliLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import Tensor

from gpbridge.checks import ShapeError, check_binary, check_labels
from gpbridge.likelihoods import LogisticLikelihood, outputs_of


def check_target_shape(
    likelihood: Likelihood, Y: Tensor, num_rows: int, name: str = "train_Y"
) -> None:
    """Require targets in the shape that gpytorch's likelihoods take.

    They broadcast another shape against the latent function without a word: a column
    against several outputs, or targets of the rows against those of the outputs.

    Args:
        likelihood: Of gpytorch. One without a known number of outputs is not checked.
        Y: Targets: ``n`` for labels and for one output, ``n x m`` for m outputs.
        num_rows: The number n of rows of the inputs.
        name: What the message calls Y.

    Raises:
        ShapeError: If they have another shape.
    """
    m = outputs_of(likelihood)
    if m is None:
        return
    kind, columns = type(likelihood).__name__, Y.shape[-1] if Y.dim() == 2 else None
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        expected, shown = (num_rows, m), f"``{num_rows} x {m}``"
        remedy = "Pass one column of targets for each output."
        if m > 1 and columns in (None, 1):
            remedy += " For one column leave num_outputs and the likelihood out."
    elif isinstance(likelihood, SoftmaxLikelihood):
        expected, shown = (num_rows,), f"``{num_rows}`` class labels"
        remedy = f"Try {name}.squeeze(-1), or .argmax(-1) for one-hot rows."
    else:
        expected, shown = (num_rows,), f"``{num_rows}``, one target for each row,"
        remedy = "Pass one target for each row of inputs."
        if columns == 1:
            remedy = f"Try {name}.squeeze(-1)."
        elif columns is not None and Y.shape[0] == num_rows:
            remedy = (
                f"For {columns} outputs try a model with num_outputs={columns} and "
                f"MultitaskGaussianLikelihood({columns}, rank=0)."
            )
    if Y.shape != expected:
        raise ShapeError(
            f"{name} must be {shown} for {kind}, but has shape {tuple(Y.shape)}. "
            f"{remedy}"
        )


def check_target_labels(
    likelihood: Likelihood, Y: Tensor, name: str = "train_Y"
) -> None:
    """Require labels that the likelihood has; once, since a look stops a device.

    Args:
        likelihood: Of gpytorch. Targets of one that is not for labels pass.
        Y: Targets in the right shape.
        name: What the message calls Y.

    Raises:
        InputDataError: If a label is none of the likelihood's.
        TypeError: If class labels are no integers.
    """  # noqa: DOC502
    if isinstance(likelihood, LogisticLikelihood | BernoulliLikelihood):
        check_binary(Y, name)
    elif isinstance(likelihood, SoftmaxLikelihood):
        check_labels(Y, likelihood.num_classes, name)
