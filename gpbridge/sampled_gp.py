r"""A GP whose posterior is a mean and samples, at any number of points.

In: data, any gpytorch kernel with a feature map, a solver. Out: :class:`SampledGP`, a
BoTorch model: means, marginal and joint covariances, Thompson draws, conditioning,
fantasies. Hyperparameters are learnt by ``selection.fit_iterative``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.sampling.pathwise.paths import GeneralizedLinearPath
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from botorch.sampling.pathwise.update_strategies import GaussianUpdate
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
from linear_operator.operators import RootLinearOperator
from torch import Generator, Size, Tensor, nn
from torch.distributions import Distribution

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_same_length,
    check_tensor,
)
from gpbridge.outcomes import latent_distribution, target_distribution
from gpbridge.pathwise import DrawnPath, iterative_update
from gpbridge.posterior_draws import PosteriorDraw, mean_values
from gpbridge.prior_draws import NUM_FEATURES, PriorDraw, draw_prior
from gpbridge.representers import (
    Correction,
    Data,
    Representers,
    correct,
    solve_representers,
)
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Solution, Solver

NOISE_FLOOR = 1e-6
_ROWS = 1024  # points at a time where only marginals are asked for
GAUSSIAN = (GaussianLikelihood, FixedNoiseGaussianLikelihood)


class NewData(NamedTuple):
    """Observations that a batch of systems does not share, targets transformed."""

    X: Tensor  # batch x n' x d, as the user passed them
    Y: Tensor  # batch' x n' x m
    noise: Tensor  # batch x n'


class SampledGP(GPyTorchModel, GP, FantasizeMixin):
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
        generator: Source of all randomness; default seed 0.
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
        generator: Generator | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__()
        _check_data(train_X, train_Y, train_Yvar)
        check_positive(num_samples=num_samples, num_features=num_features)
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
            targets, variance = outcome_transform(train_Y, train_Yvar, X=train_X)
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
        _check_parts(covar_module, likelihood, train_X, m)
        if mean_module is None:
            mean_module = ConstantMean(batch_shape=Size([m] if m > 1 else []))
        self.covar_module, self.mean_module = covar_module, mean_module
        self.likelihood, self.solver = likelihood, solver
        self.num_samples, self.num_features = num_samples, num_features
        seed = 0
        if generator is not None:
            device = generator.device
            seed = torch.randint(2**31 - 1, (), generator=generator, device=device)
        self.register_buffer("_train_X", train_X)
        self.register_buffer("_targets", targets.detach())
        self.register_buffer("_seed", torch.as_tensor(int(seed)))
        self.output_indices: list[int] | None = None
        self._new: NewData | None = None
        self._initial: tuple[Tensor, Tensor] | None = None
        self._forget()
        self.to(train_X)
        self.eval()

    # -- what it is ------------------------------------------------------------------

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
        if self.output_indices is not None:
            Y = Y[..., self.output_indices]
        if self._new is not None:
            new = self._new.Y
            Y = torch.cat([Y.expand(*new.shape[:-2], -1, -1), new], -2)
        return Y.squeeze(-1) if Y.shape[-1] == 1 else Y

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        if self.output_indices is not None:
            return len(self.output_indices)
        return self._targets.shape[-1]

    @property
    def batch_shape(self) -> Size:
        """Empty, or the batch of the observations conditioned on."""
        if self._new is None:
            return Size()
        return torch.broadcast_shapes(self._new.X.shape[:-2], self._new.Y.shape[:-2])

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances of the training points, ``n``."""
        noise = self.likelihood.noise
        return noise.reshape(-1).expand(len(self._train_X))

    @property
    def solution(self) -> Solution | None:
        """What is known about the last solve, None before the first one."""
        return None if self._solved is None else self._solved[1].solution

    @property
    def _supports_cache_root(self) -> bool:
        # Read by botorch's noisy acquisitions, which update a root of full rank.
        return False

    def __repr__(self) -> str:
        """Sizes, and how well the system is solved."""
        n, facts = len(self._train_X), self.solution
        solver = "default" if self.solver is None else type(self.solver).__name__
        how = "not solved yet"
        if facts is not None:
            passes = getattr(facts, "passes", facts.iterations)
            verb = "converged" if facts.converged else "NOT converged"
            how = (
                f"{verb}, relative residual {facts.residual_norm:.1e} after "
                f"{passes:.4g} passes"
            )
        return (
            f"{type(self).__name__}(n={n}, num_outputs={self.num_outputs}, "
            f"{type(self.covar_module).__name__}, {type(self.likelihood).__name__}, "
            f"num_samples={self.num_samples}, {solver} solver: {how})"
        )

    # -- BoTorch ---------------------------------------------------------------------

    @ordinary_tensors()
    def forward(self, X: Tensor) -> MultivariateNormal:
        """The prior in train mode, the posterior in eval mode, at ``... x n x d``."""
        if not self.training:
            return self._distribution(*self._moments(X), X.dtype)
        Z = self.transform_inputs(X)
        mean = mean_values(self.mean_module, Z, self._targets.shape[-1])
        mean = self._columns(mean)
        K = self.covar_module(Z).to_dense().unsqueeze(-3)
        K = K.expand(*K.shape[:-3], self.num_outputs, *K.shape[-2:])
        return latent_distribution(mean, _interleaved(K), X.dtype)

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
        distribution = self._distribution(mean, deviations, X.dtype, noise)
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
        check_tensor(Y=Y)
        check_same_dtype("Y", Y, self._train_X.dtype)
        m, size = self.num_outputs, X.shape[-2]
        if Y.shape[-2:] != (size, m):
            raise ShapeError(
                f"Y must be ``... x {size} x {m}`` for X of shape {tuple(X.shape)}, "
                f"but has shape {tuple(Y.shape)}."
            )
        check_finite(Y=Y)
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        if noise is None and fixed:
            raise ValueError(
                "noise must be given: FixedNoiseGaussianLikelihood holds the noise of "
                "the training points only. Pass the variances of the new observations, "
                f"``... x {size} x 1``."
            )
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
            variance = _shared_noise(noise, X)
        new = NewData(X, Y, variance)
        if self._new is not None:
            new = _appended(self._new, new)
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
            check_positive(num_samples=num_samples)
            if generator is None:
                generator = Generator()
                generator.seed()
            if num_samples > self.num_samples:
                draw = self._draw_prior(num_samples, generator, base.prior.kernel)
                seed = int(torch.randint(2**31 - 1, (), generator=generator))
                whole = self._solve()
                base = solve_representers(
                    draw, whole.mean, whole.data, seed, self.solver
                )
                if self.output_indices is not None:
                    base = base.take_outputs(self.output_indices)
                if correction is not None:
                    correction = self._correct(base)
        X = base.data.X
        weights = base.mean_weights[:, None] - base.sample_weights
        if correction is not None:
            both = correction.mean_weights + correction.sample_weights
            both = both.movedim(0, 1)  # n' x s x m
            cross = correction.cross_weights
            weights = weights - (cross @ both.flatten(1)).unflatten(-1, both.shape[1:])
            weights, X = torch.cat([weights, both]), torch.cat([X, correction.X])
        drawn = PosteriorDraw(
            base.prior,
            X,
            weights,
            base.mean,
            copy.deepcopy(getattr(self, "input_transform", None)),
            copy.deepcopy(getattr(self, "outcome_transform", None)),
            base.solution,
        )
        if num_samples is not None and num_samples <= self.num_samples:
            device = generator.device
            order = torch.randperm(self.num_samples, generator=generator, device=device)
            drawn = drawn.take(order[:num_samples].to(X.device))
        return drawn

    # -- inside ----------------------------------------------------------------------

    def _check_new_inputs(self, X: Tensor) -> None:
        check_tensor(X=X)
        check_same_device(X=X, train_X=self._train_X)
        check_inputs(X, "X", self._train_X.shape[-1])
        check_same_dtype("X", X, self._train_X.dtype)

    def _draw_prior(
        self, num_samples: int, generator: Generator, kernel: Kernel
    ) -> PriorDraw:
        return draw_prior(
            kernel,
            self._train_X.shape[-1],
            num_samples,
            num_outputs=self._targets.shape[-1],
            num_features=self.num_features,
            generator=generator,
            follow=True,
        )

    def _problem(self, kernel: Kernel, mean: Mean) -> tuple[PriorDraw, Data]:
        """The system at the current hyperparameters, from the same base draws."""
        generator = Generator().manual_seed(int(self._seed))
        prior = self._draw_prior(self.num_samples, generator, kernel)
        with torch.no_grad():
            Z = self.transform_inputs(self._train_X).double()
        noise = self.noise_variance.detach().double()
        return prior, Data(Z, self._targets.double(), noise)

    def _key(self) -> list[Tensor]:
        """Everything that the solution depends on, by value.

        Values are compared, not tensor versions: gpytorch's ``initialize`` writes to
        ``.data``.
        """
        key = [self._train_X, self._targets, self._seed, self.noise_variance]
        for module in (self.covar_module, self.mean_module):
            key += [*module.parameters(), *module.buffers()]
        if hasattr(self, "input_transform"):
            key += self.input_transform.buffers()
        return [value.detach() for value in key]

    def _solve(self) -> Representers:
        """The solved system, kept as long as nothing it depends on has changed."""
        key = self._key()
        if self._solved is not None and _same(self._solved[0], key):
            return self._solved[1]
        with torch.no_grad():
            kernel = copy.deepcopy(self.covar_module).double().requires_grad_(False)
            mean = copy.deepcopy(self.mean_module).double().requires_grad_(False)
            prior, data = self._problem(kernel, mean)
            solved = solve_representers(
                prior, mean, data, int(self._seed), self.solver, self._warm_start()
            )
        self._solved = [value.clone() for value in key], solved
        self._initial, self._correction = None, None
        return solved

    def _warm_start(self) -> Tensor | None:
        """The last solution, with zeros for points that have come since."""
        old = self._initial
        if self._solved is not None:
            old = self._solved[1].columns()
        if old is None or len(old) > len(self._train_X):
            return None
        grown = old.new_zeros(len(self._train_X), old.shape[-1])
        grown[: len(old)] = old
        return grown

    def _base(self) -> Representers:
        """The solved system of the outputs that are kept."""
        base = self._solve()
        if self.output_indices is None:
            return base
        return base.take_outputs(self.output_indices)

    def _correct(self, base: Representers) -> Correction:
        new = self._new
        Z = self.transform_inputs(new.X).double()
        return correct(base, Data(Z, new.Y.double(), new.noise.double()), self.solver)

    def _corrected(self, base: Representers) -> Correction | None:
        if self._new is None:
            return None
        kept = self._correction
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in self._new)
        if kept is None or (wanted and not kept.mean_weights.requires_grad):
            self._correction = self._correct(base)
        return self._correction

    def _moments(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        base = self._base()
        correction = self._corrected(base)
        if correction is None:
            return base.moments(Z.double())
        return correction.moments(base, Z.double())

    def _columns(self, values: Tensor) -> Tensor:
        if self.output_indices is None:
            return values
        return values[..., self.output_indices]

    def _distribution(
        self,
        mean: Tensor,
        deviations: Tensor,
        dtype: torch.dtype,
        noise: Tensor | None = None,
    ) -> MultivariateNormal:
        q, s = mean.shape[-2], len(deviations)
        root = deviations.movedim(0, -1).transpose(-3, -2) / s**0.5  # ... x m x q x s
        root = root.expand(*mean.shape[:-2], *root.shape[-3:])
        if noise is None and q > s:
            # Singular: its root has zeros, where a factorisation would need jitter.
            # It is square, since botorch's base samples are one per point.
            padding = root.new_zeros(*root.shape[:-1], q - s)
            root = torch.cat([root, padding], -1)
            factor = _interleaved(root).to(dtype)
            return latent_distribution(mean, RootLinearOperator(factor), dtype)
        covariance = root @ root.mT
        if noise is not None:
            covariance = covariance + torch.diag_embed(noise.mT)
        return latent_distribution(mean, _interleaved(covariance), dtype)

    def _noise_at(self, asked: bool | Tensor, mean: Tensor) -> Tensor:
        if isinstance(asked, Tensor):
            noise = asked.to(mean)
            if noise.shape[-1] != mean.shape[-1]:
                noise = noise.unsqueeze(-1)
            check_positive(noise=noise)
            return noise.expand(mean.shape)
        # At other points than those of training: the average noise, as in botorch.
        return self.likelihood.noise.detach().to(mean).mean().expand(mean.shape)

    def _grown(self, X: Tensor, Y: Tensor, noise: Tensor | None) -> SampledGP:
        warm = self._warm_start()
        grown = self._share()
        grown._train_X = torch.cat([self._train_X, X.detach()])
        grown._targets = torch.cat([self._targets, Y.detach()])
        if noise is not None:
            both = torch.cat([self.likelihood.noise, _shared_noise(noise, X)])
            grown.likelihood = FixedNoiseGaussianLikelihood(both)
        grown._forget()
        grown._initial = warm
        return grown

    def _share(self) -> SampledGP:
        """A shallow copy: modules and the solution are shared."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = self.__dict__[name].copy()
        return twin

    def _forget(self) -> None:
        self._solved: tuple[list[Tensor], Representers] | None = None
        self._correction: Correction | None = None

    def train(self, mode: bool = True) -> SampledGP:
        """Set the mode; transforms stay in eval mode."""
        super().train(mode)
        for name in ("input_transform", "outcome_transform"):
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ):
        """Load data, hyperparameters and seed; transforms are part of the state."""
        return nn.Module.load_state_dict(self, state_dict, strict=strict)

    def __getstate__(self) -> dict:
        """Copies and pickles carry the solution, and no graph of a gradient."""
        new = self._new
        if new is not None:
            new = NewData(*(tensor.detach() for tensor in new))
        return {**self.__dict__, "_new": new, "_correction": None}

    def _set_transformed_inputs(self) -> None:
        """Nothing to swap: inputs are kept as given and transformed where used."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to swap."""


def _interleaved(blocks: Tensor) -> Tensor:
    """Blocks ``... x m x q x r`` on the diagonal of ``... x (q m) x (r m)``."""
    if blocks.shape[-3] == 1:
        return blocks.squeeze(-3)
    full = torch.diag_embed(blocks.movedim(-3, -1))  # ... x q x r x m x m
    return full.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _same(kept: list[Tensor], key: list[Tensor]) -> bool:
    return len(kept) == len(key) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(kept, key, strict=True)
    )


