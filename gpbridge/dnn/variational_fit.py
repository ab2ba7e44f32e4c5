"""Fitting independent normals over weights by stochastic gradients.

In: a :class:`~gpbridge.dnn.variational.MeanFieldVI` and data, or all that builds one.
Out: the same, fitted, and the history of its loss. Next: its posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.checks import (
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_length,
    check_tensor,
    warn_user,
)
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.fit_input import shaped
from gpbridge.dnn.variational import MeanFieldVI
from gpbridge.frozen import copy_without_hooks
from gpbridge.probe import check_outputs
from gpbridge.targets import check_targets, default_likelihood

Callback = Callable[[int, MeanFieldVI, float], object]


def fit_mean_field(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    epochs: int = 1000,
    learning_rate: float = 1e-2,
    batch_size: int = 100,
    num_samples: int = 1,
    input_shape: Sequence[int] | None = None,
    generator: Generator | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    **options: Any,
) -> MeanFieldVI:
    """Build a :class:`~gpbridge.dnn.MeanFieldVI` for data and fit it.

    Args:
        network: Its weights are the first means; it is copied, never changed.
        train_X: As for :func:`fit_variational`.
        train_Y: As for :func:`fit_variational`.
        likelihood: Default: the choice of :func:`gpbridge.targets.default_likelihood`.
        epochs: As for :func:`fit_variational`.
        learning_rate: As for :func:`fit_variational`.
        batch_size: As for :func:`fit_variational`.
        num_samples: As for :func:`fit_variational`.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
        generator: As for :func:`fit_variational`.
        progress: As for :func:`fit_variational`.
        callback: As for :func:`fit_variational`.
        **options: The other options of :class:`~gpbridge.dnn.MeanFieldVI`, as
            ``prior`` and ``initial_std``.

    Returns:
        The fitted distribution. Noise is learnt in a copy of the likelihood: hand on
        ``vi.likelihood``, for predictions too.

    Raises:
        DivergedError: If the fit diverges; its ``last_good`` is the distribution as it
            was when the last epoch of finite loss began.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> vi = fit_mean_field(nn.Linear(1, 1), X, 3 * X, epochs=3, progress=False)
        >>> vi.draw(5)(X).shape
        torch.Size([5, 40, 1])
    """
    _check_data(train_X, train_Y)
    if likelihood is None:
        own, X = copy_without_hooks(network), shaped(train_X[:2], input_shape)
        with torch.no_grad():
            outputs = check_outputs(own(X), X)
        likelihood = default_likelihood(train_Y, outputs, train_X.dtype)
    n = len(train_X)
    vi = MeanFieldVI(network, likelihood, n, input_shape=input_shape, **options)
    fit_variational(
        vi,
        train_X,
        train_Y,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        num_samples=num_samples,
        generator=generator,
        progress=progress,
        callback=callback,
    )
    return vi


def fit_variational(
    vi: MeanFieldVI,
    train_X: Tensor,
    train_Y: Tensor,
    *,
    epochs: int = 1000,
    learning_rate: float = 1e-2,
    batch_size: int = 100,
    num_samples: int = 1,
    generator: Generator | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> list[float]:
    """Minimise the loss by Adam, with a rate that falls to zero as a cosine.

    For a loop of your own, call ``vi.loss`` with any optimizer.

    Args:
        vi: The distribution, fitted in place.
        train_X: Inputs ``n x d``, or in the layout of the network.
        train_Y: Targets as for :func:`gpbridge.dnn.fit_map`.
        epochs: Passes over the data.
        learning_rate: Of Adam, at the start.
        batch_size: Rows per step.
        num_samples: Passes of the network per step.
        generator: Source of batches and weight noise; None is a fresh one, seed 0.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, vi, mean loss); True ends it.

    Returns:
        The mean loss of every epoch, nats per datum.

    Raises:
        DivergedError: If the fit diverges; the distribution, its ``last_good``, is as
            it was when the last epoch of finite loss began.
        ValueError: If there are not N rows, or an option is out of range.
        KeyboardInterrupt: If it is interrupted in its first epoch.

    Warns:
        RuntimeWarning: If it is interrupted from the keyboard after its first epoch.
    """
    check_count(epochs=epochs, batch_size=batch_size, num_samples=num_samples)
    check_positive(learning_rate=learning_rate)
    _check_data(train_X, train_Y)
    if len(train_X) != vi.num_data:
        raise ValueError(
            f"train_X has {len(train_X)} rows, but num_data is {vi.num_data}: the "
            "weight of the prior would be wrong. Build the posterior with the number "
            "of its data, or write a loop over loss(X, Y)."
        )
    X = shaped(train_X.detach(), vi.net.input_shape)
    with torch.no_grad():
        num_outputs = vi.sample_outputs(X[:2]).shape[1]
    Y = check_targets(vi.likelihood, train_Y, num_outputs, len(X), X.dtype)
    if generator is None:
        generator = Generator().manual_seed(0)
    history: list[float] = []
    bar = tqdm(
        range(epochs), "mean field", leave=False, disable=None if progress else True
    )
    try:
        for mean in _descend(
            vi, X, Y, bar, learning_rate, batch_size, num_samples, generator
        ):
            history.append(mean)
            if not bar.disable:
                bar.set_postfix_str(f"loss {mean:.3g}", refresh=False)
            if callback is not None and callback(len(history) - 1, vi, mean) is True:
                break
    except KeyboardInterrupt:
        if not history:
            raise
        warn_user(
            f"The fit was interrupted after {len(history)} of {epochs} epochs; the "
            "present means and deviations stay.",
            RuntimeWarning,
        )
    finally:
        bar.close()
        vi.zero_grad()
    return history


def _check_data(train_X: Tensor, train_Y: Tensor) -> None:
    check_inputs(train_X)
    check_tensor(train_Y=train_Y)
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)


def _descend(vi, X, Y, epochs, learning_rate, batch_size, num_samples, generator):
    """Yield the mean loss of every epoch."""
    weights = [p for p in vi.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(epochs))
    noise = None
    if isinstance(vi.likelihood, FixedNoiseGaussianLikelihood):
        noise = vi.likelihood.noise_covar.noise
    good = None
    for epoch in epochs:
        before = [p.detach().clone() for p in weights]
        good = before if good is None else good
        order = torch.randperm(len(X), generator=generator, device=generator.device)
        total = 0.0
        for rows in order.to(X.device).split(batch_size):
            optimizer.zero_grad()
            own = None if noise is None else noise[rows]
            loss = vi.loss(X[rows], Y[rows], generator, num_samples, own)
            loss.backward()
            optimizer.step()
            total = total + len(rows) * loss.detach()
        schedule.step()
        mean = float(total) / len(X)
        if math.isfinite(mean):
            good = before  # and not what the last step of the epoch made of it
        if not math.isfinite(mean) or not all(
            bool(p.isfinite().all()) for p in weights
        ):
            with torch.no_grad():
                for p, value in zip(weights, good, strict=True):
                    p.copy_(value)
            raise DivergedError(
                f"The loss became {mean} in epoch {epoch}; means and deviations are "
                "those with which the last epoch of finite loss began, in .last_good "
                "of this error. Standardise inputs and targets, or "
                f"try {rate_advice(learning_rate, 0.01)}.",
                vi,
            )
        yield mean
