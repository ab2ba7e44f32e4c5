"""Training a deep Gaussian process on its evidence lower bound.

In: a :class:`~gpbridge.dnn.deep_gp.DeepGaussianProcess` and data, or a loader of them.
Out: a trained copy, its bounds, and a state to go on from. Next: predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from gpbridge.checks import check_count, check_kind, check_number
from gpbridge.dnn.deep_gp import DeepGaussianProcess
from gpbridge.dnn.elbo_training import ELBOFit, ascend_elbo
from gpbridge.dnn.training import Callback


def fit_deep_gp(
    model: DeepGaussianProcess,
    X: Tensor | Iterable,
    Y: Tensor | None = None,
    *,
    epochs: int = 200,
    learning_rate: float = 1e-2,
    batch_size: int | None = None,
    num_samples: int = 5,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> ELBOFit:
    """Train a copy of the model on its lower bound by Adam.

    A step on b rows with s draws and M inducing points costs about, for each layer with
    h outputs, M^3 + h s b M^2.

    Args:
        model: The model, which stays as it is; its likelihood is copied with it.
        X: Inputs ``n x d``; or an iterable of pairs of inputs and targets that can be
            iterated again, as a ``DataLoader``. That is read once and kept whole.
        Y: Targets ``n x m``; ``n`` for labels or one output; None beside a loader.
        epochs: Passes over the data, after those of ``resume``.
        learning_rate: Of Adam, for all parameters.
        batch_size: Rows per step; default all, at most 1024.
        num_samples: Draws of the hidden layers per step.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: The ``state`` of a fit before, of the same data and a model built alike,
            to go on from: with the same public attributes of its modules. What they
            count as they are called belongs in a buffer, or behind an underscore.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, model in eval mode, entries of
            the history); True ends training.

    Returns:
        The trained model, the bounds of its epochs in nats per datum, and the state to
        resume from.

    Raises:
        DivergedError: If the bound or a weight becomes NaN or infinite; its
            ``last_good`` is the fit at the last good epoch.
        ShapeError: If targets do not fit the inputs or the model.
        ValueError: If an option is out of range, or ``resume`` is of another run.
        TypeError: If the model is no deep GP, the targets are missing, or batches are
            no pairs of tensors.

    Warns:
        NotConvergedWarning: If the bound still rises at the last epoch, by more than
            its noise (:mod:`gpbridge.convergence`).
        RuntimeWarning: If the keyboard interrupts: the last good epoch is returned.

    Example:
        >>> from gpbridge.dnn import build_deep_gp
        >>> X = torch.linspace(-1, 1, 20)[:, None]
        >>> model = build_deep_gp(X, num_inducing=5)
        >>> fit = fit_deep_gp(model, X, X.sign(), epochs=2)
        >>> len(fit.history["elbo"])
        2
    """  # noqa: DOC502
    check_kind(DeepGaussianProcess, "Try build_deep_gp(X).", model=model)
    X, Y = _collected(X, Y)
    check_count(num_samples=num_samples)
    check_number(learning_rate=learning_rate)
    if callback is not None and not callable(callback):
        raise TypeError(
            "callback must be a function of (epoch, model, entries), but is "
            f"{type(callback).__name__}."
        )
    targets = model.targets(X, Y)
    own, n = copy.deepcopy(model), len(X)

    def elbo(rows: Tensor, generator: Generator) -> Tensor:
        return own._elbo(X[rows], targets[rows], n, num_samples, generator)

    return ascend_elbo(
        own,
        elbo,
        (X, targets),
        groups=[(list(own.parameters()), learning_rate)],
        epochs=epochs,
        batch_size=min(n, 1024) if batch_size is None else batch_size,
        generator=generator,
        resume=resume,
        progress=progress,
        callback=callback,
        name="fit_deep_gp",
        usual_rate=1e-2,
        warn_rising=True,
    )


def _collected(X: Tensor | Iterable, Y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tensors as they are, or the batches of a loader joined."""
    if isinstance(X, Tensor) != isinstance(Y, Tensor):
        raise TypeError(
            "Pass inputs and targets, fit_deep_gp(model, X, Y), or one loader of "
            f"pairs, fit_deep_gp(model, loader); X is a {type(X).__name__} and Y a "
            f"{type(Y).__name__}."
        )
    if isinstance(X, Tensor):
        return X, Y
    if isinstance(X, Iterator):
        raise TypeError(
            f"X is a {type(X).__name__}, which can be iterated once only. Pass the "
            "DataLoader itself, or a list of batches."
        )
    parts = list(X)
    pair = all(
        isinstance(part, list | tuple)
        and len(part) == 2
        and all(isinstance(one, Tensor) for one in part)
        for part in parts
    )
    if not parts or not pair:
        raise TypeError(
            "A loader must give one or more pairs of tensors (inputs, targets). Try "
            "DataLoader(TensorDataset(X, Y), batch_size=...)."
        )
    inputs, targets = zip(*parts, strict=True)
    return torch.cat(inputs).flatten(1), torch.cat(targets)
