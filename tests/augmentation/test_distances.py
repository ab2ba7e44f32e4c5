"""The median distance of transformed inputs."""

import pytest
import torch

from gpbridge.augmentation import (
    FiniteOrbit,
    PatchAugmentation,
    median_orbit_distance,
)


def test_the_median_distance_is_that_of_the_orbits():
    X = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    orbits = FiniteOrbit.permutations(2)(X).flatten(0, 1)
    expected = torch.pdist(orbits).median()
    assert median_orbit_distance(FiniteOrbit.permutations(2), X) == expected
    images = torch.rand(30, 36, generator=torch.Generator().manual_seed(0))
    all_patches = PatchAugmentation((6, 6), (3, 3))(images).flatten(0, 1)
    found = median_orbit_distance(PatchAugmentation((6, 6), (3, 3)), images, 100)
    expected = torch.pdist(all_patches).median()
    assert found.item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("X", [torch.zeros(5, 2), torch.zeros(1, 2), torch.ones(1, 2)])
def test_inputs_that_are_alike_have_no_median_distance(X):
    message = "that were compared are all alike, of .* Set the lengthscale by hand"
    with pytest.raises(ValueError, match=message):
        median_orbit_distance(FiniteOrbit.permutations(2), X)
