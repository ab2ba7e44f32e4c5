"""Targets at the door: which likelihood they suggest, and whether they fit it.

In: a likelihood, targets as the user has them, the network's number of outputs. Out:
targets in the one form that ``likelihoods`` expects, or an error that says what to do.
Next: ``linearized.gp`` calls these functions in its constructor.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_binary,
    check_finite,
    check_floating,
    check_labels,
    check_not_empty,
    check_positive,
    check_same_dtype,
    check_tensor,
    warn_user,
)
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import (
    GAUSSIAN,
    LogisticLikelihood,
    check_label_model,
    is_gaussian,
    log_prob,
    noise_covariance,
    refuse,
)

NOISE_FLOOR = 1e-7  # of the variance of the targets
INITIAL_NOISE = 0.1  # of the variance of the targets


def default_likelihood(
    train_Y: Tensor, num_outputs: int, dtype: torch.dtype | None = None
) -> Likelihood:
    """Choose the likelihood that the targets and the number of outputs suggest.

    =========================================  =====================================
    0/1 labels (bool, integer, or floats that  ``LogisticLikelihood``
    are all exactly 0 or 1), one output
    integer labels, several outputs            ``SoftmaxLikelihood``, no mixing
    floats, one output                         ``GaussianLikelihood``
    floats, several outputs                    ``MultitaskGaussianLikelihood``, one
                                               noise per output and none in common
    =========================================  =====================================

    Noise variances start at 0.1 Var(y) and cannot fall below 1e-7 Var(y): a network can
    pass through all its targets, and then the evidence has no maximum in the noise.
    Constant targets count as having variance one. Float targets with a single value,
    even if that is 0 or 1, are regression.

    Args:
        train_Y: Targets, ``n x m`` or ``n``; :func:`check_targets` comes next.
        num_outputs: Number of outputs of the network, m or the number of classes.
        dtype: Of the noise. If None, that of float targets, or the default dtype.

    Returns:
        A likelihood on the device of the targets.

    Raises:
        TypeError: If integers cannot be labels, or labels came as floats.
        ShapeError: If float targets have another number of columns than the network.

    Example:
        >>> type(default_likelihood(torch.tensor([0, 2, 1]), num_outputs=3)).__name__
        'SoftmaxLikelihood'
    """
    check_tensor(train_Y=train_Y)
    check_not_empty(train_Y=train_Y)
    floating = train_Y.is_floating_point()
    if dtype is None:
        dtype = train_Y.dtype if floating else torch.get_default_dtype()
    column = train_Y.dim() == 1 or train_Y.shape[-1] == 1
    if num_outputs == 1 and column and _looks_binary(train_Y):
        return LogisticLikelihood().to(train_Y.device, dtype)
    if not floating and num_outputs == 1:
        raise TypeError(
            f"train_Y has integers other than 0 and 1 ({train_Y.dtype}), but the "
            "network has one output. For regression try train_Y.double(); for class "
            "labels give the network one output per class."
        )
    if not floating:
        return SoftmaxLikelihood(num_classes=num_outputs, mixing_weights=False)
    if num_outputs > 1 and column and bool((train_Y == train_Y.round()).all()):
        check_labels(train_Y, num_outputs)  # class numbers that came as floats
    if num_outputs > 1 and (train_Y.dim() < 2 or train_Y.shape[-1] != num_outputs):
        raise ShapeError(_shape_message("train_Y", train_Y, None, num_outputs))
    # Constraints pass through the default dtype; the likelihood moves as a whole below.
    variance = train_Y.detach().to("cpu", torch.get_default_dtype())
    variance = variance.reshape(-1, num_outputs).var(0, correction=0)
    # NaN and Inf are left for check_targets, which names their rows.
    usable = variance.isfinite() & (variance > 0)
    variance = torch.where(usable, variance, torch.ones_like(variance))
    floor = NOISE_FLOOR * variance
    # A single bound as a number: upstream cannot print a tensor of one.
    constraint = GreaterThan(float(floor) if num_outputs == 1 else floor)
    if num_outputs == 1:
        likelihood = GaussianLikelihood(noise_constraint=constraint)
        likelihood.noise = INITIAL_NOISE * variance
    else:
        likelihood = MultitaskGaussianLikelihood(
            num_outputs, rank=0, noise_constraint=constraint, has_global_noise=False
        )
        likelihood.task_noises = INITIAL_NOISE * variance
    return likelihood.to(train_Y.device, dtype)


@singledispatch
def check_targets(
    likelihood: Likelihood,
    Y: Tensor,
    num_outputs: int,
    num_rows: int,
    dtype: torch.dtype | None = None,
    name: str = "train_Y",
) -> Tensor:
    """Require targets that fit the likelihood, the network and the inputs.

    Args:
        likelihood: A gpytorch likelihood with a rule here.
        Y: Targets as the user passed them.
        num_outputs: Number of outputs of the network.
        num_rows: Number of rows of the inputs.
        dtype: What 0/1 labels are converted to; the default dtype if None.
        name: What the messages call Y.

    Returns:
        Y in canonical form: ``... x n x m`` floats (for 2m outputs of the network if it
        predicts the noise), ``n`` integers for softmax, ``... x n x 1`` floats 0 and 1
        for the binary links.

    Raises:
        TypeError: If Y is of the wrong kind, as float labels for a softmax.
        ShapeError: If shapes disagree, or the network's outputs with the likelihood.
        InputDataError: If values are not finite, or labels out of range.
        ValueError: If the likelihood is set up in a way that has no rule.
        NotImplementedError: If the class of the likelihood has no rule.
    """
    return refuse(likelihood, check_targets)


def _check_gaussian(likelihood, Y, num_outputs, num_rows, dtype=None, name="train_Y"):
    kind = type(likelihood).__name__
    tasks = getattr(likelihood, "num_tasks", 1)
    if tasks != num_outputs:
        remedy = f"MultitaskGaussianLikelihood(num_tasks={num_outputs}, rank=0)"
        raise ShapeError(
            f"{kind} models {tasks} {'output' if tasks == 1 else 'outputs'}, but the "
            f"network has {num_outputs}. Try "
            f"{'GaussianLikelihood()' if num_outputs == 1 else remedy}."
        )
    check_tensor(**{name: Y})
    if Y.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64 for {kind}, but is {Y.dtype}. For "
            f"regression try {name}.double(); for class labels pass "
            "SoftmaxLikelihood(num_classes=..., mixing_weights=False)."
        )
    if Y.dim() < 2 or Y.shape[-2:] != (num_rows, num_outputs):
        raise ShapeError(_shape_message(name, Y, num_rows, num_outputs))
    check_finite(**{name: Y})
    covariance = noise_covariance(likelihood, Y)  # raises if singular, or of another n
    check_positive(noise=covariance.diagonal(dim1=-2, dim2=-1))
    return Y


for _kind in GAUSSIAN:
    check_targets.register(_kind, _check_gaussian)


@check_targets.register(HeteroscedasticGaussianLikelihood)
def _(likelihood, Y, num_outputs, num_rows, dtype=None, name="train_Y"):
    m = likelihood.num_outputs
    if num_outputs != 2 * m:
        raise ShapeError(
            f"HeteroscedasticGaussianLikelihood(num_outputs={m}) needs a network with "
            f"{2 * m} outputs, means first and then raw variances, but it has "
            f"{num_outputs}. Give it two outputs per column of targets."
        )
    check_tensor(**{name: Y})
    if Y.dim() < 2 or Y.shape[-2:] != (num_rows, m):
        raise ShapeError(
            f"{name} must be ``{num_rows} x {m}`` (rows of the inputs x half the "
            f"outputs of the network), but has shape {tuple(Y.shape)}."
        )
    check_floating(**{name: Y})
    if dtype is not None:
        check_same_dtype(name, Y, dtype)
    check_finite(**{name: Y})
    return Y


@check_targets.register(SoftmaxLikelihood)
def _(likelihood, Y, num_outputs, num_rows, dtype=None, name="train_Y"):
    check_label_model(likelihood)
    if num_outputs == 1:
        raise ShapeError(
            "SoftmaxLikelihood needs one output per class, but the network has one "
            "output. For two classes try gpbridge.likelihoods.LogisticLikelihood()."
        )
    if likelihood.num_classes != num_outputs:
        raise ShapeError(
            f"SoftmaxLikelihood models {likelihood.num_classes} classes, but the "
            f"network has {num_outputs} outputs. Try "
            f"SoftmaxLikelihood(num_classes={num_outputs}, mixing_weights=False)."
        )
    check_tensor(**{name: Y})
    check_labels(Y, num_outputs, name)
    _check_rows(name, Y, len(Y), num_rows)
    return Y.long()


@check_targets.register(BernoulliLikelihood)
@check_targets.register(LogisticLikelihood)
def _(likelihood, Y, num_outputs, num_rows, dtype=None, name="train_Y"):
    if num_outputs != 1:
        raise ShapeError(
            f"{type(likelihood).__name__} models one output, but the network has "
            f"{num_outputs}. Try SoftmaxLikelihood(num_classes={num_outputs}, "
            "mixing_weights=False), or a network with one output."
        )
    check_tensor(**{name: Y})
    labels = Y.unsqueeze(-1) if Y.dim() == 1 else Y
    if labels.dim() < 2 or labels.shape[-1] != 1:
        raise ShapeError(
            f"{name} must be ``n`` or ``n x 1`` labels 0 and 1, but has shape "
            f"{tuple(Y.shape)}. For one-hot rows try {name}.argmax(-1)."
        )
    _check_rows(name, Y, labels.shape[-2], num_rows)
    check_finite(**{name: labels})
    check_binary(labels, name)
    return labels.to(dtype or torch.get_default_dtype())


def check_not_probabilities(likelihood: Likelihood, f: Tensor) -> None:
    """Require logits of a softmax likelihood, where rows ``n x m`` sum to one.

    Raises:
        ValueError: If the outputs are the probabilities of a softmax already.
    """
    if is_gaussian(likelihood) or f.shape[-1] < 2:
        return
    sums = (f.sum(-1) - 1).abs().max()
    if bool((f >= 0).all()) and bool(sums < 1e-4):
        raise ValueError(
            "The network must return logits, but its outputs are positive and sum to "
            "one at every training point, as those of a softmax do. Leave out its last "
            "layer, nn.Softmax; nn.LogSoftmax may stay."
        )


def warn_if_logits(likelihood: Likelihood, f: Tensor, y: Tensor) -> None:
    """Warn when a probit likelihood meets outputs that fit the labels as logits.

    The outputs of a network trained with cross entropy are about 1.7 times too large
    for the probit link. Takes outputs ``n x 1`` and canonical targets ``n x 1``.
    """
    if not isinstance(likelihood, BernoulliLikelihood):
        return
    probit = float(-log_prob(likelihood, f, y).mean())
    logistic = float(-log_prob(LogisticLikelihood(), f, y).mean())
    if probit > logistic + 1e-3:
        warn_user(
            "BernoulliLikelihood is the probit link, under which the labels cost "
            f"{probit:.3f} nats each, against {logistic:.3f} if the network's outputs "
            "are logits. After training with cross entropy pass "
            "gpbridge.likelihoods.LogisticLikelihood().",
            UserWarning,
        )


def warn_if_one_hot(train_Y: Tensor, name: str = "train_Y") -> None:
    """Warn when float targets ``n x m``, m > 1, are classes written as unit rows.

    As targets without a likelihood they make a regression of m outputs.
    """
    if not train_Y.is_floating_point() or train_Y.dim() != 2 or train_Y.shape[-1] < 2:
        return
    if bool(((train_Y == 0) | (train_Y == 1)).all() and (train_Y.sum(-1) == 1).all()):
        m = train_Y.shape[-1]
        warn_user(
            f"Every row of {name} is one-hot, yet floats without a likelihood make a "
            f"regression of {m} outputs. For a classifier pass {name}.argmax(-1); to "
            f"keep the regression pass likelihood=MultitaskGaussianLikelihood({m}, "
            "rank=0).",
            UserWarning,
        )


def _looks_binary(labels: Tensor) -> bool:
    if not bool(((labels == 0) | (labels == 1)).all()):
        return False
    return not labels.is_floating_point() or bool((labels != labels.flatten()[0]).any())


def _check_rows(name: str, Y: Tensor, found: int, num_rows: int) -> None:
    if found != num_rows:
        raise ShapeError(
            f"{name} must have {num_rows} rows as the inputs have, but has shape "
            f"{tuple(Y.shape)}. Pass one label for each row of inputs."
        )


def _shape_message(name: str, Y: Tensor, num_rows: int | None, num_outputs: int) -> str:
    remedy = "Give the network one output per column of targets."
    if Y.dim() == 1 and num_outputs == 1:
        remedy = f"Try {name}.unsqueeze(-1)."
    elif Y.dim() > 1 and Y.shape[-1] == num_outputs:
        remedy = "Pass one row of targets for each row of inputs."
    rows = "n" if num_rows is None else num_rows
    return (
        f"{name} must be ``{rows} x {num_outputs}`` (rows of the inputs x outputs of "
        f"the network), but has shape {tuple(Y.shape)}. {remedy}"
    )
