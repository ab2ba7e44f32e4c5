r"""Shapes that pass through the modules of a network, checked at each of them.

The limit of wide layers knows no widths, so that a network that torch could not run
would have one all the same. In: a torch module without children, the shape of one input
of it. Out: the shape of one output. Next: ``wide_modules`` reads the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

from torch import nn

from gpbridge.checks import ShapeError, check_count, sides_of

Shape = tuple[int, ...] | None
"""(units,) of flat inputs, (channels, height, width) of images, or None: not known."""


def checked_input_shape(shape: Sequence[int] | None) -> tuple[int, int, int] | None:
    """Require (channels, height, width), or None."""
    if shape is None:
        return None
    given, shape = shape, sides_of(shape)
    if len(shape) != 3:
        raise ShapeError(
            f"input_shape must be (channels, height, width), but is {given!r}. For a "
            "grey image try (1, height, width)."
        )
    for name, side in zip(("channels", "height", "width"), shape, strict=True):
        check_count(**{f"input_shape's {name}": side})
    return shape


def shape_after(module: nn.Module, shape: Shape, path: str) -> Shape:
    """The shape of one output of a module that has a limit.

    Args:
        module: A module without children.
        shape: Of one input.
        path: Where the module stands, for messages.

    Raises:
        ShapeError: If the module takes inputs of another shape.
    """
    match module:
        case nn.Linear():
            _require_units(module, shape, path, module.in_features, "in_features")
            return (module.out_features,)
        case nn.LayerNorm():
            if shape is not None and len(shape) == 1:
                width = module.normalized_shape[-1]
                _require_units(module, shape, path, width, "normalized_shape")
            return shape
        case nn.Conv2d():
            channels, *sides = _require_image(module, shape, path, module.in_channels)
            zeros = module.padding
            if zeros == "same":  # torch has it for strides of one only
                return (module.out_channels, *sides)
            zeros = (0, 0) if zeros == "valid" else zeros
            sides = _windows(module, sides, zeros, path)
            return (module.out_channels, *sides)
        case nn.AvgPool2d():
            channels, *sides = _require_image(module, shape, path)
            return (channels, *_windows(module, sides, (0, 0), path))
        case nn.AdaptiveAvgPool2d():
            channels, *_ = _require_image(module, shape, path)
            return channels, 1, 1
        case nn.Flatten():
            return None if shape is None else (math.prod(shape),)
    return shape


def _require_units(
    module: nn.Module, shape: Shape, path: str, expected: int, name: str
) -> None:
    if shape is None or expected == 0:  # a lazy module takes what comes
        return
    if len(shape) == 3:
        _refuse(
            module,
            path,
            f"{expected} flat units ({name}), but images of shape {shape} come. Put "
            "torch.nn.Flatten() before it",
        )
    if shape[0] != expected:
        _refuse(
            module,
            path,
            f"{expected} units ({name}), but {shape[0]} come. Widths of modules that "
            "follow each other must agree",
        )


def _require_image(
    module: nn.Module, shape: Shape, path: str, channels: int = 0
) -> tuple[int, ...]:
    what = f"images of {channels} channels (in_channels)" if channels else "images"
    if shape is None or len(shape) == 1:
        came = "flat inputs" if shape is None else f"{shape[0]} flat units"
        _refuse(
            module,
            path,
            f"{what}, but {came} come. Give input_shape=(channels, height, width), and "
            "put it before Flatten",
        )
    if channels and shape[0] != channels:
        _refuse(
            module,
            path,
            f"{what}, but {shape[0]} channels come, images of shape {shape}. Give the "
            "input_shape of these images, or as many channels as the module before has",
        )
    return shape


def _windows(
    module: nn.Module, sides: Sequence[int], zeros: int | Sequence[int], path: str
) -> tuple[int, ...]:
    sizes, steps, zeros = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (module.kernel_size, module.stride, zeros)
    )
    found = tuple(
        (side + 2 * zero - size) // step + 1
        for side, size, step, zero in zip(sides, sizes, steps, zeros, strict=True)
    )
    if min(found) < 1:
        _refuse(
            module,
            path,
            f"images of at least {sizes[0]} x {sizes[1]} pixels with their zeros, but "
            f"{sides[0]} x {sides[1]} come. Use smaller windows, or fewer strides",
        )
    return found


def _refuse(module: nn.Module, path: str, reason: str) -> NoReturn:
    where = f"Module {path!r}" if path else "The module"
    raise ShapeError(f"{where} ({type(module).__name__}) takes {reason}.")
