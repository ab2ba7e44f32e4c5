r"""A cyclical rate for stochastic-gradient samplers: explore, then sample, then again.

The rate falls as a cosine within each cycle. While it is large the sampler descends
without noise and moves between modes; in the last part it samples the mode it is in.

In: an optimizer with a ``noise`` switch. Out: its rate and its switch, step by step.
Next: ``chains`` runs whole schedules.

References:
    Zhang, Li, Zhang, Chen and Wilson, Cyclical stochastic gradient MCMC for Bayesian
    deep learning, ICLR 2020, eq. (1) and algorithm 1.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpbridge.checks import check_count, check_positive
from gpbridge.dnn.schedules import cyclical_factor


def first_sampling_step(cycle: int, sampling_fraction: float) -> int:
    """The first step of a cycle that samples; the last one always does.

    Args:
        cycle: Steps of a cycle.
        sampling_fraction: Share of them that sample, in (0, 1].

    Returns:
        Its number, from zero.

    Raises:
        ValueError: If the share is not in (0, 1].

    Example:
        >>> first_sampling_step(50, 0.1)
        45
    """
    check_count(cycle=cycle)
    check_positive(sampling_fraction=sampling_fraction)
    if sampling_fraction > 1:
        raise ValueError(
            f"sampling_fraction must lie in (0, 1], but is {sampling_fraction}. To "
            "sample in the last fifth of a cycle pass 0.2."
        )
    return cycle - max(1, round(sampling_fraction * cycle))


def kept_steps(cycle: int, samples: int, sampling_fraction: float) -> list[int]:
    """Steps of a cycle after which a sample is kept, evenly to the last one.

    Args:
        cycle: Steps of a cycle.
        samples: How many to keep.
        sampling_fraction: Share of the steps that sample, in (0, 1].

    Returns:
        Their numbers, increasing.

    Raises:
        ValueError: If there are not so many steps that sample.

    Example:
        >>> kept_steps(50, 3, 0.1)
        [45, 47, 49]
    """
    first = first_sampling_step(cycle, sampling_fraction)
    if samples > cycle - first:
        raise ValueError(
            f"samples_per_cycle must be at most the {cycle - first} sampling steps of "
            f"a cycle, but is {samples}. Raise steps_per_cycle (it is {cycle}) or "
            f"sampling_fraction (it is {sampling_fraction})."
        )
    return [first + (cycle - first) * (i + 1) // samples - 1 for i in range(samples)]


class CyclicalSchedule(LRScheduler):
    r"""Cosine cycles of the rate, with the noise on at the end of each.

    With R steps in M cycles of :math:`C = \lceil R / M \rceil`, step k has the rate

    .. math::
        \eta_k = \tfrac12 \eta_0 \Bigl(
            \cos \bigl( \pi \, (k \bmod C) / C \bigr) + 1 \Bigr) .

    Call ``step()`` after every step of the optimizer. Keep a sample where
    :attr:`sampling` was true during the step, a few in each cycle.

    Args:
        optimizer: :class:`~gpbridge.dnn.SGLD`, :class:`~gpbridge.dnn.SGHMC` or any
            other; only groups with a ``noise`` option have it set.
        num_steps: R.
        num_cycles: M.
        sampling_fraction: The share of a cycle, at its end, that has noise.
        last_epoch: As in torch: the step to resume after, -1 to begin.

    Raises:
        ValueError: If a number is out of its range, or there are more cycles than
            steps.

    Example:
        >>> import torch
        >>> from gpbridge.dnn.sgmcmc import SGLD
        >>> optimizer = SGLD([torch.zeros(1, requires_grad=True)], 1.0, num_data=10)
        >>> schedule, seen = CyclicalSchedule(optimizer, 8, 2, 0.25), []
        >>> for _ in range(8):
        ...     seen.append((round(schedule.get_last_lr()[0], 2), schedule.sampling))
        ...     optimizer.step()
        ...     schedule.step()
        >>> seen[:5]
        [(1.0, False), (0.85, False), (0.5, False), (0.15, True), (1.0, False)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        num_cycles: int,
        sampling_fraction: float = 0.2,
        last_epoch: int = -1,
    ) -> None:
        check_count(num_steps=num_steps, num_cycles=num_cycles)
        if num_cycles > num_steps:
            raise ValueError(
                f"num_cycles must be at most num_steps, but is {num_cycles} for "
                f"{num_steps} steps."
            )
        self.cycle = -(-num_steps // num_cycles)
        self.first_sampling_step = first_sampling_step(self.cycle, sampling_fraction)
        super().__init__(optimizer, last_epoch)

    @property
    def sampling(self) -> bool:
        """Whether the next step of the optimizer is one of the sampling part."""
        return self.last_epoch % self.cycle >= self.first_sampling_step

    def get_lr(self) -> list[float]:
        """The rates of the next step, one per group."""
        factor = cyclical_factor(self.cycle)(self.last_epoch)
        return [factor * rate for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next step: set rates and switches."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            if "noise" in group:
                group["noise"] = self.sampling
