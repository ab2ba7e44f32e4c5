r"""A posterior over weights as a Gaussian over functions, joint over inputs.

In: any :class:`~gpbridge.types.WeightPosterior`. Out: the mean and covariance of its
functions at any inputs, as a gpytorch distribution; from draws of the nonlinear
network, or exactly for its tangent model. The posterior has seen the data already: what
comes out is never conditioned on them again.
Next: ``surrogates`` makes a BoTorch model of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from linear_operator import to_linear_operator
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    LowRankRootLinearOperator,
)
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ReliabilityWarning,
    check_choice,
    check_count,
    check_inputs,
    warn_user,
)
from gpbridge.draws import JoinedDraws, TangentDraws, WeightDraws
from gpbridge.function_draws import (
    evaluate,
    freeze,
    refreshed,
    refuse_what_holds_one,
)
from gpbridge.functional import FunctionalNet
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.outcomes import latent_distribution
from gpbridge.probe import explain_failure
from gpbridge.types import FunctionDraws, WeightPosterior
from gpbridge.weights import GaussianWeights

MODES = ("sample", "linearized")
_NO_SPREAD = (
    "One function has no spread to estimate a covariance from. Pass num_samples=64, "
    "or a posterior with several members."
)


class FunctionSpace(nn.Module):
    r"""The Gaussian over functions that a posterior over weights implies.

    With s frozen draws :math:`f_i`, mode ``"sample"``,

    .. math::
        \bar f = \tfrac1s \sum_i f_i(X), \qquad
        K = \tfrac{1}{s - 1} \sum_i (f_i - \bar f)(f_i - \bar f)^\top + \epsilon I,

    which has rank s - 1 but for the jitter, so that a density at more points than draws
    says nothing; it is held as an ``(n m) x s`` root there. A standard deviation has
    a relative error of :math:`1 / \sqrt{2 s}`. For weights :math:`N(m, \Sigma)`, mode
    ``"linearized"``,

    .. math:: \bar f = f(X, m), \qquad K = J \Sigma J^\top + \epsilon I

    with the Jacobian J at the mean, the covariance of the tangent model without Monte
    Carlo error: the kernel of :class:`~gpbridge.kernels.NeuralTangentKernel` with
    :math:`\Sigma` as weight covariance. It needs the ``(n m) x p`` Jacobian in memory.

    A Gaussian with the moments of several modes has none of them: where that matters
    use the draws themselves, :attr:`draws`.

    Args:
        posterior: What has a ``draw``, or frozen functions, such as draws with
            refreshed batch-norm statistics. A posterior of at most ``num_samples``
            members is not drawn from: each member counts once.
        mode: ``"sample"``, or ``"linearized"`` for :class:`GaussianWeights`.
        num_samples: The number s of draws.
        jitter: Variance added to each value, in squared units of the outputs.
        generator: Source of the draws; default one of seed 0.
        likelihood: How outputs are read. If it predicts noise, the functions are the
            means; any other changes nothing.
        batches: Training inputs, as for
            :func:`~gpbridge.batch_norm.refresh_batch_norm`: then every draw has
            batch-norm statistics of its own, as has the mean of a tangent model.

    Raises:
        TypeError: If the posterior does not fit the mode, or is none.
        ValueError: If an option is out of range, or one function has no spread.

    Warns:
        ReliabilityWarning: If batch norm has the statistics of other weights than those
            drawn, or all draws have the same weights.

    Example:
        >>> net = FunctionalNet(nn.Linear(2, 1))
        >>> weights = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
        >>> space = FunctionSpace(weights, mode="linearized", jitter=0)
        >>> space(torch.ones(2, 2)).covariance_matrix
        tensor([[3., 3.],
                [3., 3.]])

    References:
        Maddox, Tang, Moreno, Wilson, Damianou, Fast adaptation with linearized neural
        networks, AISTATS 2021, for the kernel.
    """

    def __init__(
        self,
        posterior: WeightPosterior | FunctionDraws,
        mode: str = "sample",
        num_samples: int = 64,
        jitter: float = 1e-6,
        generator: Generator | None = None,
        likelihood: Likelihood | None = None,
        batches: Iterable[Tensor | Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        check_count(num_samples=num_samples)
        if not 0 <= jitter < float("inf"):
            raise ValueError(
                f"jitter must be at least zero and finite, but is {jitter}."
            )
        self.mode, self.jitter, self.likelihood = mode, float(jitter), likelihood
        if generator is None:
            generator = Generator().manual_seed(0)
        self.kernel: NeuralTangentKernel | None = None
        if mode == "linearized":
            self.draws, self.kernel = _tangent(
                posterior, num_samples, generator, batches
            )
            return
        self.draws = refreshed(freeze(posterior, num_samples, generator), batches)
        _check_spread(self.draws)

    def extra_repr(self) -> str:
        """Mode and jitter; the draws say how many they are."""
        return f"mode={self.mode!r}, jitter={self.jitter:g}"

    def forward(self, X: Tensor) -> MultivariateNormal:
        """Joint distribution of the functions at inputs, differentiable in them.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            Over ``... x n`` values, or ``... x n x m`` if there are several outputs,
            point-major, output fastest.

        Raises:
            ValueError: If there is a single function, which has no spread.
        """
        mean, covariance = self.moments(X)
        covariance = add_variance(covariance, torch.full_like(mean, self.jitter))
        return latent_distribution(mean, covariance, X.dtype)

    def moments(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        """Mean ``... x n x m`` and covariance ``... x (n m) x (n m)``, no jitter."""
        check_inputs(X, "X")
        if self.kernel is not None:
            return self._tangent_moments(X)
        return draw_moments(self.values(X))

    def values(self, X: Tensor) -> Tensor:
        """The functions of all draws, ``s x ... x n x m``."""
        return self.latent(self.outputs(X))

    def outputs(self, X: Tensor) -> Tensor:
        """All outputs of the draws, ``s x ... x n x k``, with any predicted noise.

        Raises:
            ShapeError: If they have another shape, as those of one network.
        """
        return evaluate(self.draws, X)

    def latent(self, outputs: Tensor) -> Tensor:
        """The functions among outputs: without the noise that a network predicts."""
        if isinstance(self.likelihood, HeteroscedasticGaussianLikelihood):
            return self.likelihood.moments(outputs)[0]
        return outputs

    def _tangent_moments(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        net = self.kernel.functional
        try:
            outputs = net(X.to(net.dtype)).to(X.dtype)
        except Exception:
            explain_failure(net, X)
            raise
        mean, covariance = self.latent(outputs), self.kernel(X).to_dense()
        if mean.shape[-1] != outputs.shape[-1]:
            n, both, m = *outputs.shape[-2:], mean.shape[-1]
            blocks = covariance.unflatten(-1, (n, both)).unflatten(-3, (n, both))
            kept = blocks[..., :, :m, :, :m]
            covariance = kept.flatten(-4, -3).flatten(-2)
        return mean, to_linear_operator(covariance)


def _check_spread(draws: object) -> None:
    """Refuse one draw, and warn of draws that are all the same."""
    parts = list(draws.parts) if isinstance(draws, JoinedDraws) else [draws]
    if len(parts) > 1 or not isinstance(parts[0], WeightDraws):
        return
    weights, statistics = parts[0].weights, parts[0].statistics
    if len(weights) < 2:
        raise ValueError(_NO_SPREAD)
    if all(bool((v == v[:1]).all()) for v in (weights, *statistics.values())):
        warn_user(
            f"All {len(weights)} draws have the same weights: their variance is zero "
            "everywhere. Pass a posterior with spread, or snapshots of several epochs.",
            ReliabilityWarning,
        )


def draw_moments(values: Tensor) -> tuple[Tensor, LinearOperator]:
    """Mean and covariance of the values of draws, over points and outputs.

    Args:
        values: ``s x ... x n x m``.

    Returns:
        ``... x n x m``, and ``... x (n m) x (n m)`` divided by s - 1: of low rank where
        there are more values than draws.

    Raises:
        ValueError: If there is a single draw.
    """
    s = len(values)
    if s < 2:
        raise ValueError(_NO_SPREAD)
    mean = values.mean(0)
    deviations = (values - mean).movedim(0, -1)  # ... x n x m x s
    root = deviations.flatten(-3, -2) / (s - 1) ** 0.5
    if root.shape[-2] > s:
        return mean, LowRankRootLinearOperator(root)
    return mean, to_linear_operator(root @ root.mT)


def add_variance(covariance: LinearOperator, variance: Tensor) -> LinearOperator:
    """Add variances ``... x n x m`` to a covariance ``... x (n m) x (n m)``."""
    diagonal = variance.flatten(-2)
    if isinstance(covariance, LowRankRootLinearOperator):
        return covariance + DiagLinearOperator(diagonal)
    return to_linear_operator(covariance.to_dense() + torch.diag_embed(diagonal))


def _tangent(
    posterior: object,
    num_samples: int,
    generator: Generator,
    batches: Iterable[Tensor | Sequence[Tensor]] | None,
) -> tuple[TangentDraws, NeuralTangentKernel]:
    """Draws and covariance of the tangent model at the mean of the weights."""
    if not isinstance(posterior, GaussianWeights):
        if not hasattr(posterior, "draw"):
            refuse_what_holds_one(posterior)
        raise TypeError(
            "mode='linearized' needs GaussianWeights, as SWAG or variational inference "
            f"give them, but the posterior is {type(posterior).__name__}. Try "
            "mode='sample'."
        )
    net: FunctionalNet = copy.deepcopy(posterior.net)
    mean = posterior.mean
    at_mean = refreshed(WeightDraws(net, mean[None]), batches)
    own = dict(net.network.named_buffers())
    for name, value in at_mean.statistics.items():
        own[name].copy_(value[0])
    net.write(net.unflatten(mean))
    covariance = posterior.covariance
    if posterior.variance is None and posterior.root is None:
        covariance = DiagLinearOperator(torch.zeros_like(mean))  # keeps its tensors
    # Dense Gram matrices: their other form wants a p x p root of the covariance.
    kernel = NeuralTangentKernel(
        net, weight_covariance=covariance, representation="function"
    )
    change = posterior.sample_weights(num_samples, generator) - mean
    return TangentDraws(net, change), kernel.requires_grad_(False)
