"""Networks, inputs and comparisons that the tests of wide networks share."""

import torch

from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Erf,
    LeakyReLU,
    ReLU,
    Tanh,
    every_layer,
)
from tests.oracles_architecture import monte_carlo_kernels

DEEP = [Dense(1.5, 0.2), ReLU(), Dense(1.8, 0.1), ReLU(), Dense(0.9, 0.3)]


KINDS = ["nngp", "ntk"]


ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Erf(), GELU(), Tanh()]


def inputs(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def build(layers=DEEP, kind="nngp", dtype=torch.float64, **options):
    """A kernel whose hyperparameters are the layers' in the dtype asked for."""
    kernel = InfiniteWidthKernel(layers, kind, **options).to(dtype)
    initial = [layer.initial() for layer in every_layer(kernel.network.layers)]
    for group in {name for found in initial for name in found}:
        values = [found[group] for found in initial if group in found]
        setattr(kernel, group, torch.tensor(values, dtype=dtype))
    return kernel


def agree(layers, middle, x, width, num_networks, input_shape=None):
    """Both kernels within three standard errors of finite networks."""
    first = layers[0]
    dense = ("dense", 2.0, 0.01)
    start = dense if isinstance(first, Dense) else ("conv", 3, 2.0, 0.01)
    generator = torch.Generator().manual_seed(1)
    found = monte_carlo_kernels(
        [start, *middle, dense], x, width, num_networks, generator
    )
    for kind, (mean, error) in zip(KINDS, found, strict=True):
        kernel = build(layers, kind, input_shape=input_shape)
        exact = kernel(x.flatten(1)).to_dense()
        assert (error < 0.06 * exact.diagonal().max()).all()  # it can fail
        assert ((mean - exact).abs() <= 3 * error).all(), kind
