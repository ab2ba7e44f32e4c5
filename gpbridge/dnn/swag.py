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

import torch
from torch import Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.types import Params
from gpbridge.weights import GaussianWeights

_FLOOR = 1e-30  # of a variance, so that a density exists


class SWA(nn.Module):
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
        super().__init__()
        self.net = FunctionalNet(network, parameters, input_shape)
        weights = self.net.flatten(self.net.params).detach()
        self.register_buffer("num_snapshots", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros_like(weights))

    @torch.no_grad()
    def update(self, network: nn.Module | Params) -> None:
        """Take the present weights into the moments; costs a few p operations.

        Args:
            network: The module that is trained, or its weights by name, buffers among
                them if it has any that training changes.

        Raises:
            ShapeError: If a weight has another shape than the tracker's.
            ValueError: If a weight is missing or not finite; the moments stay as they
                were.
        """
        is_module = isinstance(network, nn.Module)
        own = dict(network.named_parameters()) if is_module else network
        missing = [name for name in self.net.names if name not in own]
        if missing:
            raise ValueError(
                f"The network has no {', '.join(missing)}, which the tracker was built "
                "for. Pass the module that is trained, or a copy of it."
            )
        for name, p in self.net.params.items():
            if own[name].shape != p.shape:
                raise ShapeError(
                    f"{name} must have shape {tuple(p.shape)} as in the network the "
                    f"tracker was built for, but has {tuple(own[name].shape)}. Of "
                    "stacked weights pass those of one copy."
                )
        weights = self.net.flatten({name: own[name] for name in self.net.names})
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(
                "The weights contain NaN or Inf: training has diverged. The tracker "
                f"keeps the {int(self.num_snapshots)} snapshots before; lower the "
                "learning rate."
            )
        self._take(weights)
        # What is not averaged, buffers among it, is that of the last snapshot.
        state = network.state_dict() if is_module else network
        random = set(self.net.names)
        for name, value in self.net.network.state_dict().items():
            if name not in random and name in state:
                value.copy_(state[name])

    def _take(self, weights: Tensor) -> Tensor:
        """Move the mean; returns the deviation from the mean before."""
        self.num_snapshots += 1
        change = weights - self.mean
        self.mean += change / self.num_snapshots
        return change

    def posterior(self) -> GaussianWeights:
        """The average, as weights without spread."""
        self._need(1)
        return GaussianWeights(self.net, self.mean.clone())

    def _need(self, wanted: int) -> None:
        if int(self.num_snapshots) < wanted:
            raise RuntimeError(
                f"The tracker has {int(self.num_snapshots)} snapshots and needs "
                f"{wanted}. Call update(network) at the end of each epoch."
            )


class SWAG(SWA):
    r"""A Gaussian from mean, variances and last deviations of the weights of a run.

    .. math::
        \Sigma = \alpha \Bigl( \mathrm{diag}(v) + \tfrac{1}{k - 1} D D^\top \Bigr)

    with centred variances v over all snapshots (Welford's recursion, which does not
    cancel as :math:`\overline{w^2} - \bar w^2` does) and the last k deviations D, as
    many as there are: k and not the rank divides. Memory (rank + 2) p.

    The scale :math:`\alpha` is no calibrated constant: after many epochs at a constant
    rate the published 1/2 is far too wide on some data. Choose it on held-out data,
    from 0.1, 0.25, 0.5, 1.

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
        check_positive(scale=scale)
        D, k = self.deviations, self.num_columns
        if k < self.rank:
            warn_user(
                f"SWAG has {k} snapshots for a rank of {self.rank}: the low-rank part "
                f"has {k} columns. Train longer, take several snapshots per epoch, or "
                "lower the rank."
            )
        root = (scale / (k - 1)) ** 0.5 * D.mT
        variance = None
        if diagonal:
            variance = scale * (self.squares / self.num_snapshots).clamp_min(_FLOOR)
        return GaussianWeights(self.net, self.mean.clone(), variance, root)
