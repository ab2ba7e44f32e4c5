r"""Class probabilities from Gaussian logits: the links, and one temperature.

In: mean ``... x m`` and covariance ``... x m x m`` of the logits of each point, as the
linearised posterior gives them. Out: probabilities ``... x m``, the integral of softmax
over the Gaussian or an approximation to it. A softmax ignores a common shift of its
logits, and the data never shrink that direction of the covariance, so a link should
ignore it too; the plain ``probit`` does not and is here for comparison only.
Everything is computed in float64; ``log=True`` returns log probabilities.
Next: ``predictive`` applies the links to any likelihood of labels.
"""

from __future__ import annotations

import math

import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpbridge.checks import ShapeError, check_positive, warn_user
from gpbridge.randomness import standard_normal

JITTERS = (1e-5, 1e-4, 1e-3, 1e-2)  # relative to the mean diagonal
SAMPLE_NUMBERS = 2**22  # alive at once in Monte Carlo, 32 MiB


def plugin(mean: Tensor, covariance: Tensor, log: bool = False) -> Tensor:
    """Softmax of the mean: the network's own probabilities, without its uncertainty.

    Args:
        mean: Logits, ``... x m`` with m > 1 classes.
        covariance: Ignored.
        log: Return log probabilities.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.
    """
    f, _ = _open(mean, covariance)
    return _close(f, mean.dtype, log)


def pairwise(mean: Tensor, covariance: Tensor, log: bool = False) -> Tensor:
    r"""Each class against each other one, by the probit approximation of two classes.

    .. math::
        q_c \propto \Big[ \sum_j \exp\Big(
            - \frac{f_c - f_j}{\sqrt{1 + \frac{\pi}{8} v_{cj}}} \Big) \Big]^{-1}, \qquad
        v_{cj} = S_{cc} + S_{jj} - 2 S_{cj}

    The most accurate closed form measured here, and it errs on the cautious side: total
    variation .005 from Monte Carlo at logit variance 0.1, .04 at 1, .14 at 10 with ten
    classes. Ignores a common shift by construction. Memory m x m per point.

    Args:
        mean: Mean of the logits, ``... x m`` with m > 1 classes.
        covariance: Covariance of the logits of each point, ``... x m x m``.
        log: Return log probabilities.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.

    Example:
        >>> pairwise(torch.tensor([2.0, 0.0]), 4 * torch.eye(2))
        tensor([0.7277, 0.2723])

    References:
        One of the mean-field forms of Lu, Ie and Sha, Mean-field approximation to
        Gaussian-softmax integral, arXiv 2006.07584. MacKay, The evidence framework
        applied to classification networks, Neural Computation 1992, for two classes.
    """
    f, S = _open(mean, covariance)
    difference = f.unsqueeze(-1) - f.unsqueeze(-2)  # ... x m x m
    own = S.diagonal(dim1=-2, dim2=-1)
    variance = own.unsqueeze(-1) + own.unsqueeze(-2) - S - S.mT
    odds = torch.logsumexp(-difference * _shrinkage(variance), -1)  # against class c
    return _close(-odds, mean.dtype, log)


def probit_centred(mean: Tensor, covariance: Tensor, log: bool = False) -> Tensor:
    r"""Softmax of shrunken logits, after the common shift has been projected out.

    .. math::
        \mathrm{softmax}\Big( \frac{P f}{\sqrt{1 + \frac{\pi}{8}
            \mathrm{diag}(P S P)}} \Big), \qquad P = I - \tfrac1m 1 1^\top

    It shrinks less than :func:`pairwise`, and can change the most probable class.

    Args:
        mean: Mean of the logits, ``... x m`` with m > 1 classes.
        covariance: Covariance of the logits of each point, ``... x m x m``.
        log: Return log probabilities.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.
    """
    f, S = _centre(*_open(mean, covariance))
    return _close(f * _shrinkage(S.diagonal(dim1=-2, dim2=-1)), mean.dtype, log)


