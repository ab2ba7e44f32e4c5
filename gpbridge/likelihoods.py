"""Likelihoods as functions of the network's outputs, one point at a time.

In: a gpytorch likelihood, outputs f, targets y. Out: the log density, its first
derivative and the root R of its (negative, expected) second derivative, which is all
that the operator ``A = I + R' K R`` needs to know about a likelihood.

Every rule is a ``functools.singledispatch`` on the class of the likelihood: whoever
registers ``log_prob``, ``residual`` and ``hessian_root`` for a new one can use it.
Targets are ``... x n x m`` floats for Gaussian noise, ``... x n`` integers for softmax,
``... x n x 1`` floats 0 and 1 for the two binary links.
Next: ``targets`` checks and chooses at the door, ``operators`` builds A from R.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any, NoReturn

import torch
from gpytorch.distributions import MultivariateNormal, base_distributions
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
    _OneDimensionalLikelihood,
)
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn.functional import logsigmoid

from gpbridge.checks import ShapeError
from gpbridge.randomness import standard_normal

# Three families upstream, none of which is a subclass of another.
GAUSSIAN = (
    GaussianLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
)


class LogisticLikelihood(_OneDimensionalLikelihood):
    r"""A 0/1 label whose log odds are the latent function.

    .. math::
        p(y = 1 \mid f) = \frac{1}{1 + e^{-f}}

    This is what a network with one output learns when it is trained with binary cross
    entropy on logits. Gpytorch's ``BernoulliLikelihood`` is the probit link instead.
    Expectations under a Gaussian f are one-dimensional Gauss-Hermite quadratures.

    Example:
        >>> likelihood = LogisticLikelihood()
        >>> likelihood(torch.zeros(2)).probs
        tensor([0.5000, 0.5000])
    """

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> Bernoulli:
        """Distribution of the label given values of f, ``... x n``."""
        return base_distributions.Bernoulli(logits=function_samples)

    def marginal(
        self, function_dist: MultivariateNormal, *args: Any, **kwargs: Any
    ) -> Bernoulli:
        """Distribution of the label with f integrated out, by quadrature."""
        # Both labels, so that neither tail is one minus something close to one.
        one = self.quadrature(torch.sigmoid, function_dist)
        zero = self.quadrature(lambda f: torch.sigmoid(-f), function_dist)
        tiny = torch.finfo(one.dtype).tiny
        log_odds = one.clamp_min(tiny).log() - zero.clamp_min(tiny).log()
        return base_distributions.Bernoulli(logits=log_odds)

    def log_marginal(
        self,
        observations: Tensor,
        function_dist: MultivariateNormal,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Log probability of each label with f integrated out, ``... x n``."""
        return self.marginal(function_dist).log_prob(observations)


@singledispatch
def log_prob(
    likelihood: Likelihood, f: Tensor, y: Tensor, noise: Tensor | None = None
) -> Tensor:
    r"""Log density :math:`\log p(y_i \mid f_i)` of each point, constants included.

    Args:
        likelihood: A gpytorch likelihood with a rule here.
        f: Outputs of the network, ``... x n x m``.
        y: Targets in the form that the module's docstring gives.
        noise: Noise variances of these points in place of the likelihood's own,
            ``... x n`` (``... x n x m`` for several outputs). Gaussian noise only.

    Returns:
        Nats per point, summed over outputs, ``... x n``.

    Raises:
        NotImplementedError: If the class of the likelihood has no rule.

    Example:
        >>> log_prob(LogisticLikelihood(), torch.zeros(1, 1), torch.ones(1, 1))
        tensor([-0.6931])
    """
    return refuse(likelihood, log_prob)


@singledispatch
def residual(
    likelihood: Likelihood, f: Tensor, y: Tensor, noise: Tensor | None = None
) -> Tensor:
    r"""First derivative :math:`\partial \log p(y_i \mid f_i) / \partial f_i`.

    Gaussian noise gives :math:`\Sigma^{-1} (y - f)`, a softmax ``onehot(y) - p``.

    Args:
        likelihood: A gpytorch likelihood with a rule here.
        f: Outputs of the network, ``... x n x m``.
        y: Targets as for :func:`log_prob`.
        noise: As for :func:`log_prob`.

    Returns:
        ``... x n x m``, in nats per unit of the outputs.
    """
    return refuse(likelihood, residual)


