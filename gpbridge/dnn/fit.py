"""Training one network to a maximum a posteriori estimate of its weights.

In: a module, its data and a likelihood. Out: a ``FitResult``, a trained copy with the
facts that a posterior needs: which rows it has seen, its residual variances, its weight
decay. The caller's module and the global random state are left as they were.
Next: ``linearized`` turns the result into a Gaussian process.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_same_length,
    check_tensor,
)
from gpbridge.data import holdout_rows
from gpbridge.frozen import copy_without_hooks
from gpbridge.likelihoods import is_gaussian, log_prob
from gpbridge.targets import check_targets, default_likelihood
from gpbridge.types import FitResult

WeightDecay = Callable[[int, nn.Module, Tensor, Tensor], float]
Callback = Callable[[int, nn.Module, dict[str, float]], object]

EVALUATION_ROWS = 4096  # rows per forward pass without gradient


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
        RuntimeError: If the loss becomes NaN or infinite.
        ValueError: If an option is out of range, nothing can be trained, or the network
            cannot be copied.

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
    _check_options(network, epochs, learning_rate, batch_size, weight_decay, schedule)
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            "validation_fraction must lie in [0, 1), but is "
            f"{validation_fraction}. For a tenth of the rows pass 0.1, for none 0."
        )
    check_inputs(train_X)
    check_tensor(train_Y=train_Y)
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_same_device(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)
    _check_weights(network, train_X)
    train_X, train_Y = train_X.detach(), train_Y.detach()
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    fraction = validation_fraction if early_stopping else 0.0
    fit_rows, held_out = _split(train_X, fraction, validation_rows, generator)

    own = copy_without_hooks(network)
    X = _shaped(train_X, input_shape)
    with _isolated(generator, train_X.device):
        num_outputs = _probe(own, X)
        objective = _objective(likelihood, train_Y, num_outputs, len(X), train_X.dtype)
        history = _descend(
            own,
            objective,
            _Part(X[fit_rows], objective.targets[fit_rows]),
            _Part(X[held_out], objective.targets[held_out]),
            decay_at=_decay_at(weight_decay, own, train_X, train_Y, fit_rows),
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            cosine=schedule == "cosine",
            keep_best=early_stopping,
            generator=generator,
            progress=progress,
            callback=callback,
        )
        variances = [
            (_evaluate(own, X[rows], num_outputs) - train_Y[rows]).square().mean(0)
            if objective.is_regression and len(rows)
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


class _Part(NamedTuple):
    """Rows of inputs and of the objective's targets."""

    X: Tensor
    targets: Tensor


class _Objective(NamedTuple):
    """A mean loss of outputs ``n x m`` and of targets in the form that it wants."""

    loss: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor
    num_outputs: int
    is_regression: bool


