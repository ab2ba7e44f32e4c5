"""The noise of a regression model: where its variance comes from, and at new points.

Learning it jointly with the prior is safe for the linear model's own mean and for no
other choice; the rest takes it from residuals. In: the options of the model and the
record of the training run. Out: noise variances, or None to learn them; noise
covariances of observations. Next: ``gp`` sets the ones and adds the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor

from gpbridge.checks import check_choice, check_positive, warn_user
from gpbridge.functional import Parameters
from gpbridge.likelihoods import is_gaussian, noise_covariance
from gpbridge.types import FitResult


def initial_noise(
    noise: str | float,
    mean: str,
    parameters: Parameters,
    fit_result: FitResult | None,
    misfit: Tensor,
    likelihood: Likelihood,
) -> Tensor | None:
    """Resolve the ``noise`` option.

    Args:
        noise: ``"learn"``, ``"fit_residual"``, ``"validation"`` or a variance.
        mean: ``"linear_model"`` or ``"network"``.
        parameters: Which weights are random.
        fit_result: The training run, if it is known.
        misfit: Residuals of the network on all rows, ``n x m``.
        likelihood: The Gaussian likelihood.

    Returns:
        Noise variances ``m``, or None if they are learnt or fixed per point.

    Raises:
        ValueError: If the network's output is asked for as mean with a learnt noise, or
            the training run lacks what was asked for.
    """
    fixed = isinstance(likelihood, FixedNoiseGaussianLikelihood)
    if isinstance(noise, str):
        check_choice("noise", noise, ("learn", "fit_residual", "validation"))
    if fixed:
        if noise != "learn":
            raise ValueError(
                f"noise={noise!r} has no effect with FixedNoiseGaussianLikelihood, "
                "which holds its own. Leave noise out."
            )
        return None
    if noise == "learn":
        if mean == "network":
            raise ValueError(
                "mean='network' cannot learn its noise: the linear model fits better "
                "than the network, so the learnt noise is too small for the network's "
                "residuals. Pass noise='fit_residual' with LinearizedGP.from_fit, or a "
                "variance."
            )
        if parameters == "last_layer":
            warn_user(
                "parameters='last_layer' with a learnt noise is overconfident: the "
                "features were fitted to the same targets. Pass noise='validation' "
                "with LinearizedGP.from_fit, or a variance."
            )
        return None
    if noise == "validation":
        if fit_result is None or fit_result.validation_variance is None:
            raise ValueError(
                "noise='validation' needs a fit result with validation rows. Train "
                "with gpbridge.dnn.fit_map and use LinearizedGP.from_fit, or pass a "
                "variance."
            )
        return fit_result.validation_variance
    if noise == "fit_residual":
        if fit_result is not None and fit_result.residual_variance is not None:
            return fit_result.residual_variance
        warn_user(
            "noise='fit_residual' without a fit result takes the residuals of all "
            "rows, which are too small if the network was trained on them for long. "
            "Use LinearizedGP.from_fit."
        )
        return misfit.square().mean(0)
    check_positive(noise=noise)
    return torch.as_tensor(noise).to(misfit).expand(misfit.shape[-1])


def check_no_noise(noise: str | float, likelihood: Likelihood) -> None:
    """Require the option's default under labels, which have no noise variance."""
    if noise != "learn":
        raise ValueError(
            f"noise is for regression, but came as {noise!r} with "
            f"{type(likelihood).__name__}. Leave noise out."
        )


def check_noise_is_known(likelihood: Likelihood, mean: str) -> None:
    """Require a noise that is not learnt around the network's output.

    Raises:
        ValueError: If the evidence would learn it.
    """
    free = [name for name, p in likelihood.named_parameters() if p.requires_grad]
    if mean == "network" and is_gaussian(likelihood) and free:
        raise ValueError(
            f"mean='network' cannot learn its noise, but {', '.join(free)} of the "
            "likelihood would be learnt, as the linear model's residuals are smaller "
            "than the network's. Call model.use_mean('network', 'fit_residual') or "
            "with a variance, or model.use_mean('linear_model', 'learn')."
        )


