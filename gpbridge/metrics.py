"""Scores of predictive distributions: errors, log scores, calibration, detection.

In: predictions and targets as tensors. Out: scalars without a dimension, differentiable
where the score is. Predictions come first and targets last, as in torch's losses;
shapes must agree exactly, since ``n`` against ``n x 1`` would broadcast to ``n x n``.
Every score is a mean, never a total. Next: ``plots`` draws the reliability curve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from botorch.exceptions.errors import InputDataError
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_binary,
    check_choice,
    check_finite,
    check_floating,
    check_labels,
    check_not_empty,
    check_positive,
    check_same_length,
    check_tensor,
)


class ReliabilityCurve(NamedTuple):
    """How often the confident are right: one entry per bin that holds any point.

    ``lower`` and ``upper`` are the bin's edges, ``confidence`` the mean largest
    probability inside it, ``accuracy`` the share of correct labels, ``count`` the
    number of points.
    """

    lower: Tensor
    upper: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    """Root of the mean squared error over all points and outputs.

    Args:
        mean: Predictions, ``n`` or ``n x m``.
        y: Targets of the same shape.

    Returns:
        A scalar in units of the targets.
    """
    _check_same_shape(mean=mean, y=y)
    return (mean - y).square().mean().sqrt()


def gaussian_nll(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    r"""Mean negative log density per point under normal predictions, in nats.

    .. math:: \tfrac1n \sum_i \sum_k \tfrac12 \log 2\pi v_{ik}
        + (y_{ik} - \mu_{ik})^2 / 2 v_{ik},

    a mean over points and a sum over outputs, which are taken as independent. Multiply
    the targets by a factor c and each output adds log c: add the log of the standard
    deviation to go from standardised to raw units.

    Args:
        mean: Predictive means, ``n`` or ``n x m``.
        variance: Predictive variances of y, noise included, of the same shape.
        y: Targets of the same shape.

    Returns:
        A scalar in nats per point.
    """
    _check_gaussian(mean, variance, y)
    nats = 0.5 * (math.log(2 * math.pi) + variance.log())
    nats = nats + 0.5 * (y - mean).square() / variance
    return nats.sum() / len(y)


def interval_coverage(
    mean: Tensor, variance: Tensor, y: Tensor, level: float = 0.95
) -> Tensor:
    """Share of targets inside the central interval of normal predictions.

    Args:
        mean: Predictive means, ``n`` or ``n x m``.
        variance: Predictive variances of y, noise included, of the same shape.
        y: Targets of the same shape.
        level: Probability of the interval, which is the share a calibrated model has.

    Returns:
        A scalar between 0 and 1, over all points and outputs.

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    _check_gaussian(mean, variance, y)
    if not 0 < level < 1:
        raise ValueError(
            f"level must lie strictly between 0 and 1, but is {level}. For the 95% "
            "interval pass level=0.95."
        )
    quantile = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
    inside = (y - mean).abs() <= quantile.to(mean) * variance.sqrt()
    return inside.to(mean).mean()


def crps_gaussian(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    r"""Mean continuous ranked probability score of normal predictions.

    .. math:: \int (F(t) - 1[t \ge y])^2 dt
        = s \{ z (2 \Phi(z) - 1) + 2 \varphi(z) - 1/\sqrt\pi \},
        \qquad z = (y - \mu) / s .

    It generalises the absolute error, and unlike the log score it grows only linearly
    with a miss.

    Args:
        mean: Predictive means, ``n`` or ``n x m``.
        variance: Predictive variances of y, noise included, of the same shape.
        y: Targets of the same shape.

    Returns:
        A scalar in units of the targets, the mean over points and outputs.

    References:
        Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation,
        JASA 2007, section 4.2.
    """
    _check_gaussian(mean, variance, y)
    std = variance.sqrt()
    z = (y - mean) / std
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    # 2 Phi(z) - 1 as an error function keeps its digits near z = 0.
    spread = z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)
    return (std * spread).mean()


