r"""The state of a training run that learns its own prior and noise.

Weights descend on the mean negative log posterior, by any optimiser; every few epochs
prior variances and noise ascend the evidence at the weights of the moment, by Adam on
their logarithms. How the weights depend on the hyperparameters is left out of that
gradient.

In: a network, batches, options. Out: one more epoch, and a state from which the next
gives the same bits. Next: ``online`` runs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.checks import warn_user
from gpbridge.dnn.replica_input import drawn_seed
from gpbridge.dnn.run_key import check_same_run, checksum, described, structure
from gpbridge.dnn.training import isolated_randomness
from gpbridge.frozen import copy_without_hooks
from gpbridge.kernels.tangent import Groups, weight_groups
from gpbridge.selection.online_evidence import (
    OnlineEvidence,
    OnlineStructure,
    check_learnable,
    check_structure,
    measure_evidence,
)
from gpbridge.selection.online_hyperparameters import OnlineHyperparameters
from gpbridge.selection.online_loss import BatchLoss, add_prior_gradient
from gpbridge.selection.scale_free import scale_free_groups
from gpbridge.selection.training_batches import TrainingBatches
from gpbridge.selection.weight_optimizer import OptimizerFactory, weight_optimizer
from gpbridge.types import Evidence


class OnlineStep(NamedTuple):
    """Hyperparameters after an update, and the evidence there, in total nats."""

    epoch: int  # epochs that were trained before
    evidence: float
    fit: float
    complexity: float
    effective_dimension: float
    prior_variance: list[float]  # per group
    noise_variance: list[float] | None  # per output


class NonFiniteError(ArithmeticError):
    """A loss, a weight or an evidence is not finite."""


class OnlineTraining:
    """The state of the run; for arguments see :func:`gpbridge.selection.fit_online`.

    Attributes:
        network: The trained copy.
        groups: Names of the weights that share a prior variance.
        hyperparameters: Prior variances and noise.
        losses: Mean negative log likelihood of each epoch, in nats per datum.
        steps: One entry for each update of the hyperparameters.
    """

    Step = OnlineStep  # the kind of the records

    def __init__(
        self,
        network: nn.Module,
        batches: TrainingBatches,
        groups: Groups,
        curvature: OnlineStructure,
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
        self.batches, self.net = batches, batches.net
        self.network = copy_without_hooks(network)
        self.likelihood = copy.deepcopy(batches.likelihood)
        self.groups = weight_groups(self.net, groups)
        self.curvature = curvature
        check_learnable(self.likelihood)
        self._check_structure()
        if curvature.jacobian_dtype is not None:
            self.net.to(curvature.jacobian_dtype)
        self.burn_in, self.every, self.hyper_steps = burn_in, every, hyper_steps
        self.schedule = schedule
        generator = Generator().manual_seed(0) if generator is None else generator
        self.generator = generator
        self._seed = drawn_seed(generator)
        self._noise = Generator().manual_seed(self._seed)

        own = dict(self.network.named_parameters())
        self._weights = [[own[name] for name in names] for names in self.groups]
        flat = [p for weights in self._weights for p in weights]
        self.optimizer = weight_optimizer(optimizer, flat, learning_rate)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

        like = torch.zeros(1, self.net.num_outputs, dtype=torch.float64)
        like = like.to(batches.device)
        self.hyperparameters = OnlineHyperparameters(
            self.likelihood,
            len(self.groups),
            like,
            prior_variance,
            hyper_learning_rate,
        )
        learnt = torch.cat([t.detach() for t in self.hyperparameters.learnt])
        self._options = {
            "groups": self.groups,
            "structure": repr(curvature),
            "prior variance": prior_variance,
            "burn-in": burn_in,
            "frequency": every,
            "number of hyperparameter steps": hyper_steps,
            "learning rate of hyperparameters": hyper_learning_rate,
            "learning rate": learning_rate,
            "optimizer": [type(self.optimizer).__name__, described(optimizer)],
            "schedule": described(schedule),
            "likelihood": type(self.likelihood).__name__,
            "first hyperparameters": checksum(learnt),
            "network": structure(self.network),
            "first weights": checksum(self.net.flatten(self.net.params)),
            "seed": self._seed,
        }
        self.epoch = 0
        self.losses: list[float] = []
        self.steps: list[OnlineStep] = []
        self._warn_if_not_identified()
        self._good = self._values()

    @property
    def prior_variance(self) -> Tensor:
        """One per group."""
        return self.hyperparameters.prior_variance

    @property
    def noise_variance(self) -> Tensor | None:
        """One per output, of Gaussian noise."""
        return self.hyperparameters.noise_variance

    def advance(self) -> None:
        """Train one epoch and, where it is time, update the hyperparameters.

        Raises:
            NonFiniteError: If something is not finite. Weights and hyperparameters then
                are those before; optimisers and generators have moved on, so that
                another run starts from a state that was saved.
        """
        trains, updates = self._plan()
        try:
            loss = self._train_epoch() if trains else self.losses[-1]
            step = self._update() if updates else None
        except BaseException:
            self.network.eval()
            self._restore(self._good)
            raise
        self.epoch += 1
        self.losses.append(loss)
        if step is not None:
            self.steps.append(step)
        self._good = self._values()

    def evidence(self) -> Evidence:
        """The evidence of the state, without a gradient; one pass over the data.

        It changes nothing that the next epoch depends on.
        """
        noise = self._noise.get_state()
        measured = self._measure()
        self._noise.set_state(noise)
        with torch.no_grad():
            return measured(self.prior_variance, self.noise_variance, True)

    def trained_likelihood(self) -> Likelihood:
        """A copy of the likelihood with the noise of the state."""
        return self.hyperparameters.applied_to(self.likelihood, self.batches.dtype)

    # -- one epoch -------------------------------------------------------------------

    def _plan(self) -> tuple[bool, bool]:
        """Whether this epoch trains weights, and whether it updates the rest."""
        done = self.epoch + 1 - self.burn_in
        return True, done > 0 and done % self.every == 0

    def _outputs(self, X: Tensor) -> Tensor:
        return self.network(X)

    def _train_epoch(self) -> float:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if self.schedule is not None:
                group["lr"] = rate * float(self.schedule(self.epoch))
        batch_loss = BatchLoss(self.likelihood, self.noise_variance, self.batches.dtype)
        n = self.batches.num_rows
        decays = (batch_loss.unit / (n * self.prior_variance)).tolist()
        m, total, seen = self.net.num_outputs, 0.0, 0
        self.network.train()
        with isolated_randomness(self._noise, self.batches.device):
            for X, Y in self.batches.shuffled(self.generator):
                self.optimizer.zero_grad()
                # Networks may squeeze: always n x m, also for a batch of one row.
                outputs = self._outputs(X).reshape(len(X), m)
                loss = batch_loss(outputs, Y)
                loss.backward()
                add_prior_gradient(self._weights, decays)
                self.optimizer.step()
                total, seen = total + len(X) * loss.detach(), seen + len(X)
        self.network.eval()
        if not seen:
            raise ValueError(
                "No batch was trained on: batch normalisation needs batches of two "
                "rows or more. Choose larger batches."
            )
        value = batch_loss.in_nats(float(total) / seen)
        if not math.isfinite(value):
            raise NonFiniteError(f"a mean loss of {value:.3g} nats")
        weights = (p.detach().sum() for group in self._weights for p in group)
        if not math.isfinite(float(sum(weights))):
            raise NonFiniteError(
                f"weights that are not finite, after a mean loss of {value:.3g} nats,"
            )
        return value

    # -- the hyperparameters ---------------------------------------------------------

    def _check_structure(self) -> None:
        check_structure(self.net, self.curvature)

    def _prior_steps(self) -> int:
        return self.hyper_steps

    def _measure(self) -> OnlineEvidence:
        self._copy_weights()
        with isolated_randomness(self._noise, self.batches.device):
            return measure_evidence(
                self.net,
                self.batches,
                self.groups,
                self.curvature,
                self._seed % 2**31 + self.epoch,
            )

    @torch.no_grad()
    def _copy_weights(self) -> None:
        frozen = self.net.network.state_dict()
        for name, value in self.network.state_dict().items():
            frozen[name].copy_(value)

    def _update(self) -> OnlineStep:
        try:
            found = self.hyperparameters.ascend(self._measure(), self._prior_steps())
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError("a curvature that cannot be factorised") from error
        values = [float(value) for value in found[:4]]
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(f"an evidence of {values[0]:.3g} nats")
        noise = self.noise_variance
        return OnlineStep(
            self.epoch + 1,
            *values,
            self.prior_variance.tolist(),
            None if noise is None else noise.tolist(),
        )

    def _warn_if_not_identified(self) -> None:
        for names in scale_free_groups(self.network, self.batches.first, self.groups):
            warn_user(
                f"The scale of {', '.join(names)} does not change the network's "
                "output, because a normalisation follows, yet these weights have a "
                "prior variance of their own: the data do not determine it. Choose "
                "groups='all', or add them to a group of weights whose scale matters."
            )

    # -- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, but for data and options."""
        return {
            **self._values(),
            "epoch": self.epoch,
            "losses": list(self.losses),
            "steps": [list(step) for step in self.steps],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "hyper_optimizer": copy.deepcopy(
                self.hyperparameters.optimizer.state_dict()
            ),
            "generator": self.generator.get_state(),
            "noise": self._noise.get_state(),
            "run": {**self._options, **self.batches.key()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run of the same data and options.

        Raises:
            ValueError: If the state is of another run.
        """  # noqa: DOC502
        now = {**self._options, **self.batches.key()}
        remedy = "Pass the same arguments, or start anew."
        check_same_run(state["run"], now, remedy)
        self._restore(state)
        # They keep the tensors, and would move them in the caller's state.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.hyperparameters.optimizer.load_state_dict(
            copy.deepcopy(state["hyper_optimizer"])
        )
        self.generator.set_state(state["generator"].cpu())
        self._noise.set_state(state["noise"].cpu())
        self.epoch, self.losses = state["epoch"], list(state["losses"])
        self.steps = [self.Step(*step) for step in state["steps"]]
        self._good = self._values()

    def _values(self) -> dict[str, Any]:
        """Weights and hyperparameters, copied."""
        return {
            "network": {k: v.clone() for k, v in self.network.state_dict().items()},
            "hyperparameters": [v.clone() for v in self.hyperparameters.values],
        }

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in self.network.state_dict().items():
            value.copy_(state["network"][name])
        own = self.hyperparameters.values
        for value, kept in zip(own, state["hyperparameters"], strict=True):
            value.copy_(kept)
