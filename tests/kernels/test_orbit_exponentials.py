"""Averages of squared exponentials: loops, first derivatives, blocks."""

import pytest
import torch
from gpytorch.kernels import RBFKernel

from gpbridge.kernels import ConvolutionalKernel, orbit_exponentials
from gpbridge.kernels.orbit_exponentials import orbit_cross, orbit_variance

DOUBLE = torch.float64


def problem():
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": DOUBLE}
    Z, orbits = torch.randn(4, 3, **options), torch.randn(5, 6, 3, **options)
    weights = torch.randn(6, **options)
    return [t.requires_grad_() for t in (Z, orbits, weights)]


@pytest.mark.parametrize("block", [1, 13, 40, 2**19])
def test_both_averages_are_their_loops(block, monkeypatch):
    monkeypatch.setattr(orbit_exponentials, "_CACHED", block)
    Z, orbits, weights = problem()
    cross, variance = orbit_cross(Z, orbits, weights), orbit_variance(orbits, weights)
    for n in range(5):
        for z in range(4):
            k = torch.exp(-0.5 * (orbits[n] - Z[z]).square().sum(-1))
            assert torch.isclose(cross[z, n], (weights * k).sum(), rtol=1e-12)
        pairs = (orbits[n][:, None] - orbits[n]).square().sum(-1)
        expected = weights @ torch.exp(-0.5 * pairs) @ weights
        assert torch.isclose(variance[n], expected, rtol=1e-12)


@pytest.mark.parametrize("block", [13, 40, 2**19])
def test_derivatives_are_finite_differences(block, monkeypatch):
    monkeypatch.setattr(orbit_exponentials, "_CACHED", block)
    Z, orbits, weights = problem()
    assert torch.autograd.gradcheck(orbit_cross, (Z, orbits, weights))
    assert torch.autograd.gradcheck(orbit_variance, (orbits, weights))


def test_a_point_on_the_orbit_has_correlation_one_at_most():
    x = 5 + torch.rand(30, 1, 20)  # distances of zero are rounded to either side
    found = orbit_cross(x[:, 0], x, torch.ones(1))
    assert (found <= 1).all() and found.diagonal().min() > 0.999


@pytest.mark.parametrize("located", [False, True])
@pytest.mark.parametrize("ard", [None, 4])
def test_a_convolutional_kernel_uses_them_for_its_variance(located, ard):
    """Against its full matrix, gradients of every hyperparameter included."""
    place = RBFKernel() if located else None
    base = RBFKernel(ard_num_dims=ard)
    if ard:
        base.lengthscale = torch.tensor([[0.5, 0.8, 1.1, 1.4]])
    kernel = ConvolutionalKernel(base, (4, 4), (2, 2), location_kernel=place).double()
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(9, generator=generator, dtype=DOUBLE)
    kernel.augmentation.patch_weights.data = weights
    x = torch.rand(3, 16, generator=generator, dtype=DOUBLE)
    parameters = list(kernel.parameters())
    results = []
    for values in (kernel(x, diag=True), kernel(x).to_dense().diagonal()):
        gradients = torch.autograd.grad(values.square().sum(), parameters)
        results.append([values, *gradients])
    assert len(parameters) == 2 + located
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
