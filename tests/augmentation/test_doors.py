"""What is no argument of an augmentation is refused by its name."""

import numpy as np
import pytest
import torch
from torch import nn

from gpbridge.augmentation import (
    AffineAugmentation2d,
    Augmentation,
    AveragedNetwork,
    FiniteOrbit,
    GaussianInputNoise,
    PatchAugmentation,
    Rotation2d,
    median_orbit_distance,
)

FLIPS = FiniteOrbit.flips((2, 2))
NETWORK = nn.Linear(4, 2)


@pytest.mark.parametrize("side", [0, -1, 1.5, True, None, "aa", (3,), (1, 2.0), 9])
def test_a_patch_has_two_sides_within_the_image(side):
    with pytest.raises(ValueError, match="patch_shape must be .height, width."):
        PatchAugmentation((4, 4), side)


def test_one_number_is_both_sides_of_a_patch():
    x = torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    patches = PatchAugmentation((5, 6), 2)
    assert patches.patch_shape == (2, 2)
    assert torch.equal(patches(x), PatchAugmentation((5, 6), (2, 2))(x))


@pytest.mark.parametrize("value", ["aa", 2, None, (2.0, 2), [], {"height": 2}])
@pytest.mark.parametrize("door", [FiniteOrbit.flips, AffineAugmentation2d])
def test_an_image_has_a_shape(value, door):
    with pytest.raises(ValueError, match="image_shape must be .height, width."):
        door(value)


@pytest.mark.parametrize("value", [0, 0.5, "01", (0,), (0, 0), (0, -1), (0, 1.0)])
def test_a_rotation_turns_two_columns(value):
    with pytest.raises(ValueError, match="columns must be two different numbers"):
        Rotation2d(columns=value)


NOISE = GaussianInputNoise
ONE = "must be one number, but is"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rotation2d(init="a"), f"init {ONE} 'a'"),
        (lambda: Rotation2d(init=torch.ones(2)), f"init {ONE} a tensor of shape"),
        (lambda: Rotation2d(cap=(1.0,)), f"cap {ONE} .1.0,."),
        (lambda: Rotation2d(cap=None), f"cap {ONE} None"),
        (lambda: Rotation2d(seed="a"), "seed must be a whole number, but is 'a'"),
        (lambda: NOISE(2, init=[]), f"init {ONE} .."),
        (lambda: Augmentation(2, "a"), "num_parameters must be a whole number"),
        (lambda: Augmentation(2, 0.5), "num_parameters must be a whole number"),
        (lambda: AffineAugmentation2d((2, 2), None), "generators must be a sequence"),
        (lambda: AffineAugmentation2d((2, 2), init=None), f"init of all {ONE} None"),
        (
            lambda: AffineAugmentation2d((2, 2), init={"tx": "a"}),
            f"init tx {ONE} 'a'",
        ),
        (lambda: AffineAugmentation2d((2, 2), caps=0.5), "caps must be upper limits"),
        (lambda: AffineAugmentation2d((2, 2), caps={"tx": ()}), f"caps tx {ONE}"),
        (lambda: FiniteOrbit(3), r"must be a sequence, but is 3. Try .*=\[3\]"),
        (lambda: FiniteOrbit(None), "elements must be a sequence, but is None"),
        (lambda: FiniteOrbit("ab"), "elements must be a sequence, but is 'ab'"),
        (lambda: FiniteOrbit([[0, 1], [0]]), "rows of one length"),
        (lambda: AveragedNetwork("a", FLIPS), "network must be a torch Module"),
        (lambda: AveragedNetwork(NETWORK, "a"), "must be a gpbridge Augmentation"),
        (lambda: AveragedNetwork(NETWORK, FLIPS, 4), "input_shape must be a shape"),
        (
            lambda: AveragedNetwork(NETWORK, FLIPS, (2,))(torch.zeros(3, 4)),
            r"shape \(2,\) have 2 columns, but those of the orbits have 4",
        ),
        (lambda: median_orbit_distance("a", torch.eye(4)), "must be a gpbridge Aug"),
        (lambda: median_orbit_distance(FLIPS, [1.0]), "X must be a torch.Tensor"),
        (lambda: median_orbit_distance(FLIPS, torch.eye(4), -1), "num_points must be"),
        (lambda: Rotation2d().resample(3), "generator must be a torch Generator"),
    ],
)
def test_other_things_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("shape", [np.array([4, 5]), torch.tensor([4, 5]), [4, 5]])
def test_a_shape_may_be_an_array(shape):
    assert FiniteOrbit.flips(shape)(torch.zeros(2, 20)).shape[-1] == 20


@pytest.mark.parametrize("shape", [np.array([4.0, 5.0]), torch.tensor(4), "45"])
def test_an_array_of_other_things_is_no_shape(shape):
    with pytest.raises(ValueError, match="image_shape must be .height, width."):
        FiniteOrbit.flips(shape)
