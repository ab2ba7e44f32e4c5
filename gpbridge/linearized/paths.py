"""Posterior draws of a linearised network for botorch's pathwise samplers.

Upstream dispatches on the type of the model and knows its own only. A linearised
network is finite-dimensional, so its paths are exact. In: a model. Out: sample paths,
registered with ``draw_matheron_paths``; thus ``get_matheron_path_model`` works.
"""

from __future__ import annotations

from typing import Any

import torch
from botorch.sampling.pathwise.paths import SamplePath
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from torch import Size, Tensor

from gpbridge.linearized.gp import LinearizedGP


class TangentPath(SamplePath):
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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sample_shape = Size(sample_shape)
        self.num_outputs = model.num_outputs
        self.draws = model.draw(self.sample_shape.numel(), generator)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Nothing to set: the model is not an ensemble."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Evaluate the draws, each at its own inputs where ``x`` has a sample batch.

        Args:
            x: Inputs ``... x n x d`` whose batch broadcasts with ``sample_shape``; with
                several outputs ``... x 1 x n x d``, as botorch evaluates batches of
                independent outputs.
            **kwargs: None are used.

        Returns:
            ``... x n``, or ``... x m x n`` with several outputs.
        """
        if self.num_outputs > 1:
            x = x.squeeze(-3)
        sample = self.sample_shape
        batch = torch.broadcast_shapes(x.shape[:-2], sample)
        rest = batch[: len(batch) - len(sample)]
        rows = x.expand(*batch, *x.shape[-2:]).reshape(
            *rest, sample.numel(), *x.shape[-2:]
        )
        values = self.draws.each(rows.movedim(-3, 0)).movedim(0, -3)
        values = values.reshape(*batch, *values.shape[-2:])
        return values.squeeze(-1) if self.num_outputs == 1 else values.mT


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
