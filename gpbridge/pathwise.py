r"""Functions drawn from Gaussian processes, with explicit randomness.

In: a botorch model, or a kernel and data. Out: sample paths, functions that can be
evaluated and differentiated anywhere, exact where the kernel has finitely many
features. For models botorch's pathwise package does the work; its weights, frequencies
and noise come from a generator here instead of the global state, and its dense
factorisation gives way to any solver. Next: ``acquisition`` maximises such draws.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model, ModelList
from botorch.sampling.pathwise import (
    draw_kernel_feature_paths,
    draw_matheron_paths,
    gaussian_update,
)
from botorch.sampling.pathwise.features.maps import FeatureMap, KernelEvaluationMap
from botorch.sampling.pathwise.paths import GeneralizedLinearPath, SamplePath
from botorch.sampling.pathwise.utils import (
    get_input_transform,
    get_train_inputs,
    get_train_targets,
)
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.models import ExactGP
from linear_operator.operators import LinearOperator, ZeroLinearOperator
from torch import Generator, Size, Tensor

from gpbridge.checks import ShapeError, check_positive
from gpbridge.kernels.compositions import draw_feature_map
from gpbridge.posterior_draws import PosteriorDraw, condition, solve_columns
from gpbridge.prior_draws import PriorDraw, draw_prior
from gpbridge.randomness import fresh, standard_normal
from gpbridge.types import Solver

__all__ = [
    "DrawnPath",
    "PosteriorDraw",
    "PriorDraw",
    "condition",
    "draw_path_model",
    "draw_posterior_paths",
    "draw_prior",
    "draw_prior_paths",
    "iterative_update",
]


NUM_FEATURES = 1024


class SeparateDraws(Protocol):
    """Draws that can be evaluated at common inputs, or each at inputs of its own."""

    def __call__(self, X: Tensor) -> Tensor:
        """``... x n x d`` to ``s x ... x n x m``."""
        ...

    def each(self, X: Tensor) -> Tensor:
        """``s x ... x n x d`` to ``s x ... x n x m``."""
        ...


class DrawnPath(SamplePath):
    """Draws of a model of ours in the shapes of botorch's paths.

    Args:
        draws: As many functions as the sample shape counts.
        sample_shape: Sizes of the sample dimensions.
        num_outputs: The number m of outputs.
    """

    def __init__(
        self, draws: SeparateDraws, sample_shape: Size, num_outputs: int
    ) -> None:
        super().__init__()
        self.draws, self.num_outputs = draws, num_outputs
        self.sample_shape = Size(sample_shape)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Nothing to set: the model is not an ensemble."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Evaluate the draws, each at its own inputs where ``x`` has a sample batch.

        Args:
            x: Inputs ``... x n x d`` whose batch broadcasts with ``sample_shape``
                (without the sample batch it is far cheaper than with copies); with
                several outputs ``... x 1 x n x d``, as botorch evaluates batches of
                independent outputs.
            **kwargs: None are used.

        Returns:
            ``... x n``, or ``... x m x n`` with several outputs.
        """
        if self.num_outputs > 1:
            x = x.squeeze(-3)
        sample, points = self.sample_shape, x.shape[-2:]
        batch = torch.broadcast_shapes(x.shape[:-2], sample)
        rest = batch[: len(batch) - len(sample)]
        own = x.shape[:-2][len(rest) :] if len(sample) else ()
        if all(size == 1 for size in own):  # the same inputs for all draws, at once
            values = self.draws(x.reshape(*rest, *points)).movedim(0, -3)
        else:
            rows = x.expand(*batch, *points).reshape(*rest, sample.numel(), *points)
            values = self.draws.each(rows.movedim(-3, 0)).movedim(0, -3)
        values = values.reshape(*batch, *values.shape[-2:])
        return values.squeeze(-1) if self.num_outputs == 1 else values.mT


