r"""Training many copies of one network at once.

In: a module, k initial weights, data in common or for each copy, a loss. Out: k trained
weights with their histories. Next: ``ensemble_fit`` makes modules of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike

from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.checks import check_count, warn_user
from gpbridge.dnn.checkpoints import Checkpoint
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.dnn.replica_options import Decay, ReplicaOptions
from gpbridge.dnn.stacked_loss import Loss
from gpbridge.dnn.stacked_training import StackedTraining
from gpbridge.types import Params

Callback = Callable[[int, Params, Params], object]


def train_replicas(
    network: nn.Module,
    weights: Tensor | Params,
    X: Tensor,
    Y: Tensor,
    loss: Loss,
    *,
    epochs: int = 300,
    batch_size: int = 100,
    optimizer: str = "adam",
    learning_rate: float = 5e-3,
    momentum: float = 0.9,
    weight_decay: Decay = 1e-4,
    schedule: Callable[[int], float] | None = None,
    rows: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    keep_best: bool = True,
    input_shape: Sequence[int] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    checkpoint: str | PathLike | None = None,
    checkpoint_every: int = 10,
    callback: Callback | None = None,
    progress: bool = True,
) -> ReplicaFit:
    r"""Train k copies of a network at once, each on its own minibatches.

    .. math:: w_r = \arg\min_w \tfrac1n \sum_i \ell(f(x_{ri}, w), y_{ri})
              + \tfrac12 \lambda_r \|w\|^2, \quad r = 1 \dots k

    The decay is coupled: its gradient goes through the optimiser. Memory of the state
    is (2 + 3) k p for Adam with the last good and the best epoch; a step costs the
    arithmetic of k steps and the dispatch of about one.

    Args:
        network: The module, or a :class:`~gpbridge.functional.FunctionalNet` that says
            which weights are trained; copied, never changed.
        weights: Where the copies start, ``k x p`` in the order of ``FunctionalNet``, or
            by name ``k x shape``. Buffers may be among the latter.
        X: Inputs ``n x d``, in common, or ``k x n x d``, for each copy. Images as rows.
        Y: Targets, ``n x ...`` or ``k x n x ...``.
        loss: Maps outputs ``b x m`` and targets ``b x ...`` of one copy to their mean
            loss, a scalar. One that takes ``k x b x m`` and gives ``k`` is faster.
        epochs: Passes over the rows.
        batch_size: Rows per step and copy. A last batch of one row is skipped if the
            network has batch normalisation.
        optimizer: ``"adam"`` or ``"sgd"``, of torch.optim.
        learning_rate: The rate.
        momentum: Of SGD.
        weight_decay: One number, one for each copy, or a function of (epoch, state)
            that gives either.
        schedule: Factor of an epoch, as in :mod:`gpbridge.dnn.schedules`. The rate is
            set to the product; nothing accumulates. Default constant.
        rows: Row numbers ``k x n'`` of X on which each copy is trained; they may
            repeat. Default all.
        validation: Inputs and targets, in common or for each copy.
        keep_best: Whether each copy is returned as it was at its lowest validation
            loss; otherwise at the end.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
        generator: Source of all randomness, orders of rows and dropout. A list has one
            for each copy, which then sees the batches of ``fit_map`` with it. None is a
            fresh one with seed 0.
        checkpoint: A file, written every ``checkpoint_every`` epochs and at the end. If
            it exists, training continues from it, to the same bits; the other arguments
            must be those of before, and ``epochs`` may be larger.
        checkpoint_every: Epochs.
        callback: Called after every epoch with (epoch, weights and buffers by name
            ``k x shape``, entries ``k`` of the history); what it keeps it must copy.
            True ends training.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The trained copies. The history has ``train_loss`` (mean over the epoch, without
        the decay term), ``weight_decay``, ``learning_rate`` and, with validation data,
        ``validation_loss``, ``epochs x k`` each.

    Raises:
        FileNotFoundError: If the folder of the checkpoint does not exist.
        DivergedError: If a copy diverges; it names the copy and holds all copies as
            they were before.
        ShapeError: If weights, data, or the loss have the wrong shape.
        ValueError: If an option is out of range, the network cannot be vmapped, or the
            checkpoint is of another run.
        KeyboardInterrupt: If it comes before the first epoch has ended.

    Warns:
        RuntimeWarning: If training is interrupted from the keyboard after its first
            epoch: the copies so far are returned.

    Example:
        >>> import torch
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> fit = train_replicas(
        ...     nn.Linear(1, 1), torch.zeros(3, 2), X, 3 * X, nn.functional.mse_loss,
        ...     epochs=300, learning_rate=0.1, weight_decay=0.0, progress=False,
        ... )
        >>> bool((fit.weights[:, 0] - 3).abs().max() < 1e-2)
        True
    """
    check_count(epochs=epochs)
    file = Checkpoint(checkpoint, checkpoint_every)
    training = StackedTraining(
        network,
        weights,
        X,
        Y,
        loss,
        ReplicaOptions(
            batch_size, optimizer, learning_rate, momentum, weight_decay, schedule
        ),
        rows=rows,
        validation=validation,
        keep_best=keep_best,
        input_shape=input_shape,
        generator=generator,
    )
    file.resume(training.load_state_dict, epochs, X.device)
    bar = tqdm(
        range(training.epoch, epochs),
        desc="train_replicas",
        leave=False,
        disable=None if progress else True,
    )
    try:
        for epoch in bar:
            entry = training.train_epoch()
            if not bar.disable:
                shown = entry.get("validation_loss", entry["train_loss"]).mean()
                bar.set_postfix_str(f"loss {float(shown):.3g}", refresh=False)
            stop = callback is not None and callback(epoch, training.current(), entry)
            last = stop is True or epoch + 1 == epochs
            file.keep(epoch + 1, last, training.state_dict)
            if stop is True:
                break
    except KeyboardInterrupt:
        if not training.epoch:
            raise
        warn_user(
            f"Training was interrupted after {training.epoch} of {epochs} epochs; the "
            "copies so far are returned.",
            RuntimeWarning,
        )
    finally:
        bar.close()
    return training.result()
