"""What a surrogate is told at its door: targets, outputs and likelihood that agree.

In: the number of outputs that the network has, and what the user passed. Out: nothing,
or an error that says which of them disagrees. Next: ``surrogates``.
"""

from __future__ import annotations

from gpytorch.likelihoods import (
    BernoulliLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_not_empty,
    check_same_length,
    check_tensor,
)
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.targets import check_targets

LABELS = (SoftmaxLikelihood, BernoulliLikelihood, LogisticLikelihood)


def check_num_outputs(
    likelihood: Likelihood | None, width: int, num_outputs: int | None = None
) -> int:
    """Require a network that has the outputs that it is said to have.

    Args:
        likelihood: Of the outputs, or None.
        width: How many the network has.
        num_outputs: How many the model is to have; default what follows.

    Returns:
        The number m of outputs of the model: half of the network's if these hold the
        noise too.

    Raises:
        ShapeError: If they disagree.
    """
    kind, wanted, m = type(likelihood).__name__, None, width
    if isinstance(likelihood, HeteroscedasticGaussianLikelihood):
        wanted, m = 2 * likelihood.num_outputs, likelihood.num_outputs
    elif isinstance(likelihood, MultitaskGaussianLikelihood):
        wanted = likelihood.num_tasks
    elif isinstance(likelihood, SoftmaxLikelihood):
        mixes = likelihood.mixing_weights is not None
        wanted = likelihood.num_features if mixes else likelihood.num_classes
    elif isinstance(likelihood, BernoulliLikelihood | LogisticLikelihood):
        wanted = 1
    if wanted is not None and wanted != width:
        raise ShapeError(
            f"{kind} is of {wanted} outputs of the network, but it has {width}. Pass "
            "the likelihood that the posterior was found with."
        )
    if num_outputs is not None and num_outputs != m:
        raise ShapeError(
            f"num_outputs is {num_outputs}, but the posterior's functions have {m} "
            "outputs. Leave it out where train_X is passed."
        )
    return m


def check_same_outputs(values: Tensor, num_outputs: int | None) -> None:
    """Require values ``... x m`` of as many outputs as the model was said to have."""
    if num_outputs is not None and values.shape[-1] != num_outputs:
        raise ShapeError(
            f"The model has num_outputs={num_outputs}, but the posterior's functions "
            f"have {values.shape[-1]} outputs. Pass train_X, and leave it out."
        )


def check_train_targets(
    likelihood: Likelihood | None, train_Y: Tensor, train_X: Tensor, width: int
) -> None:
    """Require targets that fit the inputs, the likelihood and the network.

    Args:
        likelihood: Of the outputs, or None.
        train_Y: ``... x n x m``; labels ``n`` or ``n x 1``.
        train_X: ``... x n x d``.
        width: The number of outputs of the network.

    Raises:
        ShapeError: If shapes disagree, or the network has 2m outputs for m targets and
            no likelihood says what the others are.
    """
    check_tensor(train_Y=train_Y)
    n = train_X.shape[-2]
    if isinstance(likelihood, LABELS):
        column = train_Y.dim() > 1 and train_Y.shape[-1] == 1
        labels = train_Y.squeeze(-1) if column else train_Y
        check_targets(likelihood, labels, width, n)
        return
    check_not_empty(train_Y=train_Y)
    if likelihood is None and not train_Y.is_floating_point():
        check_same_length(train_X=train_X, train_Y=train_Y)  # labels of some likelihood
        return
    m = check_num_outputs(likelihood, width)
    if train_Y.dim() < 2 or train_Y.shape[-2:] != (n, m):
        raise ShapeError(
            f"train_Y must be ``{n} x {m}`` (rows of train_X x outputs), but has shape "
            f"{tuple(train_Y.shape)}. {_remedy(likelihood, train_Y, n, m)}"
        )
    check_finite(train_Y=train_Y)


def _remedy(likelihood: Likelihood | None, Y: Tensor, n: int, m: int) -> str:
    if Y.shape == (n,) and m == 1:
        return "Try train_Y[:, None]."
    if likelihood is None and m == 2 * (1 if Y.dim() == 1 else Y.shape[-1]):
        return (
            "If the network predicts means and noise variances, say so: pass "
            f"likelihood=HeteroscedasticGaussianLikelihood({m // 2})."
        )
    return "Pass the targets that the network was trained on."
