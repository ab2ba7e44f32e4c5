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
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.models.deep_gps import DeepGP
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_generator,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_dtype,
    check_sequence,
    check_tensor,
)
from gpbridge.dnn.deep_gp_bound import (
    check_likelihood,
    draw_count,
    expected_bound,
    hidden_noise,
    last_marginals,
)
from gpbridge.dnn.deep_gp_draws import DeepDraw, draw_layer
from gpbridge.dnn.deep_gp_layer import InducingLayer
from gpbridge.dnn.deep_gp_predictions import (
    independent_normal,
    joint_moments,
    joint_values,
    marginal_mixture,
)
from gpbridge.likelihoods import is_gaussian
from gpbridge.prior_draws import NUM_FEATURES
from gpbridge.randomness import fresh
from gpbridge.targets import check_targets


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

    def __repr__(self) -> str:
        """One line; ``model.layers`` has the modules, which take a page."""
        likelihood = type(self.likelihood).__name__
        return f"{type(self).__name__}({self.extra_repr()}, {likelihood})"

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
        return independent_normal(*self.marginals(X, num_samples, generator, noise))

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
        self._check_noise(X, noise)
        return last_marginals(self.layers, X, noise)

    def draw_noise(
        self,
        batch_shape: Sequence[int],
        num_samples: int | None = None,
        generator: Generator | None = None,
    ) -> list[Tensor]:
        """Standard normals ``s x batch_shape x h`` for each hidden layer."""
        return hidden_noise(self.layers, batch_shape, num_samples, generator)

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
            Y: Targets ``b x m``; ``b`` for labels or one output.
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
        num_samples = draw_count(num_samples)
        return self._elbo(X, targets, num_data, num_samples, generator, noise)

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
        self._check_noise(X, noise)
        f = independent_normal(*last_marginals(self.layers, X, noise))
        return expected_bound(self, f, targets, num_data, num_samples, generator)

    def targets(self, X: Tensor, Y: Tensor) -> Tensor:
        """Checked targets in the shape of gpytorch's likelihood, ``n`` or ``n x m``."""
        self._check(X)
        m = self.num_outputs
        if isinstance(Y, Tensor) and Y.dim() == 1 and is_gaussian(self.likelihood):
            Y = Y[:, None] if m == 1 else Y
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
        return marginal_mixture(self.likelihood, mean, variance, num_samples, generator)

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
            ShapeError: If X is a batch.
        """  # noqa: DOC502
        check_count(num_samples=num_samples)
        self._check(X)
        if X.dim() != 2:
            raise ShapeError(
                "X must be ``n x d``, since the covariance is joint over points, but "
                f"has shape {tuple(X.shape)}. Loop over batches, or take predict for "
                "single points, or gpbridge.surrogates.WeightSpaceModel for batches."
            )
        return joint_moments(self.layers, X, num_samples, self._seeded(generator))

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
        self._check(X)
        return joint_values(self.layers, X, num_samples, fresh(generator, X.device))

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
        check_count(num_samples=num_samples, num_features=num_features)
        own = copy.deepcopy(self).double()
        generator = fresh(generator)
        layers = [
            draw_layer(layer, num_samples, generator, num_features)
            for layer in own.layers
        ]
        return DeepDraw(layers, self.num_inputs)

    def _seeded(self, generator: Generator | None) -> Generator:
        device = self.layers[0].variational_strategy.inducing_points.device
        if generator is None:
            return Generator(device).manual_seed(0)
        check_generator(generator, device)
        return generator

    def _check_noise(self, X: Tensor, noise: Sequence[Tensor]) -> None:
        check_sequence(noise=noise)
        if len(noise) != len(self.layers) - 1:
            raise ShapeError(
                f"noise must have one tensor for each of {len(self.layers) - 1} hidden "
                f"layers, but has {len(noise)}. Try draw_noise(X.shape[:-1])."
            )
        check_tensor(**{f"noise[{i}]": value for i, value in enumerate(noise)})

    def _check(self, X: Tensor) -> None:
        check_inputs(X, "X", self.num_inputs)
        check_not_empty(X=X)
        check_same_dtype("X", X, self.dtype)