@singledispatch
def hessian_root(
    likelihood: Likelihood, f: Tensor, noise: Tensor | None = None
) -> Tensor:
    r"""Root R of the expected curvature of the negative log density.

    .. math::
        R R^\top = - \mathbb{E}_{y \mid f} \Big[
            \frac{\partial^2 \log p(y \mid f)}{\partial f \partial f^\top} \Big]

    The output-space factor of the generalised Gauss-Newton matrix. With canonical links
    (Gaussian, softmax, logistic) it is the Hessian itself, with the probit link the
    Fisher information. Differentiable in f and in the noise.

    ==============  ================================================================
    Gaussian        :math:`\Sigma^{-1/2}`, the same for all points unless fixed
    softmax         :math:`\mathrm{diag}(\sqrt p) - p \sqrt p^\top`, singular
    logistic        :math:`\sqrt{p (1 - p)}`
    probit          :math:`\phi / \sqrt{\Phi (1 - \Phi)}`
    ==============  ================================================================

    Args:
        likelihood: A gpytorch likelihood with a rule here.
        f: Outputs of the network, ``... x n x m``. Gaussian noise reads their shape.
        noise: As for :func:`log_prob`.

    Returns:
        ``... x n x m x m`` in the dtype of f; upper triangular for Gaussian noise.

    Raises:
        NotImplementedError: If the class of the likelihood has no rule.
        ShapeError: If the noise is for another number of points.

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006,
        eqs. (3.15), (3.16) and (3.38). Martens, New insights and perspectives on the
        natural gradient method, JMLR 2020, section 9.2.
    """
    return refuse(likelihood, hessian_root)


