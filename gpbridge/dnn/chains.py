r"""Chains of weights by stochastic gradients, from a network and data to a posterior.

All chains are one tensor, ``chains x p``, and every step evaluates them in one
vectorised pass. A run can be stopped, saved and resumed bit for bit.

In: a network, data, a sampler. Out: :class:`~gpbridge.weights.EmpiricalWeights`. Next:
its draws, with batch-norm statistics of their own (``gpbridge.batch_norm``).

References:
    Zhang, Li, Zhang, Chen and Wilson, Cyclical stochastic gradient MCMC for Bayesian
    deep learning, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_count,
    check_finite,
    check_positive,
    check_tensor,
    warn_user,
)
from gpbridge.dnn.chain_losses import ChainLosses
from gpbridge.dnn.chain_state import ChainState
from gpbridge.dnn.cyclical import first_sampling_step, kept_steps
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.schedules import cyclical_factor
from gpbridge.dnn.sgmcmc import SGHMC
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.weights import EmpiricalWeights

_FAR_UP = 10.0  # times the usual rise of the loss
_CHECK_EVERY = 50  # steps between looks at the losses, which wait for the device


class SGMCMC(ChainState):
    r"""Markov chains over the weights of a network that stochastic gradients drive.

    Their law for small rates is :math:`p(D \mid w)^{1/T} p(w)`, with the noise of a
    Gaussian likelihood as it is. The sampler sees the loss per datum

    .. math::
        - \frac1b \sum_{i \in B} \log p(y_i \mid f(x_i, w)) - \frac{T}{N} \log p(w)

    at temperature T, so that one rate serves all T. Minibatches add noise of their own,
    which widens the law by a share of the order of the rate; all rows in a batch do
    not. The network is in eval mode: no dropout, batch-norm statistics as they are.

    Memory is that of ``(num_cycles samples_per_cycle + 3) num_chains`` weight vectors.

    ``.to`` moves data, weights, samples and momenta. Batches and noise are drawn where
    the generator is and moved from there: the run goes on with the same numbers.

    Args:
        network: Its weights are the first state of every chain. Copied, never changed.
        train_X: Inputs, ``n x d``, or images in the layout of the network.
        train_Y: Targets as for :func:`gpbridge.dnn.fit_map`.
        likelihood: Default: the choice of :func:`gpbridge.targets.default_likelihood`.
            Set its noise; it is not sampled.
        sampler: Builds the optimizer from (parameters, lr=, num_data=, temperature=,
            generator=): :class:`~gpbridge.dnn.SGHMC`, :class:`~gpbridge.dnn.SGLD`, or
            one of them with options, ``functools.partial(SGHMC, friction=0.05)``.
        learning_rate: The first rate of a cycle, on the loss per datum; it must be
            below about one over the largest curvature, which for Gaussian noise grows
            as one over its variance. None is 0.01, for Gaussian noise of a variance
            below one times that variance, the smallest of several.
        num_cycles: Cycles of the rate.
        steps_per_cycle: Steps of each.
        samples_per_cycle: Samples that each chain keeps in a cycle, evenly spread over
            its sampling part, the last step included.
        sampling_fraction: The share of a cycle that samples.
        cyclical: False keeps the rate constant and the noise always on.
        num_chains: Chains that run side by side.
        batch_size: Rows per step, drawn with replacement for each chain; all rows if
            there are no more.
        prior: A density of named weights; default independent standard normals.
        likelihood_temperature: T.
        parameters: Which weights are random, as in
            :class:`~gpbridge.functional.FunctionalNet`.
        initial_weights: First states, ``num_chains x p``, in place of the network's.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
        generator: Source of batches and noise, on the device of the data; None is a
            fresh one with seed 0.

    Raises:
        ValueError: If an option is out of range.
        ShapeError: If shapes disagree.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> chains = SGMCMC(nn.Linear(1, 1), X, 2 * X, num_chains=3, num_cycles=2)
        >>> chains.run(50).step  # and chains.run() goes on to the end
        50
    """

    def __init__(
        self,
        network: nn.Module,
        train_X: Tensor,
        train_Y: Tensor,
        likelihood: Likelihood | None = None,
        *,
        sampler: Callable[..., Optimizer] = SGHMC,
        learning_rate: float | None = None,
        num_cycles: int = 4,
        steps_per_cycle: int = 1000,
        samples_per_cycle: int = 5,
        sampling_fraction: float = 0.2,
        cyclical: bool = True,
        num_chains: int = 1,
        batch_size: int = 100,
        prior: nn.Module | None = None,
        likelihood_temperature: float = 1.0,
        parameters: Parameters = "all",
        initial_weights: Tensor | None = None,
        input_shape: Sequence[int] | None = None,
        generator: Generator | None = None,
    ) -> None:
        check_count(
            num_cycles=num_cycles,
            steps_per_cycle=steps_per_cycle,
            samples_per_cycle=samples_per_cycle,
            num_chains=num_chains,
        )
        if learning_rate is not None:
            check_positive(learning_rate=learning_rate)
        kept = kept_steps(steps_per_cycle, samples_per_cycle, sampling_fraction)
        loss = ChainLosses(
            network,
            train_X,
            train_Y,
            likelihood,
            batch_size=batch_size,
            prior=prior,
            likelihood_temperature=likelihood_temperature,
            parameters=parameters,
            input_shape=input_shape,
        )
        rate = loss.usual_rate() if learning_rate is None else learning_rate
        first = _first_weights(loss.net, num_chains, initial_weights).to(train_X)
        if generator is None:
            generator = Generator(device=train_X.device).manual_seed(0)
        options = {
            "lr": rate,
            "num_data": len(train_X),
            "temperature": likelihood_temperature,
            "generator": generator,
        }
        build = partial(_build, sampler, options)
        super().__init__(first, build, num_cycles, steps_per_cycle, kept)
        self.loss, self.learning_rate, self.cyclical = loss, rate, cyclical
        self.first_sampling_step = first_sampling_step(
            steps_per_cycle, sampling_fraction
        )
        self.generator = generator

    @property
    def net(self) -> FunctionalNet:
        """The network as a function of its random weights."""
        return self.loss.net

    def run(self, num_steps: int | None = None, progress: bool = True) -> SGMCMC:
        """Make steps.

        Args:
            num_steps: How many; default those that are left.
            progress: Whether to show a bar, if there is a terminal.

        Returns:
            This object.

        Raises:
            DivergedError: If a loss or a weight is not finite. The run, its
                ``last_good``, is then where it was at the last check before, and keeps
                its samples; give it another ``learning_rate`` and go on, or begin anew.
            RuntimeError: If steps are asked for and none is left.
        """
        left = self.num_steps - self.step
        if num_steps is not None and not left:
            raise RuntimeError(
                f"All {self.num_steps} steps are made. To go on, build the same chains "
                f"with num_cycles={2 * self.num_cycles}, say, give them the "
                "state_dict() of these, and run()."
            )
        if num_steps is not None:
            check_count(num_steps=num_steps)
            left = min(left, num_steps)
        bar = tqdm(
            total=left, desc="SGMCMC", leave=False, disable=None if progress else True
        )
        with bar:
            while left:
                steps = min(left, _CHECK_EVERY)
                good = self.weights.detach().clone(), self.progress()
                for _ in range(steps):
                    self._make_step()
                self._check(steps, good)
                left -= steps
                bar.update(steps)
        return self

    def _make_step(self) -> None:
        position = self.step % self.steps_per_cycle
        for group in self.optimizer.param_groups:
            factor, noise = 1.0, True
            if self.cyclical:
                factor = cyclical_factor(self.steps_per_cycle)(position)
                noise = position >= self.first_sampling_step
            group["lr"], group["noise"] = factor * self.learning_rate, noise
        losses = self.loss(self.weights, self.generator)
        (self.weights.grad,) = torch.autograd.grad(losses.sum(), self.weights)
        self.optimizer.step()
        self.losses[self.step] = losses.detach()
        if position in self.kept_steps:
            self.samples[self.num_samples] = self.weights.detach()
        self.step += 1

    def _check(self, steps: int, good: tuple[Tensor, dict[str, Any]]) -> None:
        seen = self.losses[self.step - steps : self.step]
        if bool(seen.isfinite().all() & self.weights.isfinite().all()):
            return
        end, usual = self.step, self.loss.usual_rate()
        with torch.no_grad():
            self.weights.copy_(good[0])
        self.go_to(good[1])
        raise DivergedError(
            f"A loss or a weight became NaN or infinite between steps {self.step} and "
            f"{end}. The chains are back at step {self.step}, with {self.num_samples} "
            "samples each; they are .last_good of this error. Try "
            f"{rate_advice(self.learning_rate, usual)}: set it on them and call "
            "run(), or begin anew. It scales as the noise variance of a Gaussian "
            "likelihood; standardise inputs and targets.",
            self,
        )

    def key(self) -> dict[str, Any]:
        """What a continued run must have in common with the one before."""
        own = {
            "first sampling step": self.first_sampling_step,
            "change of the rate": self.cyclical,
        }
        return super().key() | self.loss.key() | own

    def posterior(self) -> EmpiricalWeights:
        """The samples so far, of all chains, in the order of the steps.

        Returns:
            The samples as equally likely weights.

        Raises:
            RuntimeError: If there is none yet.

        Warns:
            ReliabilityWarning: If they differ by no more than rounding, or the loss has
                risen far beyond what a stationary chain would show.
        """  # noqa: DOC502
        found = self.members(self.net)
        self._warn_if_far_up()
        return found

    def _warn_if_far_up(self) -> None:
        """Compare the rise of the loss with that of a Gaussian law around a mode.

        There the loss is p T / 2 nats above its minimum on average.
        """
        edge = max(1, self.step // 4)
        start, end = self.losses[:10].mean(), self.losses[self.step - edge : self.step]
        T = self.loss.log_posterior.likelihood_temperature
        usual = T * self.net.num_params / (2 * len(self.loss.X))
        rise = float(end.mean() - start)
        if rise > _FAR_UP * usual + 1.0:
            warn_user(
                f"The loss of the chains rose by {rise:.3g} nats per datum, where a "
                f"stationary law would rise by about {usual:.2g}: their steps are too "
                f"long. Try {rate_advice(self.learning_rate, self.loss.usual_rate())}.",
                ReliabilityWarning,
            )


def sample_sgmcmc(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> EmpiricalWeights:
    """Run :class:`SGMCMC` to its end.

    Args:
        network: As for :class:`SGMCMC`.
        train_X: As for :class:`SGMCMC`.
        train_Y: As for :class:`SGMCMC`.
        likelihood: As for :class:`SGMCMC`.
        progress: Whether to show a bar, if there is a terminal.
        **options: The other options of :class:`SGMCMC`.

    Returns:
        The samples of all chains.

    Raises:
        DivergedError: If the chains diverge; its ``last_good`` are the chains, with the
            samples that there were before.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> posterior = sample_sgmcmc(nn.Linear(1, 1), X, 2 * X, steps_per_cycle=50)
        >>> posterior.num_members
        20
    """
    chains = SGMCMC(network, train_X, train_Y, likelihood, **options)
    return chains.run(progress=progress).posterior()


def _build(
    sampler: Callable[..., Optimizer],
    options: dict[str, Any],
    parameters: list[nn.Parameter],
) -> Optimizer:
    try:
        return sampler(parameters, **options)
    except TypeError as error:
        raise TypeError(
            "sampler must build an optimizer from (parameters, lr=, num_data=, "
            f"temperature=, generator=), but {sampler!r} does not ({error}). Pass "
            "SGHMC, SGLD, or functools.partial(SGHMC, friction=0.05)."
        ) from error


def _first_weights(
    net: FunctionalNet, num_chains: int, initial_weights: Tensor | None
) -> Tensor:
    if initial_weights is None:
        return net.flatten(net.params).detach().repeat(num_chains, 1)
    check_tensor(initial_weights=initial_weights)
    if tuple(initial_weights.shape) != (num_chains, net.num_params):
        raise ShapeError(
            f"initial_weights must be ``{num_chains} x {net.num_params}``, one row per "
            f"chain, but has shape {tuple(initial_weights.shape)}."
        )
    check_finite(initial_weights=initial_weights)
    return initial_weights.detach().clone()
