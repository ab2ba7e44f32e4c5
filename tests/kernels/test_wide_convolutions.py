"""Kernels of infinitely wide convolutional networks, against loops over pixels."""

import math

import pytest
import torch

from gpbridge.kernels import InfiniteWidthKernel, tiled_gram, wide_network
from gpbridge.kernels.wide_convolutions import AvgPool, Conv, GlobalAvgPool
from gpbridge.kernels.wide_layers import Dense, Flatten, ReLU, Residual
from tests.kernels.wide_problems import KINDS, agree, build, inputs
from tests.oracles_architecture import relu_convolution_by_loops

SHAPE = (2, 4, 4)
CONV = Conv(3, weight_variance=1.6, bias_variance=0.2)
READOUT = Dense(1.0, 0.0)


def independent(q, r):
    return float(q == r)


def correlated(q, r):
    return math.exp(-((q[0] - r[0]) ** 2 + (q[1] - r[1]) ** 2) / (2 * 1.3**2))


CASES = {
    "flattened": ([CONV, ReLU(), CONV, ReLU(), Flatten()], independent),
    "global pooling": ([CONV, ReLU(), CONV, ReLU(), GlobalAvgPool()], independent),
    "pooling": ([CONV, ReLU(), AvgPool(2), CONV, ReLU(), Flatten()], independent),
    "correlated": (
        [Conv(3, 1, 1, 1.6, 0.2, tap_lengthscale=1.3), ReLU(), Flatten()],
        correlated,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_convolutional_kernel_is_a_loop_over_pixels(name, kind):
    layers, sigma = CASES[name]
    words = {Conv: "conv", ReLU: "relu", AvgPool: "pool"}
    steps = [words[type(layer)] for layer in layers if type(layer) in words]
    x, z = inputs(2, 32), inputs(1, 32, seed=1)
    found = build([*layers, READOUT], kind, input_shape=SHAPE)(x, z).to_dense()
    for row, image in zip(found[:, 0], x, strict=True):
        k, theta = relu_convolution_by_loops(
            image.view(SHAPE), z[0].view(SHAPE), steps, sigma, 1.6, 0.2
        )

        def mean(table):
            if isinstance(layers[-1], GlobalAvgPool):
                return sum(table.values()) / len(table)
            own = [value for (p, q), value in table.items() if p == q]
            return sum(own) / len(own)

        expected = mean(k) if kind == "nngp" else mean(k) + mean(theta)
        assert row.item() == pytest.approx(expected, rel=1e-10)


FINITE = {
    "flattened": (
        [Conv(3), ReLU(), Conv(3), ReLU(), Flatten(), Dense()],
        [torch.relu, ("conv", 3, 2.0, 0.01), torch.relu, ("flatten",)],
    ),
    "pooled": (
        [Conv(3), ReLU(), AvgPool(2), Conv(3), ReLU(), GlobalAvgPool(), Dense()],
        [torch.relu, ("pool", 2), ("conv", 3, 2.0, 0.01), torch.relu, ("global",)],
    ),
    "residual": (
        [Conv(3), Residual([ReLU(), Conv(3)]), ReLU(), GlobalAvgPool(), Dense()],
        [
            ("residual", [torch.relu, ("conv", 3, 2.0, 0.01)]),
            torch.relu,
            ("global",),
        ],
    ),
}


@pytest.mark.parametrize("name", FINITE)
def test_wide_convolutional_networks_have_these_kernels(name):
    x = inputs(3, *SHAPE)
    agree(*FINITE[name], x, width=64, num_networks=30, input_shape=SHAPE)


def test_correlated_filters_are_those_of_wide_networks():
    apart = torch.arange(3, dtype=torch.float64)
    sigma = torch.exp(-(apart[:, None] - apart).square() / (2 * 1.3**2))
    root = torch.linalg.cholesky(sigma)
    middle = [torch.relu, ("conv", 3, 2.0, 0.01, root), torch.relu, ("flatten",)]
    layers = [Conv(3), ReLU(), Conv(3, tap_lengthscale=1.3), ReLU(), Flatten(), Dense()]
    agree(layers, middle, inputs(3, *SHAPE), 64, 60, input_shape=SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_correlated_filters_lie_between_independent_ones_and_one_weight(kind):
    x = inputs(4, 32)

    def kernel(lengthscale):
        layers = [Conv(3, 1, 0, 1.6, 0.2, lengthscale), ReLU(), Flatten(), Dense()]
        return build(layers, kind, input_shape=SHAPE)(x).to_dense()

    assert torch.allclose(kernel(0.06), kernel(None), rtol=1e-12)
    # One weight for all taps: the same network on sums over windows.
    sums = torch.nn.functional.avg_pool2d(x.view(4, *SHAPE), 3, 1).flatten(1) * 3
    layers = [Conv(1, 1, 0, 1.6, 0.2), ReLU(), Flatten(), Dense()]
    one = build(layers, kind, input_shape=(2, 2, 2))(sums).to_dense()
    assert torch.allclose(kernel(900.0), one, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences(name):
    kernel = build([*CASES[name][0], Dense()], "ntk", input_shape=SHAPE)
    x, z = inputs(2, 32).requires_grad_(), inputs(1, 32, seed=1).requires_grad_()
    raw = list(kernel.parameters())

    def total(x, z, *_):
        return kernel(x, z).to_dense().sum() + kernel(x).to_dense().square().sum()

    assert torch.autograd.gradcheck(total, (x, z, *raw), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_tiles_batches_and_the_diagonal_agree_with_the_matrix(name, monkeypatch):
    kernel = build([*CASES[name][0], Dense()], "ntk", input_shape=SHAPE)
    x = inputs(2, 5, 32)
    whole = kernel(x).to_dense()
    each = torch.stack([kernel(rows).to_dense() for rows in x])
    assert torch.allclose(whole, each, rtol=1e-12)
    assert torch.allclose(kernel(x, diag=True), whole.diagonal(dim1=-2, dim2=-1))
    leaf = x.clone().requires_grad_()
    parameters = [leaf, *kernel.parameters()]
    expected = torch.autograd.grad(kernel(leaf).to_dense().sin().sum(), parameters)
    monkeypatch.setattr(wide_network, "tile_rows", lambda _: 2)
    tiled = kernel(leaf).to_dense()
    assert torch.allclose(tiled, whole, rtol=1e-12)
    found = torch.autograd.grad(tiled.sin().sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_strides_and_padding_are_those_of_torch():
    x = inputs(1, 1, 7, 6)
    for f, step, zeros in ((3, 1, 1), (3, 2, 1), (2, 2, 0), (5, 3, 2), (1, 1, 0)):
        layers = [Conv(f, step, zeros, 1.0, 0.0), Flatten(), Dense(1.0, 0.0)]
        found = build(layers, input_shape=(1, 7, 6))(x.flatten(1)).to_dense()
        ones = torch.ones(1, 1, f, f, dtype=x.dtype)
        squares = torch.nn.functional.conv2d(
            x.square(), ones, stride=step, padding=zeros
        )
        assert torch.allclose(found, squares.mean() / f**2, rtol=1e-13)


def test_pooling_too_large_for_memory_is_refused_before_it_is_allocated():
    layers = [Conv(3), ReLU(), GlobalAvgPool(), Dense()]
    kernel = InfiniteWidthKernel(layers, input_shape=(3, 96, 96))
    x = torch.zeros(2, 3 * 96 * 96)
    with pytest.raises(MemoryError, match="all pairs of 96 x 96 pixels needs about"):
        kernel(x).to_dense()
    with pytest.raises(MemoryError, match=r"Flatten\(\) in place of pooling"):
        kernel(x, diag=True)
    flat = InfiniteWidthKernel(
        [*layers[:2], Flatten(), Dense()], input_shape=(3, 96, 96)
    )
    assert flat(x).to_dense().isfinite().all()


def test_without_pooling_memory_is_that_of_pixels_not_of_pairs(monkeypatch):
    seen = []
    real = torch.atan2

    def watch(*args):
        seen.append(args[0].numel())
        return real(*args)

    monkeypatch.setattr(torch, "atan2", watch)
    x = inputs(40, 64)
    for layers, largest in (([Flatten()], 64), ([GlobalAvgPool()], 64**2)):
        seen.clear()
        network = [Conv(3), ReLU(), *layers, Dense()]
        build(network, input_shape=(1, 8, 8))(x[:20]).to_dense()
        rows = min(20, tiled_gram.tile_rows(largest))
        assert max(seen) == rows**2 * largest
