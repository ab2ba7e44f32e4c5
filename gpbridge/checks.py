"""Checks at the public doors: one function per invariant, messages that say what to do.

Each function returns None when its invariant holds. A message names the argument, what
was expected, what came, and the next thing to try; it is only built when a check fails.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from botorch.exceptions.errors import InputDataError
from torch import Tensor

_INSIDE = ("gpbridge", "botorch", "gpytorch", "linear_operator", "torch", "contextlib")


class ShapeError(ValueError):
    """Arguments disagree about a dimension that they should share."""


class ReliabilityWarning(UserWarning):
    """A measured sign that an uncertainty should not be trusted; names the remedy."""


class NotConvergedWarning(RuntimeWarning):
    """An iteration stopped at its limit before it reached its tolerance."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that led here, however many calls lie between."""
    level, frame = 2, sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in _INSIDE:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def check_tensor(**values: Tensor) -> None:
    """Require dense torch tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, but is {type(value).__name__}. "
                f"Try torch.as_tensor({name})."
            )
        if value.layout is not torch.strided:
            raise TypeError(
                f"{name} must be dense, but its layout is {value.layout}. "
                f"Try {name}.to_dense()."
            )


def check_floating(**values: Tensor) -> None:
    """Require float32 or float64: Cholesky factors do not exist in half precision."""
    for name, value in values.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} must be float32 or float64, but is {value.dtype}. "
                f"Try {name}.double()."
            )


def check_finite(**values: Tensor) -> None:
    """Require neither NaN nor Inf; the message names the first rows that have them."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            bad = ~torch.isfinite(value)
            rows = bad.reshape(len(bad), -1).any(-1) if value.dim() else bad[None]
            first = torch.nonzero(rows).flatten()[:5].tolist()
            raise InputDataError(
                f"{name} contains NaN or Inf in {int(rows.sum())} of {len(rows)} rows, "
                f"the first at {first}. Drop or impute these rows; there is no mask."
            )


def check_inputs(X: Tensor, name: str = "train_X", width: int | None = None) -> None:
    """Require finite floating inputs ``... x n x d`` of the right width."""
    check_tensor(**{name: X})
    check_floating(**{name: X})
    if X.dim() < 2:
        remedy = f"Pass rows of {width} columns."
        if width in (None, 1):
            remedy = f"For one input dimension try {name}[:, None]."
        elif X.shape == (width,):
            remedy = f"For one point try {name}[None]."
        raise ShapeError(
            f"{name} must be ``... x n x d``, but has shape {tuple(X.shape)}. {remedy}"
        )
    if width is not None and X.shape[-1] != width:
        remedy = "Pass the same features."
        if X[0].numel() == width:  # images, say
            remedy = f"Pass rows, {name}.flatten(1)."
        raise ShapeError(
            f"{name} must have {width} columns as the training inputs have, but has "
            f"{X.shape[-1]} (shape {tuple(X.shape)}). {remedy}"
        )
    check_finite(**{name: X})


def check_not_empty(**values: Tensor) -> None:
    """Require at least one row."""
    for name, value in values.items():
        if value.shape[0] == 0:
            remedy = "Pass at least one."
            if name.startswith("train"):
                remedy = (
                    "A model without data is its prior: ask the kernel and the mean "
                    "for it."
                )
            raise InputDataError(
                f"{name} has no rows (shape {tuple(value.shape)}). {remedy}"
            )


