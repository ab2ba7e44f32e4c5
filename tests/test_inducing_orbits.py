"""Some elements of orbits: draws, covariances by brute force, unbiased moments."""

import itertools

import pytest
import torch
from gpytorch.kernels import ScaleKernel

from gpbridge.augmentation import AffineAugmentation2d, FiniteOrbit, Rotation2d
from gpbridge.inducing_orbits import (
    OrbitMoments,
    draw_elements,
    orbit_covariances,
    orbit_elements,
    unbiased_moments,
)
from tests import oracles_architecture as dense
from tests.inducing_problems import DOUBLE, NAMES, M, N, kernels, normal


def test_an_infinite_orbit_uses_pairs_of_different_elements_only():
    """Moments by hand for two elements: no pair of an element with itself."""
    cross, mean = 0.3, torch.tensor([[1.0, 3.0]], dtype=DOUBLE)
    variance = torch.tensor([[2.0, 5.0]], dtype=DOUBLE)
    pooled = (variance.sum(-1) + 2 * cross) / 4
    offset = torch.tensor([0.5], dtype=DOUBLE)
    moments = OrbitMoments(mean, variance, pooled, offset)
    first, second = unbiased_moments(moments, float("inf"))
    assert first.item() == pytest.approx(2.5)
    # E f^2 with f = h + 0.5, and E h^2 the mean of h_1 h_2 over pairs.
    assert second.item() == pytest.approx((cross + 3.0) + 2 * 0.5 * 2.0 + 0.25)


def test_more_elements_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="from an orbit of 6"):
        draw_elements(FiniteOrbit.permutations(3), 7)


@pytest.mark.parametrize("size", [2, 3, float("inf")])
def test_one_element_of_several_has_no_second_moment(size):
    """The average over pairs of different elements has no term."""
    one = torch.ones(N, 1, dtype=DOUBLE)
    moments = OrbitMoments(one, one, one[:, 0], one[:, 0])
    with pytest.raises(ValueError, match=f"orbit of {size} has no pairs"):
        unbiased_moments(moments, size)
    mean, second = unbiased_moments(moments, 1)
    assert torch.equal(mean, 2 * one[:, 0])  # element and offset
    assert torch.equal(second, 5 * one[:, 0])  # their square and the variance


def test_second_moments_average_to_that_of_the_whole_orbit():
    """Enumeration of pairs of a Gaussian vector with a full covariance."""
    root = normal(4, 4, seed=1)
    covariance, mean = root @ root.mT, normal(4, seed=2)
    expected = mean.mean().square() + covariance.mean()
    found = []
    for pair in itertools.combinations(range(4), 2):
        own = covariance[list(pair)][:, list(pair)]
        chosen = mean[list(pair)][None]
        moments = OrbitMoments(
            chosen, own.diagonal()[None], own.mean()[None], torch.zeros(1, dtype=DOUBLE)
        )
        found.append(unbiased_moments(moments, 4)[1])
    assert torch.stack(found).std() > 0.1
    assert (torch.stack(found).mean() - expected).abs() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_covariances_of_elements_are_those_of_the_base_kernel(name):
    kernel, d, width = kernels(name)
    Z, x = normal(M, width, seed=1), normal(N, d, seed=2)
    scaled = ScaleKernel(kernel).double()
    scaled.outputscale = torch.tensor(2.5, dtype=DOUBLE)
    elements = draw_elements(kernel.augmentation, 3, torch.Generator().manual_seed(0))
    cross, own = orbit_covariances(scaled, Z, x, elements)
    orbits = orbit_elements(kernel.augmentation, x, elements)
    assert orbits.shape == (N, 3, width)
    weights = kernel.augmentation.weights
    if weights is None or elements.is_floating_point():
        weights = torch.ones(3, dtype=DOUBLE)
    else:
        weights = weights[elements]
    for row, orbit in enumerate(orbits):
        single = dense.squared_exponential_gram(Z, orbit, 1.5) * weights
        pairs = dense.squared_exponential_gram(orbit, orbit, 1.5)
        pairs = pairs * weights * weights[:, None]
        assert (cross[:, row] - 2.5 * single).abs().max() < 1e-12
        assert (own[row] - 2.5 * pairs).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["convolutional", "turns"])
def test_all_elements_are_the_orbit(name):
    kernel, d, _ = kernels(name)
    x = normal(N, d, seed=2)
    everything = torch.arange(kernel.augmentation.orbit_size)
    found = orbit_elements(kernel.augmentation, x, everything)
    assert torch.equal(found, kernel.augmentation(x))


@pytest.mark.parametrize("count", [2, 7])
def test_a_continuous_law_gives_another_number_of_elements_than_its_own(count):
    for law, d in (
        (Rotation2d(4), 2),
        (AffineAugmentation2d((1, 5, 5), num_samples=4), 25),
    ):
        elements = draw_elements(law, count, torch.Generator().manual_seed(0))
        found = orbit_elements(law, torch.rand(N, d), elements)
        assert found.shape == (N, count, d)
        first, second = (
            draw_elements(law, count, torch.Generator().manual_seed(s)) for s in (0, 1)
        )
        assert torch.equal(first, elements) and not torch.equal(second, elements)
