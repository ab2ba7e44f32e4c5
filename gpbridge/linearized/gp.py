r"""A trained network as a Gaussian process and a BoTorch model.

In: a network, its data, a likelihood. Out: :class:`LinearizedGP`, the posterior of the
network's tangent model: joint over points and outputs, differentiable in the inputs,
conditioned without retraining. Hyperparameters are learnt by ``selection``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin, Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.utils.datasets import SupervisedDataset
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from gpytorch.models import GP
from torch import Size, Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
)

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from gpbridge.draws import TangentDraws
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.kernels.tangent import Groups, NeuralTangentKernel
from gpbridge.likelihoods import is_gaussian, noise_covariance
from gpbridge.linearized.calibration import (
    Calibration,
    TrainGap,
    find_calibration,
    training_gap,
)
from gpbridge.linearized.conditioning import (
    NewData,
    Update,
    add_blocks,
)
from gpbridge.linearized.construction import (
    feature_scale,
    fixed_inputs,
    freeze_network,
    prior_variance_bounds,
)
from gpbridge.linearized.evidence import evidence
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.mean import TangentMean
from gpbridge.linearized.mode import Mode
from gpbridge.linearized.noise import initial_noise, release_noise, set_noise
from gpbridge.linearized.posterior import TangentPosterior
from gpbridge.linearized.predictive import class_log_probabilities, temper_logs
from gpbridge.linearized.problem import TangentProblem
from gpbridge.outcomes import latent_distribution, target_distribution
from gpbridge.targets import check_targets, default_likelihood, warn_if_logits
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Evidence, FitResult


class LinearizedGP(GPyTorchModel, GP, FantasizeMixin):
    r"""The Gaussian process of a network's tangent model.

    .. math::
        f(x, w) \approx f(x, w^*) + J(x) (w - w^*), \qquad w \sim N(0, s I),

    conditioned on data through a gpytorch likelihood: for Gaussian noise an exact GP
    with kernel :math:`s J J^\top`, else Laplace's approximation with the full output
    Hessian. In train mode a call returns the prior of this linear model, in eval mode
    its posterior. The constructor does not fit hyperparameters: call
    :func:`gpbridge.selection.fit_evidence`, or ``calibrate`` for classification.

    Which mean: the linear model's posterior mean for Gaussian noise, the network's
    output for classification; measured to be the safe choices. Probabilities are the
    network's own softmax until held-out data calibrate the posterior.

    Costs min(p, n m)^3 / 3 once and t m min(p, n m)^2 per call on t points; beyond the
    memory budget conjugate gradients take over and hold neither matrix.

    Args:
        network: The trained module; a frozen copy is kept, yours is never changed. It
            maps transformed inputs to transformed targets.
        train_X: Inputs ``n x d``.
        train_Y: Targets: ``n x m`` floats; ``n`` integer labels for softmax; ``n`` or
            ``n x 1`` of 0 and 1 for one logit.
        likelihood: A gpytorch likelihood, shared, not copied. Default by the targets:
            Gaussian, multitask Gaussian, logistic or softmax.
        parameters: Which weights are random, see :class:`FunctionalNet`. The last layer
            alone needs a noise from validation data.
        groups: Weights that share a prior variance. Several groups prune layers on a
            trained network; ask for them explicitly.
        g_prior: Scale each weight by the size of its feature on the data, for networks
            whose weight scale is arbitrary. Forces ``offset=False``.
        offset: Centre the prior of the weights at zero for the tangent at the trained
            weights. Without, the process has mean zero. Gaussian noise only: other
            likelihoods take the problem without offset.
        mean: ``"linear_model"``, ``"network"``, or ``"auto"`` as above. The network's
            output needs a noise that is not learnt.
        noise: ``"learn"``, ``"fit_residual"``, ``"validation"``, or a variance.
        inference: How the posterior is computed.
        input_shape: Shape of one input, as (c, h, w), for networks on images.
        input_transform: A botorch input transform without learnable parameters.
        outcome_transform: A botorch outcome transform, for Gaussian noise.

    Raises:
        ShapeError: If shapes of data, network and likelihood disagree.
        TypeError: If a tensor has the wrong kind.
        ValueError: If an option or a combination is not supported.

    Example:
        >>> X = torch.linspace(0, 1, 20).unsqueeze(-1).double()
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(),
        ...                           torch.nn.Linear(16, 1)).double()
        >>> model = LinearizedGP(net, X, torch.sin(6 * X), noise=1e-2)
        >>> model.posterior(X[:3]).variance.shape
        torch.Size([3, 1])

    References:
        Khan, Immer, Abedi, Korzepa, Approximate Inference Turns Deep Networks into
        Gaussian Processes, NeurIPS 2019. Immer, Korzepa, Bauer, Improving predictions
        of Bayesian neural nets via local linearization, AISTATS 2021, eqs. (8)-(10).
    """

    def __init__(
        self,
        network: nn.Module,
        train_X: Tensor,
        train_Y: Tensor,
        likelihood: Likelihood | None = None,
        *,
        parameters: Parameters = "all",
        groups: Groups = "all",
        g_prior: bool = False,
        offset: bool = True,
        mean: str = "auto",
        noise: str | float = "learn",
        inference: Exact = Exact(),
        input_shape: Sequence[int] | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        fit_result: FitResult | None = None,
        select: str | None = None,
    ) -> None:
        super().__init__()
        check_inputs(train_X)
        check_not_empty(train_X=train_X)
        check_tensor(train_Y=train_Y)
        check_same_device(train_X=train_X, train_Y=train_Y)
        check_finite(train_Y=train_Y)  # before a transform spreads NaN to all rows
        check_choice("mean", mean, ("auto", "linear_model", "network"))
        check_choice("select", select, (None, "validation"))
        if train_X.dim() != 2:
            raise ShapeError(
                f"train_X must be ``n x d``, but has shape {tuple(train_X.shape)}. One "
                "model holds one data set; put several in a ModelListGP."
            )
        if not isinstance(inference, Exact):
            raise TypeError(
                "inference must be gpbridge.linearized.Exact(...), but is "
                f"{type(inference).__name__}."
            )
        self.inference, self.fit_result, self.select = inference, fit_result, select
        train_X, train_Y = train_X.detach(), train_Y.detach()
        net = freeze_network(network, parameters, input_shape, train_X, inference)
        Z = fixed_inputs(input_transform, train_X)
        num_outputs = net.probe(Z.to(net.dtype))
        with torch.no_grad():
            check_finite(**{"network(train_X)": net(Z.to(net.dtype))})
        targets = train_Y
        if outcome_transform is not None:
            labels = not train_Y.is_floating_point()
            if labels or not (likelihood is None or is_gaussian(likelihood)):
                kind = "integer labels" if labels else type(likelihood).__name__
                raise ValueError(
                    "outcome_transform needs a Gaussian likelihood and float targets, "
                    f"but came with {kind}. Leave it out for classification."
                )
            targets, _ = outcome_transform(train_Y)
        if likelihood is None:
            likelihood = default_likelihood(targets, num_outputs, train_X.dtype)
        targets = check_targets(
            likelihood, targets, num_outputs, len(train_X), dtype=train_X.dtype
        )
        gaussian = is_gaussian(likelihood)
        if gaussian:
            check_same_dtype("train_Y", train_Y, train_X.dtype)
        self.mean = mean
        if mean == "auto":
            self.mean = "linear_model" if gaussian else "network"
        self.offset = bool(offset and gaussian and not g_prior)
        self.g_prior = g_prior
        self._num_outputs = num_outputs
        self.register_buffer("_train_X", train_X)
        self.register_buffer("_train_Y", train_Y)
        self.register_buffer("_targets", targets)
        self.likelihood = likelihood
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        scale = feature_scale(net, Z, likelihood) if g_prior else None
        net.set_weight_scale(scale)
        self.covar_module = NeuralTangentKernel(net, groups=groups).to(train_X.device)
        self.mean_module = TangentMean(net)
        self.covar_module.register_constraint(
            "raw_prior_variance",
            prior_variance_bounds(
                net, Z, self.covar_module.unit_std(), targets if gaussian else None
            ),
            replace=True,
        )
        self.noise, self.parameters_option = noise, parameters
        self._froze_noise = False
        if gaussian:
            with torch.no_grad():
                misfit = targets - net(Z.to(net.dtype)).to(targets)
            value = initial_noise(
                noise, self.mean, parameters, fit_result, misfit, likelihood
            )
            if value is not None:
                set_noise(likelihood, value)
                self._froze_noise = True
        else:
            warn_if_logits(likelihood, net(Z.to(net.dtype)).detach().to(Z), targets)
        self.fitted: str | None = None
        self.calibration: Calibration | None = None
        self.output_indices: list[int] | None = None
        self._new: NewData | None = None
        self._forget()
        self.to(train_X.device)
        self.eval()

    @classmethod
    def from_fit(
        cls,
        fit_result: FitResult,
        train_X: Tensor,
        train_Y: Tensor,
        likelihood: Likelihood | None = None,
        *,
        noise: str | float | None = None,
        select: str | None = "auto",
        **options: Any,
    ) -> LinearizedGP:
        r"""Build the model from a training run, conditioned on all rows.

        Rows that only served for early stopping are data like the others. With
        validation rows, :func:`gpbridge.selection.fit_evidence` compares the linear
        model with the network's output there and keeps the better
        (``select="validation"``, the default when there are such rows).

        Args:
            fit_result: What :func:`gpbridge.dnn.fit_map` returned.
            train_X: All inputs ``n x d``, in the order of the training run.
            train_Y: All targets.
            likelihood: As in the constructor.
            noise: As in the constructor. Default: learnt; ``"validation"`` if only the
                last layer is random, ``"fit_residual"`` if ``mean="network"``.
            select: ``"validation"``, None, or ``"auto"``.
            **options: Of the constructor.

        Returns:
            The model, hyperparameters not yet fitted.

        Raises:
            ValueError: If there are no validation rows to select by.
            ShapeError: If the rows of the training run are not rows of the data.
        """
        check_choice("select", select, ("auto", "validation", None))
        has_validation = len(fit_result.validation_rows) > 0
        if noise is None:
            noise = "learn"
            if options.get("mean") == "network":
                noise = "fit_residual"
            elif options.get("parameters", "all") == "last_layer" and has_validation:
                noise = "validation"
        if select == "auto":
            free = noise == "learn" and options.get("mean", "auto") == "auto"
            regression = fit_result.validation_variance is not None
            settable = likelihood is None or isinstance(likelihood, GaussianLikelihood)
            select = "validation" if free and regression and settable else None
        if select == "validation" and not has_validation:
            raise ValueError(
                "select='validation' needs validation rows, but the fit result has "
                "none. "
                "Train with validation_fraction=0.1, or pass select=None."
            )
        model = cls(
            fit_result.network,
            train_X,
            train_Y,
            likelihood,
            noise=noise,
            fit_result=fit_result,
            select=select,
            **options,
        )
        rows = torch.cat([fit_result.fit_rows, fit_result.validation_rows])
        if len(rows) and int(rows.max()) >= len(train_X):
            raise ShapeError(
                f"The fit result names row {int(rows.max())}, but train_X has "
                f"{len(train_X)} rows. Pass the data that fit_map was called with."
            )
        return model

    # -- what it is ------------------------------------------------------------------

    @property
    def functional(self) -> FunctionalNet:
        """The frozen network."""
        return self.covar_module.functional

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """All inputs conditioned on, untransformed, ``batch_shape x n x d``."""
        if self._new is None:
            return (self._train_X,)
        X = self._new.X
        return (torch.cat([self._train_X.expand(*X.shape[:-2], -1, -1), X], -2),)

    @property
    def train_targets(self) -> Tensor:
        """All targets conditioned on, transformed, ``n`` if there is one output."""
        Y = self._targets
        if self._new is not None:
            new = self._new.Y
            if self.output_indices is not None:
                Y = Y[..., self.output_indices]
            Y = torch.cat([Y.expand(*new.shape[:-2], -1, -1), new], -2)
        return Y.squeeze(-1) if Y.dim() > 1 and Y.shape[-1] == 1 else Y

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        if self.output_indices is not None:
            return len(self.output_indices)
        return self._num_outputs

    @property
    def _supports_cache_root(self) -> bool:
        # Read by botorch's noisy acquisitions: low-rank updates of a cached root need
        # outputs that are independent, and those of one network are not.
        return self.num_outputs == 1

    @property
    def batch_shape(self) -> Size:
        """Empty, or the batch of the observations conditioned on."""
        if self._new is None:
            return Size()
        return torch.broadcast_shapes(self._new.X.shape[:-2], self._new.Y.shape[:-2])

    @property
    def prior_variance(self) -> Tensor:
        """Prior variance of the weights, one per group."""
        return self.covar_module.prior_variance

    @prior_variance.setter
    def prior_variance(self, value: float | Tensor) -> None:
        self.covar_module.prior_variance = value

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances, ``m``, or ``n x m`` if fixed per point, in squared units.

        Raises:
            TypeError: If the likelihood is not Gaussian.
        """
        if not is_gaussian(self.likelihood):
            # Not an AttributeError, which torch's modules replace by their own.
            raise TypeError(f"{type(self.likelihood).__name__} has no noise variance.")
        diagonal = self._noise(self._targets.double()).diagonal(dim1=-2, dim2=-1)
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        return (diagonal if fixed else diagonal[0]).to(self._train_X.dtype)

    def __repr__(self) -> str:
        """Sizes, and whether hyperparameters were fitted."""
        n, net = len(self._train_X), self.functional
        how = "not fitted" if self.fitted is None else f"fitted by {self.fitted}"
        return (
            f"{type(self).__name__}(n={n}, num_outputs={self.num_outputs}, random "
            f"weights={net.num_params}, {type(self.likelihood).__name__}, "
            f"mean={self.mean!r}, hyperparameters {how})"
        )

    # -- BoTorch ---------------------------------------------------------------------

    @ordinary_tensors()
    def forward(self, X: Tensor) -> MultivariateNormal:
        """The prior in train mode, the posterior in eval mode, at ``... x n x d``.

        Inputs are untransformed in train mode and transformed in eval mode, as in
        botorch's models.
        """
        if self.training:
            return self._prior(self.transform_inputs(X), X.dtype)
        return latent_distribution(*self._joint(X), X.dtype)

    def _prior(self, Z: Tensor, dtype: torch.dtype) -> MultivariateNormal:
        Z = Z.to(self.functional.dtype)
        # By the kernel, so that gpytorch's own objectives can learn its variances.
        covariance = self.covar_module(Z).to_dense()
        shape = (*Z.shape[:-1], self._num_outputs)
        mean = self.mean_module(Z).reshape(shape) if self.offset else Z.new_zeros(shape)
        return latent_distribution(mean, covariance, dtype)

    @ordinary_tensors()
    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Joint posterior of the latent function over points and outputs.

        Args:
            X: Inputs ``batch_shape x q x d``.
            output_indices: Outputs to keep; default all.
            observation_noise: Whether to add noise, or noise variances ``... x q x m``
                in transformed units. Gaussian noise only.
            posterior_transform: Applied last.
            **kwargs: None are used.

        Returns:
            A posterior over ``batch_shape x q x m`` values.

        Raises:
            NotImplementedError: If noise is asked for under labels.
        """
        if output_indices is not None:
            return self.subset_output(output_indices).posterior(
                X, None, observation_noise, posterior_transform
            )
        self.eval()
        self._check_new_inputs(X)
        Z = self.transform_inputs(X)
        mean, covariance = self._joint(Z)
        check_finite(**{"the network's output at X": mean.detach().flatten(0, -2)})
        if observation_noise is not False:
            covariance = add_blocks(covariance, self._noise_of(observation_noise, mean))
        posterior = GPyTorchPosterior(latent_distribution(mean, covariance, X.dtype))
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=X)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

    @ordinary_tensors()
    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> LinearizedGP:
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
        check_inputs(X, "X", self._train_X.shape[-1])
        if not is_gaussian(self.likelihood):
            return self._with_labels(X, Y)
        check_tensor(Y=Y)
        for name, value in (("X", X), ("Y", Y)):
            check_same_dtype(name, value, self._train_X.dtype)
        if Y.shape[-2:] != (X.shape[-2], self.num_outputs):
            raise ShapeError(
                f"Y must be ``... x {X.shape[-2]} x {self.num_outputs}`` for X of "
                f"shape {tuple(X.shape)}, but has shape {tuple(Y.shape)}."
            )
        check_finite(Y=Y)
        if noise is None and isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise ValueError(
                "noise must be given: FixedNoiseGaussianLikelihood holds the noise of "
                "the training points only. Pass the variances of the new observations, "
                f"``... x {X.shape[-2]} x 1``."
            )
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=self.transform_inputs(X))
        blocks = self._noise_of(True if noise is None else noise, Y.double())
        new = NewData(X, Y, blocks)
        if self._new is not None:
            new = _join(self._new, new)
        self._conditioned()  # factorised here, for all models that share the factors
        conditioned = self._share()
        conditioned._new = new
        conditioned._update = None
        return conditioned

    def fantasize(self, X: Tensor, *args: Any, **kwargs: Any) -> Model:
        """Condition on observations drawn from the posterior at ``X``.

        Raises:
            NotImplementedError: For classification.
        """
        if not is_gaussian(self.likelihood):
            raise NotImplementedError(
                f"Fantasies need Gaussian observations of the latent function, but "
                f"{type(self.likelihood).__name__} observes labels. Condition on "
                f"labels "
                "with condition_on_observations."
            )
        return super().fantasize(X, *args, **kwargs)

    def subset_output(self, idcs: list[int]) -> LinearizedGP:
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

    @classmethod
    def construct_inputs(
        cls,
        training_data: SupervisedDataset,
        network: nn.Module | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Constructor arguments from a dataset, as Ax and botorch ask for them.

        Args:
            training_data: Inputs, targets, and perhaps known noise variances.
            network: The trained network; leave it out to pass it later.
            **options: Passed on.

        Returns:
            Keyword arguments for the constructor.

        Raises:
            NotImplementedError: If several outputs have known noise variances.
        """
        inputs = super().construct_inputs(training_data)
        variance = inputs.pop("train_Yvar", None)
        if variance is not None:
            if variance.shape[-1] != 1:
                raise NotImplementedError(
                    "Known noise variances of several outputs are not supported. Model "
                    "the outputs one by one, in a ModelListGP."
                )
            if options.get("outcome_transform") is not None:
                transform = copy.deepcopy(options["outcome_transform"])
                _, variance = transform(inputs["train_Y"], variance)
            options["likelihood"] = FixedNoiseGaussianLikelihood(variance.squeeze(-1))
        if network is not None:
            options["network"] = network
        return {**inputs, **options}

    def subset_rows(self, rows: Tensor) -> LinearizedGP:
        """An independent model with the same options on some of the training rows.

        Args:
            rows: Row numbers.

        Returns:
            The model, with a likelihood of its own and nothing to select.
        """
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise NotImplementedError(
                "Rows of a model with fixed noise per point cannot be taken out. Build "
                "a "
                "model with the noise of those rows."
            )
        twin = copy.deepcopy(self)
        for name in ("_train_X", "_train_Y", "_targets"):
            setattr(twin, name, getattr(self, name)[rows])
        twin.select = None
        return twin

    def use_mean(self, mean: str, noise: str | float) -> None:
        """Change mean and noise together, as in the constructor (Gaussian noise)."""
        check_choice("mean", mean, ("linear_model", "network"))
        self.mean, self.noise = mean, noise
        if noise == "learn" and self._froze_noise:
            release_noise(self.likelihood)
            self._froze_noise = False
        misfit = self.problem.Y - self.problem.outputs
        value = initial_noise(
            noise,
            mean,
            self.parameters_option,
            self.fit_result,
            misfit,
            self.likelihood,
        )
        if value is not None:
            set_noise(self.likelihood, value)
            self._froze_noise = True

    # -- prediction ------------------------------------------------------------------

    @ordinary_tensors()
    @torch.no_grad()
    def predict(self, X: Tensor, link: str | None = None) -> Distribution:
        """Predictive distribution of y at each point, noise included.

        Points are processed in chunks of constant memory.

        Args:
            X: Inputs ``... x n x d``.
            link: For classification, how latent uncertainty becomes probabilities:
                ``"plugin"`` (the network's own, the default until calibrated),
                ``"pairwise"`` (the default after), ``"probit_centred"``, ``"probit"``,
                ``"laplace_bridge"``, ``"monte_carlo"``.

        Returns:
            Normal ``... x n x 1``, or independent Normals over m outputs; Bernoulli
            ``... x n x 1``; Categorical ``... x n``.

        Raises:
            NotImplementedError: For a subset of the classes.
            ValueError: If a link is asked for under Gaussian noise.
        """
        self.eval()
        self._check_new_inputs(X)
        if is_gaussian(self.likelihood):
            if link is not None:
                raise ValueError(
                    f"link is for classification, but came as {link!r} with "
                    f"{type(self.likelihood).__name__}. Leave it out."
                )
            mean, blocks = self.marginals(X)
            check_finite(**{"the network's output at X": mean.flatten(0, -2)})
            blocks = blocks + self._noise_of(True, mean)
            variance = blocks.diagonal(dim1=-2, dim2=-1)
            transform = getattr(self, "outcome_transform", None)
            return target_distribution(mean, variance, transform, X)
        if self.output_indices is not None:
            raise NotImplementedError(
                "Probabilities need all classes. Call predict on the model that was "
                "subset, or posterior(X) for latent values."
            )
        calibration = self._current_calibration()
        if link is None:
            link = "plugin" if calibration is None else calibration.link
        elif link != "plugin" and calibration is None:
            self._warn_about_gap(link)
        temperature = 1.0
        if calibration is not None:
            # One that was chosen for an average is not the network's own.
            if (link == "plugin") == (calibration.link == "plugin"):
                temperature = calibration.temperature
        if link == "plugin" and self.mean == "network":
            mean = self.functional(self.transform_inputs(X).to(self.functional.dtype))
            blocks = mean.new_zeros(*mean.shape, mean.shape[-1])
        else:
            mean, blocks = self.marginals(X)
        check_finite(**{"the network's output at X": mean.flatten(0, -2)})
        logs = class_log_probabilities(self.likelihood, mean, blocks, link)
        logs = temper_logs(logs, temperature).to(X.dtype)
        if mean.shape[-1] == 1:
            return Bernoulli(logits=logs[..., 1:] - logs[..., :1])
        # The check of its arguments fails for no points at all.
        return Categorical(logits=logs, validate_args=logs.numel() > 0)

    def _current_calibration(self) -> Calibration | None:
        """What held-out data chose, unless the prior variance was changed since."""
        kept = self.calibration
        if kept is None or kept.link == "plugin":
            return kept
        bounds = self.covar_module.raw_prior_variance_constraint
        chosen = min(
            max(kept.prior_variance, float(bounds.lower_bound)),
            float(bounds.upper_bound),
        )
        now = float(self.prior_variance.detach())
        return kept if abs(now - chosen) <= 1e-6 * chosen else None

    @ordinary_tensors()
    def calibrate(self, X_val: Tensor, Y_val: Tensor) -> Calibration | None:
        """Choose prior variance and a temperature on held-out data, if that helps.

        The only rule measured to be safe for classification: a joint choice by held-out
        NLL, adopted if better than the network's own probabilities by one standard
        error. Afterwards ``predict`` uses the pairwise link; else it is unchanged and a
        warning gives the numbers.

        Args:
            X_val: Inputs ``n' x d`` that neither training nor this model has seen; a
                tenth of the data is enough.
            Y_val: Their labels.

        Returns:
            What was adopted, or None.

        Raises:
            TypeError: If the model is a regression.
            ValueError: If the mean is not the network's output, or there are several
                prior groups.
        """
        if is_gaussian(self.likelihood):
            raise TypeError(
                "calibrate is for classification; under Gaussian noise call "
                "gpbridge.selection.fit_evidence(model)."
            )
        if self.mean != "network":
            raise ValueError(
                "calibrate averages around the network's output, but the model has "
                f"mean={self.mean!r}. Build it with mean='network'."
            )
        self._check_new_inputs(X_val, "X_val")
        check_not_empty(X_val=X_val)
        labels = check_targets(
            self.likelihood,
            Y_val,
            self._num_outputs,
            len(X_val),
            dtype=X_val.dtype,
            name="Y_val",
        )
        self.eval()
        with torch.no_grad():
            Z = self.transform_inputs(X_val)
        self.calibration = find_calibration(self.problem, Z, labels)
        if self.calibration is not None:
            self.fitted = "calibrate"
            if self.calibration.prior_variance > 0:
                bounds = self.covar_module.raw_prior_variance_constraint
                self.prior_variance = min(
                    max(self.calibration.prior_variance, float(bounds.lower_bound)),
                    float(bounds.upper_bound),
                )
        return self.calibration

    @property
    @ordinary_tensors()
    def train_gap(self) -> TrainGap:
        """How far predictions contradict the training labels; classification only.

        Raises:
            TypeError: If the model is a regression.
        """
        if is_gaussian(self.likelihood):
            raise TypeError("train_gap is for classification.")
        key = self._key()
        if self._gap is None or self._gap[0] != key:
            moments = self.marginals(self._train_X)
            self._gap = (key, training_gap(self.problem, *moments))
        return self._gap[1]

    # -- evidence and draws ----------------------------------------------------------

    def evidence(self) -> Evidence:
        """Log marginal likelihood of the training data with its parts, total nats.

        At the linear model's own optimum, without hyperpriors, in transformed units;
        differentiable in prior variances and noise. See
        :mod:`gpbridge.linearized.evidence`.

        Raises:
            MemoryError: If the exact evidence needs more than the memory budget.
            NotImplementedError: If the model was conditioned on further observations.
        """
        return self._evidence(count_dimension=True)

    @ordinary_tensors()
    def _evidence(self, count_dimension: bool) -> Evidence:
        self.check_all_data_is_training_data("The evidence")
        problem = self.problem
        problem.check_size("The exact evidence")
        result, self._mode = evidence(
            problem, self.prior_variance.double(), self._mode, count_dimension
        )
        return result

    def check_all_data_is_training_data(self, what: str) -> None:
        """Refuse what would silently ignore observations conditioned on later."""
        if self._new is not None:
            raise NotImplementedError(
                f"{what} is that of the {len(self._train_X)} training points only, but "
                f"the model was conditioned on {self._new.X.shape[-2]} further ones. "
                "Build a LinearizedGP on all data."
            )

    def log_evidence(self) -> Tensor:
        """Log marginal likelihood of the training data, total nats."""
        return self._evidence(count_dimension=False).value

    @ordinary_tensors()
    @torch.no_grad()
    def draw(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> TangentDraws:
        """Freeze functions drawn from the posterior.

        Exact and joint over all inputs: each draw is the tangent model at one set of
        weights, differentiable in X. Memory s p.

        Args:
            num_samples: The number s of functions.
            generator: Source of randomness. Without one, draws are fresh on each call;
                the global random state is left alone in either case.

        Returns:
            A function of X, ``... x n x d`` to ``s x ... x n x m``.
        """
        self.eval()
        check_positive(num_samples=num_samples)
        if generator is None:
            generator = torch.Generator(device=self._train_X.device)
            generator.seed()
        if len(self.batch_shape):
            raise NotImplementedError(
                "draw does not take a model with a batch of fantasies. Draw from the "
                "model that was fantasised from."
            )
        update, base = self._updated(), self._conditioned()
        return TangentDraws(
            self.functional,
            base.draw(num_samples, generator, update, self._new),
            1.0 if base.adds_network else 0.0,
            self.transform_inputs,
            self._untransform,
            self.output_indices,
        )

    # -- inside ----------------------------------------------------------------------

    @property
    def problem(self) -> TangentProblem:
        """The linear model with its caches at unit prior variance."""
        if self._problem is None:
            with torch.no_grad():
                Z = self.transform_inputs(self._train_X)
            floating = self._targets.is_floating_point()
            self._problem = TangentProblem(
                self.functional,
                Z.to(self.functional.dtype),
                self._targets.double() if floating else self._targets,
                self.likelihood,
                self.covar_module.groups,
                self.covar_module.unit_std(),
                self.offset,
                self.inference,
            )
        return self._problem

    def _check_new_inputs(self, X: Tensor, name: str = "X") -> None:
        check_tensor(**{name: X})
        check_same_device(**{name: X, "train_X": self._train_X})
        check_inputs(X, name, self._train_X.shape[-1])
        check_same_dtype(name, X, self._train_X.dtype)

    def _key(self) -> tuple:
        noise = [p.detach().flatten().tolist() for p in self.likelihood.parameters()]
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            noise.append(self.likelihood.noise_covar.noise.flatten().tolist())
        return (self.prior_variance.detach().tolist(), noise, self.mean)

    def _conditioned(self) -> TangentPosterior:
        """The posterior, kept as long as no hyperparameter changes its value.

        Values are compared, not tensor versions: gpytorch's ``initialize`` writes to
        ``.data``.
        """
        key = self._key()
        if self._posterior is None or self._posterior[0] != key:
            made = TangentPosterior(
                self.problem, self.prior_variance.detach(), self.mean
            )
            self._posterior, self._update = (key, made), None
        return self._posterior[1]

    def _updated(self) -> Update | None:
        base, kept = self._conditioned(), self._update
        if self._new is None:
            return None
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in self._new)
        if kept is None or (wanted and not kept.innovation.requires_grad):
            new = self._new._replace(X=self.transform_inputs(self._new.X))
            self._update = base.update(new, self.output_indices)
        return self._update

    def _joint(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        update = self._updated()
        return self._conditioned().joint(Z, self.output_indices, update)

    @ordinary_tensors()
    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Latent moments of each point in transformed units, float64.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            Mean ``... x n x m`` and covariance ``... x n x m x m``.
        """
        if len(self.batch_shape):
            raise NotImplementedError(
                "Marginals of a model with a batch of fantasies are not supported. Ask "
                "posterior(X) for joint moments."
            )
        rows = self.transform_inputs(X).reshape(-1, X.shape[-1])
        update = self._updated()
        mean, blocks = self._conditioned().marginals(
            rows, self.output_indices, update, X.dtype == torch.float32
        )
        m, shape = self.num_outputs, X.shape[:-1]
        return mean.reshape(*shape, m), blocks.reshape(*shape, m, m)

    def _noise(self, f: Tensor, noise: Tensor | None = None) -> Tensor:
        return noise_covariance(self.likelihood, f, noise).detach().double()

    def _noise_of(self, asked: bool | Tensor, mean: Tensor) -> Tensor:
        """Noise covariance of each point's outputs, ``... x n x m x m``."""
        if not is_gaussian(self.likelihood):
            raise NotImplementedError(
                f"{type(self.likelihood).__name__} observes labels, so its noise "
                f"cannot "
                "be added to the latent posterior. Use predict(X) for probabilities."
            )
        if isinstance(asked, Tensor):
            variance = asked.to(mean)
            if variance.shape[-1] != mean.shape[-1]:
                variance = variance.unsqueeze(-1)
            check_positive(noise=variance)
            return torch.diag_embed(variance.expand(mean.shape))
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            # Other points than those of training: the average noise, as in botorch.
            level = self._noise(self._targets.double()).mean(0)
            return level.expand(*mean.shape, mean.shape[-1])
        m = self._num_outputs
        blocks = self._noise(mean.new_zeros(*mean.shape[:-1], m))
        if self.output_indices is not None:
            blocks = blocks[..., self.output_indices, :][..., self.output_indices]
        return blocks

    def _untransform(self, values: Tensor) -> Tensor:
        if hasattr(self, "outcome_transform"):
            values, _ = self.outcome_transform.untransform(values)
        return values

    def _with_labels(self, X: Tensor, Y: Tensor) -> LinearizedGP:
        if X.dim() != 2:
            raise NotImplementedError(
                "Conditioning a classifier takes one data set, ``n' x d``, but X has "
                f"shape {tuple(X.shape)}."
            )
        check_same_dtype("X", X, self._train_X.dtype)
        Y = check_targets(
            self.likelihood, Y, self._num_outputs, len(X), self._train_X.dtype, "Y"
        )
        conditioned = self._share()
        conditioned._train_X = torch.cat([self._train_X, X])
        conditioned._targets = torch.cat([self._targets, Y])
        conditioned._train_Y = conditioned._targets
        conditioned._forget()
        return conditioned

    def _warn_about_gap(self, link: str) -> None:
        gap = self.train_gap
        if gap.posterior > gap.network + 0.05:
            warnings.warn(
                f"link={link!r} without calibration: on the training data the "
                f"predictive "
                f"contradicts the labels by {gap.posterior:.3f} on average, the "
                f"network "
                f"by {gap.network:.3f}. Pass held-out data to calibrate().",
                stacklevel=3,
            )

    def _share(self) -> LinearizedGP:
        """A shallow copy: modules and caches are shared, further data are not."""
        # Not copy.copy, whose __getstate__ leaves the caches behind.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = self.__dict__[name].copy()
        return twin

    def _forget(self) -> None:
        self._problem: TangentProblem | None = None
        self._posterior: tuple[tuple, TangentPosterior] | None = None
        self._update: Update | None = None
        self._mode: Mode | None = None
        self._gap: tuple[tuple, TrainGap] | None = None

    def train(self, mode: bool = True) -> LinearizedGP:
        """Set the mode; network and transforms stay in eval mode."""
        super().train(mode)
        for name in ("input_transform", "outcome_transform"):
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ):
        """Load network, data and hyperparameters; transforms are part of the state."""
        return nn.Module.load_state_dict(self, state_dict, strict=strict)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def get_extra_state(self) -> Tensor:
        """What a state_dict carries beside hyperparameters and data: plain values.

        As a tensor, since botorch's optimisers detach and clone whatever is in there.
        """
        calibration = None if self.calibration is None else tuple(self.calibration)
        state = {"mean": self.mean, "fitted": self.fitted, "calibration": calibration}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        state = json.loads(bytes(state.tolist()))
        self.mean, self.fitted = state["mean"], state["fitted"]
        kept = state["calibration"]
        self.calibration = None if kept is None else Calibration(*kept)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> LinearizedGP:
        super()._apply(fn, *args, **kwargs)
        self._forget()
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles carry the state, not what can be computed from it."""
        state = {**self.__dict__}
        for cache in ("_problem", "_posterior", "_update", "_mode", "_gap"):
            state[cache] = None
        return state

    def _set_transformed_inputs(self) -> None:
        """Nothing to swap: inputs are kept as given and transformed where used."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to swap."""


def _join(old: NewData, new: NewData) -> NewData:
    """Concatenate observations along points, batches broadcast."""
    joined = []
    for a, b in zip(old, new, strict=True):
        trailing = 3 if a is old.noise else 2
        batch = torch.broadcast_shapes(a.shape[:-trailing], b.shape[:-trailing])
        a = a.expand(*batch, *a.shape[-trailing:])
        b = b.expand(*batch, *b.shape[-trailing:])
        joined.append(torch.cat([a, b], dim=-trailing))
    return NewData(*joined)