def categorical_nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log probability of the labels, in nats per point.

    Probabilities below the smallest normal number of their dtype count as that number
    (87 nats in float32): this is where a softmax underflows to zero.

    Args:
        probabilities: Class probabilities, ``n x C``.
        labels: Integer labels, ``n``.

    Returns:
        A scalar in nats per point.
    """
    _check_classes(probabilities, labels)
    own = probabilities.gather(1, labels.long()[:, None])
    return -own.clamp_min(torch.finfo(own.dtype).tiny).log().mean()


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over points of the squared distance to the one-hot label, between 0 and 2.

    Args:
        probabilities: Class probabilities, ``n x C``.
        labels: Integer labels, ``n``.

    Returns:
        A scalar, summed over classes and averaged over points.
    """
    _check_classes(probabilities, labels)
    target = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return (probabilities - target).square().sum(-1).mean()


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of points whose most probable class is the label.

    Args:
        probabilities: Class probabilities, ``n x C``.
        labels: Integer labels, ``n``.

    Returns:
        A scalar between 0 and 1.
    """
    _check_classes(probabilities, labels)
    return (probabilities.argmax(-1) == labels).to(probabilities).mean()


def reliability_curve(
    probabilities: Tensor, labels: Tensor, bins: int = 15, equal: str = "width"
) -> ReliabilityCurve:
    """Accuracy against confidence in bins of the largest probability.

    Bins are open on the left and closed on the right: (k/b, (k+1)/b], or between
    quantiles of the confidence, so that each holds as many points as any other. Points
    of equal confidence share a bin.

    Args:
        probabilities: Class probabilities, ``n x C``.
        labels: Integer labels, ``n``.
        bins: Number of bins between 0 and 1; empty ones are left out of the result.
        equal: ``"width"``, or ``"mass"`` for equally many points.

    Returns:
        The curve, each field with one entry per bin that holds a point.
    """
    _check_classes(probabilities, labels)
    check_positive(bins=bins)
    check_choice("equal", equal, ("width", "mass"))
    confidence, predicted = probabilities.max(-1)
    correct = (predicted == labels).to(probabilities)
    edges = torch.linspace(
        0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device
    )
    if equal == "mass":
        last = (torch.arange(1, bins) * len(labels) + bins - 1) // bins - 1
        edges[1:-1] = confidence.clamp_max(1).sort().values[last.to(confidence.device)]
    # Rounding can leave a probability just above one.
    index = torch.bucketize(confidence.clamp_max(1), edges[1:])  # n
    count = torch.bincount(index, minlength=bins)
    used = count > 0
    total = count[used].to(probabilities)
    zeros = probabilities.new_zeros(bins)
    return ReliabilityCurve(
        lower=edges[:-1][used],
        upper=edges[1:][used],
        confidence=zeros.index_add(0, index, confidence)[used] / total,
        accuracy=zeros.index_add(0, index, correct)[used] / total,
        count=count[used],
    )


def expected_calibration_error(
    probabilities: Tensor, labels: Tensor, bins: int = 15, equal: str = "width"
) -> Tensor:
    r"""Mean gap between confidence and accuracy over bins of the confidence.

    .. math:: \sum_b \tfrac{n_b}{n} | \text{accuracy}_b - \text{confidence}_b |

    A perfectly calibrated model scores above zero, about .011 to .018 with 500 points:
    read differences, and never select by it on few points.

    Args:
        probabilities: Class probabilities, ``n x C``.
        labels: Integer labels, ``n``.
        bins: Number of bins of the largest probability.
        equal: ``"width"``, or ``"mass"`` for bins of equally many points.

    Returns:
        A scalar between 0 and 1.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. (3).
    """
    curve = reliability_curve(probabilities, labels, bins, equal)
    gap = (curve.accuracy - curve.confidence).abs()
    return (curve.count * gap).sum() / len(labels)


def predictive_entropy(probabilities: Tensor) -> Tensor:
    r"""How undecided a prediction is: :math:`-\sum_c p_c \log p_c` of each point.

    Args:
        probabilities: Class probabilities, ``n x C``.

    Returns:
        Nats ``n``, from 0 to log C.
    """
    # Labels only matter to what compares with them.
    _check_classes(probabilities, torch.zeros(len(probabilities), dtype=torch.long))
    return torch.special.entr(probabilities).sum(-1)


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Probability that a positive point scores above a negative one, ties count half.

    The area under the receiver operating characteristic, by ranks: n log n.

    Args:
        scores: Higher means more likely positive, ``n``.
        positive: Which points are positive, ``n`` of bool or 0 and 1.

    Returns:
        A scalar between 0 and 1; 0.5 for scores that say nothing.

    Raises:
        ShapeError: If scores and labels are not two vectors of one length.
        InputDataError: If only one class is present.
    """
    check_tensor(scores=scores, positive=positive)
    check_floating(scores=scores)
    if scores.dim() != 1 or positive.shape != scores.shape:
        raise ShapeError(
            "scores and positive must both be ``n``, but have shapes "
            f"{tuple(scores.shape)} and {tuple(positive.shape)}. Try .flatten()."
        )
    check_finite(scores=scores)
    check_binary(positive, "positive")
    positive = positive.bool()
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        raise InputDataError(
            f"auroc compares two groups, but got {num_positive} positive and "
            f"{num_negative} negative points. Concatenate the scores of both groups."
        )
    _, index, count = torch.unique(scores, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    midrank = last - (count - 1) / 2  # equal scores share the mean of their ranks
    rank_sum = midrank[index][positive].sum()
    wins = rank_sum - num_positive * (num_positive + 1) / 2
    return (wins / (num_positive * num_negative)).to(scores)


def fit_temperature(
    log_probabilities: Tensor,
    labels: Tensor,
    bounds: tuple[float, float] = (0.05, 10.0),
) -> float:
    r"""The temperature T that minimises the NLL of softmax(log p / T) on held-out data.

    The mean NLL is convex in :math:`1/T` and its slope is the mean of
    :math:`E_{p_T}[\log p_c] - \log p_y`, so bisection on the sign of the slope finds
    the minimum inside the bounds, and the nearer bound if it lies outside: labels that
    are all predicted correctly ask for T = 0. Deterministic; about 50 passes over
    ``n x C`` numbers.

    Args:
        log_probabilities: Log probabilities ``n x C`` on data that neither trained the
            model nor measure it; logits do as well.
        labels: Integer labels, ``n``.
        bounds: Smallest and largest temperature. Plain networks want (0.5, 10).

    Returns:
        The temperature; above one if the model was overconfident.

    Raises:
        ValueError: If the bounds are not positive and increasing.
        InputDataError: If a label has log probability minus infinity.
    """
    _check_log_probabilities(log_probabilities, labels)
    low, high = bounds
    if not 0 < low < high < math.inf:
        raise ValueError(
            "bounds must be two increasing positive temperatures, but are "
            f"{bounds}. Try (0.05, 10.0)."
        )
    logs = log_probabilities.detach().double()
    own = logs.gather(1, labels.long()[:, None])
    if not torch.isfinite(own).all():
        row = int(torch.nonzero(~torch.isfinite(own[:, 0]))[0])
        raise InputDataError(
            f"log_probabilities gives the label of row {row} probability zero, which "
            "no temperature repairs. Clamp the probabilities from below, as at 1e-12."
        )
    # Relative to the label, so that common constants cancel before the difference.
    # Impossible classes have weight zero in the mean: any finite number will do.
    finite = torch.where(torch.isfinite(logs), logs - own, 0.0)

    def slope(temperature: float) -> float:
        weights = torch.softmax(logs / temperature, dim=-1)
        return float((weights * finite).sum(-1).mean())

    # The slope is in 1/T: positive means that 1/T is too large, so T must grow.
    if slope(high) >= 0:
        return float(high)
    if slope(low) <= 0:
        return float(low)
    left, right = math.log(low), math.log(high)
    while right - left > 1e-12:
        middle = 0.5 * (left + right)
        if slope(math.exp(middle)) > 0:
            left = middle
        else:
            right = middle
    return math.exp(0.5 * (left + right))


def apply_temperature(log_probabilities: Tensor, temperature: float) -> Tensor:
    r"""Divide log probabilities by T and normalise: :math:`p_c \propto p_c^{1/T}`.

    Args:
        log_probabilities: Log probabilities or logits, ``... x C``.
        temperature: The calibration temperature; above one softens.

    Returns:
        Log probabilities, ``... x C``.
    """
    check_positive(temperature=temperature)
    return torch.log_softmax(log_probabilities / temperature, dim=-1)


def _check_same_shape(**values: Tensor) -> None:
    check_tensor(**values)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} is {shape}" for name, shape in shapes.items())
        raise ShapeError(
            f"Predictions and targets must have the same shape, but {found}. Nothing "
            "is broadcast; try .squeeze(-1) or .unsqueeze(-1)."
        )
    first = next(iter(values.values()))
    if first.dim() not in (1, 2):
        raise ShapeError(
            "Predictions must be ``n`` or ``n x m``, but have shape "
            f"{tuple(first.shape)}. Flatten batch dimensions into rows."
        )
    check_floating(**values)
    check_not_empty(**values)
    check_finite(**values)


