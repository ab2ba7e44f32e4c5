"""Patches of images: windows, their places and their weights."""

import pytest
import torch

from gpbridge.augmentation import (
    PatchAugmentation,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_windows_with_their_places(generator, stride):
    images = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    patches = PatchAugmentation((3, 5, 4), (2, 3), locations=True, stride=stride)
    orbits = patches.double()(images.flatten(1))
    p = 0
    for row in range(0, 4, stride):
        for column in range(0, 2, stride):
            window = images[:, :, row : row + 2, column : column + 3].flatten(1)
            assert torch.equal(orbits[:, p, :-2], window)
            assert orbits[:, p, -2:].tolist() == [[row, column]] * 2
            p += 1
    assert p == patches.num_samples == len(patches.weights)


def test_a_mean_of_patches_is_a_convolution_with_the_weights_of_places(generator):
    images = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=generator)
    filters = torch.randn(1, 2, 2, 3, dtype=torch.float64, generator=generator)
    patches = PatchAugmentation((2, 5, 4), (2, 3)).double()
    weights = torch.randn(8, dtype=torch.float64, generator=generator)
    patches.patch_weights.data = weights
    responses = torch.nn.functional.conv2d(images, filters).flatten(1)  # 3 x 8
    found = patches.average(patches(images.flatten(1)) @ filters.flatten(), dim=-1)
    torch.testing.assert_close(found, responses @ weights / 8)
    alike = PatchAugmentation((2, 5, 4), (2, 3), weights=False).double()
    assert alike.weights is None and not list(alike.parameters())
    found = alike.average(alike(images.flatten(1)) @ filters.flatten(), dim=-1)
    torch.testing.assert_close(found, responses.mean(-1))
