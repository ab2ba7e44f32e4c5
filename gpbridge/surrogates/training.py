r"""The training run of one network, as most recipes start with it.

In: experiments. Out: the trained network and its rows. Next: ``linearized``,
``averages``, ``chains`` make posteriors of it.
"""

from __future__ import annotations

from typing import Any

from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.likelihoods import MultitaskGaussianLikelihood as Multitask
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from gpbridge.dnn.fit import fit_map
from gpbridge.surrogates.recipe import Experiments, Recipe
from gpbridge.types import FitResult

MIN_ROWS_TO_HOLD_OUT = 50  # a tenth of fewer rows says nothing
NOISE_FLOOR = 1e-4  # of the variance of the targets


def train(recipe: Recipe, experiments: Experiments, **options: Any) -> FitResult:
    """Train a network, with early stopping on a tenth of the rows where that is wise.

    Args:
        recipe: For epochs, rate and decay.
        experiments: The data, and the network to start from.
        **options: Of :func:`gpbridge.dnn.fit_map`, above those.

    Returns:
        The training run.
    """
    usual = {
        "epochs": recipe.update_epochs if experiments.weights else recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "validation_fraction": held_out_share(len(experiments.Z)),
        "generator": experiments.generator,
        "progress": recipe.progress,
    }
    options = usual | options
    network = options.pop("network", None)
    if network is None:
        network = experiments.network
    return fit_map(network, experiments.Z, experiments.targets, **options)


def held_out_share(n: int) -> float:
    """The share of n rows that early stopping holds out."""
    return 0.1 if n >= MIN_ROWS_TO_HOLD_OUT else 0.0


def noise_prior() -> LogNormalPrior:
    """The prior that botorch gives the noise variance of standardised targets.

    With few data the marginal likelihood often has its maximum where all is noise, and
    an acquisition function then has nothing to go by.
    """
    return LogNormalPrior(loc=-4.0, scale=1.0)


def learnt_noise(num_outputs: int, like: Tensor) -> Likelihood:
    """Gaussian noise under :func:`noise_prior`.

    Args:
        num_outputs: m.
        like: Tensor of the dtype and device of the noise.

    Returns:
        The likelihood.
    """
    prior = noise_prior()
    bound = GreaterThan(NOISE_FLOOR, initial_value=prior.mode)
    if num_outputs == 1:
        likelihood = GaussianLikelihood(prior, bound)
    else:
        likelihood = Multitask(
            num_outputs, rank=0, has_global_noise=False, noise_constraint=bound
        )
        # Upstream's own closure cannot be pickled.
        likelihood.register_prior("task_noises_prior", prior, _task_noises)
    return likelihood.to(like)


def _task_noises(likelihood: Multitask) -> Tensor:
    return likelihood.task_noises


def judged_noise(fit: FitResult) -> Likelihood:
    """Noise by the rows held out of a run, or by all where there are none."""
    held_out = len(fit.validation_rows) > 0
    return noise_of(fit.validation_variance if held_out else fit.residual_variance)


def noise_of(variances: Tensor) -> Likelihood:
    """A Gaussian likelihood with given noise, at least a hundredth of a deviation.

    Args:
        variances: Of standardised targets, ``m``.

    Returns:
        The likelihood, of one output or of several without correlations.
    """
    variances = variances.detach().clamp_min(NOISE_FLOOR)
    floor = GreaterThan(NOISE_FLOOR / 10)
    if len(variances) == 1:
        likelihood = GaussianLikelihood(noise_constraint=floor).to(variances)
        likelihood.noise = variances
        return likelihood
    likelihood = Multitask(
        len(variances), rank=0, has_global_noise=False, noise_constraint=floor
    ).to(variances)
    likelihood.task_noises = variances
    return likelihood
