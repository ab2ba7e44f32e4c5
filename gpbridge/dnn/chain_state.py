"""Where Markov chains over weights are: states, samples, losses and the optimizer.

In: first weights, a schedule of samples, a way to build the optimizer. Out: a module
whose state dictionary is all that the next step depends on, and the samples so far as a
posterior. Next: ``chains`` makes the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpbridge.checks import ReliabilityWarning, warn_user
from gpbridge.dnn.run_key import check_same_run
from gpbridge.functional import FunctionalNet
from gpbridge.weights import EmpiricalWeights


class Spread(NamedTuple):
    """Root mean square over weights of standard deviations of samples.

    ``within`` the samples of one chain in one cycle, and ``between`` the means of
    those; None where there is only one.
    """

    within: float | None
    between: float | None


class ChainState(nn.Module):
    """Chains between two steps.

    Moved or converted by ``.to``, it takes the moments of the optimizer along.

    Args:
        first: Weights, ``chains x p``.
        build: Makes the optimizer of a list of one parameter.
        num_cycles: Cycles of the run.
        steps_per_cycle: Steps of each.
        kept_steps: Those of a cycle after which a sample is kept.
    """

    def __init__(
        self,
        first: Tensor,
        build: Callable[[list[nn.Parameter]], Optimizer],
        num_cycles: int,
        steps_per_cycle: int,
        kept_steps: Sequence[int],
    ) -> None:
        super().__init__()
        self.num_cycles, self.steps_per_cycle = num_cycles, steps_per_cycle
        self.kept_steps, self.step = list(kept_steps), 0
        self.weights = nn.Parameter(first)
        kept = num_cycles * len(self.kept_steps)
        self.register_buffer("samples", first.new_zeros(kept, *first.shape))
        self.register_buffer("losses", first.new_zeros(self.num_steps, len(first)))
        self.optimizer = build([self.weights])

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

    def members(self, net: FunctionalNet) -> EmpiricalWeights:
        """The samples so far as equally likely weights of a network.

        Args:
            net: The network.

        Returns:
            The samples of all chains, in the order of the steps.

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
        return EmpiricalWeights(net, weights)

    def key(self) -> dict[str, Any]:
        """What a continued run must have in common with the one before."""
        return {
            "number of chains": len(self.weights),
            "steps of a cycle": self.steps_per_cycle,
            "kept steps": sorted(self.kept_steps),
            "sampler": type(self.optimizer).__name__,
        }

    def progress(self) -> dict[str, Any]:
        """Step and state of the optimizer, with its generator."""
        return {
            "step": self.step,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def go_to(self, progress: dict[str, Any]) -> None:
        """Put step and optimizer where they were."""
        self.step = progress["step"]
        self.optimizer.load_state_dict(copy.deepcopy(progress["optimizer"]))

    def get_extra_state(self) -> dict[str, Any]:
        """The step, and the state of the optimizer with its generator."""
        return self.progress() | {"run": self.key()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put step and optimizer where they were."""
        self.go_to(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            check_same_run(
                state["run"], self.key(), "Build the chains with the same arguments."
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

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> ChainState:
        super()._apply(fn, recurse)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = fn(value)
        return self
