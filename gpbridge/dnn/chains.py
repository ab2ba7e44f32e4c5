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

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Generator, Tensor, nn
from torch.func import vmap
from tqdm import tqdm

from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_length,
    check_tensor,
    warn_user,
)
from gpbridge.dnn.cyclical import first_sampling_step, kept_steps
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.run_key import checksum, difference, structure
from gpbridge.dnn.schedules import cyclical_factor
from gpbridge.dnn.sgmcmc import SGHMC
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.likelihoods import is_gaussian
from gpbridge.targets import check_targets, default_likelihood
from gpbridge.weights import EmpiricalWeights

_CHECK_EVERY = 50  # steps between looks at the losses, which wait for the device


class Spread(NamedTuple):
    """Root mean square over weights of standard deviations of samples.

    ``within`` the samples of one chain in one cycle, and ``between`` the means of
    those; None where there is only one.
    """

    within: float | None
    between: float | None


class SGMCMC(nn.Module):
    r"""Markov chains over the weights of a network that stochastic gradients drive.

    Their law for small rates is :math:`p(D \mid w)^{1/T} p(w)`, with the noise of a
    Gaussian likelihood as it is. The sampler sees the loss per datum

    .. math::
        - \frac1b \sum_{i \in B} \log p(y_i \mid f(x_i, w)) - \frac{T}{N} \log p(w)

    at temperature T, so that one rate serves all T. Minibatches add noise of their own,
    which widens the law by a share of the order of the rate; all rows in a batch do
    not. The network is in eval mode: no dropout, batch-norm statistics as they are.

    Memory is that of ``(num_cycles samples_per_cycle + 3) num_chains`` weight vectors.

    Args:
        network: Its weights are the first state of every chain. Copied, never changed.
        train_X: Inputs, ``n x d``, or images in the layout of the network.
        train_Y: Targets as for :func:`gpbridge.dnn.fit_map`.
        likelihood: Default: the choice of :func:`gpbridge.targets.default_likelihood`.
            Set its noise; it is not sampled.
        sampler: Builds the optimizer from (parameters, lr=, num_data=, temperature=,
            generator=): :class:`~gpbridge.dnn.SGHMC`, :class:`~gpbridge.dnn.SGLD`, or
            one of them with options, ``functools.partial(SGHMC, alpha=0.05)``.
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
        sampler: Callable[..., torch.optim.Optimizer] = SGHMC,
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
        super().__init__()
        check_count(
            num_cycles=num_cycles,
            steps_per_cycle=steps_per_cycle,
            samples_per_cycle=samples_per_cycle,
            num_chains=num_chains,
            batch_size=batch_size,
        )
        if learning_rate is not None:
            check_positive(learning_rate=learning_rate)
        self.kept_steps = kept_steps(
            steps_per_cycle, samples_per_cycle, sampling_fraction
        )
        self.first_sampling_step = first_sampling_step(
            steps_per_cycle, sampling_fraction
        )
        check_inputs(train_X)
        check_tensor(train_Y=train_Y)
        check_not_empty(train_X=train_X)
        check_same_length(train_X=train_X, train_Y=train_Y)
        check_finite(train_Y=train_Y)
        if train_X.dim() > 2:
            input_shape = train_X.shape[1:] if input_shape is None else input_shape
            train_X = train_X.flatten(1)
        self.net = net = FunctionalNet(network, parameters, input_shape)
        num_outputs, n = net.probe(train_X), len(train_X)
        if likelihood is None:
            likelihood = default_likelihood(train_Y, num_outputs, train_X.dtype)
        Y = check_targets(likelihood, train_Y, num_outputs, n, train_X.dtype)
        self.log_posterior = LogPosterior(
            net, likelihood, n, prior, likelihood_temperature, "mean"
        )
        self.data = [train_X.detach(), Y.detach()]
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            self.data.append(likelihood.noise_covar.noise.detach())
        self._usual = _usual_rate(likelihood)
        learning_rate = self._usual if learning_rate is None else learning_rate
        self.learning_rate, self.cyclical = learning_rate, cyclical
        self.num_cycles, self.steps_per_cycle = num_cycles, steps_per_cycle
        self.batch_size, self.step = min(batch_size, n), 0
        first = _first_weights(net, num_chains, initial_weights).to(train_X)
        self.weights = nn.Parameter(first)
        kept = num_cycles * samples_per_cycle
        self.register_buffer("samples", first.new_zeros(kept, *first.shape))
        self.register_buffer("losses", first.new_zeros(self.num_steps, num_chains))
        if generator is None:
            generator = Generator(device=train_X.device).manual_seed(0)
        self.generator = generator
        try:
            self.optimizer = sampler(
                [self.weights],
                lr=learning_rate,
                num_data=n,
                temperature=likelihood_temperature,
                generator=generator,
            )
        except TypeError as error:
            raise TypeError(
                "sampler must build an optimizer from (parameters, lr=, num_data=, "
                f"temperature=, generator=), but {sampler!r} does not ({error}). Pass "
                "SGHMC, SGLD, or functools.partial(SGHMC, alpha=0.05)."
            ) from error

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_cycles * self.steps_per_cycle

    @property
    def num_samples(self) -> int:
        """Samples that each chain has kept so far."""
        cycles, position = divmod(self.step, self.steps_per_cycle)
        done = sum(step < position for step in self.kept_steps)
        return cycles * len(self.kept_steps) + done

    @property
    def history(self) -> Tensor:
        """The loss per datum of every step so far, ``steps x chains``, prior included.

        Each is that of a batch, before the step.
        """
        return self.losses[: self.step]

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
                good = self.weights.detach().clone(), self._progress()
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
        losses = self._batch_losses()
        (self.weights.grad,) = torch.autograd.grad(losses.sum(), self.weights)
        self.optimizer.step()
        self.losses[self.step] = losses.detach()
        if position in self.kept_steps:
            self.samples[self.num_samples] = self.weights.detach()
        self.step += 1

    def _batch_losses(self) -> Tensor:
        """The loss of each chain on a batch of its own, ``chains``."""
        n, batch, dim = len(self.data[0]), self.data, None
        if self.batch_size < n:
            shape = len(self.weights), self.batch_size
            rows = torch.randint(
                n, shape, generator=self.generator, device=self.generator.device
            ).to(batch[0].device)
            batch, dim = [tensor[rows] for tensor in batch], 0
        if self.net.vectorized:
            dims = (0, *[dim] * len(batch))
            return vmap(self._loss, dims)(self.weights, *batch)
        each = [
            self._loss(own, *(t if dim is None else t[chain] for t in batch))
            for chain, own in enumerate(self.weights)
        ]
        return torch.stack(each)

    def _loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        value = self.log_posterior(self.net.unflatten(weights), *batch)
        return -self.log_posterior.likelihood_temperature * value

    def _check(self, steps: int, good: tuple[Tensor, dict[str, Any]]) -> None:
        seen = self.losses[self.step - steps : self.step]
        if bool(seen.isfinite().all() & self.weights.isfinite().all()):
            return
        end = self.step
        with torch.no_grad():
            self.weights.copy_(good[0])
        self._go_to(good[1])
        raise DivergedError(
            f"A loss or a weight became NaN or infinite between steps {self.step} and "
            f"{end}. The chains are back at step {self.step}, with {self.num_samples} "
            "samples each; they are .last_good of this error. Try "
            f"{rate_advice(self.learning_rate, self._usual)}: set it on them and call "
            "run(), or begin anew. It scales as the noise variance of a Gaussian "
            "likelihood; standardise inputs and targets.",
            self,
        )

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """The step, and the state of the optimizer with its generator."""
        return self._progress() | {"run": self._key()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put step and optimizer where they were."""
        self._go_to(state)

    def _key(self) -> dict[str, Any]:
        """What a continued run must have in common with the one before."""
        learnt = set(self.net.names)
        return {
            "network": structure(self.net.network, learnt),
            "data": [checksum(part) for part in self.data],
            "batch size": self.batch_size,
            "number of chains": len(self.weights),
            "steps of a cycle": self.steps_per_cycle,
            "kept steps": sorted(self.kept_steps),
            "first sampling step": self.first_sampling_step,
            "change of the rate": self.cyclical,
            "likelihood": type(self.log_posterior.likelihood).__name__,
            "temperature": self.log_posterior.likelihood_temperature,
            "sampler": type(self.optimizer).__name__,
        }

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            for name, now in self._key().items():
                before = state["run"].get(name)
                if before != now:
                    raise ValueError(
                        f"The state is of another run: {difference(name, before, now)}."
                        " Build the chains with the same arguments."
                    )
            if state["step"] > self.num_steps:
                raise ValueError(
                    f"The state has {state['step']} steps, but these chains make "
                    f"{self.num_steps}. Build them with num_cycles="
                    f"{-(-state['step'] // self.steps_per_cycle)} or more."
                )
            state_dict = dict(state_dict)
            for name in ("samples", "losses"):  # of more cycles, or fewer
                own, given = getattr(self, name), state_dict.get(prefix + name)
                if given is not None and len(given) != len(own):
                    value, count = torch.zeros_like(own), min(len(own), len(given))
                    value[:count] = given[:count]
                    state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _go_to(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    @property
    def spread(self) -> Spread:
        """How far the samples so far lie from each other."""
        per_cycle = len(self.kept_steps)
        cycles = self.samples[: self.num_samples].double().split(per_cycle)
        means = torch.cat([own.mean(0) for own in cycles]) if cycles else []
        within = [own.var(0).mean() for own in cycles if len(own) > 1]
        return Spread(
            float(torch.stack(within).mean().sqrt()) if within else None,
            float(means.var(0).mean().sqrt()) if len(means) > 1 else None,
        )

    def posterior(self) -> EmpiricalWeights:
        """The samples so far, of all chains, in the order of the steps.

        Returns:
            The samples as equally likely weights.

        Raises:
            RuntimeError: If there is none yet.

        Warns:
            ReliabilityWarning: If they differ by no more than rounding.
        """
        if not self.num_samples:
            raise RuntimeError(
                f"The chains have kept no sample after {self.step} of "
                f"{self.num_steps} steps: the first comes after "
                f"{self.kept_steps[0] + 1}. Call run()."
            )
        weights = self.samples[: self.num_samples].flatten(0, 1)
        found = self.spread
        size = found.between if found.within is None else found.within
        rounding = 4 * torch.finfo(weights.dtype).eps * weights.square().mean().sqrt()
        if size is not None and size <= rounding:
            warn_user(
                f"The samples differ by {size:.2g}, which is rounding: they are one "
                "point. Raise the temperature or learning_rate, sample for longer, or "
                "use float64.",
                ReliabilityWarning,
            )
        return EmpiricalWeights(self.net, weights)


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


def _usual_rate(likelihood: Likelihood) -> float:
    """In units of the noise, to which curvatures are inverse, where it is small."""
    noise = getattr(likelihood, "noise", None) if is_gaussian(likelihood) else None
    return 0.01 if noise is None else 0.01 * min(1.0, float(noise.detach().min()))


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