def _descend(
    network: nn.Module,
    objective: _Objective,
    fit: _Part,
    validation: _Part,
    *,
    decay_at: Callable[[int], float],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    cosine: bool,
    keep_best: bool,
    generator: torch.Generator,
    progress: bool,
    callback: Callback | None,
) -> dict[str, list[float]]:
    """Run the epochs on ``network`` in place, leave it at the best, in eval mode."""
    n, loss, num_outputs = len(fit.X), objective.loss, objective.num_outputs
    validates = len(validation.X) > 0
    has_batch_norm = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        for module in network.modules()
    )
    if has_batch_norm and min(n, batch_size) == 1:
        raise ValueError(
            "The network has batch normalisation, which needs batches of two rows or "
            f"more, but batch_size is {batch_size} and {n} rows are fitted."
        )
    optimizer = _adam(network, learning_rate)
    group = optimizer.param_groups[0]
    history: dict[str, list[float]] = {"train_loss": [], "weight_decay": []}
    if validates:
        history["validation_loss"] = []
    best_loss, best_state = math.inf, None

    # No bar without a terminal: disable=None.
    bar = tqdm(
        range(epochs), desc="fit_map", leave=False, disable=None if progress else True
    )
    try:
        for epoch in bar:
            group["weight_decay"] = decay = decay_at(epoch)
            if cosine:
                group["lr"] = (
                    learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
                )
            order = torch.randperm(n, generator=generator, device=generator.device)
            batches = order.to(fit.X.device).split(batch_size)
            if has_batch_norm and len(batches[-1]) == 1:
                batches = batches[:-1]
            network.train()
            total = 0.0
            for rows in batches:
                optimizer.zero_grad()
                # Networks may squeeze: always n x m, also for a last batch of one row.
                outputs = network(fit.X[rows]).reshape(len(rows), num_outputs)
                batch_loss = loss(outputs, fit.targets[rows])
                batch_loss.backward()
                optimizer.step()
                total = total + len(rows) * batch_loss.detach()
            network.eval()
            seen = sum(map(len, batches))
            entry = {"train_loss": float(total) / seen, "weight_decay": decay}
            if validates:
                outputs = _evaluate(network, validation.X, num_outputs)
                entry["validation_loss"] = float(loss(outputs, validation.targets))
            if not all(map(math.isfinite, entry.values())):
                raise RuntimeError(
                    f"Training diverged in epoch {epoch}: {entry}. Standardise inputs "
                    f"and targets, or lower learning_rate (it is {learning_rate})."
                )
            if validates and keep_best and entry["validation_loss"] < best_loss:
                best_loss = entry["validation_loss"]
                best_state = [t.detach().clone() for t in _state(network)]
            for key, value in entry.items():
                history[key].append(value)
            if not bar.disable:
                shown = entry.get("validation_loss", entry["train_loss"])
                bar.set_postfix_str(f"loss {shown:.3g}", refresh=False)
            if callback is not None and callback(epoch, network, entry) is True:
                break
    except KeyboardInterrupt:
        if not history["train_loss"]:
            raise
        done = len(history["train_loss"])
        which = "best" if best_state is not None else "last"
        warnings.warn(
            f"Training was interrupted after {done} of {epochs} epochs; the {which} "
            "weights so far are returned.",
            RuntimeWarning,
            stacklevel=3,
        )
    finally:
        bar.close()
        network.eval()
        network.zero_grad()
    if best_state is not None:
        with torch.no_grad():
            for tensor, best in zip(_state(network), best_state, strict=True):
                tensor.copy_(best)
    return history


def _state(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    weights = [p for p in network.parameters() if p.requires_grad]
    # One fused kernel per step: a third faster on small networks on a CPU.
    fused = all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in weights
    )
    return torch.optim.Adam(weights, lr=learning_rate, fused=fused)


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
        _check_decay(value, f"weight_decay in epoch {epoch}")
        return value

    return decay_at


def _objective(
    likelihood: Likelihood | None,
    Y: Tensor,
    num_outputs: int,
    num_rows: int,
    dtype: torch.dtype,
) -> _Objective:
    """Pick the loss; check the targets and bring them into its form."""
    if likelihood is None:
        likelihood = default_likelihood(Y, num_outputs, dtype)
    targets = check_targets(likelihood, Y, num_outputs, num_rows, dtype)
    if not is_gaussian(likelihood):
        return _Objective(
            partial(_mean_nll, likelihood), targets, num_outputs, is_regression=False
        )
    check_same_dtype("train_Y", targets, dtype)
    if not isinstance(likelihood, FixedNoiseGaussianLikelihood):
        return _Objective(_square_loss, targets, num_outputs, is_regression=True)
    precision = 1 / likelihood.noise.detach().to(Y)
    weights = (precision / precision.mean())[:, None]
    # Weights travel as a last column, so that batches keep them beside their rows.
    targets = torch.cat([targets, weights], -1)
    return _Objective(_weighted_square_loss, targets, num_outputs, is_regression=True)


def _mean_nll(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    return -log_prob(likelihood, outputs, targets).mean()


def _square_loss(outputs: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * Y.shape[1] * F.mse_loss(outputs, Y)  # a sum over outputs


def _weighted_square_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    Y, weights = targets[:, :-1], targets[:, -1:]
    return 0.5 * (weights * (outputs - Y).square()).sum() / len(Y)


def _check_options(
    network: nn.Module,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float | WeightDecay,
    schedule: str,
) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network must be a torch.nn.Module, but is {type(network).__name__}."
        )
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}.")
    check_positive(learning_rate=learning_rate)
    check_choice("schedule", schedule, ("constant", "cosine"))
    if not callable(weight_decay):
        _check_decay(weight_decay, "weight_decay")


def _check_decay(value: float, name: str) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{name} must be finite and not negative, but is {value}. For none pass 0."
        )


