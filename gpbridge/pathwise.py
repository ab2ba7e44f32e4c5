r"""Functions drawn from Gaussian processes, with explicit randomness.

In: a botorch model. Out: sample paths, functions that can be evaluated and
differentiated anywhere, exact where the kernel has finitely many features. botorch's
pathwise package does the work; its weights, frequencies and noise come from a generator
here instead of the global state. Next: ``acquisition`` maximises such draws.
"""

from __future__ import annotations

from functools import partial

import torch
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model, ModelList
from botorch.sampling.pathwise import (
    draw_kernel_feature_paths,
    draw_matheron_paths,
    gaussian_update,
)
from botorch.sampling.pathwise.features.maps import FeatureMap
from botorch.sampling.pathwise.paths import SamplePath
from botorch.sampling.pathwise.utils import get_train_inputs, get_train_targets
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.models import ExactGP
from linear_operator.operators import ZeroLinearOperator
from torch import Generator, Size, Tensor

from gpbridge.kernels.compositions import draw_feature_map
from gpbridge.randomness import fresh, standard_normal


def draw_prior_paths(
    model: Model,
    sample_shape: Size | None = None,
    *,
    num_features: int = 1024,
    generator: Generator | None = None,
) -> SamplePath:
    r"""Functions :math:`f(x) = m(x) + \phi(x) w`, :math:`w \sim N(0, I)`, from a prior.

    Exact where the kernel has finitely many features; each stationary part is replaced
    by ``num_features`` random Fourier features. For any model that botorch's pathwise
    package knows and any number of features (upstream's quasi-random weights end at
    21201).

    Args:
        model: A GP, exact or variational, or a list of them.
        sample_shape: Shape of the sample dimensions.
        num_features: Fourier features of each part that needs them, an even number.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.

    Returns:
        A path: ``... x n x d`` to ``sample_shape x ... x n``.
    """
    generator = fresh(generator)

    def map_generator(kernel: Kernel, num_inputs: int, num_outputs: int) -> FeatureMap:
        return draw_feature_map(kernel, num_inputs, num_outputs, generator)

    like = torch.empty((), device=generator.device)  # upstream moves what is drawn

    return draw_kernel_feature_paths(
        model,
        sample_shape=sample_shape or Size(),
        num_features=num_features,
        map_generator=map_generator,
        weight_generator=partial(standard_normal, generator=generator, like=like),
    )


def draw_posterior_paths(
    model: Model,
    sample_shape: Size | None = None,
    *,
    num_features: int = 1024,
    generator: Generator | None = None,
) -> SamplePath:
    r"""Functions from a posterior by Matheron's rule.

    .. math:: f(x) + K_{xX} (K + \Sigma)^{-1} (y - f(X) - \epsilon)

    Prior and noise are drawn once, so a path is a function: deterministic,
    differentiable, as long as it lives. See :func:`draw_prior_paths` for exactness.

    Args:
        model: An exact GP with Gaussian noise, or a list of them.
        sample_shape: Shape of the sample dimensions.
        num_features: Fourier features of each part that needs them, an even number.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.

    Returns:
        A path: ``... x n x d`` to ``sample_shape x ... x n``.

    References:
        Wilson et al., Pathwise conditioning of Gaussian processes, JMLR 2021, eq. (12).
    """
    generator = fresh(generator)
    return draw_matheron_paths(
        model,
        sample_shape=sample_shape or Size(),
        prior_sampler=partial(
            draw_prior_paths, num_features=num_features, generator=generator
        ),
        update_strategy=partial(_noisy_update, generator=generator),
    )


def draw_path_model(
    model: Model,
    *,
    num_features: int = 1024,
    generator: Generator | None = None,
) -> GenericDeterministicModel:
    """One posterior function as a botorch model, for Thompson sampling.

    What botorch's ``get_matheron_path_model`` returns, with an explicit generator and
    for any number of features.

    Args:
        model: An exact GP with one or more independent outputs, or a list of GPs.
        num_features: Fourier features of each part that needs them, an even number.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.

    Returns:
        A deterministic model: ``batch_shape x n x d`` to ``batch_shape x n x m``.
    """
    path = draw_posterior_paths(model, num_features=num_features, generator=generator)

    def evaluate(X: Tensor) -> Tensor:
        if isinstance(model, ModelList):
            return torch.stack(path(X), dim=-1)
        if model.num_outputs == 1:
            return path(X).unsqueeze(-1)
        return path(X.unsqueeze(-3)).transpose(-1, -2)  # outputs are a batch of GPs

    return GenericDeterministicModel(evaluate, num_outputs=model.num_outputs)


def _noisy_update(
    model: Model,
    sample_values: Tensor,
    target_values: Tensor | None = None,
    *,
    generator: Generator | None,
) -> SamplePath:
    # Upstream draws the noise from the global state. It draws none if the noise is said
    # to be zero, and takes the factor of the covariance as given.
    likelihood = getattr(model, "likelihood", None)
    gaussian = (GaussianLikelihood, FixedNoiseGaussianLikelihood)
    if not isinstance(model, ExactGP) or not isinstance(likelihood, gaussian):
        raise NotImplementedError(
            "Posterior paths with an explicit generator need an exact GP with Gaussian "
            f"noise, but this is {type(model).__name__} with "
            f"{type(likelihood).__name__}. Try botorch's draw_matheron_paths."
        )
    (X,) = get_train_inputs(model, transformed=True)
    noise = likelihood.noise_covar(shape=X.shape[:-1])
    draws = standard_normal(sample_values.shape, generator, sample_values)
    noise_std = noise.diagonal(dim1=-1, dim2=-2).sqrt()
    covariance = model.covar_module(X) + noise
    return gaussian_update(
        model,
        sample_values + noise_std * draws,
        target_values=get_train_targets(model, transformed=True)
        if target_values is None
        else target_values,
        noise_covariance=ZeroLinearOperator(*noise.shape),
        scale_tril=covariance.cholesky(),
    )
