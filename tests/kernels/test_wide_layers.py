"""Layers of wide networks: what they compute, and where they may stand."""

import pytest
import torch

from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_convolutions import Conv
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Flatten,
    LayerNorm,
    ReLU,
    Residual,
    Smooth,
    Tanh,
)
from tests.kernels.wide_problems import agree, build, inputs

CASES = {
    "relu": ([Dense(), ReLU(), Dense()], [torch.relu]),
    "gelu": ([Dense(), GELU(), Dense()], [torch.nn.functional.gelu]),
    "tanh, normalised": (
        [Dense(), LayerNorm(), Tanh(), Dense()],
        [("norm",), torch.tanh],
    ),
    "residual": (
        [Dense(), Residual([ReLU(), Dense(1.0, 0.1)]), ReLU(), Dense()],
        [("residual", [torch.relu, ("dense", 1.0, 0.1)]), torch.relu],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wide_networks_have_these_kernels(name):
    agree(*CASES[name], inputs(3, 5), width=200, num_networks=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_very_wide_networks_have_these_kernels(name):
    agree(*CASES[name], inputs(4, 5, seed=3), width=1024, num_networks=100)


def test_the_tangent_kernel_of_a_linear_network_counts_its_layers():
    x = inputs(4, 3)
    layers = [Dense(2.0, 0.0), Dense(3.0, 0.0), Dense(0.5, 0.0)]
    expected = build(layers, "nngp")(x).to_dense() * 3
    assert torch.allclose(build(layers, "ntk")(x).to_dense(), expected, rtol=1e-13)


def test_smooth_takes_any_activation():
    given = Smooth(torch.sin, torch.cos)
    kernel = build([Dense(1.0, 0.0), given, Dense(1.0, 0.0)])
    x, z = inputs(3, 4), inputs(2, 4, seed=1)
    q1, q2 = x.square().mean(-1)[:, None], z.square().mean(-1)
    k = x @ z.mT / 4
    expected = (torch.exp(-(q1 + q2) / 2 + k) - torch.exp(-(q1 + q2) / 2 - k)) / 2
    assert torch.allclose(kernel(x, z).to_dense(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ([], {}, "last layer is None"),
        ([Dense(), ReLU()], {}, "must end in flat Gaussian outputs"),
        ([ReLU(), Dense()], {}, r"ReLU at layers\[0\] needs Gaussian"),
        ([Dense(), ReLU(), GELU()], {}, r"GELU at layers\[2\] needs Gaussian"),
        ([Dense(), ReLU(), LayerNorm(), Dense()], {}, r"LayerNorm at layers\[2\]"),
        (
            [Dense(), Residual([Residual([Dense()])]), Dense()],
            {},
            "must end in new weights",
        ),
        (
            [Dense(), Residual([Dense(), ReLU()])],
            {},
            r"Residual at layers\[1\] must end in new",
        ),
        ([Conv(3), Flatten(), Dense()], {}, r"Conv at layers\[0\] needs images"),
        (
            [Conv(3), Dense()],
            {"input_shape": (1, 4, 4)},
            "4 x 4 pixels comes. Put Flatten",
        ),
        (
            [Conv(7, padding=0), Flatten(), Dense()],
            {"input_shape": (1, 4, 4)},
            r"windows of 7 x 7 pixels, but its input has 4 x 4",
        ),
        (
            [Residual([Conv(3, 2)]), Flatten(), Dense()],
            {"input_shape": (1, 4, 4)},
            "branch ends in 2 x 2 pixels and the shortcut in 4 x 4 pixels",
        ),
        ([Dense()], {"kind": "ntk2"}, "kind must be one of"),
        ([Dense()], {"input_shape": (8, 8)}, "must be .channels, height, width."),
        ([Dense()], {"input_shape": (1, 0, 8)}, "height must be a whole number"),
        ([Dense()], {"memory_budget": 0}, "memory_budget must be positive"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, options, message):
    with pytest.raises(ValueError, match=message):
        InfiniteWidthKernel(layers, **options)