def _shared_noise(noise: Tensor, X: Tensor) -> Tensor:
    """One variance per point, of ``... x n' x m`` or ``... x 1 x m``."""
    check_tensor(noise=noise)
    check_positive(noise=noise)
    wanted = tuple(X.shape[:-1])
    broadcast = noise.dim() > 1 and noise.dim() <= X.dim()
    if not broadcast or noise.shape[-2] not in (1, X.shape[-2]):
        raise ShapeError(
            f"noise must be ``{' x '.join(map(str, wanted))} x m`` for X of shape "
            f"{tuple(X.shape)}, but has shape {tuple(noise.shape)}."
        )
    if not bool((noise == noise[..., :1]).all()):
        raise ValueError(
            "noise must be the same for all outputs, which share one linear system, "
            f"but has shape {tuple(noise.shape)} and differs. Put one model per output "
            "in a ModelList."
        )
    return noise[..., 0].detach().expand(X.shape[:-1])


def _appended(old: NewData, new: NewData) -> NewData:
    """Concatenate observations along points, batches broadcast."""
    joined = []
    for a, b, trailing in zip(old, new, (2, 2, 1), strict=True):
        batch = torch.broadcast_shapes(a.shape[:-trailing], b.shape[:-trailing])
        a = a.expand(*batch, *a.shape[-trailing:])
        b = b.expand(*batch, *b.shape[-trailing:])
        joined.append(torch.cat([a, b], dim=-trailing))
    return NewData(*joined)


