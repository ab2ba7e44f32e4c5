r"""Training the control points of a curve between two networks.

In: a :class:`~gpbridge.dnn.curves.WeightCurve`, data and a likelihood. Out: the curve,
whose bends have moved to low loss, and the history of its losses. Next:
``loss_surface`` measures the loss along it.

References:
    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity,
    and fast ensembling of DNNs, NeurIPS 2018, eq. (2) and section 3.3.
"""

from __future__ import annotations

import math

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor
from tqdm import tqdm

from gpbridge.checks import (
    check_choice,
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.curves import WeightCurve, image_net, rows_for
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.fit_input import check_decay
from gpbridge.dnn.objective import objective_for
from gpbridge.dnn.schedules import swa_factor
from gpbridge.dnn.training import split_rows

_LAST_RATE = 0.01  # in units of the first


def fit_curve(
    curve: WeightCurve,
    train_X: Tensor,
    train_Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    epochs: int = 200,
    learning_rate: float = 0.015,
    momentum: float = 0.9,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    optimizer: str = "sgd",
    generator: Generator | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    r"""Move the bends of a curve to low loss at all times.

    Each step draws one time and one batch, and descends

    .. math:: \frac1b \sum_i \ell(y_i, f(x_i, \phi(t)))
              + \tfrac12 \lambda \|\phi(t)\|^2, \quad t \sim U(0, 1).

    The rate is constant for half of the epochs, then falls linearly to 1% of it at nine
    tenths. Batch norm normalises by the batch, dropout is off. A step costs that of the
    network. Take the decay that the ends were trained with.

    The loss of a point is :math:`\tfrac12 \|y - f\|^2`, summed over outputs, for
    Gaussian likelihoods, and the negative log likelihood in nats for the others.

    Args:
        curve: Trained in place; its ends stay.
        train_X: Inputs ``n x d``, or images ``n x c x ...``, whose shape the curve
            takes as its ``input_shape`` if it has none.
        train_Y: Targets as for :func:`~gpbridge.dnn.fit_map`.
        likelihood: Picks the loss; default that of
            :func:`gpbridge.targets.default_likelihood`.
        epochs: Passes over the rows.
        learning_rate: At the start.
        momentum: Of SGD.
        batch_size: Rows per step.
        weight_decay: :math:`\lambda`.
        optimizer: ``"sgd"``, as published, or ``"adam"``.
        generator: Source of batches and times. None is a fresh one with seed 0.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The history: ``train_loss``, the mean over the epoch's times and rows, with the
        decay term.

    Raises:
        DivergedError: If the loss becomes NaN or infinite; the curve, its
            ``last_good``, then has the bends with which the last epoch of finite loss
            began.
        ValueError: If an option is out of range, or the curve has no free bend.

    Example:
        >>> from torch import nn
        >>> from gpbridge.dnn import BezierCurve
        >>> curve = BezierCurve(nn.Linear(2, 1), nn.Linear(2, 1))
        >>> X = torch.rand(20, 2)
        >>> history = fit_curve(curve, X, X.sum(-1, keepdim=True), epochs=3)
        >>> len(history["train_loss"])
        3
    """
    if curve.num_bends < 3:
        raise ValueError(
            "The curve has no control point between its ends, so there is nothing to "
            "train. Pass num_bends=3 or more."
        )
    check_count(epochs=epochs, batch_size=batch_size)
    check_positive(learning_rate=learning_rate)
    check_decay(momentum, "momentum")
    check_decay(weight_decay, "weight_decay")
    check_choice("optimizer", optimizer, ("sgd", "adam"))
    check_tensor(train_Y=train_Y)
    curve.net = image_net(curve.net, train_X)
    X = rows_for(curve.net, train_X, "train_X").detach()
    check_inputs(X)
    check_not_empty(train_X=X)
    check_same_length(train_X=X, train_Y=train_Y)
    check_same_device(train_X=X, train_Y=train_Y, **{"the curve": curve.start})
    check_finite(train_Y=train_Y)
    num_outputs = curve.net.probe(X)
    objective = objective_for(
        likelihood, train_Y.detach(), num_outputs, len(X), X.dtype
    )
    if generator is None:
        generator = Generator().manual_seed(0)
    if optimizer == "adam":
        stepper: torch.optim.Optimizer = torch.optim.Adam([curve.bends])
    else:
        stepper = torch.optim.SGD([curve.bends], lr=1.0, momentum=momentum)
    factor = swa_factor(epochs, _LAST_RATE)
    history: dict[str, list[float]] = {"train_loss": []}
    good = curve.bends.detach().clone()
    bar = tqdm(
        range(epochs), desc="fit_curve", leave=False, disable=None if progress else True
    )
    try:
        for epoch in bar:
            stepper.param_groups[0]["lr"] = learning_rate * factor(epoch)
            before = curve.bends.detach().clone()
            order = torch.randperm(len(X), generator=generator, device=generator.device)
            batches = split_rows(order.to(X.device), batch_size, curve.net.network)
            total = 0.0
            for rows in batches:
                with torch.enable_grad():
                    loss = curve.loss(
                        objective.loss,
                        X[rows],
                        objective.targets[rows],
                        weight_decay=weight_decay,
                        generator=generator,
                    )
                    (curve.bends.grad,) = torch.autograd.grad(loss, [curve.bends])
                stepper.step()
                total = total + len(rows) * loss.detach()
            value = float(total) / sum(map(len, batches))
            if math.isfinite(value):
                good = before  # and not what the last step of the epoch made of it
            if not (math.isfinite(value) and bool(curve.bends.isfinite().all())):
                with torch.no_grad():
                    curve.bends.copy_(good)
                raise DivergedError(
                    f"Training diverged in epoch {epoch}: the loss is {value}. The "
                    "curve has the bends with which the last epoch of finite loss "
                    "began, and is .last_good of this error. Try "
                    f"{rate_advice(learning_rate, 0.015)}.",
                    curve,
                )
            history["train_loss"].append(value)
            if not bar.disable:
                bar.set_postfix_str(f"loss {value:.3g}", refresh=False)
    finally:
        bar.close()
        curve.bends.grad = None
    return history