@singledispatch
def sample_residual(
    likelihood: Likelihood,
    f: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Gaussian draws of covariance :math:`R R^\top`, one for each point.

    Args:
        likelihood: A gpytorch likelihood with a rule for :func:`hessian_root`.
        f: Outputs of the network, ``... x n x m``.
        generator: Source of randomness. Without one, draws are fresh on each call; the
            global random state is left alone in either case.
        noise: As for :func:`log_prob`.

    Returns:
        ``... x n x m``
    """
    normal = standard_normal(f.shape, generator, f)
    return (hessian_root(likelihood, f, noise) @ normal.unsqueeze(-1)).squeeze(-1)


def is_gaussian(likelihood: Likelihood) -> bool:
    """Whether y is f plus Gaussian noise, so that the posterior is exact."""
    return isinstance(likelihood, GAUSSIAN)


def outputs_of(likelihood: Likelihood) -> int | None:
    """The number m of latent outputs that a likelihood is made for; None if unknown."""
    if isinstance(likelihood, SoftmaxLikelihood):
        return likelihood.num_features
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        return likelihood.num_tasks
    single = *GAUSSIAN, _OneDimensionalLikelihood
    return 1 if isinstance(likelihood, single) else None


def check_outputs(
    likelihood: Likelihood, num_outputs: int, argument: str | None = None
) -> None:
    """Require a likelihood of so many latent outputs.

    Upstream's likelihoods of one output take any number of them without a word, and
    their expectations are then not summed over outputs.

    Args:
        likelihood: Of gpytorch.
        num_outputs: The number of latent functions.
        argument: What the caller's user says this number with, for the message.

    Raises:
        ShapeError: If it is made for another number.
    """
    expected = outputs_of(likelihood)
    if expected in (None, num_outputs):
        return
    remedy = (
        f"MultitaskGaussianLikelihood(num_tasks={num_outputs}, rank=0), for classes "
        f"SoftmaxLikelihood(num_classes={num_outputs}, mixing_weights=False)"
    )
    if num_outputs == 1:
        remedy = "GaussianLikelihood(), for labels 0 and 1 LogisticLikelihood()"
        if argument is not None:  # with a default, and forgotten
            remedy = f"{argument}={expected}, or for one output {remedy}"
    raise ShapeError(
        f"{type(likelihood).__name__} is a likelihood of {expected} latent "
        f"{'output' if expected == 1 else 'outputs'}, but there are {num_outputs}. "
        f"Try {remedy}."
    )


def noise_covariance(
    likelihood: Likelihood, f: Tensor, noise: Tensor | None = None
) -> Tensor:
    r"""Covariance :math:`\Sigma` of y given f at each point, for Gaussian noise only.

    Args:
        likelihood: One of the Gaussian likelihoods.
        f: Outputs of the network, ``... x n x m``, of which only the shape matters.
        noise: As for :func:`log_prob`.

    Returns:
        ``... x n x m x m``, the inverse of :math:`R R^\top` of :func:`hessian_root`.

    Raises:
        TypeError: If the likelihood is not Gaussian.
    """
    if not is_gaussian(likelihood):
        raise TypeError(
            "Only Gaussian likelihoods have a noise covariance, but this is a "
            f"{type(likelihood).__name__}. Ask hessian_root for its curvature."
        )
    variances = noise_variances(likelihood, f, noise)
    if variances is not None:
        return torch.diag_embed(variances)
    root = task_noise_root(likelihood)
    return _repeat_per_point(root @ root.mT, f)


@singledispatch
def noise_variances(
    likelihood: Likelihood, f: Tensor, noise: Tensor | None = None
) -> Tensor | None:
    """Noise variances ``... x n x m``, or None where outputs have correlated noise."""
    return refuse(likelihood, noise_variances)


@noise_variances.register(GaussianLikelihood)
def _(likelihood, f, noise=None):
    if noise is None:
        return _like_outputs(likelihood.noise.unsqueeze(-1), f)
    return _like_outputs(_one_per_point(noise, f).unsqueeze(-1), f)


@noise_variances.register(FixedNoiseGaussianLikelihood)
def _(likelihood, f, noise=None):
    if noise is None:
        noise = likelihood.noise_covar.noise
        if noise.shape[-1] != f.shape[-2]:
            raise ShapeError(
                f"{type(likelihood).__name__} holds the noise of {noise.shape[-1]} "
                f"points, but there are {f.shape[-2]}. Pass noise= with one variance "
                "for each of them."
            )
    noise = _one_per_point(noise, f) + likelihood.second_noise
    return _like_outputs(noise.unsqueeze(-1), f)


@noise_variances.register(MultitaskGaussianLikelihood)
def _(likelihood, f, noise=None):
    if noise is not None:
        if noise.shape[-2:] != f.shape[-2:]:
            raise ShapeError(
                f"noise must be ``... x {f.shape[-2]} x {f.shape[-1]}`` variances for "
                f"several outputs, but has shape {tuple(noise.shape)}."
            )
        return _like_outputs(noise, f)
    if likelihood.has_task_noise and likelihood.rank > 0:
        return None
    variances = likelihood.noise if likelihood.has_global_noise else 0.0
    if likelihood.has_task_noise:
        variances = variances + likelihood.task_noises  # batch_shape x m
    return _like_outputs(variances.unsqueeze(-2), f)


def task_noise_root(likelihood: MultitaskGaussianLikelihood) -> Tensor:
    """Root B, ``... x m x (r + m)``, of the noise covariance B B' of rank r > 0.

    Args:
        likelihood: A multitask likelihood with task noise of rank r > 0.

    Returns:
        The task factor beside the root of the global noise, or alone without one.

    Raises:
        ValueError: If the covariance is singular by construction.
    """
    root, m = likelihood.task_noise_covar_factor, likelihood.num_tasks
    if likelihood.has_global_noise:
        identity = torch.eye(m, dtype=root.dtype, device=root.device)
        common = likelihood.noise.sqrt().unsqueeze(-1) * identity
        return torch.cat([root, common.expand(*root.shape[:-1], m)], -1)
    if likelihood.rank < m:
        raise ValueError(
            f"A noise covariance of rank {likelihood.rank} for {m} outputs is singular "
            "without global noise. Try has_global_noise=True, or rank=0 for one noise "
            "per output."
        )
    return root


def _gaussian_log_prob(likelihood, f, y, noise=None):
    R = hessian_root(likelihood, f, noise)
    whitened = (R.mT @ (y - f).unsqueeze(-1)).squeeze(-1)
    log_det = R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = 0.5 * f.shape[-1] * math.log(2 * math.pi)
    return log_det - 0.5 * whitened.square().sum(-1) - constant


def _gaussian_residual(likelihood, f, y, noise=None):
    R = hessian_root(likelihood, f, noise)
    return (R @ (R.mT @ (y - f).unsqueeze(-1))).squeeze(-1)


def _gaussian_hessian_root(likelihood, f, noise=None):
    variances = noise_variances(likelihood, f, noise)
    if variances is not None:
        return torch.diag_embed(variances.rsqrt())
    # Sigma = B B' = T' T with B' = Q T, and R = T^-1. Unlike a Cholesky factorisation
    # this does not square the condition number, and never waits for the device.
    T = torch.linalg.qr(task_noise_root(likelihood).mT).R
    identity = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return _repeat_per_point(torch.linalg.solve_triangular(T, identity, upper=True), f)


for _kind in GAUSSIAN:
    log_prob.register(_kind, _gaussian_log_prob)
    residual.register(_kind, _gaussian_residual)
    hessian_root.register(_kind, _gaussian_hessian_root)


@log_prob.register(SoftmaxLikelihood)
def _(likelihood, f, y, noise=None):
    check_label_model(likelihood, noise)
    return (_one_hot(y, f) * torch.log_softmax(f, -1)).sum(-1)


@residual.register(SoftmaxLikelihood)
def _(likelihood, f, y, noise=None):
    check_label_model(likelihood, noise)
    return _one_hot(y, f) - torch.softmax(f, -1)


@hessian_root.register(SoftmaxLikelihood)
def _(likelihood, f, noise=None):
    check_label_model(likelihood, noise)
    p, root_p = _probabilities_and_roots(f)
    return torch.diag_embed(root_p) - p.unsqueeze(-1) * root_p.unsqueeze(-2)


@sample_residual.register(SoftmaxLikelihood)
def _(likelihood, f, generator=None, noise=None):
    check_label_model(likelihood, noise)
    p, root_p = _probabilities_and_roots(f)
    normal = standard_normal(f.shape, generator, f)
    scaled = root_p * normal  # R times it, without forming R
    return scaled - p * scaled.sum(-1, keepdim=True)


@singledispatch
def _log_link(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Log probability of the label 1 under a link with p(0 | f) = p(1 | -f)."""


@singledispatch
def _log_slope(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Log derivative of that probability, an even function of f."""


@_log_link.register(LogisticLikelihood)
def _(likelihood, f):
    return logsigmoid(f)


@_log_slope.register(LogisticLikelihood)
def _(likelihood, f):
    return logsigmoid(f) + logsigmoid(-f)


@_log_link.register(BernoulliLikelihood)
def _(likelihood, f):
    return torch.special.log_ndtr(f)


@_log_slope.register(BernoulliLikelihood)
def _(likelihood, f):
    return -0.5 * (f.square() + math.log(2 * math.pi))


def _binary_log_prob(likelihood, f, y, noise=None):
    check_label_model(likelihood, noise)
    return _log_link(likelihood, (2 * y - 1) * f).sum(-1)


def _binary_residual(likelihood, f, y, noise=None):
    check_label_model(likelihood, noise)
    sign = 2 * y - 1
    return sign * (_log_slope(likelihood, f) - _log_link(likelihood, sign * f)).exp()


def _binary_hessian_root(likelihood, f, noise=None):
    check_label_model(likelihood, noise)
    both = _log_link(likelihood, f) + _log_link(likelihood, -f)
    return (_log_slope(likelihood, f) - 0.5 * both).exp().unsqueeze(-1)


for _kind in (LogisticLikelihood, BernoulliLikelihood):
    log_prob.register(_kind, _binary_log_prob)
    residual.register(_kind, _binary_residual)
    hessian_root.register(_kind, _binary_hessian_root)


def check_label_model(likelihood: Likelihood, noise: Tensor | None = None) -> None:
    """Require a likelihood of labels without noise variances or mixing weights."""
    if noise is not None:
        raise ValueError(
            f"noise must be None for {type(likelihood).__name__}: labels have no noise "
            "variance. Leave it out."
        )
    if getattr(likelihood, "mixing_weights", None) is not None:
        raise ValueError(
            "SoftmaxLikelihood must have mixing_weights=False: the network's outputs "
            "are the logits, one per class. Try SoftmaxLikelihood(num_classes="
            f"{likelihood.num_classes}, mixing_weights=False)."
        )


def refuse(likelihood: Likelihood, rule: Any) -> NoReturn:
    """Say that a class has no rule, which classes do, and how to add one."""
    kind, name = type(likelihood).__name__, f"{rule.__module__}.{rule.__name__}"
    known = sorted(cls.__name__ for cls in rule.registry if cls is not object)
    raise NotImplementedError(
        f"{name} has no rule for {kind}; it has rules for {', '.join(known)}. Use one "
        f"of these, or write a rule and register it with @{name}.register({kind})."
    )


def _probabilities_and_roots(f: Tensor) -> tuple[Tensor, Tensor]:
    # The root through half the log: sqrt has an infinite slope at p = 0.
    log_p = torch.log_softmax(f, -1)
    return log_p.exp(), (0.5 * log_p).exp()


def _one_hot(y: Tensor, f: Tensor) -> Tensor:
    classes = torch.arange(f.shape[-1], device=f.device)
    return (y.unsqueeze(-1) == classes).to(f.dtype)


def _one_per_point(noise: Tensor, f: Tensor) -> Tensor:
    if noise.shape[-1] != f.shape[-2]:
        raise ShapeError(
            f"noise must be ``... x {f.shape[-2]}`` variances, one for each point, but "
            f"has shape {tuple(noise.shape)}."
        )
    return noise


def _like_outputs(variances: Tensor, f: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(variances.shape, f.shape)
    return variances.to(f.dtype).expand(shape)


def _repeat_per_point(matrix: Tensor, f: Tensor) -> Tensor:
    batch_shape = torch.broadcast_shapes(matrix.shape[:-2], f.shape[:-2])
    shape = (*batch_shape, f.shape[-2], *matrix.shape[-2:])
    return matrix.to(f.dtype).unsqueeze(-3).expand(shape)
