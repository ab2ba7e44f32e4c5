r"""The state of a training run that learns the invariance of its network.

Weights descend on the loss of the averaged function, with the augmentation held; every
few epochs prior variances and noise ascend the evidence with the curvature held, and
the augmentation's parameters take one step along the gradient through the curvature.

In: a network, an augmentation, batches, options. Out: one more epoch, and a state from
which the next gives the same bits. Next: ``invariance`` runs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from gpbridge.augmentation.averaged import AveragedNetwork
from gpbridge.augmentation.base import natural_name
from gpbridge.dnn.run_key import checksum
from gpbridge.dnn.training import isolated_randomness
from gpbridge.kernels.tangent import Groups
from gpbridge.selection.invariance_curvatures import InvarianceCurvatures
from gpbridge.selection.invariance_timetable import Timetable
from gpbridge.selection.online_evidence import OnlineEvidence
from gpbridge.selection.online_training import NonFiniteError, OnlineTraining
from gpbridge.selection.orbit_curvature import OrbitStructure
from gpbridge.selection.orbit_jacobians import orbits, row_noise
from gpbridge.selection.orbit_likelihood import OrbitData
from gpbridge.selection.training_batches import TrainingBatches
from gpbridge.selection.weight_optimizer import OptimizerFactory
from gpbridge.types import Evidence, Params

ORBITS = ("fixed", "resampled", "per_datum")
_FINAL_DRAWS = 3  # of the orbits, over which the last evidence is averaged


class InvarianceStep(NamedTuple):
    """An update: hyperparameters after it, and the evidence there, in total nats.

    The evidence is of the orbits of before, at the prior and noise of after: the law
    takes its step along the gradient that comes with the same pass over the data.
    Where ``moves_prior``, evidence, fit, complexity and effective dimension are by the
    structure of the prior, else by that of the law: one column of the history holds
    both, and only those of one kind compare.
    """

    epoch: int  # epochs that were trained before
    evidence: float
    fit: float
    complexity: float
    effective_dimension: float
    prior_variance: list[float]  # per group
    noise_variance: list[float] | None  # per output
    augmentation: list[float] | None  # its learnt parameters, in natural units
    block_size: int  # data of a block of the tangent kernel; all where there are none
    moves_prior: bool  # whether prior and noise moved; says whose evidence it is


class InvarianceTraining(OnlineTraining):
    """The state of the run; see :func:`gpbridge.selection.learn_invariance`.

    Attributes:
        network: The averaged network, trained copies of both of its parts.
        steps: One entry for each update of the hyperparameters.
    """

    Step = InvarianceStep

    def __init__(
        self,
        network: AveragedNetwork,
        batches: TrainingBatches,
        groups: Groups,
        curvature: OrbitStructure,
        prior_curvature: OrbitStructure | None,
        prior_every: int,
        orbit: str,
        phases: str,
        epochs: int,
        rates: tuple[float, float],
        prior_variance: float,
        burn_in: int,
        every: int,
        hyper_steps: int,
        hyper_learning_rate: float,
        learning_rate: float,
        optimizer: OptimizerFactory | None,
        schedule: Callable[[int], float] | None,
        generator: Generator | None,
    ) -> None:
        self.orbit, self.epochs, self.rates = orbit, epochs, rates
        self.prior_curvature = prior_curvature
        self._learnt = [
            name
            for name, p in network.augmentation.named_parameters()
            if p.requires_grad
        ]
        network.augmentation.requires_grad_(False)  # of the caller's copy
        has_law = bool(self._learnt)
        self.timetable = Timetable(phases, burn_in, every, prior_every, has_law)
        super().__init__(
            network,
            batches,
            groups,
            curvature,
            prior_variance,
            burn_in,
            every,
            hyper_steps,
            hyper_learning_rate,
            learning_rate,
            optimizer,
            schedule,
            generator,
        )
        if orbit == "per_datum":
            row_noise(self.augmentation, 1, Generator())  # can it be drawn?
        own = dict(self.augmentation.named_parameters())
        learnt = [own[name] for name in self._learnt]
        self.augmentation_optimizer = None
        if learnt:
            self.augmentation_optimizer = torch.optim.Adam(learnt, lr=rates[0])
        state = [v.flatten() for v in self.augmentation.state_dict().values()]
        state = [value.double().cpu() for value in state]
        self._options |= {
            "structure of the prior": repr(prior_curvature),
            "updates to each of the prior": prior_every,
            "orbit": orbit,
            "phases": phases,
            "learning rates of the augmentation": list(rates),
            # The rate of the augmentation falls to its last value in the last epoch.
            "number of epochs": epochs if learnt else "any",
            "first augmentation": checksum(torch.cat(state)) if state else "none",
            "learnt parameters of the augmentation": self._learnt,
        }

    @property
    def augmentation(self):
        """The augmentation of the state."""
        return self.network.augmentation

    @property
    def block_size(self) -> int:
        """Data of a block of the last evidence; all where there are no blocks."""
        return self._curvatures.block_size(self._curvatures.whole)

    def natural_values(self) -> dict[str, Tensor]:
        """Learnt parameters of the augmentation, in natural units by name."""
        found = {}
        constrained = self.augmentation.named_parameters_and_constraints()
        for name, p, constraint in constrained:
            if name in self._learnt:
                value = p if constraint is None else constraint.transform(p)
                found[natural_name(name)] = value.detach().clone()
        return found

    def evidence(self) -> Evidence:
        """The evidence of the state, by all blocks, without a gradient.

        Random orbits are drawn three times, by the same seed at any state. It changes
        nothing that the next epoch depends on.
        """
        dropout = self._noise.get_state()
        generator = Generator().manual_seed(self._seed % 2**31)
        curvature = self._curvatures.whole
        found = []
        saved = self.augmentation.noise.clone()
        for _ in range(1 if self.orbit == "fixed" else _FINAL_DRAWS):
            noise = self._drawn(len(self.batches.X), generator)
            measured = self._measured(curvature, noise, {}, generator)
            with torch.no_grad():
                found.append(
                    measured.evidence(self.prior_variance, self.noise_variance, True)
                )
        self.augmentation.noise.copy_(saved)
        self._noise.set_state(dropout)
        mean = [
            torch.stack(values).mean(0) for values in list(zip(*found, strict=True))[:4]
        ]
        return Evidence(*mean, found[0].lower_bound)

    # -- one epoch ---------------------------------------------------------------------

    def _plan(self) -> tuple[bool, bool]:
        return self.timetable.trains(self.epoch), self.timetable.updates(self.epoch)

    def _prior_steps(self) -> int:
        return self.hyper_steps if self.timetable.moves_prior(self.epoch) else 0

    def _train_epoch(self) -> float:
        if self.orbit == "resampled":
            self._drawn(0, self.generator)
        return super()._train_epoch()

    def _outputs(self, X: Tensor) -> Tensor:
        if self.orbit != "per_datum":
            return self.network(X)
        noise = row_noise(self.augmentation, len(X), self.generator)
        images = orbits(self.augmentation, X, None, noise)
        shape = self.network.input_shape or images.shape[-1:]
        outputs = self.network.network(images.reshape(-1, *shape))
        outputs = outputs.reshape(*images.shape[:2], -1)
        return self.augmentation.average(outputs, -2)

    # -- the hyperparameters -----------------------------------------------------------

    def _check_structure(self) -> None:
        """Build what measures the evidence, which checks the structure."""
        self._curvatures = InvarianceCurvatures(
            self.network,
            self.groups,
            self.likelihood,
            self.batches.first,
            self.batches.num_rows,
            self.curvature,
            self.prior_curvature,
        )

    def _drawn(self, num_rows: int, generator: Generator) -> Tensor | None:
        """Orbits for an evaluation: noise of each row, or None for shared noise."""
        if self.orbit == "per_datum":
            return row_noise(self.augmentation, num_rows, generator)
        if self.orbit == "resampled":
            mode = self.augmentation.training
            self.augmentation.train()
            self.augmentation.resample(generator)
            self.augmentation.train(mode)
        return None

    def _measured(self, curvature, noise, values: Params, generator: Generator):
        data = OrbitData(self.batches.X, self.batches.Y, noise)
        state = self.prior_variance, self.noise_variance, values
        with isolated_randomness(self._noise, self.batches.device):
            return self._curvatures.measure(curvature, data, *state, generator)

    def _measure(self) -> OnlineEvidence:
        """The curvature of the moment; one step of the augmentation on the way."""
        noise = self._drawn(self.batches.num_rows, self.generator)
        own = dict(self.augmentation.named_parameters())
        values = {name: own[name] for name in self._learnt}
        law, prior = self._curvatures.law, self._curvatures.prior
        prior_moves = self.timetable.moves_prior(self.epoch)
        found = []
        if values or not prior_moves:
            found.append(self._measured(law, noise, values, self.generator))
        if prior_moves and (not found or prior is not law):
            found.append(self._measured(prior, noise, {}, self.generator))
        if values:
            self._step(own, found[0].gradients)
        return found[-1].evidence

    def _step(self, own: Params, gradients: Params) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        if not bool(flat.isfinite().all()):
            raise NonFiniteError(
                f"a gradient of the augmentation of {flat.tolist()} nats"
            )
        first, last = self.rates
        share = min(1.0, self.epoch / max(1, self.epochs - 1))
        rate = last + 0.5 * (first - last) * (1 + math.cos(math.pi * share))
        for group in self.augmentation_optimizer.param_groups:
            group["lr"] = rate
        for name, gradient in gradients.items():
            own[name].grad = -gradient
        self.augmentation_optimizer.step()
        self.augmentation_optimizer.zero_grad()

    def _update(self) -> InvarianceStep:
        step = super()._update()
        learnt = self.natural_values()
        numbers = [x for value in learnt.values() for x in value.flatten().tolist()]
        found, moved = self._curvatures, self.timetable.moves_prior(self.epoch)
        size = found.block_size(found.prior if moved else found.law)
        return InvarianceStep(*step, numbers or None, size, moved)

    # -- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, but for data and options."""
        state = super().state_dict()
        if self.augmentation_optimizer is not None:
            own = self.augmentation_optimizer.state_dict()
            state["augmentation_optimizer"] = copy.deepcopy(own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run of the same data and options.

        Raises:
            ValueError: If the state is of another run.
        """
        super().load_state_dict(state)
        if self.augmentation_optimizer is not None:
            own = copy.deepcopy(state["augmentation_optimizer"])
            self.augmentation_optimizer.load_state_dict(own)
