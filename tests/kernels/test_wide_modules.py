"""Layers read from torch modules."""

import pytest
import torch
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_convolutions import AvgPool, GlobalAvgPool
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Flatten,
    LayerNorm,
    Tanh,
)
from gpbridge.testing import assert_module_unchanged
from tests.peak_memory import peak_bytes

NESTED = nn.Sequential(
    nn.Linear(5, 8),
    nn.Sequential(nn.GELU(), nn.Linear(8, 8, bias=False), nn.Identity()),
    nn.Tanh(),
    nn.Linear(8, 1),
)


def test_a_module_gives_its_layers_and_stays_as_it_was():
    with assert_module_unchanged(NESTED):
        kernel = InfiniteWidthKernel.from_module(NESTED, "ntk", weight_variance=1.5)
    dense, free = Dense(1.5, 0.01), Dense(1.5, 0.0)
    assert kernel.network.layers == (dense, GELU(), free, Tanh(), dense)
    assert kernel.bias_variance.shape == (2,)


def test_a_convolutional_module_gives_its_layers():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, padding="valid"),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 1),
    )
    kernel = InfiniteWidthKernel.from_module(module, input_shape=(1, 8, 8))
    conv, pool, second = (kernel.network.layers[i] for i in (0, 2, 3))
    assert (conv.kernel_size, conv.zeros, second.zeros, second.stride) == (3, 1, 0, 2)
    assert pool == AvgPool(2, 2)
    assert kernel.network.layers[5:] == (GlobalAvgPool(), Flatten(), Dense())
    assert kernel(torch.zeros(2, 64)).shape == (2, 2)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "'1' .BatchNorm1d. has no"),
        (
            nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.MaxPool2d(2))),
            "Module '0.1' .MaxPool2d.",
        ),
        (nn.Sequential(nn.GELU(approximate="tanh")), "approximate='tanh', not 'none'"),
        (nn.Sequential(nn.Conv2d(1, 1, (3, 5))), r"kernel_size=\(3, 5\).*not square"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "groups=2, not 1"),
        (nn.Bilinear(2, 2, 1), "The module .Bilinear. has no limit"),
        (nn.Sequential(nn.LayerNorm((2, 3))), "normalises over more than the units"),
    ],
)
def test_a_module_without_a_limit_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        InfiniteWidthKernel.from_module(module)


L, C, POOL = nn.Linear, nn.Conv2d, nn.AdaptiveAvgPool2d


@pytest.mark.parametrize(
    "modules, input_shape, message",
    [
        ([L(3, 50), nn.ReLU(), L(40, 1)], None, "'2' .Linear. takes 40 .*but 50 come"),
        (
            [L(3, 5), nn.Sequential(nn.Tanh(), L(4, 1))],
            None,
            r"'1.1' .Linear. takes 4 units .in_features., but 5 come",
        ),
        ([L(3, 5), nn.LayerNorm(4), L(5, 1)], None, "'1' .LayerNorm. takes 4 units"),
        ([C(1, 4, 3), nn.Flatten(), L(4, 1)], (1, 8, 8), "takes 4 units.*but 144 come"),
        ([C(1, 4, 3), L(8, 1)], (1, 8, 8), r"'1' .Linear.*images of shape \(4, 6, 6\)"),
        ([C(1, 4, 3), POOL(1), L(4, 1)], (1, 8, 8), r"\(4, 1, 1\) come. Put .*Flatten"),
        ([L(64, 1)], (1, 8, 8), "64 flat units .*Put torch.nn.Flatten"),
        ([C(3, 4, 3), POOL(1)], (1, 8, 8), "'0' .Conv2d. takes images of 3 channels"),
        ([C(1, 4, 3), C(5, 2, 3)], (1, 8, 8), "'1' .Conv2d.* 5 .*but 4 channels come"),
        ([C(1, 4, 3), nn.Flatten(), L(4, 1)], None, "takes images.*flat inputs come"),
        ([nn.Flatten(), C(1, 4, 3)], (1, 8, 8), "images.*but 64 flat units come"),
        ([C(1, 4, 9)], (1, 8, 8), "at least 9 x 9 pixels.*but 8 x 8 come"),
        (
            [C(1, 4, 3), nn.AvgPool2d(4), nn.AvgPool2d(2)],
            (1, 8, 8),
            "'2' .AvgPool2d. takes images of at least 2 x 2 .*but 1 x 1 come",
        ),
    ],
)
def test_modules_that_do_not_fit_are_named(modules, input_shape, message):
    """And torch does not run any of them."""
    module = nn.Sequential(*modules)
    with pytest.raises(ShapeError, match=message):
        InfiniteWidthKernel.from_module(module, input_shape=input_shape)
    with pytest.raises(RuntimeError):
        module(torch.zeros(2, *(input_shape or (3,))))