def _check_gaussian(mean: Tensor, variance: Tensor, y: Tensor) -> None:
    _check_same_shape(mean=mean, variance=variance, y=y)
    check_positive(variance=variance)


def _check_classes(probabilities: Tensor, labels: Tensor) -> None:
    _check_class_shapes("probabilities", probabilities, labels)
    check_finite(probabilities=probabilities)
    if (probabilities < 0).any():
        raise InputDataError(
            "probabilities must not be negative, but are as low as "
            f"{float(probabilities.min()):.3g}. Try .exp() of log probabilities, or "
            ".softmax(-1) of logits."
        )
    error = (probabilities.sum(-1) - 1).abs()
    if (error > 1e-4).any():
        row = int(error.argmax())
        raise InputDataError(
            "probabilities must sum to one over the last axis, but row "
            f"{row} sums to {float(probabilities[row].sum()):.6g}. Try .softmax(-1) of "
            "logits, or divide by the sum."
        )


def _check_log_probabilities(log_probabilities: Tensor, labels: Tensor) -> None:
    _check_class_shapes("log_probabilities", log_probabilities, labels)
    bad = torch.isnan(log_probabilities) | (log_probabilities == math.inf)
    if bad.any():
        raise InputDataError(
            f"log_probabilities contains NaN or +Inf in {int(bad.any(-1).sum())} of "
            f"{len(bad)} rows. Take log_softmax of finite logits."
        )


def _check_class_shapes(name: str, values: Tensor, labels: Tensor) -> None:
    check_tensor(**{name: values}, labels=labels)
    check_floating(**{name: values})
    if values.dim() != 2:
        raise ShapeError(
            f"{name} must be ``n x C``, but has shape {tuple(values.shape)}. For the "
            "probability p of class one, try torch.stack([1 - p, p], -1)."
        )
    check_not_empty(**{name: values})
    check_labels(labels, values.shape[1], "labels")
    check_same_length(**{name: values}, labels=labels)
