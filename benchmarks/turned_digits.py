"""Images of digits, each turned by a random angle, and the law of rotations of them.

In: scikit-learn's digits or MNIST. Out: flat images, targets and labels.
``quality_invariant_gp.py`` learns from them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F

from gpbridge.augmentation import AffineAugmentation2d
from gpbridge.data import load_images

CLASSES = 10


class Images(NamedTuple):
    """Flat images, targets ``n x 10`` and labels; the same for tests."""

    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_y: Tensor


def turned(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Images ``n x h x w``, each by an angle of its own, bicubic."""
    angle = torch.rand(len(images), generator=generator, dtype=torch.float64)
    angle = ((2 * angle - 1) * math.radians(degrees)).to(images)
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([c, -s, zero, s, c, zero], -1).reshape(-1, 2, 3)
    images = images[:, None]
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)[:, 0]


def targets(labels: Tensor) -> Tensor:
    """1.8 in the column of the label, -0.2 in the other nine."""
    return 2 * F.one_hot(labels, CLASSES).double() - 0.2


def digits(degrees: float, n: int, num_test: int, seed: int) -> Images:
    """Turned digits in frames of 12 x 12."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = F.pad(torch.tensor(pixels).reshape(-1, 8, 8) / 16, 4 * (2,))
    labels = torch.tensor(labels)
    generator = Generator().manual_seed(seed)
    rows = torch.randperm(len(pixels), generator=generator)[: n + num_test]
    X, y = turned(pixels[rows], degrees, generator).flatten(1), labels[rows]
    return Images(X[:n], targets(y[:n]), X[n:], y[n:])


def mnist(path: Path, n: int, num_test: int, seed: int) -> Images:
    """Images of 14 x 14 pixels, turned by up to 90 degrees; the last rows test."""
    X, y, test_X, test_y = load_images(path, "mnist")
    test_X, test_y = test_X[-num_test:], test_y[-num_test:]
    generator = Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[:n]
    parts = [
        F.avg_pool2d(turned(pixels.reshape(-1, 28, 28), 90.0, generator), 2).flatten(1)
        for pixels in (X[rows].float(), test_X.float())
    ]
    return Images(parts[0].double(), targets(y[rows]), parts[1].double(), test_y)


def rotation(side: int, num_samples: int, degrees: float) -> AffineAugmentation2d:
    """The law that is learnt."""
    return AffineAugmentation2d(
        (side, side), ["rotation"], num_samples, init=math.radians(degrees)
    )
