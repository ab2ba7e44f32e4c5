"""A data set that comes in batches, as one pair of tensors.

A loader is read twice: the first pass counts and checks, so that memory is estimated
before it is taken and a loader that changes is found; the second fills the tensors. A
linearised GP needs its inputs again for every posterior, so they stay.

In: a loader of pairs. Out: :class:`Loaded`, inputs as rows, targets, the shape of one
input. Next: ``gp`` conditions on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor, device, dtype, nn

from gpbridge.checks import ShapeError, check_memory


class Loaded(NamedTuple):
    """A data set in memory."""

    X: Tensor  # n x d
    Y: Tensor  # n or n x m
    input_shape: tuple[int, ...] | None  # of one input, where it is no vector


class _Layout(NamedTuple):
    """What all batches have in common."""

    shape: Size  # of one row
    dtype: dtype
    device: device


class _Measured(NamedTuple):
    rows: int
    X: _Layout
    Y: _Layout


def load_data(
    train_X: Tensor | Iterable,
    train_Y: Tensor | None,
    input_shape: Sequence[int] | None,
    memory_budget: float,
) -> Loaded:
    """Take tensors as they are, and collect the batches of a loader.

    Args:
        train_X: Inputs, or an iterable of pairs of inputs and targets that can be
            iterated again, as a ``DataLoader``. Its order does not matter.
        train_Y: Targets, None beside a loader.
        input_shape: Shape of one input, or None; that of a loader's batches.
        memory_budget: Bytes for the data of a loader.

    Returns:
        The data.

    Raises:
        TypeError: If one of the arguments is missing or too many, batches are no pairs
            of tensors, or the loader can be iterated once only.
        ValueError: If the loader is empty, or its number of rows changes.
        ShapeError: If batches do not agree, or with ``input_shape``.
        MemoryError: If the data need more than the budget.
    """  # noqa: DOC502
    if not _is_loader(train_X):
        if train_Y is None and isinstance(train_X, Tensor):
            raise TypeError(
                "train_Y is missing. Pass inputs and targets, or one loader of pairs, "
                "LinearizedGP(network, loader)."
            )
        return Loaded(train_X, train_Y, _tuple(input_shape))
    if train_Y is not None:
        if isinstance(train_X, list | tuple):
            return Loaded(train_X, train_Y, _tuple(input_shape))  # refused as no tensor
        raise TypeError(
            f"train_X is a {type(train_X).__name__}, a loader of pairs (inputs, "
            "targets), so that train_Y must be left out. A likelihood is passed by "
            "name, likelihood=..."
        )
    measured = _measure(train_X)
    per_row = sum(
        part.shape.numel() * part.dtype.itemsize for part in (measured.X, measured.Y)
    )
    check_memory(
        f"The data of the loader, {measured.rows} rows of {per_row} bytes,",
        float(measured.rows * per_row),
        memory_budget,
        "Pass a loader of fewer rows, or a larger memory_budget of the inference.",
    )
    X, Y = _fill(train_X, measured)
    shape = tuple(measured.X.shape)
    if len(shape) <= 1:
        return Loaded(X.reshape(len(X), -1), Y, _tuple(input_shape))
    if input_shape is not None and tuple(input_shape) != shape:
        raise ShapeError(
            f"input_shape is {tuple(input_shape)}, but the inputs of the loader have "
            f"shape {shape}. Leave it out: it is read off the loader."
        )
    return Loaded(X.flatten(1), Y, shape)


def _is_loader(value: object) -> bool:
    """Whether it is to be iterated; arrays and networks can be, and are no loaders."""
    if isinstance(value, nn.Module | str | Mapping) or hasattr(value, "shape"):
        return False
    return isinstance(value, Iterable)


def _measure(loader: Iterable) -> _Measured:
    if isinstance(loader, Iterator):
        raise TypeError(
            f"The loader, a {type(loader).__name__}, can be iterated once only. Pass "
            "what can be iterated again, as a DataLoader, gpbridge.data.Minibatches or "
            "a list of batches."
        )
    rows, layouts = 0, None
    for number, (X, Y) in enumerate(_pairs(loader)):
        found = [_Layout(t.shape[1:], t.dtype, t.device) for t in (X, Y)]
        if layouts is None:
            layouts = found
        for name, first, own in zip("XY", layouts, found, strict=True):
            if own != first:
                raise ShapeError(
                    f"All batches of a loader must be alike, but {name} of batch "
                    f"{number} has rows of shape {tuple(own.shape)}, {own.dtype} on "
                    f"{own.device}, after {tuple(first.shape)}, {first.dtype} on "
                    f"{first.device}."
                )
        rows += len(X)
    if not rows:
        raise ValueError(
            f"The loader, a {type(loader).__name__}, gives no rows. Pass one with data."
        )
    return _Measured(rows, *layouts)


def _fill(loader: Iterable, measured: _Measured) -> tuple[Tensor, Tensor]:
    whole = [
        torch.empty(measured.rows, *part.shape, dtype=part.dtype, device=part.device)
        for part in (measured.X, measured.Y)
    ]
    start = 0
    for batch in _pairs(loader):
        stop = start + len(batch[0])
        if stop > measured.rows:
            raise _changed(measured.rows, f"{stop} or more")
        for target, part in zip(whole, batch, strict=True):
            target[start:stop] = part
        start = stop
    if start < measured.rows:
        raise _changed(measured.rows, str(start))
    return whole[0], whole[1]


def _pairs(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    for number, batch in enumerate(loader):
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            what = f"a {type(batch).__name__}"
            if isinstance(batch, list | tuple):
                kinds = ", ".join(type(part).__name__ for part in batch)
                what = f"{what} of {len(batch)} ({kinds})"
            raise TypeError(
                "A loader must give pairs of tensors (inputs, targets), but its batch "
                f"{number} is {what}."
            )
        X, Y = batch
        if not X.dim() or not Y.dim() or len(X) != len(Y):
            raise ShapeError(
                "A batch must have one row of targets for each row of inputs, but "
                f"batch {number} has inputs of shape {tuple(X.shape)} and targets of "
                f"shape {tuple(Y.shape)}."
            )
        yield X.detach(), Y.detach()


def _changed(before: int, now: str) -> ValueError:
    return ValueError(
        f"The loader gave {before} rows in its first pass and {now} in its second. A "
        "linearised GP is conditioned on one data set: pass a loader whose passes have "
        "the same rows."
    )


def _tuple(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)