def _check_weights(network: nn.Module, train_X: Tensor) -> None:
    weights = [p for p in network.parameters() if p.requires_grad]
    if not weights:
        raise ValueError(
            "The network has nothing to train: no parameter has requires_grad. Try "
            "network.requires_grad_(True)."
        )
    if any(nn.parameter.is_lazy(p) for p in weights):
        raise ValueError(
            "The network has lazy layers that have not seen data, so they have no "
            "weights to start from. Call network(train_X[:2]) once before."
        )
    dtypes = {p.dtype for p in weights if p.is_floating_point()}
    if dtypes - {train_X.dtype}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"The weights of the network are {found}, but train_X is {train_X.dtype}. "
            "Try network.to(train_X.dtype), or convert the data."
        )
    check_same_device(**{"train_X": train_X, "a weight of the network": weights[0]})


def _split(
    train_X: Tensor,
    fraction: float,
    validation_rows: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    n = len(train_X)
    every = torch.arange(n, device=train_X.device)
    if validation_rows is not None:
        held_out = _checked_rows(validation_rows, n).to(train_X.device)
        is_fit = torch.ones_like(every, dtype=torch.bool)
        is_fit[held_out] = False
        return every[is_fit], held_out
    if fraction == 0:
        return every, every[:0]
    if n == 1:
        raise ValueError(
            "train_X has one row, so none can be held out for early stopping. Pass "
            "validation_fraction=0."
        )
    fit_rows, held_out = holdout_rows(n, fraction, generator)
    return fit_rows.to(train_X.device), held_out.to(train_X.device)


def _checked_rows(rows: Tensor, n: int) -> Tensor:
    check_tensor(validation_rows=rows)
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(
            "validation_rows must be a vector of row numbers, but is "
            f"{tuple(rows.shape)} of {rows.dtype}. For a mask try "
            "torch.nonzero(mask).flatten()."
        )
    unique = rows.long().unique()
    in_range = ((unique >= 0) & (unique < n)).all()
    if len(unique) != len(rows) or not in_range or len(rows) in (0, n):
        raise ValueError(
            f"validation_rows must be different row numbers in 0 .. {n - 1}, at least "
            f"one and not all, but are {len(rows)} numbers, {len(unique)} of them "
            f"different, between {min(rows.tolist(), default=None)} and "
            f"{max(rows.tolist(), default=None)}."
        )
    return unique


def _shaped(X: Tensor, input_shape: Sequence[int] | None) -> Tensor:
    if input_shape is None:
        return X
    if math.prod(input_shape) != math.prod(X.shape[1:]):
        raise ShapeError(
            f"input_shape {tuple(input_shape)} has {math.prod(input_shape)} numbers "
            f"per row, but train_X has shape {tuple(X.shape)}."
        )
    return X.reshape(len(X), *input_shape)


@contextmanager
def _isolated(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's own random state from ``generator`` and put it back afterwards."""
    # Dropout has no generator argument.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators), torch.enable_grad():
        # torch.manual_seed would seed devices whose state is not saved.
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed)
        yield


def _probe(network: nn.Module, X: Tensor) -> int:
    """Run two rows through the network and return its number of outputs."""
    rows = X[:2]
    try:
        with torch.no_grad():
            outputs = network(rows)
    except Exception as error:
        raise ShapeError(
            f"The network fails on inputs of shape {tuple(rows.shape)}: {error} Do the "
            "columns of train_X match its first layer? Images as rows of ``d`` columns "
            "need input_shape=(c, h, w)."
        ) from error
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "The network must return one tensor, but returns "
            f"{type(outputs).__name__}. Wrap it in a module that picks one tensor."
        )
    if outputs.dim() not in (1, 2) or len(outputs) != len(rows):
        raise ShapeError(
            f"The network must return ``n x m`` or ``n``, but {len(rows)} rows gave "
            f"{tuple(outputs.shape)}. Flatten its output to one row per input."
        )
    return 1 if outputs.dim() == 1 else outputs.shape[1]


def _evaluate(network: nn.Module, X: Tensor, num_outputs: int) -> Tensor:
    """Outputs ``n x m`` in chunks, without gradients."""
    with torch.no_grad():
        chunks = [network(rows) for rows in X.split(EVALUATION_ROWS)]
    return torch.cat([chunk.reshape(-1, num_outputs) for chunk in chunks])
