"""Draws and updates of sampled GPs for botorch's pathwise samplers.

Upstream dispatches on the type of the model and knows its own only. In: a model. Out:
sample paths, registered with ``draw_matheron_paths``, and an update by the model's own
solver, registered with ``gaussian_update``.
"""

from __future__ import annotations

from typing import Any

from botorch.sampling.pathwise.paths import GeneralizedLinearPath
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from botorch.sampling.pathwise.update_strategies import GaussianUpdate
from gpytorch.likelihoods import Likelihood
from torch import Size, Tensor

from gpbridge.pathwise import DrawnPath, generator_of, iterative_update
from gpbridge.sampled.gp import SampledGP


@DrawMatheronPaths.register(SampledGP)
def _draw_sampled_paths(
    model: SampledGP,
    *,
    sample_shape: Size,
    prior_sampler: Any = None,
    update_strategy: Any = None,
) -> DrawnPath:
    generator = generator_of(model, prior_sampler, update_strategy)
    draws = model.draw(Size(sample_shape).numel(), generator)
    return DrawnPath(draws, sample_shape, model.num_outputs)


@GaussianUpdate.register(SampledGP, Likelihood)
def _update_by_solver(
    model: SampledGP,
    likelihood: Likelihood,
    *,
    sample_values: Tensor,
    target_values: Tensor | None = None,
    **kwargs: Any,
) -> GeneralizedLinearPath:
    X = model.transform_inputs(model._train_X)
    if target_values is None:
        Y = model.train_targets
        target_values = Y if model.num_outputs == 1 else Y.mT
    return iterative_update(
        model,
        sample_values,
        target_values,
        solver=model.solver,
        points=X,
        noise=model.noise_variance,
    )
