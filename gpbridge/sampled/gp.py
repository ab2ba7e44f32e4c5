r"""A GP whose posterior is a mean and samples, at any number of points.

In: data, any gpytorch kernel with a feature map, a solver. Out: :class:`SampledGP`, a
BoTorch model: means, marginal and joint covariances, Thompson draws, conditioning,
fantasies. Hyperparameters are learnt by ``selection.fit_iterative``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from gpytorch.means import ConstantMean, Mean
from gpytorch.models import GP
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from gpbridge.checks import ShapeError, check_choice, check_count
from gpbridge.kernel_operator import COMPUTE_DTYPES
from gpbridge.outcomes import latent_distribution, target_distribution
from gpbridge.posterior_draws import PosteriorDraw, mean_values
from gpbridge.prior_draws import NUM_FEATURES
from gpbridge.randomness import fresh
from gpbridge.representers import (
    solve_representers,
)
from gpbridge.sampled.covariance import interleaved, sample_distribution
from gpbridge.sampled.observations import (
    NOISE_FLOOR,
    NewData,
    appended,
    check_data,
    check_further,
    check_parts,
    check_solver,
    shared_noise,
)
from gpbridge.sampled.persistence import SampledPersistence
from gpbridge.sampled.state import SampledState
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Solver

_ROWS = 1024  # points at a time where only marginals are asked for


class SampledGP(SampledPersistence, SampledState, GPyTorchModel, GP, FantasizeMixin):
    r"""A Gaussian process represented by its posterior mean and samples.

    .. math::
        f_i(x) = m(x) + k(x, X) v_y + \bigl(g_i(x) - k(x, X) v_i\bigr), \qquad
        H v_y = y - m(X), \quad H v_i = g_i(X) + \epsilon_i

    with prior draws g and :math:`H = k(X, X) + \Sigma`. Means are exact up to the
    solver; covariances are those of the samples about their mean, which is known, so
    that with s samples a variance has a relative standard deviation of
    :math:`\sqrt{2/s}`: 18 percent for the default 64. No n by n matrix is formed by
    the iterative solvers: memory is n (d + s m), time one solve for all columns, once,
    and then t n (s + 1) m for t test points.

    Use it where a Cholesky factor does not fit, that is above some ten thousand points,
    and for Thompson sampling at any size. Several outputs are independent given the
    hyperparameters, which they share, and they share the solve.

    Everything is solved in float64 when it is first needed, kept until a hyperparameter
    changes its value, and then solved again from the old solution. Further
    observations also start from it. Randomness is drawn once, from ``generator``:
    predictions are deterministic functions of X. Hyperparameters get no gradients from
    predictions; :func:`gpbridge.selection.fit_iterative` learns them.

    Args:
        train_X: Inputs ``n x d``.
        train_Y: Targets ``n x m``.
        covar_module: A kernel without batch, with a feature map.
        likelihood: ``GaussianLikelihood`` (the default) or, for one output,
            ``FixedNoiseGaussianLikelihood``; shared, not copied.
        solver: Default :func:`~gpbridge.solvers.choose_solver`: Cholesky up to 4000
            points, then SketchAndProject to a relative residual of 0.01.
        num_samples: The number s of samples.
        train_Yvar: Known noise variances ``n x 1``, in place of a likelihood.
        mean_module: Prior mean function; default a constant per output.
        num_features: Fourier features of each sample, for stationary kernels.
        compute_dtype: Of the kernel entries in the iterations of a solver; residuals
            are confirmed in float64. Default float32 for RBF and Matern kernels whose
            amplitude is below 10,000 noise variances, else float64.
        generator: Source of all randomness; default seed 0. Samples of two models of
            one seed move together: give models of independent functions, as in a
            ModelList, generators of different seeds.
        input_transform: A botorch input transform without learnable parameters.
        outcome_transform: A botorch outcome transform.

    Raises:
        ShapeError: If shapes disagree or the kernel has a batch.
        TypeError: If a tensor or the likelihood has the wrong kind.
        ValueError: If an option or a combination is not supported.

    Example:
        >>> from gpytorch.kernels import MaternKernel, ScaleKernel
        >>> X = torch.linspace(0, 1, 20).unsqueeze(-1).double()
        >>> model = SampledGP(X, torch.sin(6 * X), ScaleKernel(MaternKernel(1.5)))
        >>> model.posterior(X[:3]).variance.shape
        torch.Size([3, 1])
        >>> model.draw(2)(X[:3]).shape
        torch.Size([2, 3, 1])

    References:
        Wilson et al., Pathwise conditioning of Gaussian processes, JMLR 2021, eq. (12).
        Lin et al., Sampling from Gaussian process posteriors using stochastic gradient
        descent, NeurIPS 2023.
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        covar_module: Kernel,
        likelihood: Likelihood | None = None,
        solver: Solver | None = None,
        num_samples: int = 64,
        *,
        train_Yvar: Tensor | None = None,
        mean_module: Mean | None = None,
        num_features: int = NUM_FEATURES,
        compute_dtype: torch.dtype | None = None,
        generator: Generator | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__()
        check_data(train_X, train_Y, train_Yvar)
        check_count(num_samples=num_samples, num_features=num_features)
        check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
        train_X, train_Y = train_X.detach(), train_Y.detach()
        m = train_Y.shape[-1]
        if input_transform is not None:
            if any(p.requires_grad for p in input_transform.parameters()):
                raise ValueError(
                    f"{type(input_transform).__name__} has learnable parameters, which "
                    "get no gradient here. Pass a transform without them."
                )
            with torch.no_grad():
                input_transform(train_X)  # bounds are read from the data here
            self.input_transform = input_transform.eval()
        targets, variance = train_Y, train_Yvar
        if outcome_transform is not None:
            targets, variance = outcome_transform(
                train_Y, train_Yvar, X=self.transform_inputs(train_X)
            )
            self.outcome_transform = outcome_transform.eval()
        if variance is not None:
            if likelihood is not None:
                raise ValueError(
                    "Pass train_Yvar or a likelihood, not both: train_Yvar makes a "
                    "FixedNoiseGaussianLikelihood."
                )
            likelihood = FixedNoiseGaussianLikelihood(variance.squeeze(-1))
        if likelihood is None:
            likelihood = GaussianLikelihood(noise_constraint=GreaterThan(NOISE_FLOOR))
        check_parts(covar_module, likelihood, train_X, m)
        check_solver(solver)
        if mean_module is None:
            mean_module = ConstantMean(batch_shape=Size([m] if m > 1 else []))
        self.covar_module, self.mean_module = covar_module, mean_module
        self.likelihood, self.solver = likelihood, solver
        self.num_samples, self.num_features = num_samples, num_features
        self.compute_dtype = compute_dtype
        seed = 0
        if generator is not None:
            device = generator.device
            seed = torch.randint(2**31 - 1, (), generator=generator, device=device)
        self.register_buffer("_train_X", train_X)
        self.register_buffer("_targets", targets.detach())
        self.register_buffer("_seed", torch.as_tensor(int(seed)))
        self.output_indices = self._new = self._initial = None
        self._forget()
        self.to(train_X)
        self.eval()
        self._check_kernel()

    @torch.no_grad()
    def _check_kernel(self) -> None:
        """Find at the door what the first prediction would stumble on."""
        self._draw_prior(1, Generator().manual_seed(0), self.covar_module)
        Z = self.transform_inputs(self._train_X[:2])
        try:
            self.covar_module(Z).to_dense()
        except (RuntimeError, IndexError) as error:
            raise ShapeError(
                f"covar_module does not take inputs of {Z.shape[-1]} columns, which "
                f"train_X has: {error}. Check ard_num_dims and active_dims."
            ) from error

    # -- BoTorch ---------------------------------------------------------------------

    @ordinary_tensors()
    def forward(self, X: Tensor) -> MultivariateNormal:
        """The prior in train mode, the posterior in eval mode, at ``... x n x d``."""
        if not self.training:
            return sample_distribution(*self._moments(X), X.dtype)
        Z = self.transform_inputs(X)
        mean = mean_values(self.mean_module, Z, self._targets.shape[-1])
        mean = self._columns(mean)
        K = self.covar_module(Z).to_dense().unsqueeze(-3)
        K = K.expand(*K.shape[:-3], self.num_outputs, *K.shape[-2:])
        return latent_distribution(mean, interleaved(K), X.dtype)

    @ordinary_tensors()
    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Joint posterior of the latent function over points, differentiable in X.

        Args:
            X: Inputs ``batch_shape x q x d``.
            output_indices: Outputs to keep; default all.
            observation_noise: Whether to add noise, or noise variances ``... x q x m``
                in transformed units.
            posterior_transform: Applied last.
            **kwargs: None are used.

        Returns:
            A posterior over ``batch_shape x q x m`` values. Its covariance has the rank
            of the samples: with more than s points it is singular.
        """
        if output_indices is not None:
            return self.subset_output(output_indices).posterior(
                X, None, observation_noise, posterior_transform
            )
        self.eval()
        self._check_new_inputs(X)
        mean, deviations = self._moments(self.transform_inputs(X))
        noise = None
        if observation_noise is not False:
            noise = self._noise_at(observation_noise, mean)
        distribution = sample_distribution(mean, deviations, X.dtype, noise)
        posterior = GPyTorchPosterior(distribution)
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=X)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

    @ordinary_tensors()
    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> SampledGP:
        """The model given further observations, with the same hyperparameters.

        One set of observations joins the data: the grown system is solved from the old
        solution when it is first needed. A batch of them, or inputs that carry
        gradients, correct the old solution by one solve for their covariances with the
        data; that is differentiable in X. Either way the result is that of a model with
        all the data, this one is not changed, and modules are shared.

        Args:
            X: Inputs ``batch_shape x n' x d``, untransformed.
            Y: Targets ``batch_shape' x n' x m``, untransformed.
            noise: Variances ``... x n' x m``, transformed; needed for fixed noise.
            **kwargs: None are used.

        Returns:
            A model that has seen all data.

        Raises:
            ShapeError: If Y does not fit X and the outputs.
            ValueError: If the noise is fixed per point and not given.
        """
        self._check_new_inputs(X)
        check_further(X, Y, noise, self.num_outputs, self.likelihood)
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=self.transform_inputs(X))
        whole = self.output_indices is None and self._new is None
        alone = X.dim() == 2 and Y.dim() == 2
        learning = torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad)
        if whole and alone and not learning and fixed == (noise is not None):
            return self._grown(X, Y, noise)
        if noise is None:
            variance = self.likelihood.noise.detach().expand(X.shape[:-1])
        else:
            variance = shared_noise(noise, X)
        new = NewData(X, Y, variance)
        if self._new is not None:
            new = appended(self._new, new)
        self._solve()  # now, for all models that share it
        conditioned = self._share()
        conditioned._new, conditioned._correction = new, None
        return conditioned

    def subset_output(self, idcs: list[int]) -> SampledGP:
        """The model seen through some of its outputs."""
        own = self.output_indices or list(range(self._targets.shape[-1]))
        if not idcs or any(not -len(own) <= i < len(own) for i in idcs):
            raise ValueError(
                f"idcs must name outputs in 0 .. {len(own) - 1}, but is {idcs}."
            )
        if self._new is not None:
            raise NotImplementedError(
                "Subset the outputs before conditioning on a batch of observations."
            )
        self._solve()
        subset = self._share()
        subset.output_indices = [own[i] for i in idcs]
        if hasattr(self, "outcome_transform"):
            subset.outcome_transform = self.outcome_transform.subset_output(idcs)
        return subset

    @ordinary_tensors()
    @torch.no_grad()
    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Latent moments of each point in transformed units, float64.

        For many points: the joint covariance is not formed, and memory is constant but
        for the result.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            Mean and variance, ``... x n x m``.
        """
        self.eval()
        self._check_new_inputs(X)
        if len(self.batch_shape):
            raise NotImplementedError(
                "Marginals of a model with a batch of fantasies are not supported. Ask "
                "posterior(X) for joint moments."
            )
        rows = self.transform_inputs(X).reshape(-1, X.shape[-1])
        means, variances = [], []
        for tile in rows.split(_ROWS):
            mean, deviations = self._moments(tile)
            means.append(mean)
            variances.append(deviations.square().mean(0))
        shape = (*X.shape[:-1], self.num_outputs)
        return torch.cat(means).reshape(shape), torch.cat(variances).reshape(shape)

    def predict(self, X: Tensor) -> Distribution:
        """Predictive distribution of y at each point, noise included.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            Normal ``... x n x 1``, or independent Normals over m outputs.
        """
        mean, variance = self.marginals(X)
        variance = variance + self._noise_at(True, mean)
        transform = getattr(self, "outcome_transform", None)
        Z = self.transform_inputs(X)
        return target_distribution(mean, variance, transform, Z, X.dtype)

    @ordinary_tensors()
    @torch.no_grad()
    def draw(
        self, num_samples: int | None = None, generator: Generator | None = None
    ) -> PosteriorDraw:
        """Freeze functions drawn from the posterior.

        They are a random choice, without repetition, of the model's own samples, which
        costs nothing; repeated calls choose among the same s functions. More than s are
        drawn anew, with a solve of their own.

        Args:
            num_samples: The number of functions; default all s samples, in their order.
            generator: Source of the choice. Without one, it is fresh on each call; the
                global random state is left alone in either case.

        Returns:
            A function of X, ``... x n x d`` to ``s x ... x n x m``, in the units of
            the targets.
        """
        self.eval()
        if len(self.batch_shape):
            raise NotImplementedError(
                "draw does not take a model with a batch of fantasies. Draw from the "
                "model that was fantasised from."
            )
        base = self._base()
        correction = self._corrected(base)
        if num_samples is not None:
            check_count(num_samples=num_samples)
            generator = fresh(generator)
            if num_samples > self.num_samples:
                draw = self._draw_prior(num_samples, generator, base.prior.kernel)
                device = generator.device
                seed = torch.randint(2**31 - 1, (), generator=generator, device=device)
                seed = int(seed)
                whole = self._solve()
                base = solve_representers(
                    draw,
                    whole.mean,
                    whole.data,
                    seed,
                    self.solver,
                    compute_dtype=self.compute_dtype,
                )
                if self.output_indices is not None:
                    base = base.take_outputs(self.output_indices)
                if correction is not None:
                    correction = self._correct(base)
        if correction is None:
            X, weights = base.data.X, base.mean_weights[:, None] - base.sample_weights
        else:
            X, weights = correction.joined(base)
        drawn = PosteriorDraw(
            copy.deepcopy(base.prior),  # the draw's own, to move or to convert
            X,
            weights,
            copy.deepcopy(base.mean),
            copy.deepcopy(getattr(self, "input_transform", None)),
            copy.deepcopy(getattr(self, "outcome_transform", None)),
            base.solution,
        )
        if num_samples is not None and num_samples <= self.num_samples:
            device = generator.device
            order = torch.randperm(self.num_samples, generator=generator, device=device)
            drawn = drawn.take(order[:num_samples].to(X.device))
        return drawn
