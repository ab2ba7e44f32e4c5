"""Rotations of a plane and noise on inputs, against their definitions."""

import math

import pytest
import torch

from gpbridge.augmentation import (
    GaussianInputNoise,
    Rotation2d,
)
from gpbridge.checks import ShapeError
from tests import oracles_architecture as oracles


@pytest.fixture
def X():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, dtype=torch.float64, generator=generator)


def test_rotation_turns_each_point(X):
    augmentation = Rotation2d(3, init=1.2).double()
    angles = augmentation.bound * torch.tensor([-2 / 3, 0.0, 2 / 3]).double()
    expected = torch.stack(
        [torch.stack([oracles.rotated(x, angle) for angle in angles]) for x in X]
    )
    torch.testing.assert_close(augmentation(X), expected, rtol=1e-6, atol=1e-7)


def test_other_columns_stay_as_they_are(X):
    wide = torch.cat([X[:, 1:], torch.arange(5.0)[:, None].double(), X[:, :1]], -1)
    orbits = Rotation2d(3, columns=(2, 0)).double()(wide)
    expected = Rotation2d(3).double()(X)
    torch.testing.assert_close(orbits[..., [2, 0]], expected)
    assert torch.equal(orbits[..., 1], wide[:, 1:2].expand(5, 3))


def test_differences_of_angles_on_a_grid_have_a_triangular_law(X):
    augmentation = Rotation2d(4, init=0.7).double()
    law = augmentation.difference_law()
    u = augmentation.noise[:, 0]
    angles = augmentation.bound * (u[None] - u[:, None]).flatten()
    expected = torch.stack([oracles.rotated(X[0], a) for a in angles]).mean(0)
    found = (law.weights[:, None] * law.orbit(X)[0]).sum(0)
    torch.testing.assert_close(found, expected)
    assert len(law.weights) == 7 and law.weights.sum() == pytest.approx(1, abs=1e-15)
    assert Rotation2d(4, sampling="qmc").difference_law() is None


def test_noise_is_normal_with_the_variance_that_was_asked():
    augmentation = GaussianInputNoise(2, 1024, init=0.25).double()
    orbit = augmentation(torch.zeros(1, 2, dtype=torch.float64))[0]
    torch.testing.assert_close(
        orbit.mean(0), torch.zeros(2).double(), atol=5e-3, rtol=0
    )
    expected = 0.25 * torch.eye(2).double()
    torch.testing.assert_close(orbit.mT @ orbit / 1024, expected, atol=5e-3, rtol=0)
    augmentation.variance = 0.5
    assert augmentation.variance.item() == pytest.approx(0.5)


def test_gauss_hermite_nodes_integrate_polynomials():
    augmentation = GaussianInputNoise(2, 25, init=1.0, sampling="gauss").double()
    u = augmentation(torch.zeros(1, 2).double())[0]
    values = torch.stack([u[:, 0] ** 2, u[:, 0] ** 4 * u[:, 1] ** 6, u[:, 1] ** 3], -1)
    expected = torch.tensor([1.0, 45.0, 0.0]).double()  # 3 * 15
    torch.testing.assert_close(
        augmentation.average(values), expected, atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: Rotation2d(cap=3.2), ValueError, "at most pi = 3.141593, but is 3.2"),
        (lambda: Rotation2d(columns=(1, 1)), ValueError, "two different numbers"),
        (lambda: Rotation2d()(torch.zeros(4, 3)), ShapeError, "two columns, but x has"),
        (
            lambda: Rotation2d(columns=(0, 4))(torch.zeros(4, 3)),
            ShapeError,
            r"needs columns \(0, 4\), but x has 3",
        ),
        (lambda: GaussianInputNoise(2, init=0.0), ValueError, "init must be positive"),
        (
            lambda: GaussianInputNoise(2, 8, sampling="gauss"),
            ValueError,
            r"must be q\*\*2 for .* as 9, but is 8",
        ),
        (
            lambda: GaussianInputNoise(2)(torch.zeros(4, 3)),
            ShapeError,
            "The noise has 2 columns, but x has 3",
        ),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_full_circle_of_angles_is_an_invariant_orbit(X):
    augmentation = Rotation2d(6, init=3.0).double()
    augmentation.raw_bound.data.fill_(50.0)  # the cap, to rounding
    sums = augmentation(X).square().prod(-1).sum(-1)
    law = math.pi / 3  # one step of the grid
    c, s = math.cos(law), math.sin(law)
    rotation = torch.tensor([[c, -s], [s, c]]).double()
    moved = augmentation(X @ rotation.mT).square().prod(-1).sum(-1)
    torch.testing.assert_close(sums, moved, rtol=1e-5, atol=1e-6)
