"""A sparse variational GP that is ready to use with any kernel, orbits included.

In: a kernel, inducing points and a likelihood. Out: a gpytorch ``ApproximateGP``.
Next: ``selection`` fits it, ``model.predict(X)`` predicts y at each point.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import (
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.means import Mean, ZeroMean
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    MeanFieldVariationalDistribution,
    NaturalVariationalDistribution,
    _VariationalDistribution,
)
from linear_operator.operators import DiagLinearOperator
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_dtype,
    check_tensor,
)
from gpbridge.inducing_covariances import inducing_width
from gpbridge.inducing_strategy import (
    InterdomainVariationalStrategy,
    check_inducing_points,
)
from gpbridge.likelihoods import (
    check_label_model,
    check_outputs,
    is_gaussian,
    noise_covariance,
)
from gpbridge.outcomes import target_distribution
from gpbridge.predictive_mixture import marginal_labels

_DISTRIBUTIONS = {
    "cholesky": CholeskyVariationalDistribution,
    "natural": NaturalVariationalDistribution,
    "mean_field": MeanFieldVariationalDistribution,
}


class SparseGP(ApproximateGP):
    r"""A sparse variational GP with inducing variables where the base kernel lives.

    Several outputs are independent a posteriori. They share the inducing points, and
    the kernel unless it has a batch of hyperparameters, one per output; then one
    Cholesky factor and one average over orbits serve all of them.

    Args:
        kernel: The prior covariance, used as it is and not copied.
        inducing_points: Inducing points ``m x d'``, from
            :func:`gpbridge.inducing_points.initial_inducing_points`.
        likelihood: Kept as ``model.likelihood``; default Gaussian noise, of a variance
            of its own for each output.
        num_outputs: The number of latent functions, as the classes of a softmax.
        mean: Prior mean; default zero.
        distribution: Of the inducing variables: ``"cholesky"``, ``"natural"`` (for
            natural gradients) or ``"mean_field"``.
        learn_inducing_points: Whether they are parameters.
        initial_std: Of the whitened inducing variables at the start, whose mean is
            zero. One is the prior. With a large outputscale, as a convolutional kernel
            needs one, the prior is a poor start, and 0.1 learns faster.

    Raises:
        ShapeError: If the likelihood is one of another number of outputs, or the
            inducing points are no rows; and in a call, if its inputs have another width
            than they.
        TypeError: If they are no floats; and in a call, if its inputs have another
            dtype than they.
        ValueError: If an option is out of range.

    Example:
        >>> import torch
        >>> from gpytorch.kernels import RBFKernel, ScaleKernel
        >>> from gpytorch.likelihoods import SoftmaxLikelihood
        >>> from gpbridge.inducing_points import initial_inducing_points
        >>> from gpbridge.kernels import ConvolutionalKernel
        >>> X = torch.rand(20, 36)
        >>> kernel = ScaleKernel(ConvolutionalKernel(RBFKernel(), (6, 6), (3, 3)))
        >>> Z = initial_inducing_points(kernel, X, 8)
        >>> softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
        >>> model = SparseGP(kernel, Z, softmax, num_outputs=3)
        >>> model(X).mean.shape
        torch.Size([20, 3])
        >>> model.predict(X).probs.shape
        torch.Size([20, 3])
    """

    def __init__(
        self,
        kernel: Kernel,
        inducing_points: Tensor,
        likelihood: Likelihood | None = None,
        *,
        num_outputs: int = 1,
        mean: Mean | None = None,
        distribution: str = "cholesky",
        learn_inducing_points: bool = True,
        initial_std: float = 1.0,
    ) -> None:
        check_choice("distribution", distribution, tuple(_DISTRIBUTIONS))
        check_count(num_outputs=num_outputs)
        check_positive(initial_std=initial_std)
        check_inducing_points(inducing_points)
        if likelihood is None:
            likelihood = _gaussian_noise(num_outputs)
        check_outputs(likelihood, num_outputs, argument="num_outputs")
        batch_shape = Size([num_outputs] if num_outputs > 1 else [])
        q = _DISTRIBUTIONS[distribution](inducing_points.shape[-2], batch_shape)
        _set_std(q, initial_std)
        strategy = InterdomainVariationalStrategy(
            self,
            inducing_points,
            q.to(inducing_points),
            learn_inducing_locations=learn_inducing_points,
        )
        # Upstream would start from the prior, with noise from the global random state.
        strategy.variational_params_initialized.fill_(1)
        if num_outputs > 1:
            strategy = IndependentMultitaskVariationalStrategy(
                strategy, num_tasks=num_outputs
            )
        super().__init__(strategy)
        self.covar_module = kernel
        self.mean_module = ZeroMean() if mean is None else mean
        self.likelihood = likelihood
        self.num_outputs = num_outputs

    @property
    def dtype(self) -> torch.dtype:
        """Of inducing points and inputs."""
        return self._base_strategy.inducing_points.dtype

    @property
    def _base_strategy(self) -> InterdomainVariationalStrategy:
        strategy = self.variational_strategy
        return strategy if self.num_outputs == 1 else strategy.base_variational_strategy

    def __call__(
        self, x: Tensor, prior: bool = False, **kwargs: Any
    ) -> MultivariateNormal:
        """The posterior of f at inputs ``... x n x d``, joint over the n points.

        Args:
            x: Inputs.
            prior: Return the prior instead.
            **kwargs: For the variational strategy.

        Returns:
            A distribution over ``... x n`` values, ``... x n x m`` for several outputs.

        Raises:
            TypeError: If inputs are no tensor, or of another dtype than the inducing
                points.
            ShapeError: If they have another width.
        """
        check_tensor(x=x)
        check_same_dtype("x", x, self.dtype, "inducing points of the model")
        if x.dim() == 1:
            x = x[:, None]
        self._check_width("x", x)
        if self.num_outputs > 1 and (prior or x.dim() > 2):
            # Outputs are a batch too, which would be matched with the last of x.
            x = x.unsqueeze(-3)
            if prior:  # upstream takes the last batch dimension for the outputs
                x = x.expand(*x.shape[:-3], self.num_outputs, *x.shape[-2:])
        return super().__call__(x, prior, **kwargs)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at inputs ``... n x d``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def marginals(self, x: Tensor) -> MultivariateNormal:
        """The posterior at each input by itself, without covariances between inputs.

        What :meth:`predict` needs. Likelihoods that draw samples, as the
        softmax, draw them jointly from ``model(x)``, and n² averages over orbits would
        be computed for it: pass them this instead.

        Args:
            x: Inputs ``... n x d``.

        Returns:
            A distribution over ``... x n`` values, ``... x n x m`` for several outputs,
            for ``model.likelihood``.
        """
        f = self(x)
        variance = f.variance
        if self.num_outputs > 1:
            variance = variance.flatten(-2)
        return type(f)(f.mean, DiagLinearOperator(variance))

    def predict(
        self,
        X: Tensor,
        num_samples: int = 256,
        generator: Generator | None = None,
        noise: Tensor | None = None,
    ) -> Distribution:
        """Distribution of y at each point, noise included.

        Exact for Gaussian noise and the probit link, a quadrature for the logistic one,
        and an average over draws for a softmax. All points share these, so that a
        probability does not depend on the other points; its standard error is at most
        ``sqrt(p (1 - p) / num_samples)``, one standard deviation of its error and no
        bound on it. For y jointly over points, and for other
        likelihoods, call ``model.likelihood(model(X))``.

        Args:
            X: Inputs ``... x n x d``.
            num_samples: Draws of the outputs of a softmax.
            generator: Source of these; None is a fresh one with seed 0, so that two
                calls agree.
            noise: Noise variances of these points, ``... x n``, where they are fixed.

        Returns:
            Normal ``... x n x 1``, or independent Normals over m outputs; Bernoulli
            ``... x n x 1``; Categorical ``... x n``.

        Raises:
            ShapeError: If inputs are no rows of the right width, or there is not one
                fixed noise for each.
            NotImplementedError: If the class of the likelihood has no rule.
            TypeError: If inputs have another dtype than the inducing points.
            ValueError: If a softmax mixes the outputs.
        """
        check_inputs(X, "X")
        check_same_dtype("X", X, self.dtype, "inducing points of the model")
        check_not_empty(X=X)
        self._check_width("X", X)
        check_count(num_samples=num_samples)
        f = self.marginals(X)
        mean, variance = f.mean, f.variance
        if self.num_outputs == 1:
            mean, variance = mean[..., None], variance[..., None]
        if is_gaussian(self.likelihood):
            covariance = noise_covariance(self.likelihood, mean, noise)
            variance = variance + covariance.diagonal(dim1=-2, dim2=-1)
            return target_distribution(mean, variance, None, X, mean.dtype)
        check_label_model(self.likelihood, noise)
        if generator is None:
            generator = Generator(X.device).manual_seed(0)
        shape = num_samples, *(1,) * (mean.dim() - 1), self.num_outputs
        return marginal_labels(
            self.likelihood, mean[None], variance[None], shape, generator
        )

    def _check_width(self, name: str, x: Tensor) -> None:
        """Blame the inputs, where the kernel takes as many columns as Z has."""
        if type(self).forward is not SparseGP.forward or x.dim() < 2:
            return  # the kernel may see features of the inputs
        e, kernel = self._base_strategy.inducing_points.shape[-1], self.covar_module
        if x.shape[-1] == e or inducing_width(kernel, x.shape[-1]) == e:
            return
        if inducing_width(kernel, e) == e:
            raise ShapeError(
                f"{name} must have {e} columns as the inducing points of the model "
                f"have, but has {x.shape[-1]} (shape {tuple(x.shape)}). Pass the same "
                "features, or build the model with inducing points of these: "
                "gpbridge.inducing_points.initial_inducing_points(kernel, X, m)."
            )


def _gaussian_noise(num_outputs: int) -> Likelihood:
    if num_outputs == 1:
        return GaussianLikelihood()
    # A second noise in common could not be told from these.
    return MultitaskGaussianLikelihood(num_outputs, rank=0, has_global_noise=False)


@torch.no_grad()
def _set_std(q: _VariationalDistribution, std: float) -> None:
    """Scale a distribution that starts as a standard normal."""
    if isinstance(q, CholeskyVariationalDistribution):
        q.chol_variational_covar.mul_(std)
    elif isinstance(q, MeanFieldVariationalDistribution):
        q._variational_stddev.mul_(std)
    else:
        q.natural_mat.div_(std**2)
