r"""Markov chains over weights as a surrogate.

In: observations. Out: a :class:`~gpbridge.surrogates.WeightSpaceModel` of the samples
of chains that stochastic gradients drive from a trained network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from botorch.models.model import Model
from torch.optim import Optimizer

from gpbridge.checks import check_count
from gpbridge.dnn.chains import sample_sgmcmc
from gpbridge.dnn.sgmcmc import SGHMC
from gpbridge.surrogates.recipe import Experiments, Recipe, State
from gpbridge.surrogates.training import judged_noise, train
from gpbridge.surrogates.weight_space import WeightSpaceModel


@dataclass(frozen=True, kw_only=True)
class SGHMCSurrogate(Recipe):
    r"""Samples of stochastic-gradient Hamiltonian Monte Carlo around a trained network.

    See :class:`~gpbridge.dnn.SGMCMC`; the prior of every weight is standard normal, the
    noise that of the residuals of the trained network. An update trains the network
    further and starts new chains there.

    Args:
        num_chains: Side by side.
        steps_per_cycle: Steps of a cycle.
        num_cycles: Cycles of the rate.
        samples_per_cycle: Samples that a chain keeps of each.
        sampler: As for :class:`~gpbridge.dnn.SGMCMC`.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    num_chains: int = 4
    num_cycles: int = 2
    steps_per_cycle: int = 300
    samples_per_cycle: int = 8
    sampler: Callable[..., Optimizer] = SGHMC

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        check_count(num_chains=self.num_chains, num_cycles=self.num_cycles)
        fit = train(self, experiments)
        likelihood = judged_noise(fit)
        posterior = sample_sgmcmc(
            fit.network,
            experiments.Z,
            experiments.targets,
            likelihood,
            sampler=self.sampler,
            num_chains=self.num_chains,
            num_cycles=self.num_cycles,
            steps_per_cycle=self.steps_per_cycle,
            samples_per_cycle=self.samples_per_cycle,
            generator=experiments.generator,
            progress=self.progress,
        )
        model = WeightSpaceModel(
            posterior,
            experiments.X,
            experiments.Y,
            num_samples=posterior.num_members,
            likelihood=likelihood,
            input_transform=experiments.input_transform,
            outcome_transform=experiments.outcome_transform(),
        )
        return model, [fit.network.state_dict()]
