r"""Any posterior over weights as a BoTorch model.

In: SWAG, ensembles, Markov chains, dropout, whatever has a ``draw``. Out: a model whose
posteriors are the draws themselves, the Gaussian with their moments, or that of the
tangent model; acquisition functions take it as any other.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.utils.datasets import SupervisedDataset
from gpytorch.likelihoods import Likelihood
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from gpbridge.acquisition import DrawsPosterior
from gpbridge.checks import ShapeError, check_choice, check_count, check_inputs
from gpbridge.function_space import FunctionSpace, add_variance
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import is_gaussian, noise_covariance, noise_variances
from gpbridge.outcomes import latent_distribution, target_distribution
from gpbridge.predictive_mixture import (
    Entropies,
    Moments,
    decompose,
    mixture_moments,
    normal_mixture,
    predictive,
    target_moments,
)
from gpbridge.types import FunctionDraws, WeightPosterior

MODES = ("ensemble", "gaussian", "linearized")


class WeightSpaceModel(Model):
    r"""A BoTorch model of the functions that a posterior over weights implies.

    ================  ==============================================================
    ``"ensemble"``    the s draws as they are: multimodal, each of them one function
                      over all candidates
    ``"gaussian"``    the normal with their mean and covariance
    ``"linearized"``  the normal of the tangent model, for Gaussian weights; no Monte
                      Carlo error
    ================  ==============================================================

    The draws are frozen: the posterior at X is a deterministic function of X, as
    acquisition functions need it. With ``"ensemble"`` they average over every draw once
    (:class:`~gpbridge.acquisition.EnumeratingSampler`). Cost of a posterior: s passes
    through the network, or one Jacobian.

    It cannot learn from further observations: a posterior over weights says nothing of
    how it was found. Train again on all data, or use
    :class:`gpbridge.LinearizedGP` or :class:`gpbridge.SampledGP`, which condition.

    Args:
        posterior: What has a ``draw``, or frozen functions.
        train_X: Inputs ``n x d``, in the caller's units: tell the number of outputs,
            and set the bounds of an input transform that learns them.
        train_Y: Targets ``n x m``: fit the outcome transform, if given. Without them
            the transforms must be those of training, already fitted.
        num_samples: The number s of draws.
        mode: See above.
        likelihood: Of the outputs; needed for noise and predictions, shared. If it
            predicts noise, the model's outputs are the means.
        num_outputs: The number m of outputs, if there is no ``train_X``.
        input_transform: A botorch transform, under which the network was trained.
        outcome_transform: Likewise, of the targets.
        generator: Source of the draws; default one of seed 0.
        jitter: Variance added to Gaussian posteriors, in squared units of the network's
            outputs.

    Raises:
        TypeError: If the posterior does not fit the mode.
        ValueError: If an option is out of range.

    Example:
        >>> from gpbridge.functional import FunctionalNet
        >>> from gpbridge.weights import GaussianWeights
        >>> net = FunctionalNet(torch.nn.Linear(2, 1))
        >>> weights = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
        >>> model = WeightSpaceModel(weights, num_outputs=1, num_samples=32)
        >>> model.posterior(torch.zeros(5, 3, 2)).values.shape
        torch.Size([5, 32, 3, 1])
    """

    def __init__(
        self,
        posterior: WeightPosterior | FunctionDraws,
        train_X: Tensor | None = None,
        train_Y: Tensor | None = None,
        *,
        num_samples: int = 64,
        mode: str = "ensemble",
        likelihood: Likelihood | None = None,
        num_outputs: int | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        generator: Generator | None = None,
        jitter: float = 1e-6,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        self.mode, self.likelihood = mode, likelihood
        self.output_indices: list[int] | None = None
        self.function_space = FunctionSpace(
            posterior,
            "linearized" if mode == "linearized" else "sample",
            num_samples,
            jitter,
            generator,
            likelihood,
        )
        if train_X is not None:
            check_inputs(train_X)
        if input_transform is not None:
            if train_X is not None:
                input_transform(train_X)  # bounds are read from the data here
            self.input_transform = input_transform.eval()
        if outcome_transform is not None:
            if train_Y is not None:
                Z = None if train_X is None else self.transform_inputs(train_X)
                outcome_transform(train_Y, X=Z)
            self.outcome_transform = outcome_transform.eval()
        if num_outputs is not None:
            check_count(num_outputs=num_outputs)
        elif train_X is not None:
            with torch.no_grad():
                Z = self.transform_inputs(train_X[:1])
                num_outputs = self.function_space.values(Z).shape[-1]
        self._num_outputs = num_outputs
        self.eval()

    # -- BoTorch ---------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        """The number m of outputs.

        Raises:
            RuntimeError: If nothing has told it yet.
        """
        if self.output_indices is not None:
            return len(self.output_indices)
        if self._num_outputs is None:
            raise RuntimeError(
                "The number of outputs is not known. Pass train_X or num_outputs to "
                "the model."
            )
        return self._num_outputs

    @property
    def batch_shape(self) -> Size:
        """None: one model."""
        return Size()

    def forward(self, X: Tensor) -> Tensor:
        """The draws at ``... x n x d``, ``... x s x n x m``, not untransformed."""
        return self._chosen(self.function_space.values(X)).movedim(0, -3)

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Joint posterior of the functions over points, differentiable in X.

        Args:
            X: Inputs ``batch_shape x q x d``.
            output_indices: Outputs to keep; default all.
            observation_noise: Whether to add the likelihood's noise, or variances
                ``... x q x m`` in transformed units. With noise the posterior is the
                normal with the moments of the mixture in any mode; :meth:`predict` has
                the mixture.
            posterior_transform: Applied last. To draws by its rule for outcomes.
            **kwargs: None are used.

        Returns:
            A :class:`~gpbridge.acquisition.DrawsPosterior`, or a normal.
        """
        if output_indices is not None:
            return self.subset_output(output_indices).posterior(
                X, None, observation_noise, posterior_transform
            )
        self.eval()
        check_inputs(X, "X")
        Z = self.transform_inputs(X)
        noisy = observation_noise is not False
        if self.mode == "ensemble" and not noisy:
            values = self(Z)
            if hasattr(self, "outcome_transform"):
                values, _ = self.outcome_transform.untransform(values, X=Z)
            posterior = DrawsPosterior(values)
            if posterior_transform is None:
                return posterior
            return posterior.transformed(posterior_transform, X)
        mean, covariance = self._chosen_moments(Z)
        if self.mode != "ensemble":
            jitter = torch.full_like(mean, self.function_space.jitter)
            covariance = add_variance(covariance, jitter)
        if noisy:
            covariance = self._with_noise(covariance, observation_noise, Z, mean)
        posterior = GPyTorchPosterior(latent_distribution(mean, covariance, X.dtype))
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=Z)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

    def subset_output(self, idcs: list[int]) -> WeightSpaceModel:
        """The model seen through some of its outputs; it shares the draws."""
        m = self.num_outputs
        if not idcs or any(not -m <= i < m for i in idcs):
            raise ValueError(f"idcs must name outputs in 0 .. {m - 1}, but is {idcs}.")
        own = self.output_indices or list(range(m))
        subset = copy.copy(self)
        subset._modules = dict(self._modules)
        subset.output_indices = [own[i] for i in idcs]
        if hasattr(self, "outcome_transform"):
            subset.outcome_transform = self.outcome_transform.subset_output(idcs)
        return subset

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, **kwargs: Any
    ) -> NoReturn:
        """Not possible; the error says what is.

        Raises:
            NotImplementedError: Always.
        """
        _refuse("condition_on_observations")

    def fantasize(self, X: Tensor, sampler: Any = None, **kwargs: Any) -> NoReturn:
        """Not possible; the error says what is.

        Raises:
            NotImplementedError: Always.
        """
        _refuse("fantasize")

    @classmethod
    def construct_inputs(
        cls, training_data: SupervisedDataset, **options: Any
    ) -> dict[str, Any]:
        """Constructor arguments from a data set, besides ``posterior``.

        Args:
            training_data: Inputs and targets. Known noise does not enter: it belongs
                to the likelihood that the posterior was found with.
            **options: Further arguments, handed through.

        Returns:
            ``train_X``, ``train_Y`` and the options.
        """
        data = super().construct_inputs(training_data)
        data.pop("train_Yvar", None)
        return {**data, **options}

    def _set_transformed_inputs(self) -> None:
        """No training inputs are kept that would need it."""

    def _revert_to_original_inputs(self) -> None:
        """No training inputs are kept that would need it."""

    # -- predictions -----------------------------------------------------------------

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
        check_inputs(X, "X")
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
        if self.output_indices is None:
            return mean, covariance
        n, m = mean.shape[-2:]
        kept = torch.tensor(self.output_indices, device=mean.device) % m
        rows = (torch.arange(n, device=mean.device)[:, None] * m + kept).flatten()
        dense = covariance.to_dense()
        chosen = to_linear_operator(dense[..., rows[:, None], rows])
        return self._chosen(mean), chosen


def _refuse(method: str) -> NoReturn:
    raise NotImplementedError(
        f"{method} does not exist for WeightSpaceModel: a posterior over weights has "
        "seen its data and cannot take more. Train again on all data, or use "
        "gpbridge.LinearizedGP or gpbridge.SampledGP, which condition without training."
    )
