r"""Elliptical slice sampling: Markov chains under a Gaussian prior, without gradients.

In: a log likelihood that evaluates all chains in one call. Out: their draws. Next:
``subspace_inference`` runs it over the coordinates of a subspace of weights.

References:
    Murray, Adams, MacKay, Elliptical slice sampling, AISTATS 2010, figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_finite,
    check_floating,
    check_positive,
    check_tensor,
    warn_user,
)
from gpbridge.randomness import fresh, standard_normal

LogLikelihood = Callable[[Tensor], Tensor]
"""From one state per chain, ``c x r``, to ``c`` log likelihoods; row by row."""


class SliceSamples(NamedTuple):
    """Draws of all chains, and what they cost.

    ``samples`` is ``chains x s x r``, ``log_likelihoods`` ``chains x s`` in float64.
    ``num_calls`` counts calls of the log likelihood, ``num_stuck`` steps in which a
    chain found no point on its slice and stayed where it was.
    """

    samples: Tensor
    log_likelihoods: Tensor
    num_calls: int
    num_stuck: int


@torch.no_grad()
def elliptical_slice_sampling(
    log_likelihood: LogLikelihood,
    initial: Tensor,
    prior_std: float | Tensor = 1.0,
    num_samples: int = 100,
    *,
    burn_in: int = 0,
    thinning: int = 1,
    max_shrinks: int = 200,
    generator: Generator | None = None,
    progress: bool = True,
) -> SliceSamples:
    r"""Sample :math:`p(z) \propto \mathcal L(z)\, N(z \mid 0, \sigma^2 I)`.

    A step draws a point :math:`\nu` of the prior and a height below
    :math:`\mathcal L(z)`, and tries points
    :math:`z \cos\theta + \nu \sin\theta` of the ellipse through both, from a bracket of
    angles that shrinks towards z, until one is above the height. There is no step size,
    and every step moves. The law of the chains is exact for any likelihood.

    All chains share each call, also those that are done with their step, so that a call
    always has one row per chain: rows may have targets of their own. A step needs about
    2 calls for likelihoods that say little and 5 to 20 for those that say much; the
    slowest chain decides. NaN and infinite log likelihoods count as rejections.

    To go on, start at ``samples[:, -1]`` without burn-in and with the same generator:
    the draws are those of one long run.

    Args:
        log_likelihood: Without the prior; ``c x r`` to ``c``, in nats.
        initial: One state per chain, ``c x r``.
        prior_std: :math:`\sigma`, one number or ``r``.
        num_samples: Draws to keep, of each chain.
        burn_in: Steps before the first.
        thinning: Steps per draw.
        max_shrinks: Most calls in a step. The bracket then has length zero in floating
            point, unless the log likelihood changes from call to call.
        generator: Source of randomness.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The draws.

    Raises:
        ShapeError: If the states are not a matrix, or the log likelihoods not one per
            chain.
        ValueError: If a chain starts where the log likelihood is not finite, or a
            number is not positive.
        RuntimeError: If all chains are stuck in the same step.

    Warns:
        UserWarning: If some chain was stuck in some step.

    Example:
        >>> def log_likelihood(z):  # of a datum 1 with unit noise
        ...     return -0.5 * (1 - z[:, 0]).square()
        >>> run = elliptical_slice_sampling(
        ...     log_likelihood, torch.zeros(4, 1), num_samples=500,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> run.samples.shape  # of N(1/2, 1/2)
        torch.Size([4, 500, 1])
        >>> bool((run.samples.mean() - 0.5).abs() < 0.1)
        True
    """
    check_tensor(initial=initial)
    if initial.dim() != 2:
        raise ShapeError(
            "initial must be one state per chain, ``c x r``, but has shape "
            f"{tuple(initial.shape)}. For one chain pass initial[None]."
        )
    check_floating(initial=initial)
    check_finite(initial=initial)
    check_positive(prior_std=prior_std)
    check_count(num_samples=num_samples, thinning=thinning, max_shrinks=max_shrinks)
    check_burn_in(burn_in)
    generator = fresh(generator, initial.device)
    z = initial.detach().clone()
    prior_std = torch.as_tensor(prior_std).to(z)
    level = start_level(log_likelihood, z)
    samples, levels = [], []
    num_calls, num_stuck = 1, 0
    bar = tqdm(
        range(burn_in + thinning * num_samples),
        desc="elliptical slice sampling",
        leave=False,
        disable=None if progress else True,
    )
    for step in bar:
        nu = prior_std * standard_normal(z.shape, generator, z)
        height = level + _uniform(level, generator).log()
        theta = 2 * math.pi * _uniform(level, generator)
        low, high = theta - 2 * math.pi, theta
        waiting = torch.ones_like(level, dtype=torch.bool)
        start = z
        for _ in range(max_shrinks):
            angle = theta.to(z)[:, None]
            proposal = start * angle.cos() + nu * angle.sin()
            value = _evaluate(log_likelihood, proposal)
            num_calls += 1
            # NaN is above nothing; plus infinity is above everything.
            taken = waiting & (value > height) & torch.isfinite(value)
            z = torch.where(taken[:, None], proposal, z)
            level = torch.where(taken, value, level)
            waiting = waiting & ~taken
            if not bool(waiting.any()):
                break
            high = torch.where(theta > 0, theta, high)
            low = torch.where(theta > 0, low, theta)
            theta = low + (high - low) * _uniform(level, generator)
        else:
            stuck = int(waiting.sum())
            num_stuck += stuck
            if stuck == len(z):
                raise RuntimeError(
                    f"All {stuck} chains found no point on their slice in "
                    f"{max_shrinks} calls of the log likelihood, in step {step}. Does "
                    "it return the same value for the same state (no dropout, no "
                    "minibatches drawn anew), in double precision where it is large? "
                    "If so, raise max_shrinks."
                )
        if step >= burn_in and (step - burn_in + 1) % thinning == 0:
            samples.append(z)
            levels.append(level)
    if num_stuck:
        warn_user(
            f"In {num_stuck} of {len(z) * (step + 1)} steps a chain found no point on "
            f"its slice in {max_shrinks} calls and stayed where it was. Raise "
            "max_shrinks, or sum the log likelihood in double precision."
        )
    return SliceSamples(
        torch.stack(samples, 1), torch.stack(levels, 1), num_calls, num_stuck
    )


def start_level(log_likelihood: LogLikelihood, initial: Tensor) -> Tensor:
    """Log likelihoods ``c`` at the start, float64, which must be finite."""
    level = _evaluate(log_likelihood, initial)
    if not bool(torch.isfinite(level).all()):
        bad = torch.nonzero(~torch.isfinite(level)).flatten()
        raise ValueError(
            f"The log likelihood is not finite at the start of {len(bad)} of "
            f"{len(level)} chains, as {level[bad[0]].item()} in chain {int(bad[0])}. "
            "Start elsewhere, as at zeros."
        )
    return level


def check_burn_in(burn_in: int) -> None:
    """Require a whole number, zero or above."""
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(
            f"burn_in must be a whole number of steps, zero or above, but is "
            f"{burn_in!r}."
        )


def _evaluate(log_likelihood: LogLikelihood, z: Tensor) -> Tensor:
    value = log_likelihood(z)
    check_tensor(log_likelihood=value)
    if tuple(value.shape) != (len(z),):
        raise ShapeError(
            f"log_likelihood must return one value per chain, ``{len(z)}``, but "
            f"returned shape {tuple(value.shape)}. Sum over data, not over chains."
        )
    return value.double()


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    """In (0, 1], so that its log is finite."""
    draws = torch.rand(
        like.shape, generator=generator, dtype=like.dtype, device=generator.device
    )
    return (1 - draws).to(like.device)