@pytest.mark.parametrize("same", [False, True])
def test_the_shapes_are_those_of_torch(same):
    options = {"padding": "same"} if same else {"stride": 2, "padding": 1}
    body = nn.Sequential(C(2, 3, 3, **options), nn.ReLU(), nn.AvgPool2d(3, stride=2))
    width = body(torch.zeros(1, 2, 11, 14)).numel()
    options = {"input_shape": (2, 11, 14)}
    for number in (width, width + 1):
        module = nn.Sequential(body, nn.Flatten(), L(number, 1))
        if number == width:
            InfiniteWidthKernel.from_module(module, **options)
            continue
        with pytest.raises(ShapeError, match=f"{number} units.*but {width} come"):
            InfiniteWidthKernel.from_module(module, **options)


def test_inputs_have_the_columns_of_the_first_module():
    kernel = InfiniteWidthKernel.from_module(NESTED)
    with pytest.raises(ShapeError, match="network takes 5 inputs, but .* 3 columns"):
        kernel(torch.zeros(2, 3)).to_dense()
    chosen = InfiniteWidthKernel.from_module(NESTED, active_dims=[0, 1, 2, 3, 5])
    assert chosen(torch.zeros(2, 6)).shape == (2, 2)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), L(4, 1))
    assert InfiniteWidthKernel.from_module(lazy)(torch.zeros(2, 3)).shape == (2, 2)


def test_pooling_of_large_images_is_refused_before_anything_is_allocated():
    module = nn.Sequential(C(1, 4, 3, padding=1), nn.ReLU(), POOL(1), nn.Flatten())
    module.append(L(4, 1))
    kernel = InfiniteWidthKernel.from_module(module, input_shape=(1, 200, 200))
    x = torch.zeros(50, 200**2)

    def refused():
        with pytest.raises(MemoryError, match="all pairs of 200 x 200 pixels needs ab"):
            kernel(x).to_dense()
        with pytest.raises(MemoryError, match="200 x 200"):
            kernel(x, diag=True)
        return x[:0]

    assert peak_bytes(refused) < 2**27


def test_an_activation_that_a_module_uses_twice_counts_twice():
    relu = nn.ReLU()
    body = [nn.Linear(3, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 1)]
    kernel = InfiniteWidthKernel.from_module(nn.Sequential(*body), "ntk")
    body[3] = nn.ReLU()
    expected = InfiniteWidthKernel.from_module(nn.Sequential(*body), "ntk")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel(x).to_dense(), expected(x).to_dense())


def test_a_norm_of_images_is_refused_and_one_of_units_is_not():
    convolution, norm = nn.Conv2d(1, 4, 3, padding=1), nn.LayerNorm(8)
    body = nn.Sequential(convolution, nn.Sequential(nn.LayerNorm(8), nn.ReLU()))
    message = "'1.0' .LayerNorm. normalises over the pixels of a row.*AdaptiveAvgPool2d"
    with pytest.raises(ValueError, match=message):
        InfiniteWidthKernel.from_module(body, input_shape=(1, 8, 8))
    pooled = [convolution, nn.ReLU(), nn.AvgPool2d(2), norm]
    with pytest.raises(ValueError, match="'3' .LayerNorm."):
        InfiniteWidthKernel.from_module(nn.Sequential(*pooled), input_shape=(1, 8, 8))
    flat = [convolution, nn.ReLU(), nn.Flatten(), nn.Linear(256, 8), norm]
    module = nn.Sequential(*flat, nn.Tanh(), nn.Linear(8, 1))
    kernel = InfiniteWidthKernel.from_module(module, input_shape=(1, 8, 8))
    assert LayerNorm() in kernel.network.layers
