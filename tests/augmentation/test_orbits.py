"""Finite orbits: flips, turns and permutations are those of the definition."""

import pytest
import torch
from gpytorch.kernels import RBFKernel

from gpbridge.augmentation import (
    FiniteOrbit,
    PatchAugmentation,
)
from gpbridge.checks import ShapeError
from gpbridge.kernels import InvariantKernel


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_quarter_turns_and_flips_are_those_of_the_image(generator):
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    orbits = FiniteOrbit.quarter_turns((2, 4, 4), flips=True)(images.flatten(1))
    turned = [images.rot90(k, (-2, -1)) for k in range(4)]
    turned += [images.flip(-1).rot90(k, (-2, -1)) for k in range(4)]
    assert torch.equal(orbits, torch.stack([t.flatten(1) for t in turned], 1))
    wide = images[..., :3]
    flips = FiniteOrbit.flips((2, 4, 3), "vertical")(wide.flatten(1))
    assert torch.equal(flips[:, 1], wide.flip(-2).flatten(1))


def test_permutations_are_all_orders_of_blocks():
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    orbit = FiniteOrbit.permutations(3, block_size=2)(x)[0].tolist()
    assert (
        len(orbit) == 6 and [3, 4, 5, 6, 1, 2] in orbit and [1, 2, 5, 6, 3, 4] in orbit
    )


def test_whether_permutations_form_a_group_is_seen():
    assert FiniteOrbit.permutations(4).is_group
    assert FiniteOrbit.quarter_turns((3, 3), flips=True).is_group
    assert not FiniteOrbit([[0, 1, 2], [1, 2, 0]]).is_group
    assert FiniteOrbit([[0, 1, 2], [1, 2, 0]]).difference_law() is None
    assert FiniteOrbit([torch.neg]).difference_law() is None
    assert FiniteOrbit.permutations(4, num_samples=23).difference_law() is None
    assert (
        FiniteOrbit.permutations(4).difference_law().weights.tolist() == [1 / 24] * 24
    )


def test_some_elements_are_different_ones():
    some = FiniteOrbit.permutations(4, num_samples=10)
    for _ in range(3):
        rows = some(torch.arange(4.0)[None])[0]
        assert len(rows.unique(dim=0)) == 10
        some.resample(torch.Generator().manual_seed(some.redraws))
    assert some.orbit_size == 24


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: FiniteOrbit([[0, 2]]), ShapeError, "each row an order of 0 .. d - 1"),
        (lambda: FiniteOrbit(torch.eye(2)), ShapeError, "dtype torch.float32"),
        (lambda: FiniteOrbit([]), ValueError, "at least one transformation"),
        (lambda: FiniteOrbit([[0, 1]], 2), ValueError, "at most 1, the number of"),
        (lambda: FiniteOrbit.permutations(9), ValueError, "362880 orders, more than"),
        (lambda: FiniteOrbit.quarter_turns((3, 4)), ShapeError, "need square images"),
        (lambda: FiniteOrbit.flips((3, 4), "x"), ValueError, "axes must be one of"),
        (
            lambda: FiniteOrbit.permutations(3)(torch.zeros(2, 4)),
            ShapeError,
            "permutations are of 3 columns, but x has 4",
        ),
        (lambda: PatchAugmentation((4, 4), (5, 2)), ShapeError, r"sides are \(4, 4\)"),
        (lambda: PatchAugmentation((4, 4), (2, 2), stride=0), ValueError, "stride"),
        (
            lambda: PatchAugmentation((4, 4), (2, 2))(torch.zeros(2, 15)),
            ShapeError,
            "have 16 columns, but x has 15",
        ),
    ],
)
def test_bad_orbits_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_functions_may_change_the_number_of_columns(generator):
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    narrow = FiniteOrbit([lambda x: x[..., :2], lambda x: x[..., 1:]])
    assert narrow.output_width(3) == narrow(x).shape[-1] == 2
    assert narrow(x[:0]).shape == (0, 2, 2)
    linear = FiniteOrbit([torch.nn.Linear(3, 5).double()])
    assert linear.output_width(3) == linear(x).shape[-1] == 5
    kernel = InvariantKernel(RBFKernel(), narrow).double()
    Z = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    expected = [kernel.base_kernel(Z, part).to_dense() for part in narrow(x).unbind(1)]
    torch.testing.assert_close(kernel.base_cross(Z, x), sum(expected) / 2)
    with pytest.raises(ShapeError, match="Z must be ``... x u x 2``"):
        kernel.base_cross(x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_may_hold_tensors_of_any_precision(generator, dtype):
    turn = torch.randn(3, 2, dtype=dtype, generator=generator)
    calls = []

    def turned(x):
        calls.append(len(x))
        return x @ turn

    orbit = FiniteOrbit([turned, lambda x: x[..., :2]])
    kernel = InvariantKernel(RBFKernel(), orbit).to(dtype)
    x = torch.randn(5, 3, dtype=dtype, generator=generator)
    assert kernel(x).to_dense().dtype == dtype
    assert orbit.output_width(3) == 2
    first = len(calls)
    assert kernel.base_cross(torch.zeros(4, 2, dtype=dtype), x).shape == (4, 5)
    assert len(calls) == first + 1  # the width is known by now
