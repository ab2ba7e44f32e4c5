"""Affine warps of images: exact where pixels meet pixels, honest about aspect."""

import math

import pytest
import torch
from torch import nn

from gpbridge.augmentation import (
    AffineAugmentation2d,
)
from gpbridge.checks import ShapeError

COS, SIN = math.cos(0.3), math.sin(0.3)
COSH, SINH = math.cosh(0.3), math.sinh(0.3)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def one_map(image_shape, name, value, **options):
    """An augmentation with a single warp, of a given amount."""
    options = {"caps": {name: max(1.0, 2 * value)}} | options
    if name == "rotation":
        options.pop("caps")
    augmentation = AffineAugmentation2d(
        image_shape, [name], num_samples=1, init=value, **options
    ).double()
    augmentation.noise.fill_(1.0)
    return augmentation


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_quarter_turn_moves_pixels_to_pixels(generator, interpolation):
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=generator)
    turn = one_map((2, 6, 6), "rotation", math.pi / 2, interpolation=interpolation)
    expected = images.rot90(1, (-2, -1)).flatten(1)
    found = turn(images.flatten(1))[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, axis", [("tx", -1), ("ty", -2)])
def test_a_shift_moves_pixels_to_pixels(generator, name, axis):
    images = torch.randn(2, 1, 4, 8, dtype=torch.float64, generator=generator)
    one_pixel = 2 / images.shape[axis]  # in halves of a side
    found = one_map((4, 8), name, one_pixel)(images.flatten(1)).reshape(2, 1, 4, 8)
    n = images.shape[axis]
    kept = found.narrow(axis, 0, n - 1)
    torch.testing.assert_close(kept, images.narrow(axis, 1, n - 1), rtol=0, atol=1e-5)
    assert found.select(axis, n - 1).abs().max() < 1e-5  # zeros came in


@pytest.mark.parametrize(
    "name, expected",
    [
        ("scale", [[math.exp(0.3), 0, 0], [0, math.exp(0.3), 0]]),
        ("xscale", [[math.exp(0.3), 0, 0], [0, 1, 0]]),
        ("yscale", [[1, 0, 0], [0, math.exp(0.3), 0]]),
        ("shear", [[COSH, SINH, 0], [SINH, COSH, 0]]),
        ("rotation", [[COS, -SIN, 0], [SIN, COS, 0]]),
        ("tx", [[1, 0, 0.3], [0, 1, 0]]),
        ("ty", [[1, 0, 0], [0, 1, 0.3]]),
    ],
)  # fmt: skip
def test_each_generator_has_its_exponential(name, expected):
    augmentation = one_map((5, 5), name, 0.3)
    found = augmentation.matrices(torch.zeros(1, 25, dtype=torch.float64))[0]
    torch.testing.assert_close(
        found, torch.tensor(expected).double(), atol=1e-6, rtol=0
    )


def test_a_square_stays_a_square_in_an_image_that_is_not():
    image = torch.zeros(1, 21, 63, dtype=torch.float64)
    image[0, 8:13, 29:34] = 1
    turned = one_map((21, 63), "rotation", math.pi / 4)(image.flatten(1)).reshape(
        21, 63
    )
    rows = (turned > 0.5).any(1).sum().item()
    columns = (turned > 0.5).any(0).sum().item()
    assert (rows, columns) == (7, 7)  # 5 times the root of 2; 5 x 13 without aspect


def test_bicubic_warps_keep_the_norm_better_than_bilinear_ones(generator):
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    images = torch.randn(20, 1, 16, 16, dtype=torch.float64, generator=generator)
    smooth = nn.functional.conv2d(images, (kernel[:, None] * kernel)[None, None])
    padded = nn.functional.pad(smooth, [5] * 4).flatten(1)
    shares = {}
    for mode in ("bicubic", "bilinear"):
        turn = one_map((24, 24), "rotation", math.pi / 12, interpolation=mode)
        shares[mode] = (turn(padded).norm() / padded.norm()).item()
    assert shares["bilinear"] < 0.93 < 0.96 < shares["bicubic"] < 1.0


def test_padding_keeps_what_would_leave_the_frame(generator):
    images = torch.rand(3, 64, dtype=torch.float64, generator=generator)
    turn = one_map((8, 8), "rotation", math.pi / 4, padding=2)
    assert turn.output_shape == (1, 12, 12)
    plain = one_map((8, 8), "rotation", math.pi / 4)
    mass = turn(images).sum() / images.sum()
    assert mass.item() == pytest.approx(1.0, abs=0.01)
    assert plain(images).sum() / images.sum() < 0.95


def test_gradients_of_all_bounds_are_right_and_not_zero(generator):
    augmentation = AffineAugmentation2d((7, 5), num_samples=5).double()
    x = torch.randn(3, 35, dtype=torch.float64, generator=generator)
    target = torch.randn(3, 5, 35, dtype=torch.float64, generator=generator)

    def loss(raw):
        return torch.func.functional_call(
            augmentation, {"raw_bound": raw}, (x,)
        ).mul(target).sum()  # fmt: skip

    raw = augmentation.raw_bound.detach()
    gradient = torch.func.grad(loss)(raw)
    steps = 1e-6 * torch.eye(6, dtype=torch.float64)
    numeric = torch.stack([(loss(raw + h) - loss(raw - h)) / 2e-6 for h in steps])
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-7)
    assert gradient.abs().min() > 1e-3


def test_starts_and_caps_by_name():
    augmentation = AffineAugmentation2d(
        (4, 4), ["tx", "rotation"], init={"rotation": 0.3}, caps={"tx": 0.5}
    )
    torch.testing.assert_close(augmentation.bound, torch.tensor([0.05, 0.3]))
    torch.testing.assert_close(augmentation.cap, torch.tensor([0.5, math.pi]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(image_shape=16), ShapeError, "image_shape must be .* but is 16"),
        (dict(image_shape=(1, 2, 3, 4)), ShapeError, "do not say how they are laid"),
        (dict(generators=["turn"]), ValueError, "generators must be one of 'rotation'"),
        (dict(generators=["tx", "tx"]), ValueError, "different names"),
        (dict(generators=[]), ValueError, "at least one"),
        (dict(caps={"rotation": 6.3}), ValueError, "at most pi"),
        (dict(caps={"turn": 1.0}), ValueError, r"caps must name gen.*\('turn',\)"),
        (
            dict(generators=["rotation"], init={"tx": 0.3}),
            ValueError,
            r"init must name generators of this augmentation, \('rotation',\), but "
            r"names \('tx',\). Add them",
        ),
        (dict(init=1.5), ValueError, "bound must lie above zero"),
        (dict(interpolation="cubic"), ValueError, "interpolation must be one of"),
        (dict(padding_mode="circular"), ValueError, "padding_mode must be one of"),
        (dict(padding=-1), ValueError, "padding must be a number of pixels"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AffineAugmentation2d(**{"image_shape": (4, 4)} | arguments)


def test_images_of_another_size_are_refused():
    message = r"shape \(1, 4, 5\) have 20 columns, but x has 16 .*Flatten"
    with pytest.raises(ShapeError, match=message):
        AffineAugmentation2d((4, 5))(torch.zeros(2, 16))