def draw_prior_paths(
    model: Model,
    sample_shape: Size | int | None = None,
    *,
    num_features: int | None = None,
    generator: Generator | None = None,
) -> SamplePath:
    r"""Functions :math:`f(x) = m(x) + \phi(x) w`, :math:`w \sim N(0, I)`, from a prior.

    Exact where the kernel has finitely many features; each stationary part is replaced
    by ``num_features`` random Fourier features. For any model that botorch's pathwise
    package knows and any number of features (upstream's quasi-random weights end at
    21201).

    Args:
        model: A GP, exact or variational, or a list of them.
        sample_shape: Shape of the sample dimensions, or the number of paths.
        num_features: Fourier features of each part that needs them, an even number;
            default 1024.
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
        sample_shape=_sizes(sample_shape),
        num_features=NUM_FEATURES if num_features is None else num_features,
        map_generator=map_generator,
        weight_generator=partial(standard_normal, generator=generator, like=like),
    )


def draw_posterior_paths(
    model: Model,
    sample_shape: Size | int | None = None,
    *,
    num_features: int | None = None,
    generator: Generator | None = None,
    solver: Solver | None = None,
) -> SamplePath:
    r"""Functions from a posterior by Matheron's rule.

    .. math:: f(x) + K_{xX} (K + \Sigma)^{-1} (y - f(X) - \epsilon)

    Prior and noise are drawn once, so a path is a function: deterministic,
    differentiable, as long as it lives. See :func:`draw_prior_paths` for exactness: all
    paths share their Fourier features, whose error shows in variances that are small
    beside the prior's. Measured with 400 points in 4 dimensions, botorch's default
    kernel and a noise variance of 1e-4: the variance of 512 paths was .88 to .98 of the
    exact one in the mean over points and at single points .67 to 2.7 (three seeds, 1024
    features); .94 to 1.09 in the mean with 8192. With a Matern kernel whose learnt
    amplitude was 5e5 noise variances it was .14 to .20 with 1024 features, and .2 to 8
    with 8192. So where variances of many draws matter, :func:`condition` a
    :func:`draw_prior`, or take a :class:`~gpbridge.SampledGP`: each draw has its own
    features there, which is without bias (1.00 to 1.01 in the first case, .4 to 1.5 in
    the second, by chance). At points that are known, ``model.posterior(X).rsample()``
    is exact.

    Models that draw by themselves (:class:`~gpbridge.SampledGP`,
    :class:`~gpbridge.LinearizedGP`) give paths of their own draws: their features and
    solver are those that they were built with, and are refused as options here.

    Args:
        model: An exact GP with Gaussian noise, one that draws by itself, or a list.
        sample_shape: Shape of the sample dimensions, or the number of paths.
        num_features: Fourier features of each part that needs them, an even number;
            default 1024.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.
        solver: Of the linear system with the covariance of the data; by default it is
            factorised.

    Returns:
        A path: ``... x n x d`` to ``sample_shape x ... x n``.

    Raises:
        TypeError: If ``sample_shape`` is neither a shape nor a number.
        ValueError: If an option is given that the model's own draws cannot obey.

    References:
        Wilson et al., Pathwise conditioning of Gaussian processes, JMLR 2021, eq. (12).
    """
    generator = fresh(generator)
    prior_sampler = partial(
        draw_prior_paths, num_features=num_features, generator=generator
    )
    update = partial(_noisy_update, generator=generator, solver=solver)
    paths = draw_matheron_paths(
        model,
        sample_shape=_sizes(sample_shape),
        prior_sampler=prior_sampler,
        update_strategy=update,
    )
    if isinstance(paths, DrawnPath):  # of a model that may not have looked at them
        generator_of(model, prior_sampler, update)
    return paths


def draw_path_model(
    model: Model,
    *,
    num_features: int | None = None,
    generator: Generator | None = None,
    solver: Solver | None = None,
) -> GenericDeterministicModel:
    """One posterior function as a botorch model, for Thompson sampling.

    What botorch's ``get_matheron_path_model`` returns, with an explicit generator and
    for any number of features.

    Args:
        model: An exact GP with one or more independent outputs, or a list of GPs.
        num_features: Fourier features of each part that needs them, an even number;
            default 1024.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.
        solver: Of the linear system with the covariance of the data; by default it is
            factorised.

    Returns:
        A deterministic model: ``batch_shape x n x d`` to ``batch_shape x n x m``.
    """
    path = draw_posterior_paths(
        model, num_features=num_features, generator=generator, solver=solver
    )

    def evaluate(X: Tensor) -> Tensor:
        if isinstance(model, ModelList):
            return torch.stack(path(X), dim=-1)
        if model.num_outputs == 1:
            return path(X).unsqueeze(-1)
        return path(X.unsqueeze(-3)).transpose(-1, -2)  # outputs are a batch of GPs

    return GenericDeterministicModel(evaluate, num_outputs=model.num_outputs)


def iterative_update(
    model: Model,
    sample_values: Tensor,
    target_values: Tensor | None = None,
    *,
    solver: Solver | None = None,
    generator: Generator | None = None,
    points: Tensor | None = None,
    noise: Tensor | None = None,
) -> GeneralizedLinearPath:
    r"""The update of Matheron's rule by a solver that never factorises.

    :math:`k(\cdot, X) v` with :math:`(K + \Sigma) v = y - f(X) - \epsilon`, in place
    of upstream's dense Cholesky factor: pass it to botorch's ``draw_matheron_paths`` as
    ``functools.partial(iterative_update, solver=...)``.

    Args:
        model: An exact GP with Gaussian noise and one output.
        sample_values: Prior functions at the data, ``... x n``.
        target_values: What is observed, default the model's targets.
        solver: Default :func:`~gpbridge.solvers.choose_solver`.
        generator: Source of the noise. Without one, draws are fresh on each call.
        points: The data ``n x d``, transformed; default the model's.
        noise: Noise variances ``n``; default those of the model's likelihood.

    Returns:
        The path of the update alone.

    Raises:
        ShapeError: If the model has a batch or several outputs.
    """
    X = points
    if X is None:
        (X,) = get_train_inputs(model, transformed=True)
    if target_values is None:
        target_values = get_train_targets(model, transformed=True)
    if X.dim() > 2 or len(model.covar_module.batch_shape):
        raise ShapeError(
            "An iterative update takes one data set and one output, but the training "
            f"inputs have shape {tuple(X.shape)} and the kernel batch_shape "
            f"{tuple(model.covar_module.batch_shape)}. Put one model per output in a "
            "ModelListGP."
        )
    if noise is None:
        noise = gaussian_noise(model, X).diagonal(dim1=-1, dim2=-2)
    noise = noise.detach()
    epsilon = standard_normal(sample_values.shape, generator, sample_values)
    misfit = target_values - sample_values - noise.sqrt() * epsilon
    columns = misfit.detach().reshape(-1, len(X)).mT.to(X)
    solution = solve_columns(model.covar_module, X.detach(), noise, columns, solver)
    feature_map = KernelEvaluationMap(
        kernel=model.covar_module,
        points=X,
        input_transform=get_input_transform(model),
    )
    weight = solution.value.mT.reshape(sample_values.shape).to(sample_values)
    return GeneralizedLinearPath(feature_map=feature_map, weight=weight)


def generator_of(
    model: Model, prior_sampler: Any = None, update_strategy: Any = None
) -> Generator | None:
    """The generator of draws that a model makes by itself, which obeys no other option.

    Args:
        model: Which has features and a solver of its own, or needs none.
        prior_sampler: As upstream's ``draw_matheron_paths`` passes it on.
        update_strategy: Likewise.

    Returns:
        The generator, if one is bound to the prior sampler.

    Raises:
        ValueError: If a number of features or a solver is bound to either.
    """
    bound = {
        **getattr(update_strategy, "keywords", {}),
        **getattr(prior_sampler, "keywords", {}),
    }
    for option in ("num_features", "solver"):
        if bound.get(option) is not None:
            raise ValueError(
                f"{option} has no effect on paths of a {type(model).__name__}, which "
                f"come from its own draws. Leave it out, or use model.draw(...) of a "
                f"model built with the {option} that you want."
            )
    return bound.get("generator")


def _sizes(sample_shape: Size | int | None) -> Size:
    if sample_shape is None:
        return Size()
    if isinstance(sample_shape, int):
        check_positive(sample_shape=sample_shape)
        return Size([sample_shape])
    if isinstance(sample_shape, tuple | list):
        return Size(sample_shape)
    raise TypeError(
        "sample_shape must be a torch.Size, or the number of paths, but is "
        f"{type(sample_shape).__name__}. Try torch.Size([5])."
    )


def gaussian_noise(model: Model, X: Tensor) -> LinearOperator:
    """Noise covariance of an exact GP at its data, in transformed units.

    Raises:
        NotImplementedError: If the model has no such noise.
    """
    likelihood = getattr(model, "likelihood", None)
    gaussian = (GaussianLikelihood, FixedNoiseGaussianLikelihood)
    if not isinstance(model, ExactGP) or not isinstance(likelihood, gaussian):
        raise NotImplementedError(
            "Posterior paths with an explicit generator need an exact GP with Gaussian "
            f"noise, but this is {type(model).__name__} with "
            f"{type(likelihood).__name__}. Try botorch's draw_matheron_paths."
        )
    return likelihood.noise_covar(shape=X.shape[:-1])


def _noisy_update(
    model: Model,
    sample_values: Tensor,
    target_values: Tensor | None = None,
    *,
    generator: Generator | None,
    solver: Solver | None = None,
) -> SamplePath:
    # Upstream draws the noise from the global state. It draws none if the noise is said
    # to be zero, and takes the factor of the covariance as given.
    if solver is not None:
        return iterative_update(
            model, sample_values, target_values, solver=solver, generator=generator
        )
    (X,) = get_train_inputs(model, transformed=True)
    noise = gaussian_noise(model, X)
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
