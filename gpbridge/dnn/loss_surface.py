r"""The loss of a network as a function of its weights, at many weights at once.

In: weights ``s x p``, data and a likelihood. Out: the mean loss at each, with
batch-norm statistics of its own; along a curve, the barrier between its ends. Next:
``planes`` asks for a grid, ``plots`` draws both.

References:
    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity,
    and fast ensembling of DNNs, NeurIPS 2018. Frankle, Dziugaite, Roy, Carbin, Linear
    mode connectivity and the lottery ticket hypothesis, ICML 2020, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from tqdm import tqdm

from gpbridge.batch_norm import has_batch_norm, refresh_batch_norm
from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.curves import WeightCurve, image_net, rows_for
from gpbridge.dnn.objective import Objective, objective_for
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet


class CurveLosses(NamedTuple):
    """Losses along a curve, from its start to its end.

    ``t`` are times ``s`` from 0 to 1, ``loss`` the mean losses there, ``error`` the
    shares of wrong labels (None for regression), ``arc`` the length of the curve up to
    each time, as a polygon through these points, in units of the weights.
    """

    t: Tensor
    loss: Tensor
    error: Tensor | None
    arc: Tensor

    @property
    def length(self) -> float:
        """The length of the curve."""
        return float(self.arc[-1])

    @property
    def mean_loss(self) -> float:
        """The mean of the loss over the length of the curve, by trapezoids."""
        if self.length == 0:
            return float(self.loss[0])
        return float(torch.trapezoid(self.loss.to(self.arc), self.arc) / self.arc[-1])

    def barrier(self, quantity: str = "loss", above: str = "mean") -> float:
        """How far the curve rises above its ends.

        Args:
            quantity: ``"loss"`` or ``"error"``.
            above: The maximum over the times is compared with the ``"mean"`` of the two
                ends (Frankle et al.), or with the ``"larger"`` of them, above which a
                curve that only passes from one level to the other does not rise.

        Returns:
            The difference, never negative.

        Raises:
            ValueError: If there is no error, that is in regression.
        """
        check_choice("quantity", quantity, ("loss", "error"))
        check_choice("above", above, ("mean", "larger"))
        values = self.loss if quantity == "loss" else self.error
        if values is None:
            raise ValueError(
                "Regression has no share of wrong labels. Ask for quantity='loss'."
            )
        ends = values[[0, -1]]
        level = ends.mean() if above == "mean" else ends.max()
        return float(values.max() - level)


def curve_losses(
    curve: WeightCurve,
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    t: int | Tensor = 61,
    batches: Iterable[Tensor] | None = None,
    chunk_size: int = 8,
    row_chunk_size: int = 500,
    progress: bool = False,
) -> CurveLosses:
    """Losses along a curve; for those along the line pass a PolyChain of two points.

    Costs ``s`` passes over the data, and as many over the batches, ``chunk_size`` of
    them at once.

    Args:
        curve: The curve.
        X: Inputs ``n x d``, or images ``n x c x ...``.
        Y: Targets as for :func:`~gpbridge.dnn.fit_map`.
        likelihood: Picks the loss, as for :func:`~gpbridge.dnn.fit_curve`.
        t: How many times, equally spaced, or increasing times from 0 to 1.
        batches: Training inputs from which batch norm takes its statistics anew at each
            time, the ends included: a list or a loader, not a generator.
        chunk_size: Times evaluated at once.
        row_chunk_size: Rows evaluated at once.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The losses.

    Raises:
        ValueError: If the times do not go from 0 to 1, the network has batch norm and
            there are no batches, or they can be passed over only once.
    """
    if not isinstance(t, Tensor):
        check_count(t=t)
        t = torch.linspace(0, 1, t, dtype=torch.float64)
    t = t.to(curve.start)
    goes = t.dim() == 1 and len(t) > 1 and t[0] == 0 and t[-1] == 1
    if not (goes and bool((t.diff() > 0).all())):
        shown = t.tolist() if t.numel() <= 8 else f"of shape {tuple(t.shape)}"
        raise ValueError(
            "t must be at least 2 times, increasing from 0 to 1, since a barrier "
            f"compares with the ends, but is {shown}."
        )
    chunks = (curve.weights(part).detach() for part in t.split(chunk_size))
    loss, error = losses_at(
        curve.net,
        chunks,
        X,
        Y,
        likelihood,
        batches=batches,
        row_chunk_size=row_chunk_size,
        total=-(-len(t) // chunk_size),
        progress=progress,
    )
    return CurveLosses(t, loss, error, _arc(curve, t))


def losses_at(
    net: FunctionalNet,
    weights: Tensor | Iterable[Tensor],
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    batches: Iterable[Tensor] | None = None,
    row_chunk_size: int = 500,
    total: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mean losses and shares of wrong labels of a network at many weights.

    Args:
        net: The network.
        weights: ``s x p``, or chunks of such rows, each evaluated in one vmapped pass.
        X: Inputs ``n x d``, or ``n x input_shape``.
        Y: Targets.
        likelihood: Picks the loss.
        batches: Inputs for the statistics of batch norm.
        row_chunk_size: Rows evaluated at once.
        total: The number of chunks, for the bar.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        Losses ``s`` and errors ``s``, None for regression.

    Raises:
        ShapeError: If there are no weights.
    """
    check_count(row_chunk_size=row_chunk_size)
    check_tensor(Y=Y)
    net = image_net(net, X)
    X = rows_for(net, X)
    check_inputs(X, "X")
    check_not_empty(X=X)
    check_same_length(X=X, Y=Y)
    if Y.is_floating_point():
        check_finite(Y=Y)
    _check_batches(net, batches)
    objective = objective_for(likelihood, Y, net.probe(X), len(X), X.dtype)
    chunks = [weights] if isinstance(weights, Tensor) else weights
    bar = tqdm(chunks, "losses", total, leave=False, disable=None if progress else True)
    losses, errors = [], []
    with torch.no_grad():
        for chunk in bar:
            draws = WeightDraws(net, chunk)
            if batches is not None:
                refresh_batch_norm(draws, batches)
            loss, error = _scores(draws, X, objective, row_chunk_size)
            losses.append(loss)
            errors.append(error)
    if not losses:
        raise ShapeError("weights must have at least one row, but there is none.")
    return torch.cat(losses), None if errors[0] is None else torch.cat(errors)


