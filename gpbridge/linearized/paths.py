"""Posterior draws of a linearised network for botorch's pathwise samplers.

Upstream dispatches on the type of the model and knows its own only. A linearised
network is finite-dimensional, so its paths are exact. In: a model. Out: sample paths,
registered with ``draw_matheron_paths``; thus ``get_matheron_path_model`` works.
"""

from __future__ import annotations

from typing import Any

from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from torch import Generator, Size

from gpbridge.linearized.gp import LinearizedGP
from gpbridge.pathwise import DrawnPath


class TangentPath(DrawnPath):
    """Draws of a linearised network in the shapes of botorch's paths.

    Args:
        model: The model to draw from.
        sample_shape: Sizes of the sample dimensions.
        generator: Source of randomness.
    """

    def __init__(
        self,
        model: LinearizedGP,
        sample_shape: Size,
        generator: Generator | None = None,
    ) -> None:
        draws = model.draw(Size(sample_shape).numel(), generator)
        super().__init__(draws, sample_shape, model.num_outputs)


@DrawMatheronPaths.register(LinearizedGP)
def _draw_tangent_paths(
    model: LinearizedGP,
    *,
    sample_shape: Size,
    prior_sampler: Any = None,
    **kwargs: Any,
) -> TangentPath:
    # gpbridge.pathwise binds its generator to the prior sampler, which a model with
    # exact paths does not need otherwise.
    generator = getattr(prior_sampler, "keywords", {}).get("generator")
    return TangentPath(model, sample_shape, generator)
