r"""Layers of infinite width, read from torch modules.

In: a ``torch.nn.Sequential``. Out: the list of layers of its limit; a module without a
limit is named by its path. Next: ``infinite_width`` makes the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gpbridge.kernels.wide_convolutions import AvgPool, Conv, GlobalAvgPool
from gpbridge.kernels.wide_layer_kinds import Layer
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Flatten,
    LayerNorm,
    LeakyReLU,
    ReLU,
    Smooth,
    Tanh,
)
from gpbridge.kernels.wide_shapes import checked_input_shape, shape_after

SUPPORTED = (
    "Linear, Conv2d, ReLU, LeakyReLU, GELU, Tanh, SiLU, Softplus, LayerNorm, "
    "AvgPool2d, AdaptiveAvgPool2d(1), Flatten, Identity, and Sequential of these"
)


def layers_of(
    module: nn.Module,
    weight_variance: float,
    bias_variance: float,
    input_shape: Sequence[int] | None = None,
) -> list[Layer]:
    """The layers of a module's limit.

    The scale and the shift of a LayerNorm count as constants, one and zero, also in
    the tangent kernel.

    Args:
        module: The module.
        weight_variance: Variance of the weights of every layer.
        bias_variance: Variance of the biases, where a module has some.
        input_shape: (channels, height, width), or None for flat inputs.

    Raises:
        ValueError: For a module without a limit, or with an option that has none.
        ShapeError: If modules that follow each other do not fit.
        TypeError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, but is {type(module).__name__}. A list "
            "of layers goes to InfiniteWidthKernel itself."
        )
    layers, shape = [], checked_input_shape(input_shape)
    for where, leaf in _leaves(module, ""):
        if isinstance(leaf, nn.LayerNorm) and _is_image(layers):
            _refuse(
                leaf,
                where,
                "normalises over the pixels of a row, since images come, and not over "
                "the channels of a pixel. Put Flatten or AdaptiveAvgPool2d(1) and a "
                "Linear before it",
            )
        layers += _layer_of(leaf, weight_variance, bias_variance, where)
        shape = shape_after(leaf, shape, where)
    return layers


def num_inputs(module: nn.Module) -> int | None:
    """Columns of flat inputs of a network, those of its first Linear; None if lazy."""
    for _, leaf in _leaves(module, ""):
        if isinstance(leaf, nn.Linear):
            return leaf.in_features or None
    return None


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside of Sequentials and their paths, in order."""
    if not isinstance(module, nn.Sequential):
        yield path, module
        return
    for name, child in module._modules.items():  # also one that comes twice
        yield from _leaves(child, f"{path}.{name}" if path else name)


def _is_image(layers: Sequence[Layer]) -> bool:
    """Whether images come out of some layers; no layer without pixels takes any."""
    kinds = (Conv, AvgPool, Flatten, GlobalAvgPool)
    shapes = [layer for layer in layers if isinstance(layer, kinds)]
    return bool(shapes) and isinstance(shapes[-1], Conv | AvgPool)


def _layer_of(
    module: nn.Module, weight_variance: float, bias_variance: float, path: str
) -> list[Layer]:
    bias = bias_variance if getattr(module, "bias", None) is not None else 0.0
    match module:
        case nn.Identity():
            return []
        case nn.Linear():
            return [Dense(weight_variance, bias)]
        case nn.Conv2d():
            return [_convolution(module, weight_variance, bias, path)]
        case nn.ReLU():
            return [ReLU()]
        case nn.LeakyReLU():
            return [LeakyReLU(module.negative_slope)]
        case nn.GELU():
            _require(module, path, approximate=("none",))
            return [GELU()]
        case nn.Tanh():
            return [Tanh()]
        case nn.SiLU():
            return [Smooth(nn.functional.silu, _silu_derivative)]
        case nn.Softplus():
            _require(module, path, beta=(1.0,))
            return [Smooth(nn.functional.softplus, torch.sigmoid)]
        case nn.LayerNorm():
            if len(module.normalized_shape) > 1:
                _refuse(module, path, "normalises over more than the units")
            return [LayerNorm()]
        case nn.Flatten():
            _require(module, path, start_dim=(1, -3), end_dim=(-1,))
            return [Flatten()]
        case nn.AvgPool2d():
            _require(module, path, padding=(0, (0, 0)), ceil_mode=(False,))
            _require(module, path, divisor_override=(None,))
            size = _square(module, path, "kernel_size")
            return [AvgPool(size, _square(module, path, "stride"))]
        case nn.AdaptiveAvgPool2d():
            _require(module, path, output_size=(1, (1, 1)))
            return [GlobalAvgPool()]
    _refuse(module, path, "has no limit here")


def _convolution(
    module: nn.Conv2d, weight_variance: float, bias: float, path: str
) -> Conv:
    _require(module, path, groups=(1,), dilation=((1, 1),), padding_mode=("zeros",))
    padding = module.padding
    if padding == "valid":
        padding = 0
    elif padding != "same":
        padding = _square(module, path, "padding")
    size, stride = (_square(module, path, n) for n in ("kernel_size", "stride"))
    return Conv(size, stride, padding, weight_variance, bias)


def _square(module: nn.Module, path: str, name: str) -> int:
    value = getattr(module, name)
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if sides[0] != sides[1]:
        _refuse(module, path, f"has {name}={value}, which is not square")
    return sides[0]


def _require(module: nn.Module, path: str, **allowed: Sequence) -> None:
    for name, values in allowed.items():
        value = getattr(module, name)
        if value not in values:
            _refuse(module, path, f"has {name}={value!r}, not {values[0]!r}")


def _refuse(module: nn.Module, path: str, reason: str) -> None:
    where = f"Module {path!r}" if path else "The module"
    raise ValueError(
        f"{where} ({type(module).__name__}) {reason}. Supported are {SUPPORTED}. Give "
        "other networks as a list of layers; Residual is one."
    )


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))
