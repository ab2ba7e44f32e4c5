"""The loop of a training run that learns hyperparameters, with bar and checkpoints.

In: the state of a run. Out: the state after its last epoch, or after an interruption.
Next: ``online`` and ``invariance`` make a result of it.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

import torch
from tqdm import tqdm

from gpbridge.checks import warn_user
from gpbridge.dnn.checkpoints import Checkpoint
from gpbridge.dnn.divergence import rate_advice
from gpbridge.selection.online_training import NonFiniteError, OnlineTraining
from gpbridge.types import Evidence


def check_folder(checkpoint: str | PathLike | None) -> None:
    """Require a file in a folder that exists.

    Raises:
        FileNotFoundError: If it does not.
    """  # noqa: DOC502
    Checkpoint(checkpoint, every=1)


def run_epochs(
    training: OnlineTraining,
    epochs: int,
    name: str,
    checkpoint: str | PathLike | None,
    checkpoint_every: int,
    callback: Callable[[OnlineTraining], object] | None,
    progress: bool,
) -> None:
    """Train up to a number of epochs, from a checkpoint if there is one.

    Args:
        training: The state of the run, changed in place.
        epochs: In all, those of the checkpoint included.
        name: Of the bar.
        checkpoint: A file, or None.
        checkpoint_every: Epochs.
        callback: Called after each epoch; True ends the run.
        progress: Whether to show a bar, if there is a terminal.

    Raises:
        ValueError: If the checkpoint is of another run, or of a longer one.
        KeyboardInterrupt: If it comes before the first epoch has ended.

    Warns:
        RuntimeWarning: If it is interrupted from the keyboard after its first epoch.
    """  # noqa: DOC502
    file = Checkpoint(checkpoint, checkpoint_every)
    file.resume(training.load_state_dict, epochs, training.batches.device)
    bar = tqdm(
        range(training.epoch, epochs),
        desc=name,
        leave=False,
        disable=None if progress else True,
    )
    try:
        for epoch in bar:
            training.advance()
            if not bar.disable:
                bar.set_postfix_str(f"loss {training.losses[-1]:.3g}", refresh=False)
            last = callback is not None and callback(training) is True
            last = last or epoch + 1 == epochs
            file.keep(epoch + 1, last, training.state_dict)
            if last:
                break
    except KeyboardInterrupt:
        if not training.epoch:
            raise
        warn_user(
            f"Training was interrupted after {training.epoch} of {epochs} epochs; the "
            "fit so far is returned.",
            RuntimeWarning,
        )
    finally:
        bar.close()


def final_evidence(training: OnlineTraining) -> Evidence:
    """The evidence of the end.

    Raises:
        NonFiniteError: If there is none.
    """
    try:
        found = training.evidence()
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError("a curvature that cannot be factorised") from error
    if not bool(found.value.isfinite()):
        raise NonFiniteError(f"an evidence of {float(found.value):.3g} nats")
    return found


def diverged_message(
    training: OnlineTraining, error: Exception, learning_rate: float, usual: float
) -> str:
    """What happened, where the last good fit is, and what to try."""
    return (
        f"Training found {error} in epoch {training.epoch}. The fit as it was before "
        "is .last_good of this error. Standardise inputs and targets, or try "
        f"{rate_advice(learning_rate, usual)}."
    )
