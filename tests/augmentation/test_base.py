"""Base noise: shared, frozen, redrawn on request; parameters between zero and a cap."""

import copy
import math
import pickle

import pytest
import torch

from gpbridge.augmentation import (
    AffineAugmentation2d,
    Augmentation,
    FiniteOrbit,
    GaussianInputNoise,
    PatchAugmentation,
    Rotation2d,
)
from gpbridge.checks import ShapeError

IMAGE = (2, 4, 5)
CASES = {
    "rotation": (lambda: Rotation2d(6), 2),
    "three of five columns": (lambda: Rotation2d(6, columns=(3, 1)), 5),
    "sobol": (lambda: Rotation2d(6, sampling="qmc"), 2),
    "independent": (lambda: Rotation2d(6, sampling="fixed"), 2),
    "affine": (lambda: AffineAugmentation2d(IMAGE, num_samples=6), 40),
    "padded": (lambda: AffineAugmentation2d(IMAGE, num_samples=6, padding=1), 40),
    "flips": (lambda: FiniteOrbit.flips(IMAGE, "both"), 40),
    "some permutations": (lambda: FiniteOrbit.permutations(4, num_samples=6), 4),
    "functions": (lambda: FiniteOrbit([torch.neg, torch.abs]), 3),
    "patches": (lambda: PatchAugmentation(IMAGE, (2, 3), locations=True), 40),
    "noise": (lambda: GaussianInputNoise(3, 6), 3),
    "quadrature": (lambda: GaussianInputNoise(2, 9, sampling="gauss"), 2),
}
REDRAWN = "rotation sobol independent affine padded noise".split()
REDRAWN += ["three of five columns", "some permutations"]


@pytest.fixture(params=CASES)
def case(request):
    build, width = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, width, dtype=torch.float64, generator=generator)
    return build().double(), x


def test_orbits_have_one_more_axis_and_the_dtype_of_the_inputs(case):
    augmentation, x = case
    s, width = augmentation.num_samples, augmentation.output_width(x.shape[-1])
    assert augmentation(x).shape == (3, 4, s, width)
    assert augmentation(x).dtype == torch.float64
    assert augmentation(x.float()).dtype == torch.float32
    assert augmentation(x[0, :1]).shape == (1, s, width)
    assert augmentation(x[0, :0]).shape == (0, s, width)


def test_a_batch_is_a_loop_and_rows_share_their_transformations(case):
    augmentation, x = case
    one_by_one = torch.stack([augmentation(row[None])[0] for row in x.flatten(0, 1)])
    orbits = augmentation(x).flatten(0, 1)
    torch.testing.assert_close(orbits, one_by_one, rtol=1e-12, atol=1e-12)
    same = x[:1, :1].expand_as(x)
    orbits = augmentation(same)
    torch.testing.assert_close(orbits, orbits[:1, :1].expand_as(orbits))


def test_state_pickle_and_copy_give_the_same_orbits(case):
    augmentation, x = case
    for p in augmentation.parameters():
        p.data += 0.3
    augmentation.resample(torch.Generator().manual_seed(5))
    expected = augmentation(x)
    others = [copy.deepcopy(augmentation)]
    if not getattr(augmentation, "functions", None):
        others.append(pickle.loads(pickle.dumps(augmentation)))
    for other in others:
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_holds_what_a_new_object_lacks(name):
    build, width = CASES[name]
    first, second = build(), build()
    first.resample(torch.Generator().manual_seed(5))
    for p in first.parameters():
        p.data += 0.3
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", CASES)
def test_orbits_stay_until_they_are_redrawn(name):
    build, width = CASES[name]
    augmentation = build()
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    before = augmentation(x)
    assert torch.equal(build()(x), before)
    assert torch.equal(augmentation(x), before)
    state = torch.get_rng_state()
    augmentation.resample(torch.Generator().manual_seed(1))
    augmentation.resample()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augmentation(x), before) == (name not in REDRAWN)
    assert augmentation.redraws == 2 * (name in REDRAWN)
    augmentation.resample(torch.Generator().manual_seed(1))
    again = augmentation(x)
    augmentation.resample(torch.Generator().manual_seed(1))
    assert torch.equal(augmentation(x), again)


def test_an_orbit_is_not_redrawn_in_eval_mode():
    augmentation = Rotation2d(4).eval()
    with pytest.raises(RuntimeError, match=r"redrawn in eval mode.*Call train\(\)"):
        augmentation.resample()
    assert augmentation.redraws == 0


@pytest.mark.parametrize("sampling", ["grid", "qmc", "fixed"])
def test_base_noise_is_uniform(sampling):
    augmentation = Rotation2d(512, sampling=sampling)
    for _ in range(3):
        noise = augmentation.noise[:, 0].double().sort().values
        expected = 2 * (torch.arange(512, dtype=torch.float64) + 0.5) / 512 - 1
        # The largest distance of distribution functions, at the 1 in 1000 level.
        bound = 1.95 / 512**0.5 if sampling == "fixed" else 0.01
        assert (noise - expected).abs().max() / 2 < bound
        augmentation.resample(torch.Generator().manual_seed(augmentation.redraws))


def test_a_grid_is_the_midpoints_of_cells():
    noise = Rotation2d(4).noise[:, 0]
    torch.testing.assert_close(noise, torch.tensor([-0.75, -0.25, 0.25, 0.75]).double())


def test_bounds_stay_below_their_cap_and_start_where_asked():
    augmentation = Rotation2d(4, init=0.3, cap=1.0).double()
    assert augmentation.bound.item() == pytest.approx(0.3, abs=1e-7)
    augmentation.bound = 0.9
    assert augmentation.bound.item() == pytest.approx(0.9, abs=1e-12)
    augmentation.raw_bound.data.fill_(3.0)
    value = augmentation.bound
    assert value.item() == pytest.approx(1 / (1 + math.exp(-3.0)), abs=1e-6)
    value.sum().backward()
    assert augmentation.raw_bound.grad.item() > 0.01


def test_the_weighted_mean_of_values():
    augmentation = PatchAugmentation((3, 3), (2, 2)).double()
    augmentation.patch_weights.data = torch.tensor([1.0, 2.0, 3.0, -1.0]).double()
    values = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    expected = torch.tensor([(0 + 4 + 12 - 6) / 4, (1 + 6 + 15 - 7) / 4]).double()
    torch.testing.assert_close(augmentation.average(values), expected)
    assert augmentation.coefficients(values).tolist() == [0.25, 0.5, 0.75, -0.25]
    flips = FiniteOrbit.flips((2, 1))
    torch.testing.assert_close(flips.average(values[:2]), values[:2].mean(0))


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: Rotation2d(0), ValueError, "num_samples must be a whole number"),
        (lambda: Rotation2d(sampling="sobol"), ValueError, "sampling must be one of"),
        (lambda: Augmentation(4, 2, "grid"), ValueError, "A grid is for one random"),
        (lambda: Rotation2d(init=0.0), ValueError, "no gradient; start with"),
        (lambda: Rotation2d(init=4.0), ValueError, "below 3.14159.*but is 4.0"),
        (lambda: Rotation2d(cap=0.0), ValueError, "cap must be positive"),
        (lambda: Rotation2d()(torch.zeros(2)), ShapeError, r"one point try x\[None\]"),
        (lambda: Rotation2d()([[1.0, 2.0]]), TypeError, "x must be a torch.Tensor"),
        (lambda: Rotation2d()(torch.ones(1, 2).int()), TypeError, "float32 or float64"),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