def probit(mean: Tensor, covariance: Tensor, log: bool = False) -> Tensor:
    r"""Softmax of logits shrunken by their own variances, for comparison with others.

    .. math:: \mathrm{softmax}\Big( f / \sqrt{1 + \tfrac{\pi}{8} \mathrm{diag} S} \Big)

    Depends on the offset of the logits and on the variance of their common shift, which
    mean nothing: prefer :func:`pairwise`.

    Args:
        mean: Mean of the logits, ``... x m`` with m > 1 classes.
        covariance: Covariance of the logits of each point, ``... x m x m``.
        log: Return log probabilities.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.

    References:
        Gibbs, Bayesian Gaussian processes for regression and classification, PhD thesis
        Cambridge 1997; the form used by the Python package laplace-torch.
    """
    f, S = _open(mean, covariance)
    return _close(f * _shrinkage(S.diagonal(dim1=-2, dim2=-1)), mean.dtype, log)


def laplace_bridge(mean: Tensor, covariance: Tensor, log: bool = False) -> Tensor:
    r"""Mean of the Dirichlet distribution whose Laplace approximation is the Gaussian.

    After conditioning mean and covariance on logits that sum to zero,

    .. math::
        q_c \propto \frac{1}{S_{cc}} \Big( 1 - \frac2m
            + \frac{e^{f_c}}{m^2} \sum_j e^{-f_j} \Big) .

    The overall scale of S cancels: no prior variance can change the result much, which
    is close to the softmax of confident logits and inaccurate for soft ones. Without
    covariance it is the limit of a small multiple of the identity, not the softmax.

    Args:
        mean: Mean of the logits, ``... x m`` with m > 1 classes.
        covariance: Covariance of the logits of each point, ``... x m x m``.
        log: Return log probabilities.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.

    References:
        Hobbhahn, Kristiadi and Hennig, Fast predictive uncertainty for classification
        with Bayesian deep networks, UAI 2022, eqs. (6) and (7).
    """
    f, S = _open(mean, covariance)
    m = f.shape[-1]
    S = S / _mean_variance(S)
    # Where the sum of the logits has no variance there is nothing to condition on: a
    # small multiple of the identity gives the limit, also for a covariance of zero.
    total = S.sum((-2, -1), keepdim=True)
    identity = torch.eye(m, dtype=f.dtype, device=f.device)
    S = torch.where(total > 1e-10 * m, S, S + 1e-7 * identity)
    row = S.sum(-1)  # S 1
    weight = row / row.sum(-1, keepdim=True)
    f = f - weight * f.sum(-1, keepdim=True)
    variance = S.diagonal(dim1=-2, dim2=-1) - row * weight
    strength = torch.logsumexp(-f, -1, keepdim=True) + f - 2 * math.log(m)
    if m > 2:
        constant = torch.full_like(strength, math.log(1 - 2 / m))
        strength = torch.logaddexp(strength, constant)
    # A class without variance of its own is certain; the bound keeps that finite.
    return _close(strength - variance.clamp_min(1e-12).log(), mean.dtype, log)


