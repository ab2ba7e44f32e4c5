"""What training accepts, and which rows it holds out.

In: the arguments of :func:`gpbridge.dnn.fit_map`. Out: an error that says what to
change, or the rows to fit and to hold out, the inputs in the shape of the network, and
its number of outputs.
Next: ``fit`` asks all of it before it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_positive,
    check_same_device,
    check_tensor,
)
from gpbridge.data import holdout_rows
from gpbridge.probe import check_outputs, run_or_explain

WeightDecay = Callable[[int, nn.Module, Tensor, Tensor], float]


def check_options(
    network: nn.Module,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float | WeightDecay,
    schedule: str,
) -> None:
    """Require a module and options in their ranges."""
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
        check_decay(weight_decay, "weight_decay")


def check_decay(value: float, name: str) -> None:
    """Require a weight decay that is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{name} must be finite and not negative, but is {value}. For none pass 0."
        )


def check_weights(network: nn.Module, train_X: Tensor) -> None:
    """Require weights to train, of the dtype and on the device of the inputs."""
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


def split_rows(
    train_X: Tensor,
    fraction: float,
    validation_rows: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The rows to fit and those to hold out, at random or as given."""
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


def shaped(X: Tensor, input_shape: Sequence[int] | None) -> Tensor:
    """Unflatten the rows to ``n x input_shape``."""
    if input_shape is None:
        return X
    if math.prod(input_shape) != math.prod(X.shape[1:]):
        raise ShapeError(
            f"input_shape {tuple(input_shape)} has {math.prod(input_shape)} numbers "
            f"per row, but train_X has shape {tuple(X.shape)}."
        )
    return X.reshape(len(X), *input_shape)


def probe_outputs(
    network: nn.Module, X: Tensor, input_shape: Sequence[int] | None
) -> int:
    """Run two rows through the network and return its number of outputs."""
    with torch.no_grad():
        outputs = run_or_explain(network, X[:2], input_shape)
    return check_outputs(outputs, X[:2])
