r"""Ways to a posterior over the coordinates of a subspace, as objects with options.

In: the log likelihood of coordinates, a prior width, a start. Out: chains, or a fitted
Gaussian, over weights and over coordinates. Next: ``subspace_inference`` runs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from gpbridge.checks import ShapeError, check_count, check_positive
from gpbridge.dnn.chain_diagnostics import effective_sample_size, split_r_hat
from gpbridge.dnn.hamiltonian import hamiltonian_monte_carlo
from gpbridge.dnn.slice_sampling import elliptical_slice_sampling
from gpbridge.dnn.subspace_likelihood import SubspaceLikelihood
from gpbridge.randomness import standard_normal
from gpbridge.weights import EmpiricalWeights, GaussianWeights


class SubspaceChains(NamedTuple):
    """Draws of a sampler.

    ``posterior`` has all draws as equally likely weights; ``samples`` are their
    coordinates, ``chains x s x r``, and ``log_densities`` the tempered log likelihoods
    of slice sampling, or log posteriors of a gradient sampler, ``chains x s``.
    ``num_calls`` counts passes of all chains over the data. ``r_hat`` and
    ``effective_sample_size`` have one entry per coordinate; None below four draws.
    """

    posterior: EmpiricalWeights
    samples: Tensor
    log_densities: Tensor
    num_calls: int
    r_hat: Tensor | None
    effective_sample_size: Tensor | None

    def __repr__(self) -> str:
        """Numbers of chains, draws and coordinates, and how well they mixed."""
        chains, draws, coordinates = self.samples.shape
        mixed = "" if self.r_hat is None else f", r_hat<={self.r_hat.max().item():.3f}"
        return (
            f"SubspaceChains(chains={chains}, draws={draws}, "
            f"coordinates={coordinates}{mixed})"
        )


class SubspaceGaussian(NamedTuple):
    """A Gaussian in the coordinates, ``z ~ N(mean, root root')``.

    ``posterior`` has it over weights; ``elbo`` is the noisy trace of the bound in nats,
    one entry per step, and ``num_calls`` the number of these.
    """

    posterior: GaussianWeights
    mean: Tensor
    root: Tensor
    elbo: Tensor
    num_calls: int

    def __repr__(self) -> str:
        """The number of coordinates, and the bound at the end."""
        return (
            f"{type(self).__name__}({len(self.mean)} coordinates, {self.num_calls} "
            f"steps, bound {float(self.elbo[-1]):.4g})"
        )


class SubspaceMethod(Protocol):
    """A way to the posterior over coordinates; an object that holds its options."""

    def run(
        self,
        target: SubspaceLikelihood,
        prior_std: float | Tensor,
        initial: Tensor,
        generator: Generator,
        progress: bool,
    ) -> SubspaceChains | SubspaceGaussian:
        """Find it, from ``r`` or ``c x r`` coordinates."""
        ...


@dataclass(frozen=True)
class EllipticalSliceSampling:
    """Chains without gradients and without a step size, exact in the limit.

    See :func:`gpbridge.dnn.slice_sampling.elliptical_slice_sampling`.

    Args:
        num_samples: Draws of each chain.
        num_chains: Chains, which share every call; two or more can disagree.
        burn_in: Steps before the first draw.
        thinning: Steps per draw.
        max_shrinks: Most calls in a step.
    """

    num_samples: int = 30
    num_chains: int = 2
    burn_in: int = 30
    thinning: int = 1
    max_shrinks: int = 200

    def run(
        self,
        target: SubspaceLikelihood,
        prior_std: float | Tensor,
        initial: Tensor,
        generator: Generator,
        progress: bool = True,
    ) -> SubspaceChains:
        """Run the chains."""
        run = elliptical_slice_sampling(
            target,
            _per_chain(initial, self.num_chains),
            prior_std,
            self.num_samples,
            burn_in=self.burn_in,
            thinning=self.thinning,
            max_shrinks=self.max_shrinks,
            generator=generator,
            progress=progress,
        )
        return _chains(target, run.samples, run.log_likelihoods, run.num_calls)


@dataclass(frozen=True)
class HamiltonianMonteCarlo:
    """Chains that follow gradients; ``num_steps=1`` is Metropolis-adjusted Langevin.

    See :func:`gpbridge.dnn.hamiltonian.hamiltonian_monte_carlo`.

    Args:
        num_samples: Draws of each chain.
        num_chains: Chains, which share every call.
        warm_up: Steps in which step size and scales are learned.
        num_steps: Gradients per draw.
        step_size: At the start, in units of the prior's standard deviation.
        target_acceptance: Share of steps to accept.
    """

    num_samples: int = 30
    num_chains: int = 2
    warm_up: int = 100
    num_steps: int = 10
    step_size: float = 0.1
    target_acceptance: float = 0.8

    def run(
        self,
        target: SubspaceLikelihood,
        prior_std: float | Tensor,
        initial: Tensor,
        generator: Generator,
        progress: bool = True,
    ) -> SubspaceChains:
        """Run the chains."""
        std = torch.as_tensor(prior_std).to(initial)

        def log_posterior(z: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = target.value_and_gradient(z)
            prior = -0.5 * (z / std).square().sum(-1)
            return value + prior, gradient - z / std.square()

        run = hamiltonian_monte_carlo(
            log_posterior,
            _per_chain(initial, self.num_chains),
            self.num_samples,
            warm_up=self.warm_up,
            num_steps=self.num_steps,
            step_size=self.step_size,
            scale=std,
            target_acceptance=self.target_acceptance,
            generator=generator,
            progress=progress,
        )
        return _chains(target, run.samples, run.log_densities, run.num_calls)


@dataclass(frozen=True)
class VariationalInference:
    r"""The Gaussian of the highest evidence lower bound, by Adam.

    .. math:: E_q[\ell(z)] - KL(q \,\|\, N(0, \sigma^2 I)), \qquad
        z = \sigma (\mu + L \epsilon)

    with reparameterised draws on all data and the divergence in closed form,
    :math:`\tfrac12 (\|L\|^2 + \|\mu\|^2 - r) - \sum \log L_{ii}`. A diagonal L gives
    variances below those of the posterior where coordinates are correlated.

    Args:
        num_steps: Steps of Adam, with a rate that goes to zero as a cosine.
        learning_rate: At the start, in units of the prior's standard deviation.
        num_draws: Draws per step, in mirrored pairs if even.
        full_covariance: Whether L is a triangle or diagonal.
        initial_std: Of q, in units of the prior's.
    """

    num_steps: int = 300
    learning_rate: float = 0.05
    num_draws: int = 8
    full_covariance: bool = False
    initial_std: float = 0.05

    @torch.no_grad()
    def run(
        self,
        target: SubspaceLikelihood,
        prior_std: float | Tensor,
        initial: Tensor,
        generator: Generator,
        progress: bool = True,
    ) -> SubspaceGaussian:
        """Fit the Gaussian, from the first row of the initial coordinates.

        Raises:
            RuntimeError: If the bound becomes NaN or infinite.
        """
        check_count(num_steps=self.num_steps, num_draws=self.num_draws)
        check_positive(learning_rate=self.learning_rate, initial_std=self.initial_std)
        std = torch.as_tensor(prior_std).to(initial)
        mean = torch.atleast_2d(initial)[0] / std
        r = len(mean)
        # Inverse of softplus, so that the first L is a multiple of the identity.
        raw = torch.tensor(self.initial_std).expm1().log() * torch.eye(r)
        parameters = [mean.clone().requires_grad_(), raw.to(mean).requires_grad_()]
        # A memory of 100 steps, not 1000: the first gradients are the largest.
        optimizer = torch.optim.Adam(parameters, self.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        trace = []
        bar = tqdm(
            range(self.num_steps),
            desc="variational inference",
            leave=False,
            disable=None if progress else True,
        )
        for step in bar:
            half = standard_normal((-(-self.num_draws // 2), r), generator, mean)
            noise = torch.cat([half, -half])[: self.num_draws]
            with torch.enable_grad():
                mean, root = parameters[0], self._root(parameters[1])
                z = std * (mean + noise @ root.mT)
                kl = 0.5 * (root.square().sum() + mean.square().sum() - r)
                kl = kl - root.diagonal().log().sum()
            value, gradient = target.value_and_gradient(z)
            elbo = value.mean() - kl.detach()
            if not bool(torch.isfinite(elbo) & torch.isfinite(gradient).all()):
                raise RuntimeError(
                    f"The bound is {elbo.item()} in step {step}. Lower learning_rate "
                    f"(it is {self.learning_rate}) or prior_std."
                )
            with torch.enable_grad():
                # The likelihood's part through z, whose gradient is known already.
                (kl - (z * gradient).sum() / len(z)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            trace.append(elbo)
        mean = std * parameters[0].detach()
        root = (self._root(parameters[1]) * std[..., None]).detach()
        posterior = target.subspace.gaussian_of(mean, root)
        return SubspaceGaussian(
            posterior, mean, root, torch.stack(trace), self.num_steps
        )

    def _root(self, raw: Tensor) -> Tensor:
        # In units of the diagonal: rows of many entries stay small where it is small.
        root = torch.eye(len(raw)).to(raw)
        if self.full_covariance:
            root = root + raw.tril(-1)
        return (softplus(raw.diagonal()) + 1e-6)[:, None] * root


def _per_chain(initial: Tensor, num_chains: int) -> Tensor:
    check_count(num_chains=num_chains)
    if initial.dim() == 2 and len(initial) != num_chains:
        raise ShapeError(
            f"initial must have one row per chain, but has {len(initial)} rows for "
            f"{num_chains} chains. Pass num_chains={len(initial)} to the method."
        )
    return initial.expand(num_chains, -1)


def _chains(
    target: SubspaceLikelihood, samples: Tensor, values: Tensor, num_calls: int
) -> SubspaceChains:
    enough = samples.shape[1] >= 4
    return SubspaceChains(
        target.subspace.posterior_of(samples),
        samples,
        values,
        num_calls,
        split_r_hat(samples) if enough else None,
        effective_sample_size(samples) if enough else None,
    )