def _scores(
    draws: WeightDraws, X: Tensor, objective: Objective, row_chunk_size: int
) -> tuple[Tensor, Tensor | None]:
    """Means over all rows, each ``s``."""
    loss, wrong = 0.0, 0.0
    for rows, targets in zip(
        X.split(row_chunk_size), objective.targets.split(row_chunk_size), strict=True
    ):
        outputs = draws(rows)  # s x b x m
        share = len(rows) / len(X)
        each = [objective.loss(member, targets) for member in outputs]
        loss = loss + share * torch.stack(each)
        if not objective.is_regression:
            wrong = wrong + share * _is_wrong(outputs, targets).mean(-1)
    return loss, None if objective.is_regression else wrong


def _is_wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    """``s x b`` of 0 and 1."""
    if outputs.shape[-1] > 1:
        predicted = outputs.argmax(-1)
    else:
        predicted = (outputs[..., 0] > 0).long()
    return (predicted != labels.reshape(-1)).to(outputs)


def _check_batches(net: FunctionalNet, batches: Iterable[Tensor] | None) -> None:
    if batches is None and has_batch_norm(net.network):
        raise ValueError(
            "The network has batch norm, whose running statistics belong to other "
            "weights than those evaluated. Pass batches=, training inputs in a list or "
            "a loader."
        )
    if batches is not None and iter(batches) is batches:
        raise ValueError(
            "batches can be passed over only once, but each chunk of weights needs a "
            "pass. Pass a list or a loader instead of a generator."
        )


def _arc(curve: WeightCurve, t: Tensor) -> Tensor:
    """Cumulative length of the polygon through the points at ``t``, in float64."""
    with torch.no_grad():
        # Inner products of B points instead of s vectors of p weights.
        points = (curve.control_points - curve.start).double()
        gram = points @ points.mT
        steps = curve.coefficients(t).double().diff(dim=0)
        squares = ((steps @ gram) * steps).sum(-1).clamp_min(0)
    return torch.cat([squares.new_zeros(1), squares.sqrt().cumsum(0)])
