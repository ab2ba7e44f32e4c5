r"""Linearised networks as surrogates: trained, then a Gaussian process there.

In: observations. Out: a :class:`~gpbridge.LinearizedGP`, which conditions on further
observations by itself, so that fantasies and knowledge gradients work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from botorch.models.model import Model

from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact, Inference
from gpbridge.selection.evidence import fit_evidence
from gpbridge.surrogates.recipe import Experiments, Recipe, State
from gpbridge.surrogates.training import learnt_noise, train
from gpbridge.types import FitResult


@dataclass(frozen=True, kw_only=True)
class LinearizedSurrogate(Recipe):
    r"""A trained network, linearised; prior and noise variance by marginal likelihood.

    The network trains on standardised outcomes, with early stopping on a tenth of the
    rows from 50 rows on; the posterior has seen all rows. The mean is the linear
    model's own. Cost of a fit: the epochs, and n³ m³ (or n p²) once.

    Args:
        inference: How the posterior is computed, see
            :class:`~gpbridge.LinearizedGP`.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.

    Example:
        >>> import torch
        >>> X = torch.rand(20, 2).double()
        >>> recipe = LinearizedSurrogate(epochs=20)
        >>> model = recipe.fit(X, X.prod(-1, keepdim=True))
        >>> model.posterior(X[:3]).variance.shape
        torch.Size([3, 1])
    """

    inference: Inference = Exact()

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        trained = train(self, experiments)
        model = LinearizedGP.from_fit(
            trained,
            experiments.X,
            experiments.Y,
            learnt_noise(experiments.Y.shape[-1], experiments.Y),
            select=None,
            inference=self.inference,
            input_transform=experiments.input_transform,
            outcome_transform=experiments.outcome_transform(),
            **self._options(trained),
        )
        # Without any variation the evidence would leave no variance to explore with.
        if not bool((experiments.Y == experiments.Y[0]).all()):
            fit_evidence(model, warn=False)
        return model, [trained.network.state_dict()]

    def _options(self, trained: FitResult) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class LastLayerSurrogate(LinearizedSurrogate):
    r"""A trained network whose last layer alone is random: a Bayesian linear model.

    The noise is the variance of the residuals of validation rows, where there are some,
    because features that were fitted to the targets leave too little.

    Args:
        **options: Of :class:`LinearizedSurrogate`.
    """

    def _options(self, trained: FitResult) -> dict[str, Any]:
        held_out = len(trained.validation_rows) > 0
        noise = "validation" if held_out else "learn"
        return {"parameters": "last_layer", "noise": noise}
