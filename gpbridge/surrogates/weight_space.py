r"""Any posterior over weights as a BoTorch model.

In: SWAG, ensembles, Markov chains, dropout, whatever has a ``draw``. Out: a model whose
posteriors are the draws themselves, the Gaussian with their moments, or that of the
tangent model; acquisition functions take it as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.utils.datasets import SupervisedDataset
from gpytorch.likelihoods import Likelihood
from torch import Generator, Size, Tensor, nn

from gpbridge.acquisition import DrawsPosterior
from gpbridge.batch_norm import inputs_of
from gpbridge.checks import (
    check_choice,
    check_count,
    check_inputs,
    check_not_empty,
)
from gpbridge.function_draws import SeenDraws, take
from gpbridge.function_space import FunctionSpace, add_variance
from gpbridge.outcomes import latent_distribution
from gpbridge.surrogates.inputs import (
    check_num_outputs,
    check_same_outputs,
    check_train_targets,
)
from gpbridge.surrogates.predictions import SurrogatePredictions
from gpbridge.types import FunctionDraws, WeightPosterior
from gpbridge.weights import even_choice

MODES = ("ensemble", "gaussian", "linearized")


class WeightSpaceModel(SurrogatePredictions, Model):
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

    In a botorch ``ModelList`` beside a GP the samplers that an acquisition function
    finds by itself disagree about the number of samples. Hand it a
    ``botorch.sampling.list_sampler.ListSampler`` with one for each model:
    ``EnumeratingSampler(Size([s]))`` and ``SobolQMCNormalSampler(Size([s]))``.

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
        batches: Training inputs ``b x d`` in the caller's units, for the batch-norm
            statistics of every draw; ``[train_X]`` where that fits in memory.

    Raises:
        TypeError: If the posterior does not fit the mode, or is none.
        ShapeError: If targets, outputs of the network, likelihood and ``num_outputs``
            disagree.
        ValueError: If an option is out of range, or one function has no spread.

    Warns:
        ReliabilityWarning: As for :class:`~gpbridge.function_space.FunctionSpace`:
            batch norm with the statistics of other weights, draws that are all the
            same.

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
        batches: Iterable[Tensor | Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        self.mode, self.likelihood = mode, likelihood
        self.output_indices: list[int] | None = None
        self._width: int | None = None  # of the inputs
        if num_outputs is not None:
            check_count(num_outputs=num_outputs)
        if train_X is not None:
            check_inputs(train_X)
            check_not_empty(train_X=train_X)
            self._width = train_X.shape[-1]
        elif train_Y is not None:
            check_inputs(train_Y, "train_Y")  # rows ``n x m`` of finite numbers
        if input_transform is not None:
            if train_X is not None:
                input_transform(train_X)  # bounds are read from the data here
            self.input_transform = input_transform.eval()
        self.function_space = FunctionSpace(
            posterior,
            "linearized" if mode == "linearized" else "sample",
            num_samples,
            jitter,
            generator,
            likelihood,
            None if batches is None else map(self.transform_inputs, inputs_of(batches)),
        )
        if train_X is not None:
            with torch.no_grad():
                Z = self.transform_inputs(train_X[..., :1, :])
                width = self.function_space.outputs(Z).shape[-1]
            if train_Y is not None:
                check_train_targets(likelihood, train_Y, train_X, width)
            num_outputs = check_num_outputs(likelihood, width, num_outputs)
        if outcome_transform is not None:
            if train_Y is not None:
                Z = None if train_X is None else self.transform_inputs(train_X)
                outcome_transform(train_Y, X=Z)
            self.outcome_transform = outcome_transform.eval()
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

    def extra_repr(self) -> str:
        """Mode, and the number of outputs where it is known."""
        known = "" if self._num_outputs is None else f", num_outputs={self.num_outputs}"
        return f"mode={self.mode!r}{known}"

    def __repr__(self) -> str:
        """One line: what the draws are of is shown by ``function_space``."""
        draws = self.function_space.draws
        known = draws.extra_repr() if isinstance(draws, nn.Module) else ""
        return (
            f"{type(self).__name__}({self.extra_repr()}; "
            f"{type(draws).__name__}({known}))"
        )

    @property
    def batch_shape(self) -> Size:
        """None: one model."""
        return Size()

    def forward(self, X: Tensor) -> Tensor:
        """The draws at ``... x n x d``, ``... x s x n x m``, not untransformed."""
        values = self.function_space.values(X)
        check_same_outputs(values, self._num_outputs)
        return self._chosen(values).movedim(0, -3)

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
        check_inputs(X, "X", self._width)
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

    @property
    def num_members(self) -> int | None:
        """The number s of frozen functions."""
        return getattr(self.function_space.draws, "num_samples", None)

    def draw(
        self, num_samples: int | None = None, generator: Generator | None = None
    ) -> SeenDraws:
        """Frozen functions, in the caller's units: a choice among the model's own.

        Args:
            num_samples: How many; default every one once, in order. Up to s they are
                distinct, beyond that every one comes as often as any other, up to one.
            generator: Source of the choice.

        Returns:
            A function of X, ``... x n x d`` to ``s x ... x n x m``.

        Raises:
            TypeError: If the model is of functions that do not tell their number.
        """
        draws = self.function_space.draws
        if num_samples is not None:
            s = self.num_members
            if s is None:
                raise TypeError(
                    f"The functions of the model, a {type(draws).__name__}, do not say "
                    "how many they are. Give them an attribute num_samples."
                )
            draws = take(draws, even_choice(num_samples, s, generator))
        return SeenDraws(draws, self.transform_inputs, self._finished)

    def _finished(self, outputs: Tensor, Z: Tensor) -> Tensor:
        values = self._chosen(self.function_space.latent(outputs))
        if hasattr(self, "outcome_transform"):
            values, _ = self.outcome_transform.untransform(values, X=Z)
        return values

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


def _refuse(method: str) -> NoReturn:
    raise NotImplementedError(
        f"{method} does not exist for WeightSpaceModel: a posterior over weights has "
        "seen its data and cannot take more. Train again on all data, or use "
        "gpbridge.LinearizedGP or gpbridge.SampledGP, which condition without training."
    )
