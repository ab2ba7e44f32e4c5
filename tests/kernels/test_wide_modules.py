"""Layers read from torch modules."""

import pytest
import torch
from torch import nn

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
