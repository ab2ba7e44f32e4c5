r"""Hamiltonian Monte Carlo of a few coordinates, all chains in one call.

In: a log density with its gradient. Out: draws of all chains. Next:
``subspace_inference`` runs it over the coordinates of a subspace of weights.

References:
    Neal, MCMC using Hamiltonian dynamics, 2011, section 3 (the sampler). Hoffman,
    Gelman, The no-U-turn sampler, JMLR 2014, section 3.2, algorithm 5 (the step size).
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
    check_share,
    check_tensor,
    warn_user,
)
from gpbridge.randomness import fresh, standard_normal

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From one state per chain, ``c x r``, to log densities ``c`` and gradients."""

_FEW = 0.1  # accepted, below which draws should not be trusted


class HamiltonianSamples(NamedTuple):
    """Draws of all chains, and what they cost.

    ``samples`` is ``chains x s x r``, ``log_densities`` ``chains x s`` in float64.
    ``num_calls`` counts gradients, ``acceptance`` is the mean probability to accept
    after the warm-up, at the step size ``step_size`` in units of ``scale``, ``r``.
    """

    samples: Tensor
    log_densities: Tensor
    num_calls: int
    acceptance: float
    step_size: float
    scale: Tensor


@torch.no_grad()
def hamiltonian_monte_carlo(
    value_and_gradient: ValueAndGradient,
    initial: Tensor,
    num_samples: int = 100,
    *,
    warm_up: int = 100,
    num_steps: int = 10,
    step_size: float = 0.1,
    scale: float | Tensor = 1.0,
    target_acceptance: float = 0.8,
    generator: Generator | None = None,
    progress: bool = True,
) -> HamiltonianSamples:
    r"""Sample a density by trajectories of its Hamiltonian.

    A step draws momenta, follows the leapfrog integrator for ``num_steps`` gradients
    with a step size drawn within 20% of its own (a trajectory of fixed length can be
    periodic) and accepts by the change of energy. One gradient is the Metropolis
    adjusted Langevin algorithm. During the warm-up the step size goes to where the
    target share is accepted, on average over chains, and after an eighth, a quarter
    and a half of it the scales of the coordinates become the standard deviations that
    were seen, over all chains.

    Args:
        value_and_gradient: Log density up to a constant and gradient, of all chains.
        initial: One state per chain, ``c x r``.
        num_samples: Draws to keep, of each chain.
        warm_up: Steps before the first, in which step size and scales are learned; 0
            keeps those given.
        num_steps: Gradients per draw.
        step_size: At the start, in units of the scale.
        scale: Standard deviations of the coordinates, roughly, one number or ``r``.
        target_acceptance: Share to accept; NaN and infinities are rejected.
        generator: Source of randomness.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The draws.

    Raises:
        ShapeError: If the states are not a matrix.
        ValueError: If the density is not finite at the start, or a number is out of
            range.

    Warns:
        UserWarning: If fewer than a tenth of the steps are accepted.

    Example:
        >>> run = hamiltonian_monte_carlo(
        ...     lambda z: (-0.5 * z.square().sum(-1), -z), torch.zeros(4, 2), 200,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> bool((run.samples.var() - 1).abs() < 0.2)
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
    check_count(num_samples=num_samples, num_steps=num_steps)
    if warm_up:
        check_count(warm_up=warm_up)
    check_positive(step_size=step_size, scale=scale)
    check_share(target_acceptance=target_acceptance)
    generator = fresh(generator, initial.device)
    z = initial.detach().clone()
    scale = torch.as_tensor(scale).to(z).expand(z.shape[-1])
    value, gradient = value_and_gradient(z)
    if not bool((torch.isfinite(value) & torch.isfinite(gradient).all(-1)).all()):
        raise ValueError(
            "The log density or its gradient is not finite at the start of some chain: "
            f"values {value.tolist()[:8]}. Start elsewhere, as at zeros."
        )
    adaptation = _StepSize(step_size, target_acceptance)
    seen, samples, values, accepted = [], [], [], []
    bar = tqdm(
        range(warm_up + num_samples),
        desc="Hamiltonian Monte Carlo",
        leave=False,
        disable=None if progress else True,
    )
    for step in bar:
        jitter = 0.8 + 0.4 * float(
            torch.rand((), generator=generator, device=generator.device)
        )
        epsilon = jitter * adaptation.size * scale
        momentum = standard_normal(z.shape, generator, z)
        energy = 0.5 * momentum.square().sum(-1).double() - value.double()
        at, new_value, new_gradient = z, value, gradient
        for _ in range(num_steps):
            momentum = momentum + 0.5 * epsilon * new_gradient
            at = at + epsilon * momentum
            new_value, new_gradient = value_and_gradient(at)
            momentum = momentum + 0.5 * epsilon * new_gradient
        new_energy = 0.5 * momentum.square().sum(-1).double() - new_value.double()
        # NaN has probability zero; so has minus infinity, which has no gradient.
        usable = torch.isfinite(new_energy) & torch.isfinite(new_gradient).all(-1)
        chance = (energy - new_energy).clamp_max(0).exp()
        chance = torch.where(usable, chance, torch.zeros_like(chance))
        draws = torch.rand(
            chance.shape,
            generator=generator,
            dtype=chance.dtype,
            device=generator.device,
        ).to(chance.device)
        taken = draws < chance
        z = torch.where(taken[:, None], at, z)
        gradient = torch.where(taken[:, None], new_gradient, gradient)
        value = torch.where(taken, new_value, value)
        if step < warm_up:
            adaptation.learn(float(chance.mean()))
            seen.append(z)
            if step + 1 in (warm_up // 8, warm_up // 4, warm_up // 2) and step > 8:
                scale, seen = _spread(seen, scale), []
                adaptation = _StepSize(step_size, target_acceptance)
            if step + 1 == warm_up:
                adaptation.finish()
        else:
            samples.append(z)
            values.append(value.double())
            accepted.append(chance.mean())
    acceptance = float(torch.stack(accepted).mean())
    if acceptance < _FEW:
        warn_user(
            f"Only {acceptance:.1%} of the steps were accepted, at a step size of "
            f"{adaptation.size:.3g}. Raise warm_up, or lower step_size."
        )
    num_calls = 1 + num_steps * (warm_up + num_samples)
    return HamiltonianSamples(
        *(torch.stack(samples, 1), torch.stack(values, 1), num_calls),
        *(acceptance, adaptation.size, scale),
    )


class _StepSize:
    """Dual averaging of the log step size towards a share of accepted steps."""

    def __init__(self, size: float, target: float) -> None:
        self.size, self.target = size, target
        self.centre = math.log(10 * self.size)  # shrinks towards it: large steps
        self.steps, self.excess, self.average = 0, 0.0, math.log(self.size)

    def learn(self, chance: float) -> None:
        self.steps += 1
        t, gamma, delay, decay = self.steps, 0.05, 10, 0.75  # of the paper
        share = 1 / (t + delay)
        self.excess += share * (self.target - chance - self.excess)
        log_size = self.centre - t**0.5 / gamma * self.excess
        weight = t**-decay
        self.average += weight * (log_size - self.average)
        self.size = math.exp(min(log_size, 5.0))

    def finish(self) -> None:
        self.size = math.exp(self.average)


def _spread(seen: list[Tensor], scale: Tensor) -> Tensor:
    """Standard deviations of the later half of what was seen, over all chains."""
    states = torch.cat(seen[len(seen) // 2 :])
    n, std = len(states), states.std(0)
    # Few states say little: on the log scale, five count for what was there before.
    mixed = (n * std.log() + 5 * scale.log()) / (n + 5)
    # A coordinate that hardly moved says nothing.
    return torch.where(std > 1e-6 * scale, mixed.exp(), scale)