def monte_carlo(
    mean: Tensor,
    covariance: Tensor,
    log: bool = False,
    *,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
    antithetic: bool = True,
) -> Tensor:
    r"""Average of the softmax of samples from the Gaussian: the reference.

    Sampled with the common shift projected out. The centred covariance is singular, so
    its factor has a jitter of 1e-5 of its mean diagonal, which grows tenfold, with a
    warning, up to 1e-2 at points where that is not enough. About 100 samples do for
    accuracies and calibration, not for the log of small probabilities: the error of a
    probability q is below :math:`\sqrt{q (1 - q) / s}`. All points share their standard
    normal draws, so that a probability is a smooth function of mean and covariance and
    does not depend on the other points of a batch.

    Args:
        mean: Mean of the logits, ``... x m`` with m > 1 classes.
        covariance: Covariance of the logits of each point, ``... x m x m``.
        log: Return log probabilities.
        num_samples: Samples for each point, rounded up to an even number of antithetic
            ones.
        generator: Source of randomness. Without one, a fixed seed, so that the same
            logits have the same probabilities on each call.
        antithetic: Draw pairs of opposite sign, which cancels errors of odd order.

    Returns:
        Probabilities ``... x m`` in the dtype of the mean.

    Raises:
        NotPSDError: If a covariance is indefinite beyond the largest jitter.
    """
    check_positive(num_samples=num_samples)
    f, S = _centre(*_open(mean, covariance))
    root = _jittered_root(S)
    if generator is None:
        generator = torch.Generator(device=f.device).manual_seed(0)
    signs = (1.0, -1.0) if antithetic else (1.0,)
    draws = -(-num_samples // len(signs))
    chunk = max(1, SAMPLE_NUMBERS // max(1, f.numel()))
    parts = []
    for start in range(0, draws, chunk):
        size = (f.shape[-1], min(chunk, draws - start))
        deviation = root @ standard_normal(size, generator, f)  # ... x m x s
        for sign in signs:
            samples = torch.log_softmax(f.unsqueeze(-1) + sign * deviation, -2)
            parts.append(torch.logsumexp(samples, -1))
    return _close(torch.logsumexp(torch.stack(parts), 0), mean.dtype, log)


LINKS = {
    "plugin": plugin,
    "pairwise": pairwise,
    "probit_centred": probit_centred,
    "probit": probit,
    "laplace_bridge": laplace_bridge,
    "monte_carlo": monte_carlo,
}
"""The links by the names that ``predict(link=...)`` takes."""


def _open(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    if mean.shape[-1] == 1:
        raise ShapeError(
            "Links of several classes need ``... x m`` logits with m > 1, but mean has "
            f"shape {tuple(mean.shape)}. For one output try probabilities(likelihood, "
            "mean, covariance, link=...)."
        )
    check_moments(mean, covariance)
    return mean.double(), covariance.double()


def _close(logits: Tensor, dtype: torch.dtype, log: bool) -> Tensor:
    logs = torch.log_softmax(logits, -1)
    return (logs if log else logs.exp()).to(dtype)


def check_moments(mean: Tensor, covariance: Tensor) -> None:
    """Require one covariance matrix for each point."""
    m = mean.shape[-1]
    if covariance.shape[-2:] != (m, m):
        raise ShapeError(
            f"covariance must be ``... x {m} x {m}``, one matrix for each point, but "
            f"has shape {tuple(covariance.shape)} beside a mean of shape "
            f"{tuple(mean.shape)}."
        )


def _shrinkage(variance: Tensor) -> Tensor:
    # The logistic function is close to Phi with its argument scaled by sqrt(pi / 8).
    return (1 + math.pi / 8 * variance.clamp_min(0)).rsqrt()


def _centre(f: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    S = S - S.mean(-1, keepdim=True)
    return f - f.mean(-1, keepdim=True), S - S.mean(-2, keepdim=True)


def _mean_variance(S: Tensor) -> Tensor:
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return mean.clamp_min(torch.finfo(S.dtype).tiny ** 0.5)


def _jittered_root(S: Tensor) -> Tensor:
    scaled = _mean_variance(S) * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    jitter = torch.full_like(S[..., :1, :1], JITTERS[0])
    for larger in (*JITTERS[1:], None):
        root, info = torch.linalg.cholesky_ex(S + jitter * scaled)
        failed = (info > 0)[..., None, None]
        if not failed.any():
            return root
        if larger is not None:
            warn_user(
                f"The covariance of {int(failed.sum())} points needs a jitter of "
                f"{larger} of its mean diagonal for Monte Carlo.",
                NumericalWarning,
            )
            jitter = torch.where(failed, larger, jitter)
    raise NotPSDError(
        f"The covariance of {int(failed.sum())} points is indefinite, or not finite, "
        f"beyond a jitter of {JITTERS[-1]} of its mean diagonal. Try a float64 model, "
        'or link="pairwise", which needs no factor.'
    )
