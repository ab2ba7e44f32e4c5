r"""What a training run visits as a surrogate: SWAG, and inference in its subspace.

In: observations. Out: a :class:`~gpbridge.surrogates.WeightSpaceModel` of draws around
the mean of the last weights of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.models.model import Model
from torch import Tensor, nn

from gpbridge.checks import check_count, check_share
from gpbridge.dnn.scale_tuning import tune_scale
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import sample_subspace
from gpbridge.dnn.swag import SWAG
from gpbridge.surrogates.recipe import Experiments, Recipe, State
from gpbridge.surrogates.training import held_out_share, judged_noise, noise_of, train
from gpbridge.surrogates.weight_space import WeightSpaceModel
from gpbridge.types import FitResult, WeightPosterior


@dataclass(frozen=True, kw_only=True)
class SWAGSurrogate(Recipe):
    r"""A Gaussian over weights with the moments of the last part of a training run.

    See :class:`~gpbridge.dnn.SWAG`. From 50 rows on a tenth is held out and chooses the
    scale of the covariance; below, the scale is one half, as published.

    Args:
        averaged: The share of the epochs, at their end, that is averaged over.
        rank: Of the covariance beside its diagonal.
        num_samples: Draws of weights.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    averaged: float = 0.3
    rank: int = 20
    num_samples: int = 64

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        check_share(averaged=self.averaged)
        check_count(rank=self.rank, num_samples=self.num_samples)
        network, epochs = experiments.network, self._epochs(experiments)
        tracker = SWAG(network, self.rank)
        if epochs < 2:
            raise ValueError(
                f"An average needs at least 2 epochs, but there are {epochs}. Choose "
                "larger epochs and update_epochs."
            )
        first = epochs - max(int(self.averaged * epochs), 2)

        def take(epoch: int, network: nn.Module, entry: object) -> None:
            if epoch >= first:
                tracker.update(network)

        rows = _held_out(experiments)
        fit = train(
            *(self, experiments),
            network=network,
            early_stopping=False,
            validation_rows=rows if len(rows) else None,
            callback=take,
        )
        model = WeightSpaceModel(
            self._posterior(tracker, experiments, fit),
            experiments.X,
            experiments.Y,
            num_samples=self.num_samples,
            likelihood=judged_noise(fit),
            input_transform=experiments.input_transform,
            outcome_transform=experiments.outcome_transform(),
            generator=experiments.generator,
        )
        return model, [fit.network.state_dict()]

    def _posterior(
        self, tracker: SWAG, experiments: Experiments, fit: FitResult
    ) -> WeightPosterior:
        rows = fit.validation_rows
        if not len(rows):
            return tracker.posterior()
        tuned = tune_scale(
            tracker,
            experiments.Z[rows],
            experiments.targets[rows],
            noise_of(fit.validation_variance),
            scales=(0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
            generator=experiments.generator,
        )
        return tuned.posterior


@dataclass(frozen=True, kw_only=True)
class SubspaceSurrogate(SWAGSurrogate):
    r"""Elliptical slice sampling in the principal directions of a training run.

    See :class:`~gpbridge.dnn.Subspace`.

    Args:
        dim: Of the subspace.
        temperature: Of the likelihood of all data.
        **options: Of :class:`SWAGSurrogate`.
    """

    dim: int = 5
    temperature: float = 1.0

    def _posterior(
        self, tracker: SWAG, experiments: Experiments, fit: FitResult
    ) -> WeightPosterior:
        chains = sample_subspace(
            Subspace.pca(tracker, min(self.dim, tracker.num_columns)),
            experiments.Z,
            experiments.targets,
            noise_of(fit.residual_variance),
            temperature=self.temperature,
            generator=experiments.generator,
            progress=self.progress,
        )
        return chains.posterior


def _held_out(experiments: Experiments) -> Tensor:
    n = len(experiments.Z)
    order = torch.randperm(n, generator=experiments.generator)
    return order[: int(held_out_share(n) * n)].to(experiments.X.device)
