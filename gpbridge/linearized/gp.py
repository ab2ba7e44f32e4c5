r"""A trained network as a Gaussian process and a BoTorch model.

In: a network, its data, a likelihood. Out: :class:`LinearizedGP`, the posterior of the
network's tangent model: joint over points and outputs, differentiable in the inputs,
conditioned without retraining. Hyperparameters are learnt by ``selection``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.utils.datasets import SupervisedDataset
from gpytorch import settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.models import GP
from torch import Tensor, nn
from torch.distributions import Distribution

from gpbridge.checks import check_choice, check_finite, check_generator, check_positive
from gpbridge.draws import TangentDraws
from gpbridge.functional import Parameters
from gpbridge.kernels.tangent import Groups, NeuralTangentKernel
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.calibration import Calibration
from gpbridge.linearized.classification import Classification
from gpbridge.linearized.conditioning import NewData, add_blocks
from gpbridge.linearized.construction import (
    check_data,
    check_previous,
    fixed_inputs,
    freeze_network,
    outputs_at,
    prepare_targets,
    prior_variance_bounds,
)
from gpbridge.linearized.derived_models import DerivedModels
from gpbridge.linearized.evidence import evidence
from gpbridge.linearized.g_prior import check_g_prior, feature_scale
from gpbridge.linearized.inference import Exact, Inference
from gpbridge.linearized.loading import load_data
from gpbridge.linearized.mean import prior_mean
from gpbridge.linearized.noise import check_no_noise, known_noise
from gpbridge.linearized.persistence import Persistence
from gpbridge.linearized.state import TangentState
from gpbridge.linearized.structured_weights import StructuredWeights
from gpbridge.linearized.training_run import (
    check_training_run,
    data_after_training,
    defaults_after_training,
)
from gpbridge.linearized.variational import Refinement
from gpbridge.outcomes import latent_distribution, target_distribution
from gpbridge.randomness import fresh
from gpbridge.targets import check_not_probabilities, warn_if_logits
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Evidence, FitResult


class LinearizedGP(
    Persistence,
    Classification,
    DerivedModels,
    TangentState,
    GPyTorchModel,
    GP,
    FantasizeMixin,
):
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
    network's own softmax until ``calibrate`` or ``refine`` adopts an average.

    Costs min(p, n m)^3 / 3 once and t m min(p, n m)^2 per call on t points; beyond the
    memory budget conjugate gradients take over and hold neither matrix.

    Args:
        network: The trained module; a frozen copy is kept, yours is never changed. It
            maps transformed inputs to transformed targets.
        train_X: Inputs ``n x d``, or a loader of pairs (inputs, targets), which is read
            twice, as images if its batches are.
        train_Y: Targets: ``n x m`` floats; ``n`` integer labels for softmax; ``n`` or
            ``n x 1`` of 0 and 1 for one logit. None beside a loader.
        likelihood: A gpytorch likelihood, shared, not copied. Default by the targets:
            Gaussian, multitask Gaussian, logistic or softmax.
        parameters: Which weights are random, see :class:`FunctionalNet`; also
            ``"without_normalization"``, which fixes those of normalisation layers, and
            :mod:`gpbridge.subnetworks`, which chooses single entries. The last layer
            alone needs a noise from validation data.
        groups: Weights that share a prior variance. Several groups prune layers on a
            trained network; ask for them explicitly.
        g_prior: Scale each weight by the size of its feature on the data, for networks
            whose weight scale is arbitrary, as in front of a normalisation layer.
            True sums exactly, by m backward passes per point; a number K estimates by
            as many. Forces ``offset=False``.
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
        previous: The posterior of earlier data, which is the prior here; see
            :func:`~gpbridge.linearized.continual.weight_posterior`. Needs the same
            structure, weights and groups.

    Raises:
        ShapeError: If shapes of data, network and likelihood disagree.
        TypeError: If a tensor has the wrong kind, or a loader gives no pairs.
        ValueError: If an option or a combination is not supported, or a loader gives no
            rows or another number of them in its second pass.

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
        train_X: Tensor | Iterable,
        train_Y: Tensor | None = None,
        likelihood: Likelihood | None = None,
        *,
        parameters: Parameters = "all",
        groups: Groups = "all",
        g_prior: bool | int = False,
        offset: bool = True,
        mean: str = "auto",
        noise: str | float = "learn",
        inference: Inference = Exact(),
        input_shape: Sequence[int] | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        fit_result: FitResult | None = None,
        select: str | None = None,
        previous: StructuredWeights | None = None,
    ) -> None:
        super().__init__()
        check_choice("mean", mean, ("auto", "linear_model", "network"))
        check_choice("select", select, (None, "validation"))
        check_g_prior(g_prior)
        if not isinstance(inference, Inference):
            raise TypeError(
                "inference must be gpbridge.linearized.Exact(...), Sampled(...), "
                "Kronecker(...), Diagonal(...) or LowRank(...), but is "
                f"{type(inference).__name__}."
            )
        self.inference, self.fit_result, self.select = inference, fit_result, select
        train_X, train_Y, input_shape = load_data(
            train_X, train_Y, input_shape, inference.memory_budget
        )
        check_data(network, train_X, train_Y)
        train_X, train_Y = train_X.detach(), train_Y.detach()
        net = freeze_network(network, parameters, input_shape, train_X, inference)
        Z = fixed_inputs(input_transform, train_X)
        outputs = outputs_at(net, Z)
        self._num_outputs = outputs.shape[-1]
        likelihood, targets = prepare_targets(
            likelihood, train_Y, outcome_transform, outputs.shape, Z, train_X.dtype
        )
        gaussian = is_gaussian(likelihood)
        self.mean = mean
        if mean == "auto":
            self.mean = "linear_model" if gaussian else "network"
        self.offset = bool(offset and gaussian and not g_prior)
        self.g_prior = g_prior
        self.register_buffer("_train_X", train_X)
        self.register_buffer("_targets", targets)
        self.likelihood = likelihood
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        if g_prior:
            budget = inference.memory_budget
            scale = feature_scale(net, Z, likelihood, g_prior, budget)
        net.set_weight_scale(scale if g_prior else None)
        self.covar_module = NeuralTangentKernel(net, groups=groups).to(train_X.device)
        self.mean_module = prior_mean(net, self.offset)
        unit_std = self.covar_module.unit_std()
        power = targets if gaussian else None
        bounds = prior_variance_bounds(net, Z, unit_std, power, g_prior)
        self.covar_module.register_constraint(
            "raw_prior_variance", bounds, replace=True
        )
        self.previous = previous
        if previous is not None:
            check_previous(previous, self, self.covar_module.groups)
            self.prior_variance = previous.prior_variance
        self.noise, self.parameters_option = noise, parameters
        self._froze_noise = False
        if gaussian:
            self._apply_noise_option(targets - outputs.to(targets))
        else:
            check_no_noise(noise, likelihood)
            check_not_probabilities(likelihood, outputs)
            warn_if_logits(likelihood, outputs.to(Z), targets)
        self.fitted: str | None = None
        self.calibration: Calibration | None = None
        self.refinement: Refinement | None = None
        self.output_indices: list[int] | None = None
        self._new: NewData | None = None
        self._saved: dict[str, Tensor] | None = None
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
        rows: str = "all",
        **options: Any,
    ) -> LinearizedGP:
        r"""Build the model from a training run, conditioned on all rows by default.

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
            rows: ``"all"``, or ``"fit"`` to condition on those that the run fitted and
                to keep the validation rows for ``calibrate``. Noise that is fixed per
                point is that of these rows.
            **options: Of the constructor.

        Returns:
            The model, hyperparameters not yet fitted.

        Raises:
            ValueError: If there are no validation rows to select by.
            ShapeError: If the rows of the training run are not rows of the data.
        """
        check_training_run(fit_result)
        noise, select = defaults_after_training(
            fit_result, train_Y, likelihood, noise, select, rows, options
        )
        fit_result, train_X, train_Y = data_after_training(
            fit_result, train_X, train_Y, rows
        )
        return cls(
            fit_result.network,
            train_X,
            train_Y,
            likelihood,
            noise=noise,
            fit_result=fit_result,
            select=select,
            **options,
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
        self.check_prior_of_its_own("The prior covariance")
        Z = Z.to(self.functional.dtype)
        # By the kernel, so that gpytorch's own objectives can learn its variances.
        covariance = self.covar_module(Z).to_dense()
        mean = self.mean_module(Z).reshape(*Z.shape[:-1], self._num_outputs)
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
            blocks = self._noise_at(mean, observation_noise)
            covariance = add_blocks(covariance, blocks)
        elif covariance.shape[-1] > self.functional.num_params:
            covariance = _regular(covariance, X.dtype)
        posterior = GPyTorchPosterior(latent_distribution(mean, covariance, X.dtype))
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=Z)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

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
            transform = copy.deepcopy(options.get("input_transform"))
            options["likelihood"] = known_noise(
                variance,
                inputs["train_Y"],
                options.get("outcome_transform"),
                fixed_inputs(transform, inputs["train_X"]),
            )
        if network is not None:
            options["network"] = network
        return {**inputs, **options}

    # -- prediction ------------------------------------------------------------------

    @ordinary_tensors()
    @torch.no_grad()
    def predict(self, X: Tensor, link: str | None = None) -> Distribution:
        """Predictive distribution of y at each point, noise included.

        Points are processed in chunks of constant memory.

        Args:
            X: Inputs ``... x n x d``.
            link: For classification, how latent uncertainty becomes probabilities:
                ``"plugin"`` (the network's own, the default until calibrated or
                refined), ``"pairwise"`` (the default after), ``"probit_centred"``,
                ``"probit"``, ``"laplace_bridge"``, ``"monte_carlo"``.

        Returns:
            Normal ``... x n x 1``, or independent Normals over m outputs; Bernoulli
            ``... x n x 1``; Categorical ``... x n``.

        Raises:
            NotImplementedError: For a subset of the classes.
            ValueError: If a link is asked for under Gaussian noise.
        """
        self.eval()
        self._check_new_inputs(X)
        if not is_gaussian(self.likelihood):
            return self._predict_labels(X, link)
        if link is not None:
            raise ValueError(
                f"link is for classification, but came as {link!r} with "
                f"{type(self.likelihood).__name__}. Leave it out."
            )
        mean, blocks = self.marginals(X)
        check_finite(**{"the network's output at X": mean.flatten(0, -2)})
        blocks = blocks + self._noise_at(mean)
        variance = blocks.diagonal(dim1=-2, dim2=-1)
        transform = getattr(self, "outcome_transform", None)
        Z = self.transform_inputs(X)
        return target_distribution(mean, variance, transform, Z, X.dtype)

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
        self.check_prior_of_its_own("The evidence")
        problem = self.problem
        problem.check_size("The exact evidence")
        result, self._mode = evidence(
            problem, self.prior_variance.double(), self._mode, count_dimension
        )
        return result

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
        generator = fresh(generator, self._train_X.device)
        check_generator(generator, self._train_X.device)
        if len(self.batch_shape):
            raise NotImplementedError(
                "draw does not take a model with a batch of fantasies. Draw from the "
                "model that was fantasised from."
            )
        update, base = self._updated(), self._conditioned()
        return TangentDraws(
            self.functional,
            base.draw(num_samples, generator, update, self._observed()),
            1.0 if base.adds_network else 0.0,
            self.transform_inputs,
            self._untransform,
            self.output_indices,
        )


def _regular(covariance: Tensor, dtype: torch.dtype) -> Tensor:
    """A covariance of more values than weights, which has no Cholesky factor, mended.

    Left alone, upstream adds jitter to those members of a batch whose rounding made the
    factorisation fail, and samples depend on the batch. The rounding of a factorisation
    is n times epsilon of the largest eigenvalue, at most n times the mean variance. No
    more is added than upstream would add.
    """
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    bound = 4 * variances.shape[-1] ** 2 * torch.finfo(dtype).eps
    relative = min(bound, settings.cholesky_jitter.value(dtype))
    jitter = relative * variances.mean(-1, keepdim=True)
    return covariance + torch.diag_embed(jitter.expand_as(variances))
