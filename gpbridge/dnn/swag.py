r"""Moments of the weights along a training run: SWA and SWAG.

A tracker observes a loop and never owns it: call ``update(network)`` at the end of an
epoch, from where the learning rate is constant, and ``posterior()`` when training ends.

In: a network being trained. Out: :class:`~gpbridge.weights.GaussianWeights`. Next:
their draws, with batch-norm statistics of their own (``gpbridge.batch_norm``).

References:
    Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, Averaging weights leads to wider
    optima and better generalization, UAI 2018, algorithm 1. Maddox, Garipov, Izmailov,
    Vetrov, Wilson, A simple baseline for Bayesian uncertainty in deep learning, NeurIPS
    2019, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpbridge.checks import (
    check_choice,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.dnn.trackers import WeightTracker
from gpbridge.functional import Parameters
from gpbridge.weights import GaussianWeights

_FLOOR = 1e-30  # of a variance, so that a density exists


class SWA(WeightTracker):
    r"""The average of the weights along a run.

    .. math:: \bar w \leftarrow \bar w + (w - \bar w) / n

    Args:
        network: The module that is trained; its weights are read, nothing is changed.
        parameters: Which weights are averaged, as in
            :class:`~gpbridge.functional.FunctionalNet`; the others are taken as they
            are at the last update.
        input_shape: Shape of one input, to unflatten the ``d`` columns.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> average = SWA(network)
        >>> for _ in range(3):  # epochs
        ...     average.update(network)
        >>> int(average.num_snapshots)
        3
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, parameters, input_shape)
        weights = self.net.flatten(self.net.params).detach()
        self.register_buffer("mean", torch.zeros_like(weights))

    def _take(self, weights: Tensor) -> Tensor:
        """Move the mean; returns the deviation from the mean before."""
        self.num_snapshots += 1
        change = weights - self.mean
        self.mean += change / self.num_snapshots
        return change

    def posterior(self) -> GaussianWeights:
        """The average, as weights without spread."""
        self._need(1)
        return GaussianWeights(self.own_net(), self.mean)


class SWAG(SWA):
    r"""A Gaussian from mean, variances and last deviations of the weights of a run.

    .. math::
        \Sigma = \alpha \Bigl( \mathrm{diag}(v) + \tfrac{1}{k - 1} D D^\top \Bigr)

    with centred variances v over all snapshots (Welford's recursion, which does not
    cancel as :math:`\overline{w^2} - \bar w^2` does) and the last k deviations D, as
    many as there are: k and not the rank divides. Memory (rank + 2) p.

    The scale :math:`\alpha` is no calibrated constant: after many epochs at a constant
    rate the published 1/2 is far too wide on some data. Choose it on held-out data,
    by :func:`gpbridge.dnn.tune_scale`.

    Args:
        network: The module that is trained.
        rank: Deviations that are kept.
        parameters: Which weights are random.
        centering: ``"running"``, deviations from the mean at their time, as published,
            or ``"final"``, from the mean at the end.
        input_shape: Shape of one input.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = 20,
        parameters: Parameters = "all",
        centering: str = "running",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, parameters, input_shape)
        check_count(rank=rank)
        check_choice("centering", centering, ("running", "final"))
        self.rank, self.centering = rank, centering
        self.register_buffer("squares", torch.zeros_like(self.mean))
        # One row per snapshot, overwritten in turn: weights, or their deviations.
        self.register_buffer("kept", self.mean.new_zeros(rank, len(self.mean)))

    def extra_repr(self) -> str:
        """Snapshots, rank and what deviations are taken from."""
        own = f"rank={self.rank}, centering={self.centering!r}"
        return f"{super().extra_repr()}, {own}"

    @property
    def num_columns(self) -> int:
        """The number k of deviations there are."""
        return min(int(self.num_snapshots), self.rank)

    @property
    def deviations(self) -> Tensor:
        """The last k deviations, one per row, ``k x p``.

        Raises:
            RuntimeError: If there are fewer than two snapshots.
        """
        self._need(2)
        D = self.kept[: self.num_columns]
        return D - self.mean if self.centering == "final" else D.clone()

    def _take(self, weights: Tensor) -> Tensor:
        row = int(self.num_snapshots) % self.rank
        change = super()._take(weights)
        self.squares += change * (weights - self.mean)
        final = self.centering == "final"
        self.kept[row] = weights if final else weights - self.mean
        return change

    def posterior(self, scale: float = 0.5, diagonal: bool = True) -> GaussianWeights:
        """The Gaussian of the snapshots so far.

        Args:
            scale: Of the covariance; one half weighs the two parts equally.
            diagonal: Whether to have the diagonal part.

        Returns:
            The posterior. It is conditioned on the data already.

        Raises:
            RuntimeError: If there are fewer than two snapshots.
            ValueError: If the scale is not positive.

        Warns:
            UserWarning: If there are fewer snapshots than the rank.
        """
        if scale == 0:
            raise ValueError(
                "scale must be positive, but is 0, at which nothing is random. For the "
                "average alone take gpbridge.weights.EmpiricalWeights(tracker.net, "
                "tracker.mean[None]), or SWA."
            )
        check_positive(scale=scale)
        self.check_rank()
        return self.gaussian(scale, diagonal)

    def check_rank(self) -> None:
        """Warn if there are fewer snapshots than the rank."""
        self._need(2)
        k = self.num_columns
        if k < self.rank:
            warn_user(
                f"SWAG has {k} snapshots for a rank of {self.rank}: the low-rank part "
                f"has {k} columns. Train longer, take several snapshots per epoch, or "
                "lower the rank."
            )

    def gaussian(self, scale: float, diagonal: bool = True) -> GaussianWeights:
        """As :meth:`posterior`, without its checks."""
        D, k = self.deviations, self.num_columns
        root = (scale / (k - 1)) ** 0.5 * D.mT
        variance = None
        if diagonal:
            variance = scale * (self.squares / self.num_snapshots).clamp_min(_FLOOR)
        return GaussianWeights(self.own_net(), self.mean, variance, root)

    def get_extra_state(self) -> Tensor:
        """Whether the rows that are kept are weights, to be centred at the end."""
        return torch.tensor(self.centering == "final")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the centering is an option, which was compared before."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        final = state_dict.get(f"{prefix}_extra_state")
        kept = state_dict.get(f"{prefix}kept")
        if final is not None and bool(final) != (self.centering == "final"):
            before = "final" if bool(final) else "running"
            raise ValueError(
                f"The state has deviations for centering={before!r}, but this tracker "
                f"has {self.centering!r}. Build it with centering={before!r}."
            )
        if kept is not None and len(kept) != self.rank:
            raise ValueError(
                f"The state keeps {len(kept)} deviations, but this tracker has rank="
                f"{self.rank}. Build it with rank={len(kept)}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
