"""Predictions of y by draws of weights, in the units of the caller's targets.

In: the draws, likelihood and transforms of a model. Out: the distribution of y at each
point, what of its variance is noise, and moments of the chosen outputs. Next:
:class:`~gpbridge.surrogates.WeightSpaceModel` is a BoTorch model with them.
"""

from __future__ import annotations

import torch
from gpytorch.likelihoods import Likelihood
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.distributions import Distribution

from gpbridge.checks import ShapeError, check_inputs
from gpbridge.function_space import FunctionSpace, add_variance
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import is_gaussian, noise_covariance, noise_variances
from gpbridge.outcomes import target_distribution
from gpbridge.predictive_mixture import (
    Entropies,
    Moments,
    decompose,
    mixture_moments,
    normal_mixture,
    predictive,
    target_moments,
)
from gpbridge.surrogates.inputs import LABELS, check_same_outputs


class SurrogatePredictions:
    """What a model of weight draws says of targets."""

    mode: str
    likelihood: Likelihood | None
    output_indices: list[int] | None
    function_space: FunctionSpace

    def predict(self, X: Tensor) -> Distribution:
        """Distribution of y at each point, noise included.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            The mixture over draws, see
            :func:`gpbridge.predictive_mixture.predictive`; in the Gaussian modes and
            with Gaussian noise a Normal ``... x n x 1``, or independent ones. Under an
            outcome transform that is not affine, as Log, the parts of the mixture are
            normals to first order in the noise.

        Raises:
            ValueError: If there is no likelihood.
            NotImplementedError: If outputs are labels or have correlated noise, and
                only some are kept or the targets are transformed.
        """
        Z, likelihood = self._ready(X), self.likelihood
        transform = getattr(self, "outcome_transform", None)
        outputs = self.function_space.outputs(Z)
        variances = None
        if self._has_noise():
            if self.mode != "ensemble":
                mean, variance = self._marginals(Z)
                variance = variance + self._aleatoric(outputs)
                return target_distribution(mean, variance, transform, Z, X.dtype)
            variances = noise_variances(likelihood, outputs)
        if variances is None:
            if transform is None and self.output_indices is None:
                return predictive(likelihood, outputs)
            raise NotImplementedError(
                "predict keeps labels and outputs with correlated noise together and "
                "as they are. Ask the whole model, without an outcome transform."
            )
        means = self._chosen(self.function_space.latent(outputs))
        variances = self._chosen(variances)
        if transform is not None:
            means, variances = transform.untransform(means, variances, X=Z)
        return normal_mixture(means, variances)

    def decompose(self, X: Tensor) -> Moments | Entropies:
        """What the draws disagree about, and the noise of each.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            See :func:`gpbridge.predictive_mixture.decompose`; moments in the units of
            the caller's targets.

        Raises:
            ValueError: If there is no likelihood.
            NotImplementedError: If a mode is Gaussian and the outcome transform is not
                affine: what is left of a normal has no such parts.
        """
        Z = self._ready(X)
        outputs = self.function_space.outputs(Z)
        if not self._has_noise():
            return decompose(self.likelihood, outputs)
        transform = getattr(self, "outcome_transform", None)
        means, variances = map(self._chosen, target_moments(self.likelihood, outputs))
        if self.mode == "ensemble":
            if transform is not None:
                means, variances = transform.untransform(means, variances, X=Z)
            return mixture_moments(means, variances)
        mean, epistemic = self._marginals(Z)
        aleatoric = variances.mean(0)
        if transform is not None:
            if not transform._is_linear:
                raise NotImplementedError(
                    f"decompose needs an affine outcome transform with mode "
                    f"{self.mode!r}, but it is {type(transform).__name__}. Try "
                    "mode='ensemble'."
                )
            aleatoric = transform.untransform(mean, aleatoric, X=Z)[1]
            mean, epistemic = transform.untransform(mean, epistemic, X=Z)
        return Moments(mean, epistemic, aleatoric)

    def _ready(self, X: Tensor) -> Tensor:
        self.eval()
        check_inputs(X, "X", self._width)
        if self.likelihood is None:
            raise ValueError(
                "Predictions of y need a likelihood, and the model has none. Pass "
                "likelihood=, the one that the posterior was found with."
            )
        return self.transform_inputs(X)

    def _has_noise(self) -> bool:
        predicted = isinstance(self.likelihood, HeteroscedasticGaussianLikelihood)
        return predicted or is_gaussian(self.likelihood)

    def _with_noise(
        self,
        covariance: LinearOperator,
        observation_noise: bool | Tensor,
        Z: Tensor,
        mean: Tensor,
    ) -> LinearOperator:
        """Add noise, in transformed units."""
        if isinstance(observation_noise, Tensor):
            try:
                variance = observation_noise.to(mean).expand_as(mean)
            except RuntimeError as error:
                raise ShapeError(
                    "observation_noise must be ``... x q x m`` variances of shape "
                    f"{tuple(mean.shape)}, but has shape "
                    f"{tuple(observation_noise.shape)}."
                ) from error
            return add_variance(covariance, variance)
        if isinstance(self.likelihood, LABELS):
            raise ValueError(
                f"{type(self.likelihood).__name__} has labels, to whose latent outputs "
                "no noise is added. Leave observation_noise out; predict(X) has the "
                "probabilities of the labels."
            )
        if self.likelihood is None or not self._has_noise():
            raise ValueError(
                "observation_noise=True needs a likelihood with Gaussian noise, but it "
                f"is {type(self.likelihood).__name__}. Pass likelihood= to the model, "
                "or variances as observation_noise."
            )
        outputs = self.function_space.outputs(Z)
        if noise_variances(self.likelihood, outputs) is not None:
            return add_variance(covariance, self._aleatoric(outputs))
        noise = noise_covariance(self.likelihood, outputs)[0]  # ... x q x m x m
        noise = self._chosen(self._chosen(noise).mT)
        blocks = torch.diag_embed(noise.movedim(-3, -1))  # ... x m x m x q x q
        blocks = blocks.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2)
        return to_linear_operator(covariance.to_dense() + blocks)

    def _aleatoric(self, outputs: Tensor) -> Tensor:
        return self._chosen(target_moments(self.likelihood, outputs)[1].mean(0))

    def _chosen(self, values: Tensor) -> Tensor:
        return (
            values if self.output_indices is None else values[..., self.output_indices]
        )

    def _marginals(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each point, ``... x n x m``; no joint covariance."""
        mean, covariance = self._chosen_moments(Z.unsqueeze(-2))
        return mean.squeeze(-2), covariance.diagonal(dim1=-2, dim2=-1)

    def _chosen_moments(self, Z: Tensor) -> tuple[Tensor, LinearOperator]:
        mean, covariance = self.function_space.moments(Z)
        check_same_outputs(mean, self._num_outputs)
        if self.output_indices is None:
            return mean, covariance
        n, m = mean.shape[-2:]
        kept = torch.tensor(self.output_indices, device=mean.device) % m
        rows = (torch.arange(n, device=mean.device)[:, None] * m + kept).flatten()
        dense = covariance.to_dense()
        chosen = to_linear_operator(dense[..., rows[:, None], rows])
        return self._chosen(mean), chosen