def set_noise(likelihood: Likelihood, variance: Tensor) -> None:
    """Fix the noise variances ``m`` of a likelihood, at its floor if they are below it.

    Args:
        likelihood: A Gaussian or multitask Gaussian likelihood.
        variance: The variances.

    Raises:
        TypeError: If the likelihood has no such parameter.
    """
    variance = variance.detach()
    if isinstance(likelihood, GaussianLikelihood):
        raw = likelihood.noise_covar
        value = _within(variance[:1], raw.raw_noise_constraint)
        likelihood.noise = value
        raw.raw_noise.requires_grad_(False)
    elif (
        isinstance(likelihood, MultitaskGaussianLikelihood)
        and likelihood.has_task_noise
        and likelihood.rank == 0
    ):
        if likelihood.has_global_noise:
            floor = likelihood.raw_noise_constraint.lower_bound
            likelihood.noise = 2 * floor + 1e-12
            likelihood.raw_noise.requires_grad_(False)
        value = _within(variance, likelihood.raw_task_noises_constraint)
        likelihood.task_noises = value.to(likelihood.raw_task_noises)
        likelihood.raw_task_noises.requires_grad_(False)
    else:
        raise TypeError(
            f"The noise of {type(likelihood).__name__} cannot be set to one variance "
            "per output. Set it in the likelihood and pass noise='learn'."
        )


def release_noise(likelihood: Likelihood) -> None:
    """Let the noise variances that :func:`set_noise` fixed be learnt again."""
    for name, parameter in likelihood.named_parameters():
        if name.rpartition(".")[2] in ("raw_noise", "raw_task_noises"):
            parameter.requires_grad_(True)


def observation_noise(
    likelihood: Likelihood,
    asked: bool | Tensor,
    mean: Tensor,
    targets: Tensor,
    outputs: Sequence[int] | None = None,
) -> Tensor:
    """Noise covariance of the outputs at each point, ``... x n x m x m``, float64.

    Args:
        likelihood: The likelihood.
        asked: True for the likelihood's own, or variances ``... x n x m``.
        mean: Latent values at the points, float64, ``... x n x m``.
        targets: The training targets, of all outputs.
        outputs: Which of the outputs are seen; default all.

    Returns:
        The covariance.

    Raises:
        NotImplementedError: If the likelihood observes labels.
    """
    if not is_gaussian(likelihood):
        raise NotImplementedError(
            f"{type(likelihood).__name__} observes labels, so its noise cannot be "
            "added to the latent posterior. Use predict(X) for probabilities."
        )
    if isinstance(asked, Tensor):
        variance = asked.to(mean)
        if variance.shape[-1] != mean.shape[-1]:
            variance = variance.unsqueeze(-1)
        check_positive(noise=variance)
        return torch.diag_embed(variance.expand(mean.shape))
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        # Other points than those of training: the average noise, as in botorch.
        blocks = noise_covariance(likelihood, targets.double()).detach().double()
        return blocks.mean(0).expand(*mean.shape, mean.shape[-1])
    values = mean.new_zeros(*mean.shape[:-1], targets.shape[-1])
    blocks = noise_covariance(likelihood, values).detach().double()
    if outputs is not None:
        blocks = blocks[..., outputs, :][..., outputs]
    return blocks


def known_noise(
    variance: Tensor, train_Y: Tensor, transform: OutcomeTransform | None, Z: Tensor
) -> FixedNoiseGaussianLikelihood:
    """The likelihood of targets ``n x 1`` whose noise variances are known.

    Args:
        variance: The noise variances, ``n x 1``.
        train_Y: The targets.
        transform: Of the targets.
        Z: The transformed inputs.

    Returns:
        A likelihood with the transformed variances.

    Raises:
        NotImplementedError: If there are several outputs.
    """
    if variance.shape[-1] != 1:
        raise NotImplementedError(
            "Known noise variances of several outputs are not supported. Model the "
            "outputs one by one, in a ModelListGP."
        )
    if transform is not None:
        _, variance = copy.deepcopy(transform)(train_Y, variance, X=Z)
    return FixedNoiseGaussianLikelihood(variance.squeeze(-1))


def _within(variance: Tensor, constraint) -> Tensor:
    lower, upper = constraint.lower_bound, constraint.upper_bound
    slack = 1 + 1e-6  # a value on the bound has no finite inverse transform
    return torch.clamp(variance, (lower * slack).to(variance), upper.to(variance))
