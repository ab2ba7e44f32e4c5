r"""Deep Gaussian processes: sparse GPs, each on the outputs of the one before.

.. math:: f(x) = f_L(f_{L-1}(\dots f_1(x))), \qquad
          q(f_1, \dots, f_L) = \prod_l p(f_l \mid u_l) q(u_l)

In: layers, a likelihood. Out: a gpytorch ``DeepGP`` whose bound is trained on draws of
marginals, as upstream's, and whose posterior is joint over points, which draws of
marginals are not. Next: ``deep_gp_build`` puts layers together, ``deep_gp_fit`` trains.

References:
    Salimbeni, Deisenroth, Doubly stochastic variational inference for deep Gaussian
    processes, NeurIPS 2017, eqs. (14) to (19).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    Likelihood,
    SoftmaxLikelihood,
)
from gpytorch.mlls import DeepApproximateMLL, VariationalELBO
from gpytorch.models.deep_gps import DeepGP
from gpytorch.settings import num_likelihood_samples
from linear_operator.operators import DiagLinearOperator
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from gpbridge.checks import (
    check_count,
    check_generator,
    check_inputs,
    check_memory,
    check_not_empty,
    check_same_device,
    check_same_dtype,
)
from gpbridge.dnn.deep_gp_draws import DeepDraw, draw_layer
from gpbridge.dnn.deep_gp_layer import InducingLayer
from gpbridge.dnn.training import isolated_randomness
from gpbridge.likelihoods import LogisticLikelihood, is_gaussian, noise_variances
from gpbridge.outcomes import latent_distribution
from gpbridge.predictive_mixture import normal_mixture, predictive
from gpbridge.prior_draws import NUM_FEATURES
from gpbridge.randomness import fresh, standard_normal
from gpbridge.targets import check_targets

MEMORY_BUDGET = 2**32  # bytes of joint covariances


class DeepGaussianProcess(DeepGP):
    r"""A deep GP with a likelihood. :func:`build_deep_gp` makes one that trains.

    Called with inputs ``n x d`` it returns what gpytorch's deep GPs return: marginals
    of the last layer for each of s draws of the hidden ones, ``s x n`` or
    ``s x n x m``, for ``DeepApproximateMLL``. Draws come from ``generator`` and never
    from the global state.

    The hidden draws of a call are independent between points. That is right for the
    bound and for predictions at one point, a mixture over draws (:meth:`predict`); and
    wrong for anything joint. :meth:`posterior`, :meth:`sample_joint` and :meth:`draw`
    keep the correlations. With ``draw`` it is a posterior over functions as any other
    here: ``gpbridge.surrogates.WeightSpaceModel(model, train_X, likelihood=...)`` is
    its BoTorch model.

    Args:
        layers: Each with as many inputs as the one before has outputs.
        likelihood: Of the last layer's outputs.

    Raises:
        ValueError: If the likelihood cannot be trained on minibatches, or layers do not
            fit.
    """

    def __init__(self, layers: Sequence[InducingLayer], likelihood: Likelihood) -> None:
        super().__init__()
        check_likelihood(likelihood)
        for number, (one, next_one) in enumerate(zip(layers, layers[1:], strict=False)):
            if one.output_dims != next_one.input_dims:
                raise ValueError(
                    f"Layer {number} has {one.output_dims} outputs, but the layer "
                    f"after it has {next_one.input_dims} inputs. They must agree."
                )
        self.layers, self.likelihood = nn.ModuleList(layers), likelihood

    @property
    def num_inputs(self) -> int:
        """The number d of inputs."""
        return self.layers[0].input_dims

    @property
    def num_outputs(self) -> int:
        """The number m of latent outputs."""
        return self.layers[-1].output_dims

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        return self.layers[0].variational_strategy.inducing_points.dtype

    def extra_repr(self) -> str:
        """Widths and inducing points of the layers."""
        widths = [self.num_inputs, *(layer.output_dims for layer in self.layers)]
        points = [len(one.variational_strategy.inducing_points) for one in self.layers]
        shown = " -> ".join(map(str, widths))
        return f"{shown}, inducing points {', '.join(map(str, points))}"

    # -- The bound -------------------------------------------------------------------

    def forward(
        self,
        X: Tensor,
        num_samples: int | None = None,
        generator: Generator | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> MultivariateNormal:
        """Marginals of the last layer given draws of the hidden ones.

        Args:
            X: Inputs ``n x d``.
            num_samples: The number s of draws; default gpytorch's setting
                ``num_likelihood_samples``. One layer has no draws: s is 1.
            generator: Source of the draws. Without one they are fresh.
            noise: Standard normals in place of draws, for each hidden layer
                ``s x n x h``, see :meth:`draw_noise`.

        Returns:
            ``s x n`` values, or ``s x n x m``, without covariances between points.
        """
        mean, variance = self.marginals(X, num_samples, generator, noise)
        if self.num_outputs == 1:
            return MultivariateNormal(
                mean[..., 0], DiagLinearOperator(variance[..., 0])
            )
        covariance = DiagLinearOperator(variance.flatten(-2))
        return MultitaskMultivariateNormal(mean, covariance)

    def marginals(
        self,
        X: Tensor,
        num_samples: int | None = None,
        generator: Generator | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Means and variances of :meth:`forward`, ``s x ... x n x m`` each."""
        self._check(X)
        if noise is None:
            noise = self.draw_noise(X.shape[:-1], num_samples, generator)
        return self._marginals(X, noise)

    def _marginals(self, X: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        values = X.unsqueeze(0)
        for layer, normal in zip(self.layers[:-1], noise, strict=True):
            mean, variance = layer.marginals(values)
            values = mean + variance.sqrt() * normal
        return self.layers[-1].marginals(values)

    def draw_noise(
        self,
        batch_shape: Sequence[int],
        num_samples: int | None = None,
        generator: Generator | None = None,
    ) -> list[Tensor]:
        """Standard normals ``s x batch_shape x h`` for each hidden layer."""
        shape = _samples(num_samples), *batch_shape
        like = self.layers[0].variational_strategy.inducing_points
        generator = fresh(generator, like.device)
        return [
            standard_normal((*shape, layer.output_dims), generator, like)
            for layer in self.layers[:-1]
        ]

    def elbo(
        self,
        X: Tensor,
        Y: Tensor,
        *,
        num_data: int | None = None,
        num_samples: int | None = None,
        generator: Generator | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        r"""The evidence lower bound per datum, on all data or on a minibatch.

        .. math:: \tfrac1b \sum_i \mathbb{E}_q \log p(y_i \mid f(x_i))
                  - \tfrac1N \sum_l \mathrm{KL}(q(u_l) \,\|\, p(u_l))

        Gpytorch's ``DeepApproximateMLL`` of ``VariationalELBO``. A minibatch's is an
        unbiased estimate: the mean over equal minibatches is that of all data.

        Args:
            X: Inputs ``b x d``.
            Y: Targets ``b x m``, or labels ``b``.
            num_data: The number N of all data; default b.
            num_samples: As for :meth:`forward`.
            generator: Likewise.
            noise: Likewise.

        Returns:
            Nats per datum, differentiable in all parameters.
        """
        targets = self.targets(X, Y)
        num_data = len(X) if num_data is None else num_data
        check_count(num_data=num_data)
        generator = fresh(generator, X.device)
        check_generator(generator, X.device)
        return self._elbo(X, targets, num_data, _samples(num_samples), generator, noise)

    def _elbo(
        self,
        X: Tensor,
        targets: Tensor,
        num_data: int,
        num_samples: int,
        generator: Generator,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if noise is None:
            noise = self.draw_noise(X.shape[:-1], num_samples, generator)
        f = _separate(*self._marginals(X, noise))
        bound = DeepApproximateMLL(VariationalELBO(self.likelihood, self, num_data))
        # Upstream's softmax draws its outputs from the global state: one for each
        # hidden draw, so that one layer has as many draws as two.
        each = 1 if f.batch_shape[0] > 1 else num_samples
        with isolated_randomness(generator, X.device), num_likelihood_samples(each):
            return bound(f, targets)

    def targets(self, X: Tensor, Y: Tensor) -> Tensor:
        """Checked targets in the shape of gpytorch's likelihood, ``n`` or ``n x m``."""
        self._check(X)
        m = self.num_outputs
        Y = check_targets(self.likelihood, Y, m, len(X), dtype=X.dtype, name="Y")
        check_same_device(X=X, Y=Y)
        if Y.is_floating_point():
            check_same_dtype("Y", Y, self.dtype)
        return Y.squeeze(-1) if Y.dim() == 2 and m == 1 else Y

    # -- Predictions -----------------------------------------------------------------

    def predict(
        self, X: Tensor, num_samples: int = 100, generator: Generator | None = None
    ) -> Distribution:
        """Distribution of y at each point, noise included.

        The mixture over draws of the hidden layers, the last one integrated out where
        that has a closed form (Gaussian, probit) or by quadrature (logistic), and drawn
        for softmax. ``predict(X).log_prob(Y)`` is the log density of the mixture, not
        of a normal with its moments.

        Args:
            X: Inputs ``... x n x d``.
            num_samples: The number s of draws.
            generator: Source of randomness; None is a fresh one with seed 0, so that
                two calls agree.

        Returns:
            As :func:`gpbridge.predictive_mixture.predictive`: for Gaussian noise a
            mixture of normals ``... x n x 1``, or ``... x n`` over m outputs; a
            Categorical ``... x n``; or a Bernoulli ``... x n x 1``.
        """
        check_count(num_samples=num_samples)
        generator = self._seeded(generator)
        mean, variance = self.marginals(X, num_samples, generator)
        likelihood = self.likelihood
        if is_gaussian(likelihood):
            return normal_mixture(mean, variance + noise_variances(likelihood, mean))
        if isinstance(likelihood, BernoulliLikelihood):
            return predictive(likelihood, mean / (1 + variance).sqrt())
        if isinstance(likelihood, LogisticLikelihood):
            f = _separate(mean, variance)
            return predictive(likelihood, likelihood.marginal(f).logits[..., None])
        shape = num_samples, *mean.shape[1:]
        normal = standard_normal(shape, generator, mean)
        return predictive(likelihood, mean + variance.sqrt() * normal)

    def posterior(
        self, X: Tensor, num_samples: int = 100, generator: Generator | None = None
    ) -> MultivariateNormal:
        r"""Mean and covariance of the latent function, joint over points and outputs.

        .. math:: \mu = \tfrac1s \sum_i \mu_i, \qquad \Sigma = \tfrac1s \sum_i
                  \bigl(\Sigma_i + (\mu_i - \mu)(\mu_i - \mu)^\top\bigr)

        over s joint draws of the hidden layers: the moments of the mixture, exact for
        one layer. The function is not Gaussian with more: :meth:`draw` has it.

        Args:
            X: Inputs ``n x d``.
            num_samples: The number s of draws.
            generator: As for :meth:`predict`.

        Returns:
            Over ``n`` values, or ``n x m``; no observation noise.

        Raises:
            MemoryError: If the covariances of all draws do not fit.
        """  # noqa: DOC502
        check_count(num_samples=num_samples)
        values = self._hidden_joint(X, num_samples, self._seeded(generator))
        means, covariances = self.layers[-1].joint(values)  # s x n x m, s x m x n x n
        mean, covariance = means.mean(0), covariances.mean(0)
        off = (means - mean).flatten(-2)
        blocks = torch.diag_embed(covariance.movedim(-3, -1))  # n x n x m x m
        joint = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
        joint = joint + off.mT @ off / len(off)
        return latent_distribution(mean, joint, X.dtype)

    def sample_joint(
        self, X: Tensor, num_samples: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """Values of functions at inputs ``n x d``, joint over them: ``s x n x m``.

        By dense covariances in every layer, at s h n^3 each, for any kernel. Two calls
        give values of different functions; :meth:`draw` gives functions.

        Args:
            X: Inputs.
            num_samples: The number s.
            generator: Source of randomness. Without one, draws are fresh.

        Raises:
            MemoryError: If the covariances of all draws do not fit.
        """  # noqa: DOC502
        check_count(num_samples=num_samples)
        generator = fresh(generator, X.device)
        values = self._hidden_joint(X, num_samples, generator)
        last = self.layers[-1]
        shape = num_samples, len(X), last.output_dims
        return last.sample_joint(values, standard_normal(shape, generator, X))

    def draw(
        self,
        num_samples: int,
        generator: Generator | None = None,
        *,
        num_features: int = NUM_FEATURES,
    ) -> DeepDraw:
        """Freeze s functions of the posterior, pathwise through all layers.

        Args:
            num_samples: The number s.
            generator: Source of randomness. Without one, draws are fresh.
            num_features: Fourier features of each layer and draw, for kernels that need
                them; each draw has its own, so that covariances have no bias.

        Returns:
            A function of X, ``... x n x d`` to ``s x ... x n x m``, computed in
            float64 and differentiable in X.

        Raises:
            NotImplementedError: If a layer's kernel has no feature map.
        """  # noqa: DOC502
        check_count(num_samples=num_samples)
        own = copy.deepcopy(self).double()
        generator = fresh(generator)
        layers = [
            draw_layer(layer, num_samples, generator, num_features)
            for layer in own.layers
        ]
        return DeepDraw(layers, self.num_inputs)

    def _hidden_joint(
        self, X: Tensor, num_samples: int, generator: Generator
    ) -> Tensor:
        self._check(X)
        widest = max(layer.output_dims for layer in self.layers)
        samples = num_samples if len(self.layers) > 1 else 1
        bytes_each = torch.finfo(X.dtype).bits // 8
        check_memory(
            f"The joint posterior of {len(X)} points",
            3 * bytes_each * (samples * widest + self.num_outputs**2) * len(X) ** 2,
            MEMORY_BUDGET,
            "Pass fewer points or a smaller num_samples; predict(X) needs no "
            "covariances, and draw(num_samples) gives functions without them.",
        )
        values = X.unsqueeze(0)
        for layer in self.layers[:-1]:
            shape = num_samples, len(X), layer.output_dims
            noise = standard_normal(shape, generator, X)
            values = layer.sample_joint(values, noise)
        return values

    def _seeded(self, generator: Generator | None) -> Generator:
        device = self.layers[0].variational_strategy.inducing_points.device
        return Generator(device).manual_seed(0) if generator is None else generator

    def _check(self, X: Tensor) -> None:
        check_inputs(X, "X", self.num_inputs)
        check_not_empty(X=X)
        check_same_dtype("X", X, self.dtype)


def check_likelihood(likelihood: Likelihood) -> None:
    """Require a likelihood of single points, whose noise is not correlated.

    Raises:
        ValueError: If it holds one noise for each training point, mixes its inputs, or
            has correlated noise, whose correlations upstream's bound leaves out.
    """
    name, remedy = type(likelihood).__name__, None
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        remedy = "GaussianLikelihood(): minibatches do not know which noise is theirs"
    elif getattr(likelihood, "rank", 0) and is_gaussian(likelihood):
        remedy = "MultitaskGaussianLikelihood(num_tasks, rank=0)"
    elif (
        isinstance(likelihood, SoftmaxLikelihood)
        and likelihood.mixing_weights is not None
    ):
        remedy = "SoftmaxLikelihood(num_classes=..., mixing_weights=False)"
    if remedy is not None:
        raise ValueError(f"A deep GP cannot be trained with this {name}. Try {remedy}.")


def _samples(num_samples: int | None) -> int:
    s = num_likelihood_samples.value() if num_samples is None else num_samples
    check_count(num_samples=s)
    return s


def _separate(mean: Tensor, variance: Tensor) -> MultivariateNormal:
    """A distribution over ``... x n`` or ``... x n x m`` independent values."""
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean[..., 0], DiagLinearOperator(variance[..., 0]))
    covariance = DiagLinearOperator(variance.flatten(-2))
    return MultitaskMultivariateNormal(mean, covariance)
