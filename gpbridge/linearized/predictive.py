"""Predicted labels: class probabilities, one temperature, and how to choose both.

In: mean and covariance of the network's outputs, a likelihood of labels. Out: its class
probabilities under a link; on held-out data, the prior variance and the temperature
that give the labels the smallest negative log likelihood, with the evidence that they
are better than the network as it is.
Next: ``gp`` offers these as ``LinearizedGP.predict`` and ``LinearizedGP.calibrate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_finite,
    check_not_empty,
    check_positive,
    check_same_length,
)
from gpbridge.likelihoods import LogisticLikelihood, check_label_model, refuse
from gpbridge.linearized.links import LINKS, check_moments
from gpbridge.metrics import apply_temperature, fit_temperature

PRIOR_VARIANCES = tuple(10 ** (-k / 2) for k in range(-2, 10))
"""Twelve half decades of prior variance, 10 down to 10^-4.5."""

POSTERIOR_TEMPERATURES = (0.05, 10.0)
"""Broad posteriors are underconfident on average: their temperature is well below 1."""

NETWORK_TEMPERATURES = (0.5, 10.0)
"""Few held-out labels, all predicted correctly, must not sharpen a plain network."""


@singledispatch
def class_log_probabilities(
    likelihood: Likelihood,
    mean: Tensor,
    covariance: Tensor,
    link: str = "pairwise",
    **options: object,
) -> Tensor:
    """Log probability of each class at each point, under any likelihood of labels.

    Two columns, labels 0 and 1, for one output. A logistic output is the difference of
    two logits that share it evenly, so that the links of several classes apply, but
    ``probit`` stands for MacKay's form, which ``pairwise`` equals here. A probit output
    has its exact probability under every link that averages. Logs, because a small
    probability beside one close to one has no other exact form; a categorical
    distribution of them clamps nothing.

    Args:
        likelihood: A softmax, logistic or probit likelihood.
        mean: Mean of the network's outputs, ``... x m``.
        covariance: Their covariance at each point, ``... x m x m``.
        link: One of the names in ``LINKS``.
        **options: Of the link, as ``num_samples`` and ``generator`` of Monte Carlo.

    Returns:
        ``... x C`` in the dtype of the mean, with C = 2 for one output.

    Raises:
        NotImplementedError: If the likelihood is not one of labels.
        ValueError: If the link is unknown.
    """
    return refuse(likelihood, class_log_probabilities)


@class_log_probabilities.register(SoftmaxLikelihood)
def _(likelihood, mean, covariance, link="pairwise", **options):
    check_label_model(likelihood)
    check_choice("link", link, list(LINKS))
    return LINKS[link](mean, covariance, log=True, **options)


@class_log_probabilities.register(LogisticLikelihood)
def _(likelihood, mean, covariance, link="pairwise", **options):
    check_choice("link", link, list(LINKS))
    _check_one_output(likelihood, mean)
    check_moments(mean, covariance)
    split = torch.tensor([-0.5, 0.5], dtype=torch.float64, device=mean.device)
    logits = mean.double() * split  # ... x 2
    spread = covariance.double() * split.unsqueeze(-1) * split  # ... x 2 x 2
    link = "pairwise" if link == "probit" else link
    return LINKS[link](logits, spread, log=True, **options).to(mean.dtype)


@class_log_probabilities.register(BernoulliLikelihood)
def _(likelihood, mean, covariance, link="pairwise", **options):
    check_choice("link", link, list(LINKS))
    _check_one_output(likelihood, mean)
    check_moments(mean, covariance)
    logit = mean.double()
    if link != "plugin":
        variance = covariance.double().squeeze(-1).clamp_min(0)
        logit = logit * (1 + variance).rsqrt()
    logs = torch.special.log_ndtr(torch.cat([-logit, logit], -1))
    return logs.to(mean.dtype)


def probabilities(
    likelihood: Likelihood,
    mean: Tensor,
    covariance: Tensor,
    link: str = "pairwise",
    calibration_temperature: float = 1.0,
    **options: object,
) -> Tensor:
    """Probabilities of the classes, or of the label 1 where there is one output.

    Args:
        likelihood: A softmax, logistic or probit likelihood.
        mean: Mean of the network's outputs, ``... x m``.
        covariance: Their covariance at each point, ``... x m x m``.
        link: One of the names in ``LINKS``.
        calibration_temperature: Divides the log probabilities.
        **options: Of the link.

    Returns:
        ``... x m`` in the dtype of the mean.
    """
    check_positive(calibration_temperature=calibration_temperature)
    logs = class_log_probabilities(likelihood, mean, covariance, link, **options)
    logs = apply_temperature(logs, calibration_temperature)
    return (logs if mean.shape[-1] > 1 else logs[..., 1:]).exp()


class CalibrationResult(NamedTuple):
    """The best candidate on the held-out data, and whether to adopt it.

    Attributes:
        prior_variance: Of the best candidate; 0 is the network with a temperature.
        calibration_temperature: Of the best candidate, divides log probabilities.
        adopted: Whether the mean gain exceeds one standard error. If not, keep the
            network's own probabilities, whatever the best candidate was.
        gain: Mean over held-out points of the network's NLL minus the candidate's, in
            nats per point.
        gain_std_error: Standard error of that mean; the differences are paired.
        network_nll: Mean NLL of the network on the held-out data.
        calibrated_nll: The same of the best candidate.
    """

    prior_variance: float
    calibration_temperature: float
    adopted: bool
    gain: float
    gain_std_error: float
    network_nll: float
    calibrated_nll: float


@torch.no_grad()
def choose_calibration(
    likelihood: Likelihood,
    network_logits: Tensor,
    labels: Tensor,
    covariance_of: Callable[[float], Tensor],
    prior_variances: Sequence[float] = PRIOR_VARIANCES,
    link: str = "pairwise",
    **options: object,
) -> CalibrationResult:
    r"""Prior variance and temperature jointly, by the smallest held-out NLL.

    .. math::
        \min_{s, T} - \tfrac1n \sum_i \log \mathrm{softmax}\big(
            \tfrac1T \log q(f_i, S_i(s)) \big)_{y_i}

    over a grid of prior variances s and, for each, one temperature T; the network with
    a temperature is one more candidate and wins ties. The best is adopted if its mean
    gain over the network as it is exceeds one standard error.

    The gain on the points that made the choice flatters it: one standard error passes
    about 13 % of perfectly calibrated networks (a chi-squared of two parameters beyond
    4), which then lose about .02 nats on 200 points. A stricter guard costs more than
    it saves: a cross-validated gain passes 3 %, but on ten networks on digits it gave
    up nine tenths of an improvement of .021 nats. Without held-out data keep the
    network's own probabilities: no rule that uses training data alone is safe on
    networks that are calibrated already.

    Cost: one call of ``covariance_of`` and about 50 passes over ``n x m`` numbers for
    each candidate; one eigendecomposition can serve all covariances.

    Args:
        likelihood: A softmax, logistic or probit likelihood.
        network_logits: Outputs of the network on the held-out inputs, ``n x m``.
        labels: Held-out labels in canonical form: ``n`` integers for softmax, ``n x 1``
            of 0 and 1 for one output.
        covariance_of: Maps a prior variance per weight to the posterior covariance of
            the outputs at the held-out inputs, ``n x m x m``.
        prior_variances: Candidates; the network's own (0) need not be among them.
        link: How the Gaussian is averaged, any but "plugin".
        **options: Of the link, as the number of Monte Carlo samples.

    Returns:
        The best candidate and the evidence for it.

    Raises:
        ShapeError: If lengths differ or ``covariance_of`` returns another shape.
        InputDataError: If it returns NaN or Inf, or the data are empty.
        ValueError: If the link is unknown, or a prior variance is negative.

    References:
        Guo, Pleiss, Sun and Weinberger, On calibration of modern neural networks, ICML
        2017, for the temperature.
    """
    check_choice("link", link, [name for name in LINKS if name != "plugin"])
    check_not_empty(network_logits=network_logits)
    averaged = sorted(set(prior_variances) - {0.0})
    check_positive(prior_variances=torch.tensor(averaged))
    logits = network_logits.double()
    n, m = logits.shape
    classes = labels if isinstance(likelihood, SoftmaxLikelihood) else labels.flatten()
    classes = classes.long()
    check_same_length(network_logits=logits, labels=classes)

    nothing = logits.new_zeros(n, m, m)
    network = class_log_probabilities(likelihood, logits, nothing, "plugin")
    network_nll = _nll(network, classes)

    best, lowest = None, math.inf
    # From the network outwards, and only strict improvements: ties keep less posterior.
    for prior_variance in (0.0, *averaged):
        logs, bounds = network, NETWORK_TEMPERATURES
        if prior_variance > 0:
            covariance = covariance_of(prior_variance)
            _check_covariance(covariance, prior_variance, (n, m, m))
            logs = class_log_probabilities(
                likelihood, logits, covariance.double(), link, **options
            )
            bounds = POSTERIOR_TEMPERATURES
        temperature = fit_temperature(logs, classes, bounds)
        nll = _nll(apply_temperature(logs, temperature), classes)
        if float(nll.mean()) < lowest:
            best, lowest = (prior_variance, temperature, nll), float(nll.mean())

    prior_variance, temperature, nll = best
    gain = network_nll - nll
    # One point has no spread to judge its gain by, and is never enough.
    std_error = float(gain.std()) / math.sqrt(n) if n > 1 else math.inf
    return CalibrationResult(
        prior_variance=prior_variance,
        calibration_temperature=temperature,
        adopted=float(gain.mean()) > std_error,
        gain=float(gain.mean()),
        gain_std_error=std_error,
        network_nll=float(network_nll.mean()),
        calibrated_nll=float(nll.mean()),
    )


def _check_one_output(likelihood: Likelihood, mean: Tensor) -> None:
    if mean.shape[-1] != 1:
        raise ShapeError(
            f"{type(likelihood).__name__} needs ``... x 1`` outputs, but mean has "
            f"shape {tuple(mean.shape)}. For several classes try SoftmaxLikelihood."
        )


def _nll(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, classes.unsqueeze(-1)).squeeze(-1)


def _check_covariance(
    covariance: Tensor, prior_variance: float, shape: tuple[int, int, int]
) -> None:
    if covariance.shape != shape:
        raise ShapeError(
            f"covariance_of({prior_variance:.3g}) must be {shape}, one matrix for each "
            f"held-out point, but has shape {tuple(covariance.shape)}."
        )
    check_finite(covariance=covariance)
