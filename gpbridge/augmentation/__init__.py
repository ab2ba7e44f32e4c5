"""Augmentations: learnable distributions over transformations of the inputs."""

from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.augmentation.images import AffineAugmentation2d
from gpbridge.augmentation.vectors import Rotation2d

__all__ = [
    "AffineAugmentation2d",
    "Augmentation",
    "DifferenceLaw",
    "Rotation2d",
]