def check_same_length(**values: Tensor) -> None:
    """Require the same number of rows."""
    lengths = {name: value.shape[0] for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ShapeError(f"The numbers of rows must agree, but {found}.")


def check_same_device(**values: Tensor) -> None:
    """Require one device."""
    devices = {name: value.device for name, value in values.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise ValueError(
            f"All tensors must be on one device, but {found}. Move them with .to(...)."
        )


def check_generator(generator: torch.Generator, device: torch.device) -> None:
    """Require a generator that draws where the model is."""
    check_kind(
        torch.Generator, "Try torch.Generator().manual_seed(0).", generator=generator
    )
    if generator.device.type != device.type:
        raise ValueError(
            f"generator draws on {generator.device}, but the model is on {device}. Try "
            f"torch.Generator({str(device)!r}).manual_seed(0)."
        )


def check_same_dtype(
    name: str,
    value: Tensor,
    expected: torch.dtype,
    owner: str = "training inputs",
) -> None:
    """Require the dtype of the model, which is that of its training inputs."""
    if value.dtype != expected:
        raise TypeError(
            f"{name} must be {expected} as the {owner} are, but is {value.dtype}. "
            f"Try {name}.to({expected})."
        )


def check_kind(kind: type, remedy: str = "", **values: object) -> None:
    """Require instances of a class, named as its package is imported."""
    for name, value in values.items():
        if not isinstance(value, kind):
            package = kind.__module__.partition(".")[0]
            raise TypeError(
                f"{name} must be a {package} {kind.__name__}, but is "
                f"{type(value).__name__}.{' ' if remedy else ''}{remedy}"
            )


def check_number(**values: float) -> None:
    """Require one finite number each, no sequence of them and no truth value."""
    for name, value in values.items():
        single = isinstance(value, Real) and not isinstance(value, bool)
        if isinstance(value, Tensor):
            single = value.dim() == 0 and not value.is_complex()
            single = single and value.dtype != torch.bool
        if not single:
            shown = repr(value)
            if isinstance(value, Tensor):
                shown = f"a tensor of shape {tuple(value.shape)}"
            raise TypeError(f"{name} must be one number, but is {shown}.")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, but is {value}.")


def checked_shape(name: str, value: Sequence[int] | None) -> tuple[int, ...] | None:
    """A shape of whole numbers above zero as a tuple, or None as it is.

    Raises:
        ShapeError: If it is anything else.
    """
    if value is None:
        return None
    sides = sides_of(value)
    if not sides or min(sides) < 1:
        raise ShapeError(
            f"{name} must be a shape of one input, as (channels, height, width), but "
            f"is {value!r}."
        )
    return sides


def sides_of(shape: object) -> tuple[int, ...]:
    """The whole numbers of a sequence, an array or a tensor; none of anything else."""
    shape = shape.tolist() if hasattr(shape, "tolist") else shape
    whole = isinstance(shape, Sequence) and all(map(is_whole, shape))
    return tuple(map(int, shape)) if whole else ()


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_positive(**values: float | Tensor) -> None:
    """Require strictly positive finite numbers."""
    for name, value in values.items():
        # A Python float would be rounded to float32, and shown so.
        dtype = None if isinstance(value, Tensor) else torch.float64
        try:
            tensor = torch.as_tensor(value, dtype=dtype)
            ordered = not (tensor.is_complex() or isinstance(value, list | tuple))
        except (TypeError, ValueError, RuntimeError):
            ordered = False
        if not ordered:
            raise TypeError(f"{name} must be a number, but is {value!r}.")
        # Written so that NaN fails too.
        if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
            shown = (
                tensor.tolist() if tensor.numel() <= 8 else f"as low as {tensor.min()}"
            )
            raise ValueError(f"{name} must be positive and finite, but is {shown}.")


def check_count(**values: int) -> None:
    """Require whole numbers above zero."""
    for name, value in values.items():
        if not is_whole(value) or value < 1:
            raise ValueError(
                f"{name} must be a whole number above zero, but is {value!r}."
            )


def check_sequence(**values: Iterable[object]) -> None:
    """Require several things in order, and not one of them by itself."""
    for name, value in values.items():
        single = isinstance(value, str | bytes | Mapping) or (
            isinstance(value, Tensor) and value.dim() == 0
        )
        if single or not isinstance(value, Iterable):
            remedy = "" if value is None else f" Try {name}=[{value!r}]."
            raise TypeError(f"{name} must be a sequence, but is {value!r}.{remedy}")


def check_share(**values: float) -> None:
    """Require numbers strictly between zero and one, such as relative residuals."""
    check_positive(**values)
    for name, value in values.items():
        if not value < 1:
            raise ValueError(
                f"{name} must be below 1, but is {value}: zero already has a relative "
                "residual of 1."
            )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Require one of a few words."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}."
        )


def check_labels(labels: Tensor, num_classes: int, name: str = "train_Y") -> None:
    """Require integer class labels ``n`` in ``0 .. num_classes - 1``."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"{name} must hold integer class labels for a softmax likelihood, but is "
            f"{labels.dtype}. Try {name}.long()."
        )
    if labels.dim() != 1:
        raise ShapeError(
            f"{name} must be ``n`` class labels, but has shape {tuple(labels.shape)}. "
            f"Try {name}.squeeze(-1), or .argmax(-1) for one-hot rows."
        )
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = int(torch.nonzero(bad)[0])
        raise InputDataError(
            f"{name} must lie in 0 .. {num_classes - 1} (the network has {num_classes} "
            f"outputs), but row {row} is {int(labels[row])}. Drop ignored rows, or "
            "give the network one output per class."
        )


def check_binary(labels: Tensor, name: str = "train_Y") -> None:
    """Require labels 0 and 1."""
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        value = labels[bad].flatten()[0].item()
        raise InputDataError(
            f"{name} must hold 0 and 1 for a binary likelihood, but contains {value}. "
            "Map the two classes to 0 and 1, or use a softmax likelihood."
        )


def check_bounds(bounds: Tensor) -> None:
    """Require bounds ``2 x d``, the lower above the upper row.

    Args:
        bounds: Lower and upper bounds of each column.

    Raises:
        ShapeError: If they are not ``2 x d``.
        ValueError: If a lower bound is not below its upper bound, or not finite.
    """
    check_tensor(bounds=bounds)
    if bounds.dim() != 2 or len(bounds) != 2:
        raise ShapeError(
            "bounds must be ``2 x d``, the lower bounds and then the upper ones, but "
            f"have shape {tuple(bounds.shape)}."
        )
    check_finite(bounds=bounds)
    wrong = (bounds[0] >= bounds[1]).nonzero().flatten().tolist()
    if wrong:
        column = wrong[0]
        low, high = bounds[:, column].tolist()
        raise ValueError(
            f"bounds must have the lower row below the upper one, but column {column} "
            f"goes from {low:g} to {high:g}. Are the rows in the wrong order?"
        )


def check_memory(what: str, needed: float, budget: float, remedy: str) -> None:
    """Refuse an allocation beyond a budget, both in bytes."""
    if needed > budget:
        raise MemoryError(
            f"{what} needs about {needed / 2**30:.2f} GiB, but the budget is "
            f"{budget / 2**30:.2f} GiB. {remedy}"
        )
