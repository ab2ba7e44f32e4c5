r"""Gaussian processes with the kernel of a network as surrogates.

In: observations. Out: a ``SingleTaskGP`` for each outcome, several in a
``ModelListGP``, whose kernel is that of a network: at random weights, infinitely wide
or learnt. They condition, fantasise and serve every acquisition function of botorch.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.model import Model
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from gpbridge.checks import check_choice
from gpbridge.kernels.deep import network_body
from gpbridge.kernels.infinite_width import InfiniteWidthKernel
from gpbridge.kernels.tangent import NeuralTangentKernel
from gpbridge.models import NetworkKernelGP
from gpbridge.selection.deep_kernel import fit_deep_kernel
from gpbridge.selection.multi_start import (
    MATERN_PLUS_STARTS,
    Start,
    fit_matern_plus_kernel,
    multi_start,
)
from gpbridge.surrogates.recipe import (
    Experiments,
    NetworkBuilder,
    Recipe,
    State,
    relu_network,
)
from gpbridge.surrogates.training import NOISE_FLOOR, noise_prior

# Mean prior variance in units of the targets' variance. Where the evidence explains all
# by noise, a process without a variance would leave nothing to explore.
SIGNAL_BOUNDS = (1e-2, 1e4)
UPDATE_PATIENCE = 3  # checks without gain, one every ten steps, from a trained network
NOISE_STARTS = (1e-3, 1e-1)  # of the variance of the targets
MOSTLY_MATERN = MATERN_PLUS_STARTS[1]


class _OutcomeByOutcome(Recipe):
    """One Gaussian process for each outcome."""

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        columns = experiments.Y.split(1, dim=-1)
        fits = [self._one(experiments, Y, j) for j, Y in enumerate(columns)]
        models = [model for model, _ in fits]
        weights = [state for _, state in fits if state is not None]
        return (models[0] if len(models) == 1 else ModelListGP(*models)), weights

    @abstractmethod
    def _one(
        self, experiments: Experiments, Y: Tensor, index: int
    ) -> tuple[SingleTaskGP, State | None]:
        """The process of outcome ``index``, and the state that its update needs."""


@dataclass(frozen=True, kw_only=True)
class TangentSurrogate(_OutcomeByOutcome):
    r"""A Gaussian process with the tangent kernel of an untrained network.

    The network's inductive bias without any training: two numbers are learnt, the
    kernel's scale and the noise, see :class:`~gpbridge.kernels.NeuralTangentKernel`. An
    update starts from the last ones, and from the first start of a fit.

    Args:
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    def _one(
        self, experiments: Experiments, Y: Tensor, index: int
    ) -> tuple[SingleTaskGP, State | None]:
        kernel = NeuralTangentKernel(experiments.build(1)).requires_grad_(False)
        return _fitted(experiments, Y, kernel, index)


@dataclass(frozen=True, kw_only=True)
class MaternTangentSurrogate(_OutcomeByOutcome):
    r"""A Matérn kernel plus the tangent kernel of an untrained network.

    The strongest plain Gaussian process measured on small tables, see
    :func:`~gpbridge.selection.fit_matern_plus_kernel`. An update starts from the last
    hyperparameters, and from a kernel that is mostly Matérn.

    Args:
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    def _one(
        self, experiments: Experiments, Y: Tensor, index: int
    ) -> tuple[SingleTaskGP, State | None]:
        kernel = NeuralTangentKernel(experiments.build(1))
        starts = MATERN_PLUS_STARTS
        if experiments.weights:
            starts = (experiments.weights[index], MOSTLY_MATERN)
        model = fit_matern_plus_kernel(
            *(experiments.X, Y, kernel),
            starts=starts,
            noise_floor=NOISE_FLOOR,
            input_transform=experiments.input_transform,
        )
        return model, _hyperparameters(model)


@dataclass(frozen=True, kw_only=True)
class InfiniteWidthSurrogate(_OutcomeByOutcome):
    r"""A Gaussian process with the kernel of the network at infinite width.

    The variances of the weights and biases of every layer are learnt by marginal
    likelihood, see :class:`~gpbridge.kernels.InfiniteWidthKernel`. The network has ReLU
    layers by default: with tanh a kernel takes some twenty times as long.

    Args:
        kind: ``"nngp"``, the network at random weights, or ``"ntk"``, trained.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`; the network
            must be a ``torch.nn.Sequential`` of layers that have a limit.
    """

    network: NetworkBuilder = relu_network
    kind: str = "nngp"

    def _one(
        self, experiments: Experiments, Y: Tensor, index: int
    ) -> tuple[SingleTaskGP, State | None]:
        check_choice("kind", self.kind, ("nngp", "ntk"))
        kernel = InfiniteWidthKernel.from_module(experiments.build(1), self.kind)
        return _fitted(experiments, Y, kernel.to(Y), index)


@dataclass(frozen=True, kw_only=True)
class DeepKernelSurrogate(_OutcomeByOutcome):
    r"""A deep kernel: features learnt by marginal likelihood, kept if they predict.

    See :func:`~gpbridge.selection.fit_deep_kernel`. ``epochs`` and ``update_epochs``
    are full-batch steps at most, and an update ends after 30 without a gain; the rate
    is a fifth of ``learning_rate``.

    Args:
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`; the network
            must be a ``torch.nn.Sequential`` that ends with a linear layer.
    """

    def _one(
        self, experiments: Experiments, Y: Tensor, index: int
    ) -> tuple[SingleTaskGP, State | None]:
        body = network_body(experiments.build(1))
        if experiments.weights:
            body.load_state_dict(experiments.weights[index])
        model = fit_deep_kernel(
            body,
            experiments.X,
            Y,
            input_transform=experiments.input_transform,
            network_learning_rate=self.learning_rate / 5,
            max_epochs=self._epochs(experiments),
            patience=UPDATE_PATIENCE if experiments.weights else 10,
            progress=self.progress,
            generator=experiments.generator,
        )
        return model, model.covar_module.network.network.state_dict()


def _fitted(
    experiments: Experiments, Y: Tensor, kernel: Kernel, index: int
) -> tuple[SingleTaskGP, State]:
    noise = LogTransformedInterval(NOISE_FLOOR, 10.0, initial_value=1e-2)
    likelihood = GaussianLikelihood(noise_prior(), noise)
    size = float(kernel(experiments.Z, diag=True).mean())
    low, high = (bound / size for bound in SIGNAL_BOUNDS)
    scale = LogTransformedInterval(low, high, initial_value=1 / size)
    model = NetworkKernelGP(
        experiments.X,
        Y,
        likelihood=likelihood,
        covar_module=ScaleKernel(kernel, outputscale_constraint=scale),
        input_transform=experiments.input_transform,
    )
    starts: list[Start] = [{"likelihood.noise": noise} for noise in NOISE_STARTS]
    if experiments.weights:
        starts = [experiments.weights[index], starts[0]]
    multi_start(ExactMarginalLogLikelihood(likelihood, model), starts)
    return model.eval(), _hyperparameters(model)


def _hyperparameters(model: SingleTaskGP) -> State:
    """What the evidence has learnt, by name, to start from the next time."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
