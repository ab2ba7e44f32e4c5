"""Training one network to a maximum a posteriori estimate of its weights.

In: a module, its data and a likelihood. Out: a ``FitResult``, a trained copy with the
facts that a posterior needs: which rows it has seen, its residual variances, its weight
decay. The caller's module and the global random state are left as they were.
Next: ``linearized`` turns the result into a Gaussian process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from types import FunctionType
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import (
    check_finite,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.checkpoints import Checkpoint
from gpbridge.dnn.fit_input import (
    WeightDecay,
    check_decay,
    check_options,
    check_weights,
    probe_outputs,
    shaped,
    split_rows,
)
from gpbridge.dnn.objective import objective_for, residual_variance
from gpbridge.dnn.run_key import checksum, described, structure
from gpbridge.dnn.training import Callback, Part, descend, isolated_randomness
from gpbridge.frozen import copy_without_hooks
from gpbridge.types import FitResult


def fit_map(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    epochs: int = 300,
    learning_rate: float = 5e-3,
    batch_size: int = 100,
    weight_decay: float | WeightDecay = 1e-4,
    validation_fraction: float = 0.1,
    validation_rows: Tensor | None = None,
    early_stopping: bool = True,
    schedule: str = "constant",
    input_shape: Sequence[int] | None = None,
    checkpoint: str | PathLike | None = None,
    checkpoint_every: int = 10,
    generator: torch.Generator | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> FitResult:
    r"""Train a copy of a network by Adam on a mean loss with weight decay.

    .. math:: \frac1n \sum_i \ell(y_i, f(x_i, w)) + \tfrac12 \lambda \|w\|^2

    The loss of a point is :math:`\tfrac12 \|y - f\|^2`, summed over outputs, for
    Gaussian likelihoods, and the negative log likelihood in nats for the others. The
    decay :math:`\lambda` is coupled (its gradient goes through Adam), so the optimum is
    the MAP estimate under weights of prior variance s and noise variance v where
    :math:`\lambda = v / (s n)`, or :math:`\lambda = 1 / (s n)` for classification. The
    noise of a Gaussian likelihood does not enter, except that fixed per-point variances
    weight the points by their inverse, normalised to mean one.

    With a validation part the weights of the epoch with the lowest validation loss are
    returned. This is the safe regime: condition the posterior on all rows afterwards.
    Without one, all rows train, which suits ``schedule="cosine"`` and a decay matched
    to the prior.

    Args:
        network: Maps ``n x d`` (or ``n x input_shape``) to ``n x m`` or ``n``. Weights
            with ``requires_grad=False`` stay fixed. It is copied, never changed.
        train_X: Inputs, ``n x d``, or images in the layout of the network.
        train_Y: Targets: ``n x m`` floats; ``n`` integer labels for softmax; ``n`` or
            ``n x 1`` of 0 and 1 for binary likelihoods.
        likelihood: Picks the loss; any that has a rule in ``gpbridge.likelihoods``.
            Default: the choice of :func:`gpbridge.targets.default_likelihood`.
        epochs: Passes over the fit rows.
        learning_rate: Of Adam, at the start.
        batch_size: Rows per step. A last batch of one row is skipped if the network has
            batch normalisation.
        weight_decay: The decay, or a function of (epoch, network, fit inputs, fit
            targets), called before every epoch with the network in eval mode, which it
            must not change.
        validation_fraction: Share of rows to hold out, at random; 0 for none.
        validation_rows: Row numbers to hold out instead.
        early_stopping: Whether to return the best epoch. Without, only
            ``validation_rows`` are held out, and they are merely recorded.
        schedule: ``"constant"`` or ``"cosine"``, to zero over the epochs.
        input_shape: Shape of one input, to unflatten the ``d`` columns, as (c, h, w).
        checkpoint: A file, written every ``checkpoint_every`` epochs and at the end. If
            it exists, training continues from it, to the same bits; the other arguments
            must be those of before, and ``epochs`` may be larger, except with
            ``"cosine"``. A ``weight_decay`` must be a number or a plain function then.
        checkpoint_every: Epochs.
        generator: Source of all randomness: split, batches, dropout. None is a fresh
            one with seed 0.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, network in eval mode, the
            entries of this epoch in the history); True ends training.

    Returns:
        The trained copy in eval mode, its rows, residual variances, the last weight
        decay, and the history: ``train_loss`` (mean over the epoch, without the decay
        term), ``weight_decay`` and, with a validation part, ``validation_loss``.

    Raises:
        DivergedError: If a loss or a weight becomes NaN or infinite; its ``last_good``
            is the network at its best epoch so far, or, without early stopping, as it
            was when the last epoch of finite loss began.
        FileNotFoundError: If the folder of the checkpoint does not exist.
        TypeError: If ``weight_decay`` has a state that a checkpoint cannot keep.
        ValueError: If an option is out of range, nothing can be trained, the network
            cannot be copied, or the checkpoint is of another run.

    Warns:
        RuntimeWarning: If training is interrupted from the keyboard after its first
            epoch: the best weights so far are returned.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> fit = fit_map(nn.Linear(1, 1), X, 3 * X, epochs=100, learning_rate=0.1)
        >>> len(fit.fit_rows), len(fit.validation_rows)
        (36, 4)
        >>> bool(fit.validation_variance < 1e-3)
        True

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015.
    """
    check_options(network, epochs, learning_rate, batch_size, weight_decay, schedule)
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            "validation_fraction must lie in [0, 1), but is "
            f"{validation_fraction}. For a tenth of the rows pass 0.1, for none 0."
        )
    file = Checkpoint(checkpoint, checkpoint_every)
    if checkpoint is not None:
        _check_decay_state(weight_decay)
    check_inputs(train_X)
    check_tensor(train_Y=train_Y)
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_same_device(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)
    check_weights(network, train_X)
    train_X, train_Y = train_X.detach(), train_Y.detach()
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    key = partial(
        _key,
        {
            "likelihood": type(likelihood).__name__,
            "learning rate": learning_rate,
            "batch size": batch_size,
            "weight decay": described(weight_decay),
            "schedule": (schedule, epochs) if schedule == "cosine" else schedule,
            "keeping of the best epoch": early_stopping,
            "seed": checksum(generator.get_state()),
        },
    )
    fraction = validation_fraction if early_stopping else 0.0
    fit_rows, held_out = split_rows(train_X, fraction, validation_rows, generator)

    own = copy_without_hooks(network)
    X = shaped(train_X, input_shape)
    with isolated_randomness(generator, train_X.device):
        num_outputs = probe_outputs(own, X, input_shape)
        objective = objective_for(
            likelihood, train_Y, num_outputs, len(X), train_X.dtype
        )
        history = descend(
            own,
            objective,
            Part(X[fit_rows], objective.targets[fit_rows]),
            Part(X[held_out], objective.targets[held_out]),
            decay_at=_decay_at(weight_decay, own, train_X, train_Y, fit_rows),
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            cosine=schedule == "cosine",
            keep_best=early_stopping,
            generator=generator,
            progress=progress,
            callback=callback,
            checkpoint=file,
            key={} if checkpoint is None else key(X, objective.targets, held_out, own),
        )
        variances = [
            residual_variance(own, X[rows], train_Y[rows], num_outputs)
            if objective.is_regression
            else None
            for rows in (fit_rows, held_out)
        ]
    return FitResult(
        network=own,
        fit_rows=fit_rows,
        validation_rows=held_out,
        residual_variance=variances[0],
        validation_variance=variances[1],
        weight_decay=history["weight_decay"][-1],
        history=history,
    )


def _key(
    options: dict[str, Any],
    X: Tensor,
    targets: Tensor,
    held_out: Tensor,
    network: nn.Module,
) -> dict[str, Any]:
    """What a continued run must have in common with the one before."""
    return options | {
        "network": structure(network),
        "first weights": [checksum(p) for p in network.parameters()],
        "inputs": checksum(X),
        "targets": checksum(targets),
        "validation rows": checksum(held_out),
    }


def _check_decay_state(weight_decay: float | WeightDecay) -> None:
    function = weight_decay
    while isinstance(function, partial):
        function = function.func
    if callable(function) and not isinstance(function, FunctionType):
        raise TypeError(
            "weight_decay must be a number or a plain function where a checkpoint is "
            f"written, but is a {type(function).__name__}, whose own state the file "
            "does not hold. Train without checkpoint, or pass its number."
        )


def _decay_at(
    weight_decay: float | WeightDecay,
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    fit_rows: Tensor,
) -> Callable[[int], float]:
    if not callable(weight_decay):
        return lambda epoch: float(weight_decay)
    fit_X, fit_Y = train_X[fit_rows], train_Y[fit_rows]

    def decay_at(epoch: int) -> float:
        value = float(weight_decay(epoch, network, fit_X, fit_Y))
        check_decay(value, f"weight_decay in epoch {epoch}")
        return value

    return decay_at