def _check_data(X: Tensor, Y: Tensor, variance: Tensor | None) -> None:
    check_inputs(X)
    check_not_empty(train_X=X)
    check_tensor(train_Y=Y)
    if X.dim() != 2 or Y.dim() != 2:
        raise ShapeError(
            "train_X must be ``n x d`` and train_Y ``n x m``, but have shapes "
            f"{tuple(X.shape)} and {tuple(Y.shape)}. For one output try "
            "train_Y[:, None]; put several data sets in a ModelList."
        )
    check_same_device(train_X=X, train_Y=Y)
    check_same_length(train_X=X, train_Y=Y)
    check_same_dtype("train_Y", Y, X.dtype)
    check_finite(train_Y=Y)
    if variance is not None:
        check_tensor(train_Yvar=variance)
        check_positive(train_Yvar=variance)
        if variance.shape != (len(X), 1) or Y.shape[-1] != 1:
            raise ShapeError(
                f"train_Yvar must be ``n x 1`` with one output, but has shape "
                f"{tuple(variance.shape)} for train_Y {tuple(Y.shape)}. Outputs share "
                "one linear system; put one model per output in a ModelList."
            )


def _check_parts(kernel: Kernel, likelihood: Likelihood, X: Tensor, m: int) -> None:
    if not isinstance(likelihood, GAUSSIAN):
        raise TypeError(
            "likelihood must be a GaussianLikelihood or FixedNoiseGaussianLikelihood, "
            f"but is {type(likelihood).__name__}."
        )
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        if m > 1 or likelihood.noise.shape != (len(X),):
            raise ShapeError(
                f"Fixed noise must be ``n`` variances for one output, but has shape "
                f"{tuple(likelihood.noise.shape)} with n = {len(X)} and m = {m}. Put "
                "one model per output in a ModelList."
            )
    if len(kernel.batch_shape):
        raise ShapeError(
            "covar_module must have no batch, but has batch_shape "
            f"{tuple(kernel.batch_shape)}. Outputs share one kernel here; put one "
            "model per output in a ModelList."
        )


@DrawMatheronPaths.register(SampledGP)
def _draw_sampled_paths(
    model: SampledGP, *, sample_shape: Size, prior_sampler: Any = None, **kwargs: Any
) -> DrawnPath:
    # gpbridge.pathwise binds its generator to the prior sampler.
    generator = getattr(prior_sampler, "keywords", {}).get("generator")
    draws = model.draw(Size(sample_shape).numel(), generator)
    return DrawnPath(draws, sample_shape, model.num_outputs)


@GaussianUpdate.register(SampledGP, Likelihood)
def _update_by_solver(
    model: SampledGP,
    likelihood: Likelihood,
    *,
    sample_values: Tensor,
    target_values: Tensor | None = None,
    **kwargs: Any,
) -> GeneralizedLinearPath:
    X = model.transform_inputs(model._train_X)
    if target_values is None:
        Y = model.train_targets
        target_values = Y if model.num_outputs == 1 else Y.mT
    return iterative_update(
        model,
        sample_values,
        target_values,
        solver=model.solver,
        points=X,
        noise=model.noise_variance,
    )
