r"""How fast a network trains, as a score that ranks architectures.

A sum of training losses counts how well each batch was predicted before the step that
fitted it. For a linear model that samples its posterior this is a bound of the evidence
(:mod:`~gpbridge.selection.speed_bound`); for a network trained by gradient descent it
is no bound of anything. What is claimed, and to be measured, is rank correlation with
the test score among networks that are trained alike: same data, loss, batch size, and
number of epochs.

In: losses of a training loop, step by step or as a history. Out:
:class:`TrainingSpeed`, scores of one network or of k at once; lower is better.

References:
    Ru, Lyle, Schut, Fil, van der Wilk, Gal, Speedy performance estimation for neural
    architecture search, NeurIPS 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_count, check_floating
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.types import FitResult

_BUFFERS = ("epoch_losses", "running", "num_seen")

Run = FitResult | ReplicaFit | Mapping[str, Any] | Tensor | Sequence[float]


class TrainingSpeed(nn.Module):
    r"""Sums of training losses :math:`\ell_t`, the mean of epoch t of T, observed only.

    .. math::
        \mathrm{TSE} = \sum_{t \le T} \ell_t, \qquad
        \mathrm{TSE\text{-}E} = \sum_{t > T - E} \ell_t, \qquad
        \mathrm{TSE\text{-}EMA} = \frac{\sum_t \gamma^{T - t} \ell_t}
                                       {\sum_t \gamma^{T - t}}

    Call ``update`` with the loss of each step and ``end_epoch`` after each epoch; or
    pass the tracker as ``callback=`` of ``fit_map`` or ``train_replicas``; or build it
    from what they return by :meth:`from_history`. One tracker holds one network or k
    that train side by side. Costs nothing beside a step, and does not wait for the
    device before the epoch ends. ``state_dict`` in the middle of an epoch resumes to
    the same bits.

    Attributes:
        epoch_losses: :math:`\ell_t`, ``t``, or ``t x k`` for k networks.

    Example:
        >>> speed = TrainingSpeed()
        >>> for loss in (3.0, 1.0, 0.5, 0.5):
        ...     speed.update(loss)
        ...     if loss < 2.0:
        ...         speed.end_epoch()
        >>> speed.epoch_losses
        tensor([2.0000, 0.5000, 0.5000], dtype=torch.float64)
        >>> float(speed.tse()), float(speed.tse_e(2))
        (3.0, 1.0)
    """

    epoch_losses: Tensor
    running: Tensor  # sum over the data of this epoch so far
    num_seen: Tensor  # data of this epoch so far

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("epoch_losses", torch.empty(0, dtype=torch.float64))
        # Empty until the first loss says how many networks there are.
        self.register_buffer("running", torch.empty(0, dtype=torch.float64))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_history(cls, *runs: Run) -> TrainingSpeed:
        """Rank networks by the histories of their training.

        Args:
            *runs: Results of ``fit_map`` or ``train_replicas``, their histories (the
                entry ``train_loss`` is read), or losses ``t`` or ``t x k``. Several
                runs become columns in their order.

        Returns:
            The tracker, after the last epoch.

        Raises:
            ShapeError: If the runs have different numbers of epochs.
            ValueError: If there is no run, or a loss is NaN or infinite.
        """
        if not runs:
            raise ValueError("from_history needs at least one run, but got none.")
        losses = [_losses(run) for run in runs]
        lengths = [len(each) for each in losses]
        if len(set(lengths)) > 1:
            raise ShapeError(
                "Sums of losses are compared over the same number of epochs, but the "
                f"runs have {lengths}. Pass histories cut to the first {min(lengths)}."
            )
        if len(losses) > 1:
            columns = [each.reshape(len(each), -1) for each in losses]
            losses = [torch.cat([column.to(columns[0]) for column in columns], -1)]
        speed = cls()
        for loss in losses[0]:
            speed.update(loss)
            speed.end_epoch()
        return speed

    @torch.no_grad()
    def update(self, loss: Tensor | float, num_data: int = 1) -> None:
        """Take in the loss of one step, before its gradient is followed.

        Args:
            loss: The mean loss of the batch, a number, or ``k`` of them.
            num_data: Size of the batch, if the batches of an epoch differ in size.

        Raises:
            ShapeError: If the shape is another than before.
            TypeError: If the loss is no floating number.
        """
        check_count(num_data=num_data)
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss), dtype=torch.float64)
        check_floating(loss=loss)
        first = not self.running.numel()
        running = torch.zeros_like(loss) if first else self.running
        if loss.dim() > 1 or not loss.numel() or loss.shape != running.shape:
            wanted = (
                "a number or ``k``" if first else f"of shape {tuple(running.shape)}"
            )
            raise ShapeError(
                f"loss must be {wanted}, one mean loss per network at every step, but "
                f"has shape {tuple(loss.shape)}. Try loss.mean()."
            )
        self.running = running + num_data * loss.detach()
        self.num_seen += num_data

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Close the epoch: the mean of its losses joins ``epoch_losses``.

        Raises:
            RuntimeError: If no loss came since the last call.
            ValueError: If a loss was NaN or infinite; earlier epochs are kept.
        """
        if not int(self.num_seen):
            raise RuntimeError(
                "end_epoch closes an epoch without a loss. Call update(loss) at every "
                "step, and end_epoch() once after the last."
            )
        mean = self.running / self.num_seen
        self.running = torch.zeros_like(mean)
        self.num_seen.zero_()
        finite = mean.isfinite()
        if not bool(finite.all()):
            which = torch.nonzero(~finite.reshape(-1)).flatten()[:5].tolist()
            raise ValueError(
                f"The mean training loss of epoch {self.num_epochs} is NaN or infinite "
                f"for network {which}: training has diverged. The {self.num_epochs} "
                "epochs before are kept; lower the learning rate, or rank the network "
                "last."
            )
        before = self.epoch_losses.to(mean).reshape(-1, *mean.shape)
        self.epoch_losses = torch.cat([before, mean[None]])

    def forward(self, epoch: int, network: object, entry: Mapping[str, Any]) -> None:
        """Observe an epoch as the callback of ``fit_map`` or ``train_replicas``.

        Args:
            epoch: Its number.
            network: Not looked at.
            entry: What the history gets; ``train_loss`` is read.

        Raises:
            ValueError: If the epoch is not the next one.
        """
        if epoch != self.num_epochs:
            raise ValueError(
                f"The tracker has {self.num_epochs} epochs, but epoch {epoch} came. "
                "Use a new tracker for each run; to go on with a run, load the "
                "tracker's state_dict of that epoch."
            )
        self.update(entry["train_loss"])
        self.end_epoch()

    @property
    def num_epochs(self) -> int:
        """The number T of epochs that have ended."""
        return len(self.epoch_losses)

    def tse(self) -> Tensor:
        """Sum of the mean losses of all epochs, a scalar or ``k``."""
        return self._ended().sum(0)

    def tse_e(self, num_epochs: int = 1) -> Tensor:
        """The same sum over the last E epochs, without what the start decides.

        Args:
            num_epochs: The number E; 1 is the last epoch alone.

        Returns:
            A scalar or ``k``.

        Raises:
            ValueError: If there are fewer epochs.
        """
        check_count(num_epochs=num_epochs)
        losses = self._ended()
        if num_epochs > len(losses):
            raise ValueError(
                f"num_epochs must be at most the {len(losses)} that have ended, but is "
                f"{num_epochs}."
            )
        return losses[-num_epochs:].sum(0)

    def tse_ema(self, gamma: float = 0.9) -> Tensor:
        r"""Moving average over epochs whose weights fall by :math:`\gamma` per epoch.

        An average of about the last :math:`1 / (1 - \gamma)` epochs, in nats per datum,
        between the smallest and the largest loss. Ru et al. leave out the division,
        which changes no ranking, and use 0.999, which in short runs ranks as TSE does.
        (A recursion that weights the *new* loss by 0.99 is the last loss, no average.)

        Args:
            gamma: From 0, the last epoch alone, to 1, the mean of all.

        Returns:
            A scalar or ``k``.

        Raises:
            ValueError: If gamma is outside.
        """
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], but is {gamma}.")
        losses = self._ended()
        age = torch.arange(len(losses) - 1, -1, -1).to(losses)
        weights = gamma**age
        return torch.tensordot(weights / weights.sum(), losses, dims=1)

    def extra_repr(self) -> str:
        """How many epochs have ended, of how many networks."""
        networks = self.epoch_losses.shape[1] if self.epoch_losses.dim() > 1 else 1
        return f"num_epochs={self.num_epochs}, num_networks={networks}"

    def _ended(self) -> Tensor:
        if not self.num_epochs:
            raise RuntimeError(
                "No epoch has ended yet. Call update(loss) at every step and "
                "end_epoch() after each epoch."
            )
        return self.epoch_losses

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in _BUFFERS:  # as many epochs and networks as the other had
            saved = state_dict.get(prefix + name)
            if saved is not None:
                device = getattr(self, name).device
                setattr(self, name, torch.empty_like(saved, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _losses(run: Run) -> Tensor:
    """Mean training losses ``t`` or ``t x k`` of one run."""
    if isinstance(run, FitResult | ReplicaFit):
        run = run.history
    if isinstance(run, Mapping):
        if "train_loss" not in run:
            raise ValueError(
                f"A history must have train_loss, but has {', '.join(run) or 'nothing'}"
                ". Pass the losses themselves, ``t`` or ``t x k``."
            )
        run = run["train_loss"]
    losses = run if isinstance(run, Tensor) else torch.tensor(run, dtype=torch.float64)
    if losses.dim() not in (1, 2) or not len(losses):
        raise ShapeError(
            "The losses of a run must be ``t`` or ``t x k`` with at least one epoch, "
            f"but have shape {tuple(losses.shape)}."
        )
    return losses
