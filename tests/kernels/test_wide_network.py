"""Covariances of wide networks: tiles, diagonals, matched pairs, memory."""

import pytest
import torch

from gpbridge.kernels import InfiniteWidthKernel, wide_network
from gpbridge.kernels.wide_convolutions import Conv, GlobalAvgPool
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Erf,
    Flatten,
    ReLU,
    Residual,
    Smooth,
    Tanh,
)
from tests.kernels.wide_problems import KINDS, build, inputs
from tests.peak_memory import peak_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_neither_values_nor_gradients(kind, monkeypatch):
    kernel = build(kind=kind, batch_shape=torch.Size([2]))
    kernel.weight_variance = inputs(2, 3).exp()
    x, z = inputs(11, 3).requires_grad_(), inputs(2, 7, 3, seed=1).requires_grad_()
    results = []
    for rows in (20, 4):
        monkeypatch.setattr(wide_network, "tile_rows", lambda _, rows=rows: rows)
        K, C = kernel(x).to_dense(), kernel(x, z).to_dense()
        scalar = (K.sin() * inputs(*K.shape, seed=2)).sum() + C.sin().sum()
        leaves = [x, z, kernel.raw_weight_variance, kernel.raw_bias_variance]
        results.append([K, C, *torch.autograd.grad(scalar, leaves)])
        assert torch.allclose(K, K.mT, rtol=1e-14)
    for whole, tiled in zip(*results, strict=True):
        assert torch.allclose(whole, tiled, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("same", [True, False])
def test_second_derivatives_do_not_depend_on_tiles(same, monkeypatch):
    kernel, x = build(kind="ntk"), inputs(6, 2).requires_grad_()
    leaves = [x, kernel.raw_weight_variance]
    found = []
    for rows in (20, 4):
        monkeypatch.setattr(wide_network, "tile_rows", lambda _, rows=rows: rows)
        K = kernel(x, None if same else x[:3].detach() + 0.1).to_dense()
        grads = torch.autograd.grad(K.sin().sum(), leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        found += [*grads, *torch.autograd.grad(total, leaves)]
    for one, other in zip(found[:4], found[4:], strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_is_that_of_the_matrix_and_of_matched_pairs(kind):
    kernel = build(kind=kind)
    x, z = inputs(5, 3), inputs(5, 3, seed=1)
    assert torch.equal(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    matched = kernel(x, z, diag=True)
    assert torch.allclose(matched, kernel(x, z).to_dense().diagonal(), rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_needs_no_matrix(kind):
    x = inputs(200_000, 2)  # a matrix would take 300 GB
    assert build(kind=kind)(x, diag=True).isfinite().all()


CASES = {
    "pooled": [Conv(3), ReLU(), Conv(3), ReLU(), GlobalAvgPool(), Dense()],
    "deep": [*[Conv(3), ReLU()] * 5, GlobalAvgPool(), Dense()],
    "pixels": [Conv(3), ReLU(), Conv(3), ReLU(), Flatten(), Dense()],
    "taps": [Conv(3, tap_lengthscale=1.0), ReLU()] * 2 + [Flatten(), Dense()],
    "gelu": [Conv(3), GELU(), Conv(3), GELU(), Flatten(), Dense()],
    "erf": [Conv(3), Erf(), Conv(3), Erf(), GlobalAvgPool(), Dense()],
    "tanh": [Conv(3), Tanh(), Conv(3), Tanh(), Flatten(), Dense()],
    "series": [Conv(3), Smooth(torch.sin, torch.cos), GlobalAvgPool(), Dense()],
    "residual": [Conv(3), Residual([ReLU(), Conv(3)]), GlobalAvgPool(), Dense()],
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_of_a_tile_is_what_it_takes(name, kind, gradients, monkeypatch):
    estimates = []
    monkeypatch.setattr(
        wide_network, "check_memory", lambda what, needed, *_: estimates.append(needed)
    )
    kernel = InfiniteWidthKernel(CASES[name], kind, input_shape=(1, 8, 8))
    x = inputs(4 if kernel.network.pairs else 30, 64, dtype=torch.float32)
    parameters = list(kernel.parameters())

    def run():
        values = kernel(x).to_dense()
        if gradients:
            torch.autograd.grad(values.sum(), parameters)
        return values

    with torch.set_grad_enabled(gradients):
        taken = peak_bytes(run)
    assert taken / 1.5 < estimates[-1] < 1.9 * taken


@pytest.mark.parametrize("size, least", [(5, 21e6), (7, 40e6)])
def test_correlated_taps_count_by_their_pairs(size, least):
    """What was measured of one tile of two images, gradients included."""
    layers = [Conv(size, tap_lengthscale=1.0), ReLU()] * 2 + [Flatten(), Dense()]
    kernel = InfiniteWidthKernel(layers, input_shape=(1, 8, 8), memory_budget=least / 2)
    x = inputs(2, 64)
    with pytest.raises(MemoryError, match="One tile of 2 x 2 inputs with all pairs"):
        kernel.double()(x).to_dense()
    with torch.no_grad():
        assert kernel(x).to_dense().isfinite().all()
