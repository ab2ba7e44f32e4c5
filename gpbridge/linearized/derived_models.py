"""Models derived from a linearised GP that share its network, likelihood and factors.

In: a conditioned model, and further observations or a choice of outputs. Out: the mixin
:class:`DerivedModels`, whose methods return another model and leave this one as it is;
``conditioning`` has the algebra of the update. Next: ``gp``.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from botorch.models.model import Model
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import Tensor

from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.conditioning import NewData, check_observations, join
from gpbridge.targets import check_targets
from gpbridge.tracing import ordinary_tensors


class DerivedModels:
    """Conditioning, fantasies and subsets of outputs of a linearised GP."""

    @ordinary_tensors()
    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> Self:
        """The model given further observations, with the same hyperparameters.

        Nothing is retrained and this model is not changed. For Gaussian noise the
        result equals a model built with all data; with ``mean="network"`` the network's
        output stays the mean that new observations correct. For classification the
        points join the training data and the posterior is recomputed.

        Args:
            X: Inputs ``batch_shape x n' x d``, untransformed.
            Y: Targets ``batch_shape' x n' x m``, untransformed; labels as in training.
            noise: Variances ``... x n' x m``, transformed; needed for fixed noise.
            **kwargs: None are used.

        Returns:
            A model that shares network, likelihood and factors with this one.

        Raises:
            ShapeError: If Y does not fit X and the outputs.
            ValueError: If the noise is fixed per point and not given.
        """
        self._check_new_inputs(X)
        if not is_gaussian(self.likelihood):
            if noise is not None:
                raise ValueError(
                    "noise is for Gaussian observations, but came with "
                    f"{type(self.likelihood).__name__}. Leave it out."
                )
            return self._with_labels(X, Y)
        check_observations(X, Y, self.num_outputs)
        if noise is None and isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise ValueError(
                "noise must be given: FixedNoiseGaussianLikelihood holds the noise of "
                "the training points only. Pass the variances of the new observations, "
                f"``... x {X.shape[-2]} x 1``."
            )
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=self.transform_inputs(X))
        if noise is None:
            blocks = Y.double().new_zeros(*Y.shape, Y.shape[-1])
        else:
            blocks = self._noise_at(Y.double(), noise)
        own = torch.full(Y.shape[-2:-1], noise is None, device=Y.device)
        new = join(self._new, NewData(X, Y, blocks, own))
        self._conditioned()  # factorised here, for all models that share the factors
        conditioned = self._share()
        conditioned._new = new
        conditioned._update = None
        return conditioned

    def _with_labels(self, X: Tensor, Y: Tensor) -> Self:
        if X.dim() != 2:
            raise NotImplementedError(
                "Conditioning a classifier takes one data set, ``n' x d``, but X has "
                f"shape {tuple(X.shape)}."
            )
        if self._refined() is not None:
            raise NotImplementedError(
                "A refined classifier is not conditioned further. Condition first and "
                "call refine() after, or set model.refinement = None."
            )
        Y = check_targets(
            self.likelihood, Y, self._num_outputs, len(X), self._train_X.dtype, "Y"
        )
        conditioned = self._share()
        conditioned._train_X = torch.cat([self._train_X, X])
        conditioned._targets = torch.cat([self._targets, Y])
        conditioned._forget()
        return conditioned

    def fantasize(self, X: Tensor, *args: Any, **kwargs: Any) -> Model:
        """Condition on observations drawn from the posterior at ``X``.

        Raises:
            NotImplementedError: For classification.
        """
        if not is_gaussian(self.likelihood):
            raise NotImplementedError(
                "Fantasies need Gaussian observations of the latent function, but "
                f"{type(self.likelihood).__name__} observes labels. Condition on "
                "labels with condition_on_observations."
            )
        return super().fantasize(X, *args, **kwargs)

    def subset_output(self, idcs: list[int]) -> Self:
        """The joint model seen through some of its outputs."""
        own = list(range(self._num_outputs))
        if self.output_indices is not None:
            own = self.output_indices
        if not idcs or any(not -len(own) <= i < len(own) for i in idcs):
            raise ValueError(
                f"idcs must name outputs in 0 .. {len(own) - 1}, but is {idcs}."
            )
        if self._new is not None:
            raise NotImplementedError(
                "Subset the outputs before conditioning on further observations."
            )
        self._conditioned()  # factorised here, for all models that share the factors
        subset = self._share()
        subset.output_indices = [own[i] for i in idcs]
        if hasattr(self, "outcome_transform"):
            subset.outcome_transform = self.outcome_transform.subset_output(idcs)
        return subset
