"""Orbits of rows, with noise of their own."""

import pytest
import torch

from gpbridge.augmentation import AffineAugmentation2d, Rotation2d
from gpbridge.augmentation.base import Augmentation
from gpbridge.selection.orbit_jacobians import orbits, row_noise
from tests.selection.orbit_problems import N, S, points


def test_noise_of_each_row_gives_each_row_its_own_orbit():
    X, augmentation = points(), Rotation2d(S).double()
    noise = row_noise(augmentation, N, torch.Generator().manual_seed(0))
    assert noise.shape == (N, S, 1) and noise.abs().max() <= 1
    found = orbits(augmentation, X, None, noise)
    for row in range(N):
        augmentation.noise.copy_(noise[row])
        expected = augmentation(X[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-14)


def test_noise_of_rows_is_uniform_and_evenly_spread():
    augmentation = Rotation2d(S).double()
    noise = row_noise(augmentation, 4000, torch.Generator().manual_seed(0))[..., 0]
    assert noise.mean().abs() < 0.02
    assert noise.var().item() == pytest.approx(1 / 3, rel=0.02)
    gaps = noise.sort(-1).values.diff(dim=-1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 / S))


def test_images_get_orbits_of_their_own_too():
    augmentation = AffineAugmentation2d((5, 5), num_samples=3).double()
    X = points(4, 25)
    noise = row_noise(augmentation, 4, torch.Generator().manual_seed(0))
    found = orbits(augmentation, X, None, noise)
    augmentation.noise.copy_(noise[2])
    torch.testing.assert_close(found[2], augmentation(X[2:3])[0], rtol=0, atol=1e-12)


def test_noise_that_is_not_uniform_is_not_shifted():
    with pytest.raises(NotImplementedError, match="Choose orbit='fixed'"):
        row_noise(Augmentation(3), 2, torch.Generator())
